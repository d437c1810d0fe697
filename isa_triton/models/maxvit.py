"""timm's MaxViT on this library: its block and grid attention without window_partition, permutes or size limits.

MaxViT (Tu et al., arXiv 2204.01697, section 3) attends inside windows of a fixed size, then inside grids of a fixed
size: `Partition.local` and `Partition.interlaced(grid=)`. Its position biases are the `bias` of attention.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from timm.models.maxxvit import Attention2d, ParallelPartitionAttention, PartitionAttention2d, PartitionAttentionCl
from torch import Tensor, nn

from ..functional import BACKENDS, partitioned_attention
from ..partition import Partition

Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model, *, backend: str = "auto") -> Model:
    """Let every partition attention of a timm model run on `partitioned_attention`, in place.

    No weight is touched, so checkpoints load before and after. Maps that the window or grid does not divide run too:
    attention is over the real pixels only. Calling it again sets the backend anew; `restore` takes it back.

    Args:
        model: of the MaxViT, MaxxViT or CoAtNet families of timm, or any network that holds their blocks.
        backend: of `partitioned_attention`.

    Returns:
        The model itself.

    Raises:
        ValueError: no partition attention in it, or an unknown backend. In training, also a model with dropout of
            attention weights, which the kernels do not have.

    >>> model = accelerate(timm.create_model("maxvit_tiny_tf_224"))  # doctest: +SKIP
    >>> model(torch.randn(1, 3, 256, 320)).shape  # doctest: +SKIP
    torch.Size([1, 1000])
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    found = [(module, theirs) for module in model.modules() for theirs in _OURS if isinstance(module, theirs)]
    if not found:
        raise ValueError(
            f"model must hold partition attention of timm's MaxViT, got {type(model).__name__} without any"
        )
    for module, theirs in found:
        module.__class__ = _OURS[theirs]
        module.backend = backend  # type: ignore[assignment]
    return model


def restore(model: Model) -> Model:
    """Undo `accelerate`, in place; a model that is not accelerated stays as it is.

    >>> restore(accelerate(model)) is model  # doctest: +SKIP
    True
    """
    for module in model.modules():
        for theirs, ours in _OURS.items():
            if type(module) is ours:
                module.__class__ = theirs
                del module.backend
    return model


class AcceleratedAttentionCl(PartitionAttentionCl):
    """`PartitionAttentionCl`: windows or a grid of maps [B, H, W, C]."""

    backend: str

    def _partition_attn(self, x: Tensor) -> Tensor:
        return _attention(self.attn, x, self.partition_size, self.partition_block, self.backend)


class AcceleratedAttention2d(PartitionAttention2d):
    """`PartitionAttention2d`: windows or a grid of maps [B, C, H, W]."""

    backend: str

    def _partition_attn(self, x: Tensor) -> Tensor:
        return _attention(self.attn, x, self.partition_size, self.partition_block, self.backend)


class AcceleratedParallelAttention(ParallelPartitionAttention):
    """`ParallelPartitionAttention`: windows beside a grid, of maps [B, H, W, C]."""

    backend: str

    def _partition_attn(self, x: Tensor) -> Tensor:
        sides = ((self.attn_block, True), (self.attn_grid, False))
        return torch.cat([_attention(attn, x, self.partition_size, block, self.backend) for attn, block in sides], -1)


_OURS: dict[type[nn.Module], type[nn.Module]] = {
    PartitionAttentionCl: AcceleratedAttentionCl,
    PartitionAttention2d: AcceleratedAttention2d,
    ParallelPartitionAttention: AcceleratedParallelAttention,
}


def _attention(attn: Any, x: Tensor, partition_size: tuple[int, int], block: bool, backend: str) -> Tensor:
    """What timm's `AttentionCl` or `Attention2d` does to every window or grid group of the map x, where they lie."""
    if attn.training and attn.attn_drop.p > 0:
        raise ValueError(
            f"dropout of attention weights is not supported: train with attn_drop 0, not {attn.attn_drop.p}"
        )
    nchw = isinstance(attn, Attention2d)
    if nchw:
        x = x.contiguous(memory_format=torch.channels_last)  # convolutions keep it, and attention wants channels last
    qkv = attn.qkv(x)
    qkv = qkv.permute(0, 2, 3, 1) if nchw else qkv  # [B, H, W, 3 C]
    parts = (attn.num_heads, 3) if attn.head_first else (3, attn.num_heads)
    q, k, v = qkv.unflatten(3, (*parts, attn.dim_head)).unbind(parts.index(3) + 3)  # [B, H, W, heads, width]

    size = qkv.shape[1], qkv.shape[2]
    tokens = min(partition_size[0], size[0]), min(partition_size[1], size[1])  # a small map is one window
    partition = Partition.local(size, tokens) if block else Partition.interlaced(size, grid=tokens)
    bias = None if attn.rel_pos is None else _bias(attn.rel_pos.get_bias(), partition_size, tokens)
    context = partitioned_attention(q, k, v, partition, bias=bias, scale=attn.scale, backend=backend).flatten(3)
    return attn.proj_drop(attn.proj(context.permute(0, 3, 1, 2) if nchw else context))


def _bias(bias: Tensor, window: tuple[int, int], tokens: tuple[int, int]) -> Tensor:
    """A window's position bias [(1,) heads, T, T] for its first `tokens` rows and columns: only distances count."""
    h, w = (slice(n) for n in tokens)
    bias = bias.flatten(0, -3).unflatten(2, window).unflatten(1, window)[:, h, w, h, w]
    return bias.flatten(3, 4).flatten(1, 2)  # [heads, tokens, tokens]
