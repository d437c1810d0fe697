"""Mean IoU of a network, from windows that slide over images of several scales, flipped and not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from bench.train.recipe import IGNORED

Network = Callable[[Tensor], Tensor]  # images [B, 3, H, W] -> logits [B, classes, H, W]


def window_starts(length: int, window: int) -> list[int]:
    """Where windows begin that cover a length in steps of 2/3 of a window; the last one ends where the length does."""
    last = max(length - window, 0)
    return [*range(0, last, max(1, 2 * window // 3)), last]


def strips(
    network: Network, x: Tensor, window: tuple[int, int], prepare: Callable[[Tensor], Tensor] = lambda x: x
) -> Iterator[Tensor]:
    """Logits of an image x [1, 3, H, W] from top to bottom: strips [1, classes, h', W] that H is the sum of.

    A pixel's are the mean over all windows that it lies in; a strip is done when no later window reaches it, so that no
    more is held than a window's height of the whole width. An image smaller than the window is padded with zeros on its
    right and below.

    Args:
        network: windows -> logits.
        x: the image.
        window: (h, w) of what the network sees at once.
        prepare: what is done to a window before it is padded: an image of bytes becomes one of numbers.
    """
    (H, W), (h, w) = x.shape[2:], window
    tops, lefts = window_starts(H, h), window_starts(W, w)
    total, count = x.new_zeros(1, 0, 0, max(W, w)), x.new_zeros(1, 1, 0, max(W, w))  # no row, of no class yet
    for top, following in zip(tops, [*tops[1:], max(H, h)], strict=True):
        for left in lefts:
            part = prepare(x[..., top : top + h, left : left + w])
            logits = network(F.pad(part, (0, w - part.shape[3], 0, h - part.shape[2]))).float()
            if left == 0:
                total, count = _grown(total, logits, h), _grown(count, logits[:, :1], h)
            total[..., left : left + w] += logits
            count[..., left : left + w] += 1
        done = following - top
        yield (total[:, :, :done] / count[:, :, :done])[:, :, : H - top, :W]
        total, count = total[:, :, done:], count[:, :, done:]


def _grown(rows: Tensor, like: Tensor, height: int) -> Tensor:
    """Rows with further ones of zeros below them."""
    fresh = like.new_zeros(1, like.shape[1], height - rows.shape[2], rows.shape[3])
    return torch.cat([rows, fresh], 2) if rows.shape[2] else fresh


def slide(network: Network, x: Tensor, window: tuple[int, int]) -> Tensor:
    """Logits [1, classes, H, W] of an image x [1, 3, H, W], all `strips` of it."""
    return torch.cat(list(strips(network, x, window)), 2)


def probabilities(
    network: Network, x: Tensor, window: tuple[int, int], scales: Sequence[float] = (1.0,), mirror: Tensor | None = None
) -> Tensor:
    """Class probabilities [1, classes, H, W] of an image x [1, 3, H, W]: the mean over scales and flips.

    Args:
        network: images -> logits.
        x: the image.
        window: (h, w) of what the network sees at once.
        scales: of the image's sides.
        mirror: the class that every class becomes in a mirror, [classes]; None: the image is not flipped.
    """
    size, total, n = x.shape[2:], x.new_zeros(()), 0
    for scale in scales:
        scaled = x if scale == 1 else F.interpolate(x, [max(1, round(scale * s)) for s in size], mode="bilinear")
        for flipped in (False,) if mirror is None else (False, True):
            logits = slide(network, scaled.flip(3) if flipped else scaled, window)
            if flipped:
                logits = logits.flip(3)[:, mirror]
            total, n = total + F.interpolate(logits, size, mode="bilinear").softmax(1), n + 1
    return total / n


def intersection_over_union(
    predicted: Iterable[tuple[Tensor, Tensor]], num_classes: int, device: torch.device
) -> tuple[list[float | None], float]:
    """IoU of every class over all pixels of all images, and its mean over the classes that occur.

    Args:
        predicted: predictions [H, W] and labels [H, W]; under torchrun those of this process, and the result is that
            of all.
        num_classes: of both; pixels whose label is `IGNORED` do not count.
        device: where they are.

    Returns:
        A value a class, None where neither predictions nor labels have it; and the mean.
    """
    confusion = MulticlassConfusionMatrix(num_classes, ignore_index=IGNORED).to(device)
    for prediction, label in predicted:
        confusion.update(prediction, label)
    pixels = confusion.compute().cpu().double()  # [label, prediction]
    intersection, union = pixels.diag(), pixels.sum(0) + pixels.sum(1) - pixels.diag()
    ious = intersection / union  # nan where a class does not occur
    return [None if math.isnan(iou) else iou for iou in ious.tolist()], float(ious.nanmean())
