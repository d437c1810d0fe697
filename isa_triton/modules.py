"""Layers that project and compose: one attention stage, the two-stage ISA, the ISA module and the head.

Feature maps are [B, C, H, W]. NCHW and channels_last inputs are both read as they lie; everything in between is
channels_last, so that the attention's [B, H, W, heads, width] tensors are views of the projections' outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .functional import BACKENDS, partitioned_attention
from .partition import Partition

_PATTERNS: dict[str, Callable[[tuple[int, int], tuple[int, int]], Partition]] = {
    "interlaced": lambda size, partition_size: Partition.interlaced(size, stride=partition_size),
    "local": lambda size, partition_size: Partition.local(size, window=partition_size),
    "rows": lambda size, partition_size: Partition.rows(size),
    "columns": lambda size, partition_size: Partition.columns(size),
    "dense": lambda size, partition_size: Partition.dense(size),
}
_PARTITIONED = ("interlaced", "local")  # the patterns that a partition size shapes


class Conv1x1(nn.Conv2d):
    """A 1x1 convolution as a GEMM over pixels, of one input or of several that stand for their concatenation.

    [B, C_i, H, W], ... -> [B, out_channels, H, W], channels_last. The parameters are those of `nn.Conv2d`.
    """

    def __init__(self, in_channels: int, out_channels: int, bias: bool = False) -> None:
        super().__init__(in_channels, out_channels, kernel_size=1, bias=bias)

    def forward(self, *inputs: Tensor) -> Tensor:
        size = inputs[0].shape[2:]
        weights = self.weight.flatten(1).split([x.shape[1] for x in inputs], dim=1)  # [out, C_i]
        y = None
        for x, weight in zip(inputs, weights, strict=True):
            pixels = x.permute(0, 2, 3, 1).flatten(1, 2)  # [B, H W, C_i], NCHW or channels_last
            weight = weight.mT.expand(len(x), -1, -1)  # a batched GEMM takes NCHW transposed; folding B would copy it
            y = torch.bmm(pixels, weight) if y is None else torch.baddbmm(y, pixels, weight)
        assert y is not None
        if self.bias is not None:
            y = y + self.bias
        return y.unflatten(1, size).permute(0, 3, 1, 2)


class ConvNormReLU(nn.Sequential):
    """Convolution without bias, batch normalisation, ReLU."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU(inplace=True)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.relu(self.norm(self.conv(*inputs)))


