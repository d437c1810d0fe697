"""Attention of whole maps by an attention module of others: groups where they lie, or copied side by side on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._tracing import is_exported, is_inference, is_known_to_be, is_plain
from ...axis import ceil_div, local
from ...functional import missing_tokens, partitioned_attention
from ...maps import linear, unpad
from ...partition import Partition


class OnMaps(nn.Module):
    """Stands before an attention class of theirs and says what that does to tokens, wherever they lie.

    Ours has `heads`, and of `position_bias`, `factor`, `cosine`, `output`, `dropout_p` what differs.
    """

    proj: nn.Module
    cosine = False  # whether scores are of vectors of length 1

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """q, k and v [..., heads, width] of pixels or tokens [..., C]."""
        raise NotImplementedError

    def position_bias(self, partition: Partition) -> Tensor | None:
        """[heads, tokens, tokens], or None."""
        return None

    def factor(self) -> float | Tensor | None:
        """Of the scores: a number, one for each head, or K**-0.5."""
        return None

    def output(self, context: Tensor) -> Tensor:
        """The projection [..., C] of what was attended [..., heads V], with its dropout."""
        return project(self.proj, context)

    def dropout_p(self) -> float:
        """The probability that an attention weight is dropped in training."""
        return 0.0

    def gathers(self) -> bool:
        """Whether what stands in it takes tokens as well as maps."""
        return True


class TokensOf(OnMaps):
    """The same of an attention class of theirs that has something else under the names of ours."""

    attn: Any

    def __init__(self, attn: nn.Module) -> None:
        self.__dict__.update(attn=attn, training=attn.training)  # which is no part of it


class GivenPartitions(OnMaps):
    """An attention class of theirs that a block calls: of maps where it is given a partition, else it is theirs."""

    def forward(self, *args: Any, partition: Partition | None = None, backend: str = "auto", **options: Any) -> Any:
        if partition is None:
            return super().forward(*args, **options)
        return self.of_map(args[0], partition, backend)

    def of_map(self, x: Tensor, partition: Partition, backend: str) -> Any:
        """What it returns of a map [B, *size, C], for all groups."""
        return attend(self, x, partition, backend)


def attend(attn: OnMaps, x: Tensor, partition: Partition, backend: str, *, bias: Tensor | None = None) -> Tensor:
    """What an attention module does to every group of the map x [B, *size, ...]; a bias is in place of its own."""
    if gathers(x, backend) and is_known_to_be(partition.divides) and attn.gathers():
        return _attend_gathered(attn, x, partition, bias)
    q, k, v = attn.heads(x)  # [B, *size, heads, width]
    context = partitioned_attention(
        *(q, k, v, partition),
        bias=attn.position_bias(partition) if bias is None else bias,
        scale=attn.factor(),
        dropout_p=_dropout_p(attn),
        cosine=attn.cosine,
        backend=backend,
    )
    return attn.output(context.flatten(-2))


def attend_with_zeros(attn: OnMaps, x: Tensor, partition: Partition, backend: str) -> Tensor:
    """The same where zeros fill the groups up that the map x [B, *size, C] does not: one key for all, no padded map.

    Without a position bias, which would tell them apart.
    """
    if is_known_to_be(partition.divides):
        return attend(attn, x, partition, backend)
    if gathers(x, backend) or _dropout_p(attn) > 0:  # which drops the weight of every zero by itself
        around = [0, 0]  # of F.pad, the last axis first: zeros before the map, and behind it
        for axis in reversed(partition):
            around += [-axis.origin, axis.origin + axis.groups * axis.tokens - axis.size]
        whole = Partition(*(local(axis.groups * axis.tokens, axis.tokens) for axis in partition))
        return unpad(attend(attn, F.pad(x, around), whole, backend), around)
    q, k, v = attn.heads(x)  # [B, *size, heads, width]
    _, of_zero, value = attn.heads(x.new_zeros(1, *[1] * len(partition), x.shape[-1]))
    out = partitioned_attention(
        *(q, k, v, partition),
        scale=attn.factor(),
        extra_k=of_zero.flatten(1, -3).expand(x.shape[0], -1, -1, -1),  # [B, 1, heads, width]
        extra_v=value.flatten(1, -3).expand(x.shape[0], -1, -1, -1),
        extra_weight=missing_tokens(partition, x.device)[None, ..., None].to(x.dtype),  # [1, *size, 1]
        cosine=attn.cosine,
        backend=backend,
    )
    return attn.output(out.flatten(-2))


def _attend_gathered(attn: OnMaps, x: Tensor, partition: Partition, bias: Tensor | None) -> Tensor:
    """The same between copies of x and y: PyTorch's attention on a CPU copies, and q, k, v and context are four."""
    pixels, axes = partition.view(x), len(partition)  # [B, *groups, *tokens, ...]
    tokens = pixels.reshape(-1, partition.tokens, *x.shape[1 + axes :])  # [n, T, ...]
    q, k, v = (t.transpose(1, 2) for t in attn.heads(tokens))  # [n, heads, T, width]
    if attn.cosine:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    bias, factor = attn.position_bias(partition) if bias is None else bias, attn.factor()
    if isinstance(factor, Tensor):
        q, factor = q * factor[:, None, None], 1.0
    mask = None if bias is None else bias[None]
    context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=_dropout_p(attn), scale=factor)
    attended = attn.output(context.transpose(1, 2).flatten(2))
    return partition.join(attended.view(*pixels.shape[: 1 + 2 * axes], attended.shape[-1]))


