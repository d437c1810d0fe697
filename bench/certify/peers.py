"""Part e's others: who else computes the same attention, each at its strongest, gradients included.

Maps that a partition does not divide are padded and their padding masked, as models do. Those that gather copy the map
to groups and back, and that is in their time: it is what they need and the kernels do not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.certify import problems
from bench.certify.problems import Tensors
from bench.compared import libraries
from bench.tiles.compile import Problem
from isa_triton import Partition

OURS = "isa_triton"
BLOCK = libraries.TILE


@dataclass(frozen=True)
class Peer:
    """Who attends, and by what function of a problem and its tensors."""

    title: str
    attend: Callable[[Problem, Tensors], Tensor]
    package: str = "torch"
    refuses: Callable[[Problem], str | None] = lambda problem: None

    def obstacle(self, problem: Problem) -> str | None:
        """Why it has no form of a problem, or None."""
        if not find_spec(self.package):
            return f"needs {self.package}, which is not installed"
        return self.refuses(problem)


# -- groups, copied ----------------------------------------------------------------------------------------------------


def whole(partition: Partition) -> Partition:
    """The same groups on a map that they divide: padded at the bottom and on the right."""
    return Partition(*(axis._replace(size=axis.groups * axis.tokens) for axis in partition))


def gather(partition: Partition, x: Tensor) -> Tensor:
    """[maps, H, W, heads, width] -> [maps groups, heads, tokens, width], a copy; of a volume [maps, D, H, ...] too."""
    missing = [padded.size - axis.size for padded, axis in zip(whole(partition), partition, strict=True)]
    x = F.pad(x, (0, 0, 0, 0, *(side for n in reversed(missing) for side in (0, n))))
    for dim, axis in enumerate(partition):
        x = x.unflatten(1 + 2 * dim, _sides(axis))
    return x.permute(0, *_order(partition), -2, -1).reshape(-1, partition.tokens, *x.shape[-2:]).transpose(1, 2)


def scatter(partition: Partition, groups: Tensor) -> Tensor:
    """[maps groups, heads, tokens, width] -> [maps, H, W, heads, width], a copy; the inverse of `gather`."""
    order, counts = _order(partition), [axis.groups for axis in partition]
    x = groups.transpose(1, 2).unflatten(1, [axis.tokens for axis in partition]).unflatten(0, (-1, *counts))
    x = x.permute(0, *(1 + order.index(1 + dim) for dim in range(len(order))), -2, -1)
    for dim, axis in enumerate(partition, start=1):
        x = x.flatten(dim, dim + 1).narrow(dim, 0, axis.size)
    return x


def _is_local(axis: Any) -> bool:
    return axis.token_stride == 1


def _sides(axis: Any) -> tuple[int, int]:
    """How an axis of pixels is laid out: windows of tokens, or tokens that are groups apart."""
    return (axis.groups, axis.tokens) if _is_local(axis) else (axis.tokens, axis.groups)


def _order(partition: Partition) -> tuple[int, ...]:
    """The dimensions of groups_h, groups_w, tokens_h, tokens_w in a map whose axes are laid out as `_sides` says."""
    groups = [1 + 2 * dim + (not _is_local(axis)) for dim, axis in enumerate(partition)]
    return *groups, *(4 * dim + 3 - at for dim, at in enumerate(groups))


@cache
def padding(partition: Partition, maps: int, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    """[maps groups, 1, 1, tokens]: minus infinity for keys outside the map; None where there are none."""
    if whole(partition) == partition:
        return None
    inside = gather(partition, torch.ones(maps, *partition.size, 1, 1, device=device))[..., 0]
    return torch.where(inside > 0, 0.0, -torch.inf).to(dtype)[:, :, None]


def mask_of(problem: Problem, tensors: Tensors) -> Tensor | None:
    """The bias and the padding, added up where there are both."""
    padded = padding(problem.partition, problem.maps, tensors.q.device, tensors.q.dtype)
    if padded is None or tensors.bias is None:
        return tensors.bias if padded is None else padded
    return tensors.bias + padded


def on_gathered(attend: Callable[..., Tensor]) -> Callable[[Problem, Tensors], Tensor]:
    """Attention of `attend(q, k, v, mask)` over gathered groups."""

    def gathered(problem: Problem, tensors: Tensors) -> Tensor:
        q, k, v = (gather(problem.partition, x) for x in (tensors.q, tensors.k, tensors.v))
        return scatter(problem.partition, attend(q, k, v, mask_of(problem, tensors)))

    return gathered


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """torch's fused attention, whose kernels want values as wide as keys: wider ones go through in chunks."""
    width, wanted = q.shape[-1], v.shape[-1]
    v = F.pad(v, (0, -wanted % width))
    chunks = [F.scaled_dot_product_attention(q, k, chunk, attn_mask=mask) for chunk in v.split(width, -1)]
    return torch.cat(chunks, -1)[..., :wanted] if len(chunks) > 1 else chunks[0][..., :wanted]


