"""spandrel's networks that restore images in windows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from spandrel.architectures.DAT.__arch.DAT import DAT
from spandrel.architectures.DRCT.__arch.drct_arch import DRCT
from spandrel.architectures.HAT.__arch.HAT import HAT
from spandrel.architectures.OmniSR.__arch.OmniSR import OmniSR
from spandrel.architectures.Swin2SR.__arch.Swin2SR import Swin2SR
from spandrel.architectures.SwinIR.__arch.SwinIR import SwinIR
from spandrel.architectures.Uformer.__arch.Uformer import Uformer
from torch import Tensor, nn

from bench.models.zoo import Entry, Size

SWIN: dict[str, Any] = {
    "img_size": 16, "window_size": 8, "embed_dim": 12, "depths": [2], "num_heads": [3], "mlp_ratio": 2.0, "upscale": 2
}  # fmt: skip
SHUFFLED: dict[str, Any] = SWIN | {"upsampler": "pixelshuffle"}
UFORMER: dict[str, Any] = {
    "img_size": 32,
    "win_size": 4,
    "embed_dim": 6,
    "num_heads": [3] * 9,
    "modulator": True,
    "cross_modulator": True,
}
SIZES = (16, 16), (16, 40), (19, 21)  # that of training, another, one that windows do not divide
WHOLE = (16, 16), (16, 40), (24, 8)  # where it refuses others


def image(size: Size) -> tuple[Tensor]:
    return (torch.rand(2, 3, *size, dtype=torch.float64),)


def entry(name: str, make: Callable[[], nn.Module], sizes: tuple[Size, ...] = SIZES, *, is_graph: bool = True) -> Entry:
    return Entry("spandrel", name, make, image, sizes, is_graph=is_graph)


ENTRIES = (
    entry("SwinIR", partial(SwinIR, **SHUFFLED)),
    entry("Swin2SR", partial(Swin2SR, **SHUFFLED)),
    entry("HAT", partial(HAT, squeeze_factor=4, **SWIN)),
    entry("DRCT", partial(DRCT, gc=6, **SHUFFLED | {"depths": [5]}), WHOLE, is_graph=False),
    entry("DAT", partial(DAT, img_size=16, embed_dim=96, depth=[3], num_heads=[6], split_size=[4, 8])),
    entry(
        "OmniSR", partial(OmniSR, num_feat=16, window_size=8), is_graph=False
    ),  # whose norm, a Function, does not compile
    entry("Uformer", partial(Uformer, depths=[2, *[1] * 7, 2], **UFORMER), ((32, 32), (64, 64))),
)
