"""The layers: one attention stage, the two-stage ISA, the ISA module that networks insert, and the head.

They project and compose; `maps` has what they are made of, and says how feature maps lie in memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._tracing import is_exported, is_known_to_be, is_plain, leaf_of_fx
from .backend import check_backend
from .maps import (
    PATTERNS,
    POINTWISE,
    RELU,
    Activation,
    Attends,
    Conv1x1,
    ConvNormReLU,
    NormLayer,
    PartitionSize,
    attend_maps,
    check_axes,
    check_flag,
    check_heads,
    check_map,
    check_options,
    check_partition_size,
    check_probability,
    check_size,
    check_widths,
    crop,
    each_partition_size,
    make_partition,
    one_of,
    pad_to_multiple,
    pads,
    projected,
    recomputed,
    unit_options,
)
from .norm import as_map, from_map
from .partition import Partition


class StageOptions(TypedDict, total=False):
    """Keywords of `SelfAttention2d`, which has their defaults, that whatever is built of stages passes on."""

    num_heads: int
    padding: str
    backend: str
    norm_layer: NormLayer | None
    activation: Activation
    recompute: bool
    attention_dropout: float


class ISAOptions(StageOptions, total=False):
    """Keywords of `InterlacedSparseSelfAttention` that whatever is built of it passes on."""

    order: str


class SelfAttention(Attends):
    """The paper's stage over maps of any number of axes: of `SelfAttention1d`, `SelfAttention2d`, `SelfAttention3d`."""

    axes: ClassVar[int]

    def __init__(
        self,
        in_channels: int,
        key_channels: int,
        value_channels: int,
        out_channels: int | None = None,
        *,
        pattern: str,
        partition_size: PartitionSize = 8,
        num_heads: int = 1,
        padding: str = "zeros",
        backend: str = "auto",
        norm_layer: NormLayer | None = None,
        activation: Activation = RELU,
        recompute: bool = False,
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        check_widths(in_channels=in_channels, out_channels=out_channels)
        check_widths(key_channels=key_channels, value_channels=value_channels)
        check_heads(num_heads, key_channels=key_channels, value_channels=value_channels)
        self.num_heads = num_heads
        self.pattern = one_of("pattern", pattern, PATTERNS if self.axes > 1 else ("interlaced", "local", "dense"))
        self.partition_size = check_partition_size(partition_size, self.axes)
        self.padding = one_of("padding", padding, ("zeros", "mask"))
        self._backend = check_backend(backend)
        self.recompute = check_flag("recompute", recompute)
        self.attention_dropout = check_probability("attention_dropout", attention_dropout, less=True)

        pointwise = POINTWISE[self.axes]

        def project(c: int, out: int) -> ConvNormReLU:
            return ConvNormReLU(pointwise(c, out), norm_layer, activation)

        self.query = nn.Sequential(project(in_channels, key_channels), project(key_channels, key_channels))
        self.key = nn.Sequential(project(in_channels, key_channels), project(key_channels, key_channels))
        self.value = pointwise(in_channels, value_channels)
        self.output = project(value_channels, out_channels)

    @leaf_of_fx
    def forward(self, x: Tensor) -> Tensor:
        check_map(x, self.value.in_channels, self.axes)
        size = x.shape[2:]
        padded = pads(self.pattern, self.padding)
        if padded:
            x = pad_to_multiple(x, self.partition_size)
        if x.is_cpu and self._backend != "triton" and not is_exported():  # three products and the values read it
            x = from_map(as_map(x).contiguous(memory_format=torch.channels_last), x.shape[2:])
        folds = self._folds(x)
        context = self._context(x, folds)
        output: Any = self.output
        if folds:
            matrix = output.conv.matrix() @ self.value.matrix()
            y = output.behind(from_map(projected([as_map(context)], matrix, output.conv.bias), x.shape[2:]))
        else:
            y = output(context)
        return crop(y, size) if padded else y

    def _context(self, x: Tensor, folds: bool) -> Tensor:
        """Attention over x. What it has read, q, k and values, is gone when the output is formed."""
        recompute = self.recompute and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        q, k = (recomputed(f, x) if recompute else f(x) for f in (self.query, self.key))
        values, dropout_p = x if folds else self.value(x), self.attention_dropout if self.training else 0.0
        return attend_maps(q, k, values, self.partition(x.shape[2:]), self.num_heads, self._backend, dropout_p)

    def _folds(self, x: Tensor) -> bool:
        """Whether values and output are one product, ``W_o (A (W_v x)) = (W_o W_v) (A x)``, as in `inference.fuse`.

        On a CPU, where products are what takes the time, and in full precision, to which weights are rounded once more.
        """
        narrow = x.shape[1] <= self.value.out_channels and self.num_heads == 1
        if not (narrow and x.is_cpu and self._backend != "triton" and x.dtype in (torch.float32, torch.float64)):
            return False
        pixels = x.shape[0] * math.prod(x.shape[2:])
        if is_exported() or torch.is_autocast_enabled("cpu") or is_known_to_be(pixels < self.output.conv.out_channels):
            return False
        plain, kind = (self.value, self.output.conv), POINTWISE[self.axes]
        as_made = is_plain(self.output, ConvNormReLU) and all(is_plain(part, kind) for part in plain)
        return as_made and self.value.bias is None

    def partition(self, size: Sequence[int]) -> Partition:
        """The partition of a map of (H, W) pixels, after any padding."""
        return make_partition(self.pattern, size, self.partition_size)

    def extra_repr(self) -> str:
        heads = f", num_heads={self.num_heads}" if self.num_heads > 1 else ""
        dropout = f", attention_dropout={self.attention_dropout}" if self.attention_dropout else ""
        sizes = f"partition_size={self.partition_size}{heads}, padding={self.padding!r}{dropout}"
        return f"pattern={self.pattern!r}, {sizes}"


class SelfAttention2d(SelfAttention):
    """One attention stage over a partition of the map: projections, attention, output projection.

    The paper's stage (arXiv 1907.12273, section 3.1; the authors' SelfAttentionBlock2D): key and query are two
    conv1x1 + BN + ReLU each, value is one conv1x1, scores are scaled by ``(key_channels / num_heads) ** -0.5``, and the
    output is conv1x1 + BN + ReLU. The paper, and every published checkpoint, has one head. On a CPU, in
    fp32 and fp64, values and output are one product, ``W_o (A (W_v x)) = (W_o W_v) (A x)``, where in_channels are at
    most value_channels.

    Args:
        in_channels: C, of the map.
        key_channels: K, width of the queries and keys of all heads together.
        value_channels: V, width of the values of all heads together.
        out_channels: width of the result; default in_channels.
        pattern: "interlaced" (long range), "local" (short range), "rows", "columns" or "dense".
        partition_size: (P_h, P_w), or P for both: the interval of interlaced groups or the size of local windows.
        num_heads: attentions side by side, each on its part of the key and value channels, which it divides.
        padding: for maps that P does not divide. "zeros" pads the input, centred, to a multiple of P and crops the
            result; padded pixels are keys and enter batch statistics, as in every published model. "mask" attends the
            real pixels only, with P clamped to the map.
        backend: of `partitioned_attention`; an attribute too, that may be set at any time.
        norm_layer: makes a normalisation from its channels; by default that of `isa_triton.norm` for as many axes.
        activation: makes an activation.
        recompute: in training, keep nothing of what is inside the key and query projections and compute it again in
            backward: fewer bytes, more time. An attribute too. Under torch.compile the compiler decides what to keep.
        attention_dropout: probability that a weight of attention is dropped in training, less than 1; an attribute too.

    x [B, in_channels, H, W] -> [B, out_channels, H, W], channels_last.

    Raises:
        ValueError: an unknown pattern, padding or backend; a width or partition size below 1; heads that do not divide
            the widths; x of another shape.

    Examples:
        >>> layer = SelfAttention2d(64, 32, 64, pattern="interlaced", partition_size=(4, 4))
        >>> layer(torch.randn(2, 64, 12, 20)).shape
        torch.Size([2, 64, 12, 20])
    """

    axes = 2


class SelfAttention1d(SelfAttention):
    """`SelfAttention2d` of lines: x [B, in_channels, L] -> [B, out_channels, L].

    Its parameters are those of `nn.Conv1d`; a partition size is (P,) or P, a pattern "interlaced", "local" or "dense".

    Examples:
        >>> layer = SelfAttention1d(64, 32, 64, pattern="local", partition_size=16)
        >>> layer(torch.randn(2, 64, 100)).shape
        torch.Size([2, 64, 100])
    """

    axes = 1


class SelfAttention3d(SelfAttention):
    """`SelfAttention2d` of volumes: x [B, in_channels, D, H, W] -> [B, out_channels, D, H, W], channels_last.

    Its parameters are those of `nn.Conv3d`; a partition size is (P_d, P_h, P_w), or P for all axes.

    Examples:
        >>> layer = SelfAttention3d(64, 32, 64, pattern="interlaced", partition_size=(2, 4, 4))
        >>> layer(torch.randn(2, 64, 4, 12, 20)).shape
        torch.Size([2, 64, 4, 12, 20])
    """

    axes = 3


STAGES: dict[int, type[SelfAttention]] = {1: SelfAttention1d, 2: SelfAttention2d, 3: SelfAttention3d}  # by axes


class InterlacedSparseSelfAttention(Attends):
    """Interlaced sparse self-attention: a long-range and a short-range stage, cascaded without a residual.

    Every output pixel sees every input pixel through exactly one intermediate pixel, at O(HW sqrt(HW)) cost instead
    of O((HW)^2) (arXiv 1907.12273, section 3.2); on lines and in volumes too.

    Args:
        in_channels: C, of the map.
        key_channels: K, width of the queries and keys of either stage; each has its own weights.
        value_channels: V, width of the values of either stage.
        out_channels: width of both stages' results; default in_channels.
        axes: of the maps; 1 for lines [B, C, L], 3 for volumes [B, C, D, H, W].
        partition_size: (P_h, P_w), or P for all axes, of both stages.
        order: "long-short", as published, or "short-long".
        **options: num_heads, padding, backend, norm_layer, activation, recompute and attention_dropout of
            `SelfAttention2d`. The map is padded once, before both stages.

    x [B, in_channels, H, W] -> [B, out_channels, H, W], channels_last.

    Raises:
        ValueError: as `SelfAttention2d`.
        TypeError: an unknown option.

    Examples:
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
        axes: int = 2,
        partition_size: PartitionSize = 8,
        order: str = "long-short",
        **options: Unpack[StageOptions],
    ) -> None:
        super().__init__()
        check_options(self, options, StageOptions)
        out_channels = in_channels if out_channels is None else out_channels
        self.order, kind = one_of("order", order, ("long-short", "short-long")), STAGES[check_axes(axes)]
        long_in, short_in = (in_channels, out_channels) if order == "long-short" else (out_channels, in_channels)

        def stage(pattern: str, stage_in: int) -> SelfAttention:
            widths = stage_in, key_channels, value_channels, out_channels
            return kind(*widths, pattern=pattern, partition_size=partition_size, **options)

        self.long_range = stage("interlaced", long_in)
        self.short_range = stage("local", short_in)

    @property
    def stages(self) -> tuple[SelfAttention, SelfAttention]:
        """Both, in the order in which they run."""
        stages = self.long_range, self.short_range
        return stages if self.order == "long-short" else stages[::-1]

    @leaf_of_fx
    def forward(self, x: Tensor) -> Tensor:
        first, second = self.stages
        check_map(x, first.value.in_channels, first.axes)
        size = x.shape[2:]
        if first.padding == "zeros":  # once for both: the second stage's keys include what became of the padding
            x = pad_to_multiple(x, first.partition_size)
        x = first(x)  # the name lets go of the padded input before the second stage runs
        return crop(second(x), size)

    def extra_repr(self) -> str:
        return f"order={self.order!r}"


DROPOUTS: dict[int, type[nn.Module]] = {1: nn.Dropout1d, 2: nn.Dropout2d, 3: nn.Dropout3d}  # of channels, by axes


class ISAModule(Attends):
    """The block the paper inserts into a network: ISA beside its input, fused by conv1x1 + BN + ReLU + dropout.

    Args:
        in_channels: C, of the map.
        key_channels: K, width of queries and keys.
        value_channels: V, width of values.
        out_channels: width of the result.
        axes: of the maps; 1 for lines [B, C, L], 3 for volumes [B, C, D, H, W].
        partition_size: (P_h, P_w), P for all axes, or several tuples for parallel branches; then x is expanded to as
            many times out_channels by a conv1x1 + BN + ReLU before it is fused with the branches.
        dropout: probability that a channel of the result is dropped in training.
        **options: order and all options of `InterlacedSparseSelfAttention`.

    x [B, in_channels, H, W] -> [B, out_channels, H, W], channels_last.

    Raises:
        ValueError: as `SelfAttention2d`.
        TypeError: an unknown option.

    Examples:
        >>> ISAModule(64, 32, 64, 48, partition_size=((4, 4), (8, 8)))(torch.randn(2, 64, 16, 24)).shape
        torch.Size([2, 48, 16, 24])
    """

    def __init__(
        self,
        in_channels: int,
        key_channels: int,
        value_channels: int,
        out_channels: int,
        *,
        axes: int = 2,
        partition_size: PartitionSize | Sequence[PartitionSize] = 8,
        dropout: float = 0.05,
        **options: Unpack[ISAOptions],
    ) -> None:
        super().__init__()
        check_options(self, options, ISAOptions)
        check_widths(out_channels=out_channels)
        sizes = each_partition_size(partition_size, check_axes(axes))
        widths = in_channels, key_channels, value_channels, out_channels
        self.branches = nn.ModuleList(
            InterlacedSparseSelfAttention(*widths, axes=axes, partition_size=size, **options) for size in sizes
        )
        n = len(sizes)
        expanded = in_channels if n == 1 else n * out_channels

        def project(c: int, out: int) -> ConvNormReLU:
            return ConvNormReLU(POINTWISE[axes](c, out), **unit_options(options))

        self.expand = nn.Identity() if n == 1 else project(in_channels, expanded)
        self.fuse = project(expanded + n * out_channels, out_channels)
        self.dropout = DROPOUTS[axes](check_probability("dropout", dropout))

    def forward(self, x: Tensor) -> Tensor:
        contexts = [branch(x) for branch in self.branches]
        return self.dropout(self.fuse(self.expand(x), *contexts))


class ISAHead(Attends):
    """The segmentation head: conv3x3 + BN + ReLU, ISA module, classifier, bilinear upsampling.

    Args:
        in_channels: width of the backbone's map (2048 for the ResNets of the paper).
        channels: width of the head, and of the values (512).
        num_classes: width of the result.
        key_channels: K, width of queries and keys.
        partition_size: (P_h, P_w), P for both axes, or several pairs for parallel branches.
        dropout: probability that a channel of the ISA module's result is dropped in training.
        align_corners: of the upsampling; True for heads trained on sizes like 769x769.
        **options: order and all options of `InterlacedSparseSelfAttention`.

    x [B, in_channels, H, W] -> logits [B, num_classes, H, W], or of the `size` given to forward, upsampled.

    Raises:
        ValueError: as `SelfAttention2d`.
        TypeError: an unknown option.

    Examples:
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
        partition_size: PartitionSize | Sequence[PartitionSize] = 8,
        dropout: float = 0.1,
        align_corners: bool = False,
        **options: Unpack[ISAOptions],
    ) -> None:
        super().__init__()
        check_options(self, options, ISAOptions)
        check_widths(in_channels=in_channels, channels=channels, num_classes=num_classes)
        self.in_channels, self.align_corners = in_channels, check_flag("align_corners", align_corners)
        reduce = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.reduce = ConvNormReLU(reduce, **unit_options(options))
        widths = channels, key_channels, channels, channels
        self.isa = ISAModule(*widths, partition_size=partition_size, dropout=dropout, **options)
        self.classifier = Conv1x1(channels, num_classes, bias=True)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        check_map(x, self.in_channels)
        if size is not None:
            check_size(size)
        logits = self.classifier(self.isa(self.reduce(x)))
        if size is None:
            return logits
        return F.interpolate(logits, size=size, mode="bilinear", align_corners=self.align_corners)

    def extra_repr(self) -> str:
        return f"align_corners={self.align_corners}"