def authors(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The ISA authors' way: matmul, softmax, matmul, scores in memory."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    return (scores if mask is None else scores + mask).softmax(-1) @ v


# -- FlexAttention and NATTEN ------------------------------------------------------------------------------------------


def flex(problem: Problem, tensors: Tensors) -> Tensor:
    """FlexAttention, compiled, over groups copied one behind another: then its blocks hold few of them."""
    from torch.nn.attention.flex_attention import flex_attention

    p, tokens, maps = problem.partition, problem.partition.tokens, problem.maps
    q, k, v = (  # [maps, heads, groups tokens, width]
        gather(p, x).unflatten(0, (maps, -1)).transpose(1, 2).flatten(2, 3) for x in (tensors.q, tensors.k, tensors.v)
    )
    bias = tensors.bias

    def with_bias(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert bias is not None
        return score + bias[h, query % tokens, key % tokens]

    attention: Any = (
        flex_attention if q.is_cpu else libraries.compiled_flex
    )  # nothing is timed there, and compiling is slow
    out = attention(q, k, v, score_mod=None if bias is None else with_bias, block_mask=_blocks(p, tensors.q.device))
    return scatter(p, out.unflatten(2, (-1, tokens)).transpose(1, 2).flatten(0, 1))


@cache
def _blocks(partition: Partition, device: torch.device) -> Any:
    """The mask that joins the tokens of a group, and no padding."""
    from torch.nn.attention.flex_attention import create_block_mask

    length, tokens = partition.groups * partition.tokens, partition.tokens
    inside = gather(partition, torch.ones(1, *partition.size, 1, 1, device=device)).flatten() > 0  # [groups tokens]

    def same_group(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query // tokens == key // tokens) & inside[key]

    return create_block_mask(same_group, None, None, length, length, device=str(device), BLOCK_SIZE=BLOCK)


def natten(problem: Problem, tensors: Tensors) -> Tensor:
    """Neighbourhood attention whose neighbourhoods are the groups."""
    return libraries.neighbourhoods(tensors.q, tensors.k, tensors.v, problem.partition)


def natten_refuses(problem: Problem) -> str | None:
    """Why NATTEN has no form of a problem, or None."""
    if problem.bias:
        return "takes no bias"
    if not problem.partition.divides:
        return "takes maps that the partition divides"
    return "takes values as wide as keys, or here a multiple" if problem.value_width % problem.key_width else None


PEERS = {
    OURS: Peer("isa_triton", problems.attend),
    "sdpa": Peer("torch's scaled_dot_product_attention on gathered groups", on_gathered(sdpa)),
    "authors": Peer("the authors' layout: gathered groups, scores in memory", on_gathered(authors)),
    "flex": Peer("FlexAttention, compiled, on gathered groups", flex),
    "natten": Peer("NATTEN", natten, package="natten", refuses=natten_refuses),
}
