"""Other libraries with attention over the same index sets, for where they are installed.

timm permutes, copies and calls torch's scaled_dot_product_attention. FlexAttention (part of torch) masks tiles of 128 x
128 scores; on a CPU it exists under torch.compile only. NATTEN is neighbourhood attention, whose dilation interlaces
and whose stride makes windows. The last two stand behind operators, so that fake tensors count what they would
allocate and compute without running them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from bench.compared.modules import sdpa_attention
from bench.workload import Workload
from isa_triton import Partition
from isa_triton.axis import ceil_div

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

TILE = 128  # of FlexAttention: it computes a tile of scores whole or not at all
TIMM_HEAD = 32  # channels of a head in MaxViT


def forward_only(workload: Workload) -> str | None:
    """What a library without a backward pass on a CPU says to a workload."""
    return "is measured forward only" if workload.training else None


def divided_only(workload: Workload) -> str | None:
    """What a library without padding says to a workload."""
    (P_h, P_w), height, width = workload.partition_size, workload.height, workload.width
    return f"takes maps that {P_h}x{P_w} divides" if height % P_h or width % P_w else None


# -- timm --------------------------------------------------------------------------------------------------------------


def timm(q: Tensor, k: Tensor, v: Tensor, partition: Partition) -> Tensor:
    """MaxViT's grid or block attention; q, k [B, H, W, 1, K], v [B, H, W, 1, V]."""
    from timm.models import maxxvit

    how = "window" if partition.h.token_stride == partition.w.token_stride == 1 else "grid"
    split, join = getattr(maxxvit, f"{how}_partition"), getattr(maxxvit, f"{how}_reverse")
    tokens = [partition.h.tokens, partition.w.tokens]
    groups = (split(x.squeeze(3), tokens).unsqueeze(3) for x in (q, k, v))  # [B groups, h, w, 1, width]
    return join(sdpa_attention(*groups).squeeze(3), tokens, list(partition.size)).unsqueeze(3)


def timm_refuses(workload: Workload) -> str | None:
    """Why timm has no form of a workload, or None."""
    if workload.level == "module" and workload.channels % TIMM_HEAD:
        return f"takes multiples of {TIMM_HEAD} channels"
    return divided_only(workload)


class TimmStages(nn.Module):
    """MaxViT's grid attention, then its block attention, with their projections and without norms and MLPs."""

    def __init__(self, workload: Workload) -> None:
        from timm.models import maxxvit

        super().__init__()
        self.window = list(workload.partition_size)
        # tokens of a long-range group on either axis: MaxViT fixes these, ISA the interval between them
        self.grid = [side // p for side, p in zip(workload.size, workload.partition_size, strict=True)]
        self.long_range = maxxvit.Attention2d(workload.channels, dim_head=TIMM_HEAD)
        self.short_range = maxxvit.Attention2d(workload.channels, dim_head=TIMM_HEAD)

    def forward(self, x: Tensor) -> Tensor:
        from timm.models import maxxvit

        size = list(x.shape[2:])
        x = self.long_range(maxxvit.grid_partition_nchw(x, self.grid))
        x = maxxvit.grid_reverse_nchw(x, self.grid, size)
        x = self.short_range(maxxvit.window_partition_nchw(x, self.window))
        return maxxvit.window_reverse_nchw(x, self.window, size)


# -- FlexAttention and NATTEN, behind operators ------------------------------------------------------------------------


def flex(q: Tensor, k: Tensor, v: Tensor, partition: Partition) -> Tensor:
    """FlexAttention whose mask joins the pixels of a group; q, k [B, H, W, heads, K], v [B, H, W, heads, V]."""
    return _flex(q, k, v, partition.flat())


def natten(q: Tensor, k: Tensor, v: Tensor, partition: Partition) -> Tensor:
    """Neighbourhood attention whose neighbourhoods are the groups of a partition that divides the map.

    q, k [B, H, W, heads, K], v [B, H, W, heads, V].
    """
    return _natten(q, k, v, partition.flat())


@torch.library.custom_op("isa_bench::flex", mutates_args=())
def _flex(q: Tensor, k: Tensor, v: Tensor, axes: list[int]) -> Tensor:
    partition = Partition.unflatten(axes)
    q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))  # [B, heads, H W, width]
    mask = _block_mask(partition, q.device)
    context = compiled_flex(q, k, v, block_mask=mask)
    return context.transpose(1, 2).unflatten(1, partition.size).contiguous()