def _dropout_p(attn: OnMaps) -> float:
    return attn.dropout_p() if attn.training else 0.0


def gathers(x: Tensor, backend: str) -> bool:
    """Whether groups of x are copied side by side: on a CPU; a graph that is exported may run elsewhere."""
    return backend == "auto" and x.is_cpu and not is_exported()


def trains_faster_theirs(x: Tensor, backend: str) -> bool:
    """Whether shifted windows are left to a roll and a mask: in training on a CPU, which wants whole windows."""
    return torch.is_grad_enabled() and gathers(x, backend)


def shift_of(x: Tensor, window: Sequence[int], shift: Sequence[int]) -> list[int]:
    """The shift of windows of a map [B, *size, C]: none along an axis that one window covers."""
    return [0 if n <= tokens else by for n, tokens, by in zip(x.shape[1:-1], window, shift, strict=True)]


def in_windows(
    x: Tensor, window: Sequence[int], shift: Sequence[int], of_map: Callable[[Tensor, Partition], Tensor]
) -> Tensor:
    """of_map(x, partition) of windows of a map [B, *size, C], with zeros behind it up to whole windows."""
    size = x.shape[1:-1]
    whole = [ceil_div(extent, tokens) * tokens for extent, tokens in zip(size, window, strict=True)]
    partition = Partition(*map(local, whole, window, shift))
    pads = [padded - extent for padded, extent in zip(whole, size, strict=True)]
    if is_known_to_be(sum(pads) == 0):
        return of_map(x, partition)
    behind = [0, 0, *(n for pad in reversed(pads) for n in (0, pad))]
    return unpad(of_map(F.pad(x, behind), partition), behind)


def project(layer: Any, x: Tensor) -> Tensor:
    """A linear layer, a 1x1 convolution, or what was put in its place, of x [..., C].

    Adapters, hooks and parametrisations are called; a weight is read of a layer that has none of them.
    """
    if is_plain(layer, nn.Conv2d) or is_plain(layer, nn.Linear):
        return linear(x, layer.weight.flatten(1), layer.bias)
    takes_maps = isinstance(layer, nn.Conv2d) or any(isinstance(part, nn.Conv2d) for part in layer.modules())
    return layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if takes_maps else layer(x)


def split(qkv: Tensor, heads: int, *, heads_first: bool = False) -> tuple[Tensor, ...]:
    """q, k and v [..., heads, width], from all of them [..., 3 heads width], or [..., heads 3 width]."""
    width = qkv.shape[-1] // (3 * heads)
    if heads_first:
        return qkv.view(*qkv.shape[:-1], heads, 3, width).unbind(-2)
    return qkv.view(*qkv.shape[:-1], 3, heads, width).unbind(-3)


_cached: WeakKeyDictionary[nn.Module, tuple[Any, list[Tensor], Tensor]] = WeakKeyDictionary()


def cached_bias(
    module: Any, weights: list[nn.Parameter], compute: Callable[[], Tensor], window: Sequence[int] | None = None
) -> Tensor:
    """compute(), a module's position bias; on a CPU in inference the last one, while weights and window are the same.

    An MLP of distances takes longer there than a comparison of its weights. Other devices would have to wait for that.
    """
    if not is_inference() or module.training or type(weights[0]) is not nn.Parameter or not weights[0].is_cpu:
        return compute()
    kind = window or module.window_size, weights[0].dtype  # torch.equal looks at values only
    kind_then, then, bias = _cached.get(module, (None, [], weights[0]))
    if kind_then != kind or not all(map(torch.equal, then, weights)):
        bias = compute()
        _cached[module] = kind, [x.clone() for x in weights], bias
    return bias


def cropped(bias: Tensor, window: Sequence[int], tokens: Sequence[int]) -> Tensor:
    """A window's position bias [heads, T, T] for its first `tokens` pixels on every axis: only distances count."""
    if tuple(tokens) == tuple(window):
        return bias
    first = tuple(slice(n) for n in tokens)
    n = len(first)
    bias = bias.unflatten(2, tuple(window)).unflatten(1, tuple(window))[:, *first, *first]
    return bias.flatten(1 + n, 2 * n).flatten(1, n)  # [heads, tokens, tokens]