class SelfAttention2d(nn.Module):
    """One attention stage over a partition of the map: projections, attention, output projection.

    The paper's stage (arXiv 1907.12273, section 3.1; the authors' SelfAttentionBlock2D): key and query are two
    conv1x1 + BN + ReLU each, value is one conv1x1, scores are scaled by ``key_channels ** -0.5``, one head, and the
    output is conv1x1 + BN + ReLU.

    Args:
        in_channels, key_channels, value_channels: widths.
        out_channels: width of the result; default in_channels.
        pattern: "interlaced" (long range), "local" (short range), "rows", "columns" or "dense".
        partition_size: (P_h, P_w), the interval of interlaced groups or the size of local windows.
        padding: for maps that P does not divide. "zeros" pads the input, centred, to a multiple of P and crops the
            result; padded pixels are keys and enter batch statistics, as in every published model. "mask" attends the
            real pixels only, with P clamped to the map.
        backend: of `partitioned_attention`; an attribute too, that may be set at any time.

    x [B, in_channels, H, W] -> [B, out_channels, H, W], channels_last.

    Raises:
        ValueError: an unknown pattern, padding or backend; a width or partition size below 1; x of another shape.

    >>> layer = SelfAttention2d(64, 32, 64, pattern="interlaced", partition_size=(4, 4))
    >>> layer(torch.randn(2, 64, 12, 20)).shape
    torch.Size([2, 64, 12, 20])
    """

    def __init__(
        self,
        in_channels: int,
        key_channels: int,
        value_channels: int,
        out_channels: int | None = None,
        *,
        pattern: str,
        partition_size: tuple[int, int] = (8, 8),
        padding: str = "zeros",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        _check_widths(
            in_channels=in_channels,
            key_channels=key_channels,
            value_channels=value_channels,
            out_channels=out_channels,
        )
        self.pattern = _one_of("pattern", pattern, tuple(_PATTERNS))
        self.partition_size = _partition_size(partition_size)
        self.padding = _one_of("padding", padding, ("zeros", "mask"))
        self.backend = _one_of("backend", backend, BACKENDS)
        self.query = nn.Sequential(*(ConvNormReLU(Conv1x1(c, key_channels)) for c in (in_channels, key_channels)))
        self.key = nn.Sequential(*(ConvNormReLU(Conv1x1(c, key_channels)) for c in (in_channels, key_channels)))
        self.value = Conv1x1(in_channels, value_channels)
        self.output = ConvNormReLU(Conv1x1(value_channels, out_channels))

    def forward(self, x: Tensor) -> Tensor:
        _check_map(x, self.value.in_channels)
        size = x.shape[2:]
        pads = self.padding == "zeros" and self.pattern in _PARTITIONED
        if pads:
            x = pad_to_multiple(x, self.partition_size)
        q, k, v = (f(x).permute(0, 2, 3, 1).unsqueeze(3) for f in (self.query, self.key, self.value))
        partition = self.partition((x.shape[2], x.shape[3]))
        context = partitioned_attention(q, k, v, partition, backend=self.backend)  # [B, H, W, 1, V]
        y = self.output(context.squeeze(3).permute(0, 3, 1, 2))
        return crop(y, size) if pads else y

    def partition(self, size: tuple[int, int]) -> Partition:
        """The partition of a map of (H, W) pixels, after any padding."""
        P_h, P_w = self.partition_size
        return _PATTERNS[self.pattern](size, (min(P_h, size[0]), min(P_w, size[1])))

    def extra_repr(self) -> str:
        return f"pattern={self.pattern!r}, partition_size={self.partition_size}, padding={self.padding!r}"


class InterlacedSparseSelfAttention(nn.Module):
    """Interlaced sparse self-attention: a long-range and a short-range stage, cascaded without a residual.

    Every output pixel sees every input pixel through exactly one intermediate pixel, at O(HW sqrt(HW)) cost instead
    of O((HW)^2) (arXiv 1907.12273, section 3.2).

    Args:
        in_channels, key_channels, value_channels: widths; both stages have their own weights.
        out_channels: width of both stages' results; default in_channels.
        partition_size: (P_h, P_w) of both stages.
        order: "long-short", as published, or "short-long".
        padding, backend: see `SelfAttention2d`; padded once, before both stages.

    x [B, in_channels, H, W] -> [B, out_channels, H, W], channels_last. Raises as `SelfAttention2d`.

    >>> layer = InterlacedSparseSelfAttention(64, 32, 64, partition_size=(4, 4))
    >>> layer(torch.randn(2, 64, 13, 20)).shape
    torch.Size([2, 64, 13, 20])
    """

    def __init__(
        self,
        in_channels: int,
        key_channels: int,
        value_channels: int,
        out_channels: int | None = None,
        *,
        partition_size: tuple[int, int] = (8, 8),
        order: str = "long-short",
        padding: str = "zeros",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        self.order = _one_of("order", order, ("long-short", "short-long"))
        long_in, short_in = (in_channels, out_channels) if order == "long-short" else (out_channels, in_channels)

        def stage(pattern: str, stage_in: int) -> SelfAttention2d:
            widths = (stage_in, key_channels, value_channels, out_channels)
            return SelfAttention2d(
                *widths, pattern=pattern, partition_size=partition_size, padding=padding, backend=backend
            )

        self.long_range = stage("interlaced", long_in)
        self.short_range = stage("local", short_in)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.long_range, self.short_range
        if self.order == "short-long":
            first, second = second, first
        _check_map(x, first.value.in_channels)
        size = x.shape[2:]
        if first.padding == "zeros":  # once for both: the second stage's keys include what became of the padding
            x = pad_to_multiple(x, first.partition_size)
        x = first(x)  # the name lets go of the padded input before the second stage runs
        return crop(second(x), size)

    def extra_repr(self) -> str:
        return f"order={self.order!r}"


class ISAModule(nn.Module):
    """The block the paper inserts into a network: ISA beside its input, fused by conv1x1 + BN + ReLU + dropout.

    Args:
        in_channels, key_channels, value_channels, out_channels: widths.
        partition_sizes: one (P_h, P_w), or several for parallel branches; then x is expanded to as many times
            out_channels by a conv1x1 + BN + ReLU before it is fused with the branches.
        dropout: probability that a channel of the result is dropped in training.

    x [B, in_channels, H, W] -> [B, out_channels, H, W], channels_last. Raises as `SelfAttention2d`.

    >>> ISAModule(64, 32, 64, 48, partition_sizes=((4, 4), (8, 8)))(torch.randn(2, 64, 16, 24)).shape
    torch.Size([2, 48, 16, 24])
    """

    def __init__(
        self,
        in_channels: int,
        key_channels: int,
        value_channels: int,
        out_channels: int,
        *,
        partition_sizes: Sequence[tuple[int, int]] = ((8, 8),),
        dropout: float = 0.05,
    ) -> None:
        super().__init__()
        if len(partition_sizes) < 1:
            raise ValueError("partition_sizes must hold at least one (P_h, P_w), got none")
        widths = (in_channels, key_channels, value_channels, out_channels)
        self.branches = nn.ModuleList(
            InterlacedSparseSelfAttention(*widths, partition_size=partition_size) for partition_size in partition_sizes
        )
        n = len(partition_sizes)
        expanded = in_channels if n == 1 else n * out_channels
        self.expand = nn.Identity() if n == 1 else ConvNormReLU(Conv1x1(in_channels, expanded))
        self.fuse = ConvNormReLU(Conv1x1(expanded + n * out_channels, out_channels))
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor) -> Tensor:
        contexts = [branch(x) for branch in self.branches]
        return self.dropout(self.fuse(self.expand(x), *contexts))


class ISAHead(nn.Module):
    """The segmentation head: conv3x3 + BN + ReLU, ISA module, classifier, bilinear upsampling.

    Args:
        in_channels: width of the backbone's map (2048 for the ResNets of the paper).
        channels: width of the head, and of the values (512).
        num_classes: width of the result.
        key_channels, partition_size, dropout: of the ISA module.

    x [B, in_channels, H, W] -> logits [B, num_classes, H, W], or of the `size` given to forward, upsampled.
    Raises as `SelfAttention2d`.

    >>> ISAHead(128, 64, 19, key_channels=32)(torch.randn(2, 128, 16, 24), size=(128, 192)).shape
    torch.Size([2, 19, 128, 192])
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        num_classes: int,
        *,
        key_channels: int = 256,
        partition_size: tuple[int, int] = (8, 8),
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        _check_widths(in_channels=in_channels, channels=channels, num_classes=num_classes)
        self.reduce = ConvNormReLU(nn.Conv2d(in_channels, channels, 3, padding=1, bias=False))
        self.isa = ISAModule(
            channels, key_channels, channels, channels, partition_sizes=(partition_size,), dropout=dropout
        )
        self.classifier = Conv1x1(channels, num_classes, bias=True)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        logits = self.classifier(self.isa(self.reduce(x)))
        if size is None:
            return logits
        return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def pad_to_multiple(x: Tensor, partition_size: tuple[int, int]) -> Tensor:
    """x [B, C, H, W] with zeros around it, centred, low side floor(pad / 2), up to a multiple of P on both axes."""
    P_h, P_w = partition_size
    pad_h = (x.shape[2] + P_h - 1) // P_h * P_h - x.shape[2]  # no modulo of a negative: symbolic shapes refuse it
    pad_w = (x.shape[3] + P_w - 1) // P_w * P_w - x.shape[3]
    if pad_h == 0 and pad_w == 0:
        return x
    return F.pad(x, (pad_w // 2, pad_w - pad_w // 2, pad_h // 2, pad_h - pad_h // 2))


def crop(x: Tensor, size: Sequence[int]) -> Tensor:
    """The inverse of `pad_to_multiple`: the centre of x [B, C, H, W], a view."""
    top, left = (x.shape[2] - size[0]) // 2, (x.shape[3] - size[1]) // 2
    return x[:, :, top : top + size[0], left : left + size[1]]


def _one_of(name: str, value: str, valid: tuple[str, ...]) -> str:
    if value not in valid:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, valid))}, got {value!r}")
    return value


def _partition_size(value: tuple[int, int]) -> tuple[int, int]:
    if len(value) != 2 or not all(isinstance(p, int) and p >= 1 for p in value):
        raise ValueError(f"partition_size must be two integers (P_h, P_w) of at least 1, got {value!r}")
    return value[0], value[1]


def _check_widths(**widths: int) -> None:
    for name, width in widths.items():
        if not isinstance(width, int) or width < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {width!r}")


def _check_map(x: Tensor, channels: int) -> None:
    if x.dim() != 4 or x.shape[1] != channels or x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(f"x must be [B, {channels}, H, W] with H, W of at least 1, got {tuple(x.shape)}")
