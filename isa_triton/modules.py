"""Layers that project and compose: one attention stage, the two-stage ISA, the ISA module and the head.

Feature maps are [B, C, H, W]. NCHW and channels_last inputs are both read as they lie; everything in between is
channels_last, so that the attention's [B, H, W, heads, width] tensors are views of the projections' outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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

NormLayer = Callable[[int], nn.Module]  # from channels
Activation = Callable[[], nn.Module]
_RELU = partial(nn.ReLU, inplace=True)


class ISAOptions(TypedDict, total=False):
    """Keywords of `InterlacedSparseSelfAttention` that what is built of it passes on; it has their defaults."""

    order: str
    padding: str
    backend: str
    recompute: bool


class Conv1x1(nn.Conv2d):
    """A 1x1 convolution as a GEMM over pixels, of one input or of several that stand for their concatenation.

    [B, C_i, H, W], ... -> [B, out_channels, H, W], channels_last. The parameters are those of `nn.Conv2d`.
    """

    def __init__(self, in_channels: int, out_channels: int, bias: bool = False) -> None:
        super().__init__(in_channels, out_channels, kernel_size=1, bias=bias)

    def forward(self, *inputs: Tensor) -> Tensor:
        size = inputs[0].shape[2:]
        weights = self.weight.flatten(1).split([x.shape[1] for x in inputs], dim=1)  # [out, C_i]
        y = self.bias  # then [B, H W, out]
        for x, weight in zip(inputs, weights, strict=True):
            pixels = x.permute(0, 2, 3, 1).flatten(1, 2)  # [B, H W, C_i], NCHW or channels_last
            weight = weight.mT.expand(len(x), -1, -1)  # a batched GEMM takes NCHW transposed; folding B would copy it
            y = torch.bmm(pixels, weight) if y is None else torch.baddbmm(y, pixels, weight)
        assert y is not None
        return y.unflatten(1, size).permute(0, 3, 1, 2)


class ConvNormReLU(nn.Sequential):
    """Convolution without bias, normalisation, activation: batch normalisation and ReLU unless told otherwise."""

    def __init__(self, conv: nn.Conv2d, norm_layer: NormLayer = nn.BatchNorm2d, activation: Activation = _RELU) -> None:
        super().__init__()
        self.conv = conv
        self.norm: Any = norm_layer(conv.out_channels)
        self.relu = activation()

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
        norm_layer: makes a normalisation from its channels.
        activation: makes an activation.
        recompute: in training, keep nothing of what is inside the key and query projections and compute it again in
            backward: fewer bytes, more time. An attribute too. Under torch.compile the compiler decides what to keep.

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
        norm_layer: NormLayer = nn.BatchNorm2d,
        activation: Activation = _RELU,
        recompute: bool = False,
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
        self.recompute = recompute

        def project(c: int, out: int) -> ConvNormReLU:
            return ConvNormReLU(Conv1x1(c, out), norm_layer, activation)

        self.query = nn.Sequential(project(in_channels, key_channels), project(key_channels, key_channels))
        self.key = nn.Sequential(project(in_channels, key_channels), project(key_channels, key_channels))
        self.value = Conv1x1(in_channels, value_channels)
        self.output = project(value_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        check_map(x, self.value.in_channels)
        size = x.shape[2:]
        padded = pads(self.pattern, self.padding)
        if padded:
            x = pad_to_multiple(x, self.partition_size)
        recompute = self.recompute and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        q, k = (recomputed(f, x) if recompute else f(x) for f in (self.query, self.key))
        y = self.output(attend_maps(q, k, self.value(x), self.partition((x.shape[2], x.shape[3])), self.backend))
        return crop(y, size) if padded else y

    def partition(self, size: tuple[int, int]) -> Partition:
        """The partition of a map of (H, W) pixels, after any padding."""
        return make_partition(self.pattern, size, self.partition_size)

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
        padding, backend, norm_layer, activation, recompute: see `SelfAttention2d`; padded once, before both stages.

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
        norm_layer: NormLayer = nn.BatchNorm2d,
        activation: Activation = _RELU,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        self.order = _one_of("order", order, ("long-short", "short-long"))
        long_in, short_in = (in_channels, out_channels) if order == "long-short" else (out_channels, in_channels)

        def stage(pattern: str, stage_in: int) -> SelfAttention2d:
            return SelfAttention2d(
                stage_in,
                key_channels,
                value_channels,
                out_channels,
                pattern=pattern,
                partition_size=partition_size,
                padding=padding,
                backend=backend,
                norm_layer=norm_layer,
                activation=activation,
                recompute=recompute,
            )

        self.long_range = stage("interlaced", long_in)
        self.short_range = stage("local", short_in)

    @property
    def stages(self) -> tuple[SelfAttention2d, SelfAttention2d]:
        """Both, in the order in which they run."""
        stages = self.long_range, self.short_range
        return stages if self.order == "long-short" else stages[::-1]

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.stages
        check_map(x, first.value.in_channels)
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
        norm_layer, activation, options: see `InterlacedSparseSelfAttention`.

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
        norm_layer: NormLayer = nn.BatchNorm2d,
        activation: Activation = _RELU,
        **options: Unpack[ISAOptions],
    ) -> None:
        super().__init__()
        if not isinstance(partition_sizes, Sequence) or not partition_sizes:
            raise ValueError(f"partition_sizes must hold at least one (P_h, P_w), got {partition_sizes!r}")
        widths = (in_channels, key_channels, value_channels, out_channels)
        self.branches = nn.ModuleList(
            InterlacedSparseSelfAttention(
                *widths, partition_size=partition_size, norm_layer=norm_layer, activation=activation, **options
            )
            for partition_size in partition_sizes
        )
        n = len(partition_sizes)
        expanded = in_channels if n == 1 else n * out_channels

        def project(c: int, out: int) -> ConvNormReLU:
            return ConvNormReLU(Conv1x1(c, out), norm_layer, activation)

        self.expand = nn.Identity() if n == 1 else project(in_channels, expanded)
        self.fuse = project(expanded + n * out_channels, out_channels)
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
        key_channels, dropout: of the ISA module.
        partition_size: (P_h, P_w), or several of them for parallel branches.
        align_corners: of the upsampling; True for heads trained on sizes like 769x769.
        norm_layer, activation, options: see `InterlacedSparseSelfAttention`.

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
        partition_size: tuple[int, int] | Sequence[tuple[int, int]] = (8, 8),
        dropout: float = 0.1,
        align_corners: bool = False,
        norm_layer: NormLayer = nn.BatchNorm2d,
        activation: Activation = _RELU,
        **options: Unpack[ISAOptions],
    ) -> None:
        super().__init__()
        _check_widths(in_channels=in_channels, channels=channels, num_classes=num_classes)
        self.align_corners = align_corners
        reduce = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.reduce = ConvNormReLU(reduce, norm_layer, activation)
        self.isa = ISAModule(
            channels,
            key_channels,
            channels,
            channels,
            partition_sizes=_partition_sizes(partition_size),
            dropout=dropout,
            norm_layer=norm_layer,
            activation=activation,
            **options,
        )
        self.classifier = Conv1x1(channels, num_classes, bias=True)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        logits = self.classifier(self.isa(self.reduce(x)))
        if size is None:
            return logits
        return F.interpolate(logits, size=size, mode="bilinear", align_corners=self.align_corners)

    def extra_repr(self) -> str:
        return f"align_corners={self.align_corners}"


def check_map(x: Tensor, channels: int) -> None:
    """Raises ValueError where x is not [B, channels, H, W]."""
    if x.dim() != 4 or x.shape[1] != channels or x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(f"x must be [B, {channels}, H, W] with H, W of at least 1, got {tuple(x.shape)}")


def make_partition(pattern: str, size: tuple[int, int], partition_size: tuple[int, int]) -> Partition:
    """The partition of a map of (H, W) pixels by the name of its pattern; P is clamped to the map."""
    return _PATTERNS[pattern](size, (min(partition_size[0], size[0]), min(partition_size[1], size[1])))


def pads(pattern: str, padding: str) -> bool:
    """Whether a stage pads its map to a multiple of the partition size."""
    return padding == "zeros" and pattern in _PARTITIONED


def attend_maps(q: Tensor, k: Tensor, v: Tensor, partition: Partition, backend: str) -> Tensor:
    """One head of attention between maps: q, k [B, K, H, W] and v [B, V, H, W] -> context [B, V, H, W]."""
    q, k, v = (x.permute(0, 2, 3, 1).unsqueeze(3) for x in (q, k, v))  # [B, H, W, 1, K or V]
    return partitioned_attention(q, k, v, partition, backend=backend).squeeze(3).permute(0, 3, 1, 2)


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


def recomputed(layers: nn.Module, x: Tensor) -> Tensor:
    """layers(x), of which backward keeps x alone and computes the rest again."""
    return checkpoint(layers, x, use_reentrant=False, context_fn=lambda: (nullcontext(), _buffers_kept(layers)))


@contextmanager
def _buffers_kept(layers: nn.Module) -> Iterator[None]:
    """Layers work on copies of their buffers: running statistics do not count a batch a second time."""
    kept = [(layer, dict(layer._buffers)) for layer in layers.modules()]
    for layer, buffers in kept:
        layer._buffers.update({name: None if x is None else x.clone() for name, x in buffers.items()})
    try:
        yield
    finally:
        for layer, buffers in kept:
            layer._buffers.update(buffers)


def _one_of(name: str, value: str, valid: tuple[str, ...]) -> str:
    if value not in valid:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, valid))}, got {value!r}")
    return value


def _partition_size(value: tuple[int, int]) -> tuple[int, int]:
    pair = isinstance(value, Sequence) and len(value) == 2
    if not pair or not all(type(p) is int and p >= 1 for p in value):
        raise ValueError(f"partition_size must be two integers (P_h, P_w) of at least 1, got {value!r}")
    return value[0], value[1]


def _partition_sizes(value: tuple[int, int] | Sequence[tuple[int, int]]) -> Sequence[tuple[int, int]]:
    """One partition size or several, as several."""
    several = isinstance(value, Sequence) and (not value or isinstance(value[0], Sequence))
    return value if several else (value,)  # type: ignore[return-value]


def _check_widths(**widths: int) -> None:
    for name, width in widths.items():
        if not isinstance(width, int) or width < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {width!r}")
