"""Published networks that `isa_triton.models.accelerate` takes, as their packages build them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from bench.models.zoo import Size


@dataclass(frozen=True)
class Network:
    """One of them.

    Attributes:
        package, name: what it is.
        make: builds it, in evaluation as in training.
        channels: of its input, [1, channels, *size].
        sizes: of its inputs whose bytes are counted.
        timed: size of the input that is timed on a CPU.
        result: the tensor in what it returns.
    """

    package: str
    name: str
    make: Callable[[], nn.Module]
    channels: int
    sizes: tuple[Size, ...]
    timed: Size
    result: Callable[[Any], Tensor] = lambda y: y

    def __str__(self) -> str:
        return self.name

    def input(self, size: Size, device: str = "cpu") -> Tensor:
        return torch.randn(1, self.channels, *size, device=device)


def _of(module: str, name: str, **options: Any) -> Callable[[], nn.Module]:
    """Builds a class or calls a function of a module, imported then."""
    return lambda: getattr(import_module(module), name)(**options)


def _transformers(config: str, model: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        transformers = import_module("transformers")
        network: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**options))
        return network

    return make


_IR: dict[str, Any] = {  # the x4 networks of their papers
    "upscale": 4, "img_size": 64, "img_range": 1.0, "embed_dim": 180, "depths": (6,) * 6, "num_heads": (6,) * 6,
    "mlp_ratio": 2, "upsampler": "pixelshuffle", "resi_connection": "1conv",
}  # fmt: skip
_HAT = _IR | {"window_size": 16, "compress_ratio": 3, "squeeze_factor": 30, "conv_scale": 0.01, "overlap_ratio": 0.5}
_UNETR: dict[str, Any] = {"in_channels": 1, "out_channels": 14, "feature_size": 48}


def _timm(name: str, side: int) -> Network:
    return Network("timm", name, _of("timm", "create_model", model_name=name), 3, ((side, side),), (side, side))


def _torchvision(name: str, *sizes: Size, timed: Size) -> Network:
    return Network(
        "torchvision",
        name,
        _of("torchvision.models.video" if "3d" in name else "torchvision.models", name),
        3,
        sizes,
        timed,
    )


def _spandrel(name: str, module: str, options: dict[str, Any], timed: Size) -> Network:
    kind = module.rsplit(".", 1)[1]
    sizes = ((256, 256), (512, 512), (1024, 1024))
    return Network("spandrel", name, _of(f"spandrel.architectures.{module}", kind, **options), 3, sizes, timed)


NETWORKS = {
    network.name: network
    for network in (
        _timm("maxvit_nano_rw_256", 256),
        _timm("maxvit_tiny_tf_224", 224),
        _timm("swin_tiny_patch4_window7_224", 224),
        _torchvision("swin_t", (224, 224), timed=(224, 224)),
        _torchvision("swin_v2_t", (256, 256), (512, 512), (1024, 1024), timed=(256, 256)),
        _torchvision("swin3d_t", (16, 224, 224), timed=(8, 112, 112)),
        Network(
            "monai",
            "SwinUNETR",
            _of("monai.networks.nets", "SwinUNETR", **_UNETR),
            1,
            ((64, 64, 64), (96, 96, 96), (128, 128, 128)),
            (64, 32, 32),
        ),
        _spandrel("SwinIR", "SwinIR.__arch.SwinIR", _IR | {"window_size": 8}, (64, 64)),
        _spandrel("HAT", "HAT.__arch.HAT", _HAT, (32, 32)),
        Network(
            "transformers",
            "Swinv2Model",
            _transformers("Swinv2Config", "Swinv2Model", image_size=256, window_size=8),
            3,
            ((256, 256),),
            (256, 256),
            attrgetter("last_hidden_state"),
        ),
        Network(
            "transformers",
            "Swin2SR",
            _transformers("Swin2SRConfig", "Swin2SRForImageSuperResolution"),
            3,
            ((256, 256), (512, 512)),
            (64, 64),
            attrgetter("reconstruction"),
        ),
    )
}