@torch.library.custom_op("isa_bench::natten", mutates_args=())
def _natten(q: Tensor, k: Tensor, v: Tensor, axes: list[int]) -> Tensor:
    return neighbourhoods(q, k, v, Partition.unflatten(axes))


def neighbourhoods(q: Tensor, k: Tensor, v: Tensor, partition: Partition) -> Tensor:
    """What `natten` is, with gradients: not behind an operator."""
    from natten.functional import na2d

    dilation = partition.h.token_stride, partition.w.token_stride
    stride = (1, 1) if max(dilation) > 1 else (partition.h.tokens, partition.w.tokens)
    where = {"kernel_size": (partition.h.tokens, partition.w.tokens), "dilation": dilation, "stride": stride}
    # every backend of NATTEN takes values as wide as keys: wider ones go through in chunks
    return torch.cat([na2d(q, k, chunk.contiguous(), **where) for chunk in v.split(q.shape[-1], -1)], -1)


@_flex.register_fake
@_natten.register_fake
def _like_v(q: Tensor, k: Tensor, v: Tensor, axes: Any) -> Tensor:
    return torch.empty_like(v, memory_format=torch.contiguous_format)


@register_flop_formula(torch.ops.isa_bench.flex)
def _flex_flops(q: Any, k: Any, v: Any, axes: Any, **_: Any) -> int:
    tiles = int(_tile_pairs(Partition.unflatten(axes)).sum())
    return 2 * q[0] * q[3] * (q[-1] + v[-1]) * TILE**2 * tiles


@register_flop_formula(torch.ops.isa_bench.natten)
def _natten_flops(q: Any, k: Any, v: Any, axes: Any, **_: Any) -> int:
    chunks = v[-1] // q[-1]
    return 2 * q[0] * q[3] * 2 * q[-1] * chunks * Partition.unflatten(axes).pairs


def natten_refuses(workload: Workload) -> str | None:
    """Why NATTEN has no form of a workload, or None."""
    if workload.value_channels % workload.key_channels:
        return "takes values as wide as keys, or here a multiple"
    return forward_only(workload) or divided_only(workload)


def compiled_flex(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """FlexAttention under torch.compile, q, k, v [B, heads, tokens, width]."""
    import torch._dynamo

    with torch._dynamo.config.patch(recompile_limit=1024):  # every map is compiled anew, and past the limit none is
        return _compiled_flex()(q, k, v, **options)


@cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


@cache
def _block_mask(partition: Partition, device: torch.device) -> BlockMask:
    from torch.nn.attention.flex_attention import BlockMask

    pixels, pairs = partition.h.size * partition.w.size, torch.from_numpy(_tile_pairs(partition)).to(device)
    group = torch.from_numpy(_groups(partition)).to(device)

    def same_group(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return group[query.clamp(max=pixels - 1)] == group[key.clamp(max=pixels - 1)]  # the last tile may be ragged

    number = pairs.sum(-1, dtype=torch.int32)[None, None]  # [1, 1, tiles]
    order = pairs.int().argsort(dim=-1, descending=True, stable=True).int()[None, None]  # [1, 1, tiles, tiles]
    return BlockMask.from_kv_blocks(number, order, mask_mod=same_group, seq_lengths=(pixels, pixels), BLOCK_SIZE=TILE)


def _tile_pairs(partition: Partition) -> Any:
    """[tiles, tiles]: whether some pixel of one tile shares its group with some pixel of the other.

    In NumPy, which fake tensors leave alone.
    """
    group = _groups(partition)
    holds = np.zeros((ceil_div(len(group), TILE), partition.groups), np.float32)
    holds[np.arange(len(group)) // TILE, group] = 1
    return holds @ holds.T > 0


def _groups(partition: Partition) -> Any:
    """[H W]: the group of every pixel."""
    return partition.seat(*np.divmod(np.arange(partition.h.size * partition.w.size), partition.w.size))[0]
