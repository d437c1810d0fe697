"""timm's MaxViT and Swin on this library: windows and grids where they lie, without masks or size limits.

MaxViT (Tu et al., arXiv 2204.01697, section 3) attends inside windows of a fixed size, then inside grids of a fixed
size: `Partition.local` and `Partition.interlaced(grid=)`. Swin (Liu et al., arXiv 2103.14030, section 3.2) attends
inside windows, then inside windows that are shifted: `Partition.local(shift=)`. Their position biases are the `bias` of
attention.

Nothing is copied, but on a CPU: PyTorch's attention there wants the tokens of a group side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._extras import install
from .._tracing import is_exported, is_inference, is_known_to_be, is_plain, leaf_of_fx
from ..axis import ceil_div, grid, local
from ..backend import check_backend
from ..functional import partitioned_attention
from ..maps import at_most, check_module, linear, unpad
from ..partition import Partition

try:
    from timm.models.maxxvit import (
        Attention2d,
        AttentionCl,
        ParallelPartitionAttention,
        PartitionAttention2d,
        PartitionAttentionCl,
    )
    from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention
except ImportError as error:
    raise ImportError(f"models.timm needs timm 1.0 or later, an extra: {install('vision')}") from error

Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model, *, backend: str = "auto") -> Model:
    """Let every partition attention of a timm model run on `partitioned_attention`, in place.

    "auto" is, on a CPU and where windows divide the map, torch's scaled_dot_product_attention between one copy of the
    map and another: faster there than copies of q, k, v and the result, which "eager" makes. In training on a CPU
    windows that are shifted are left to timm, on maps that its masks are for.

    No weight is touched, so checkpoints load before and after. What stands in a block is called: adapters, hooks and
    parametrisations work as before, and a block whose attention is not timm's own stays as it is. Calling it again sets
    the backend anew; `restore` takes it back.

    Maps that the window or grid does not divide: MaxViT, which refuses them in timm, attends to the real pixels only;
    Swin attends to zeros behind the map too, as in timm. Images of any size go through MaxViT of the "tf" kind; of the
    "rw" kind, whose pooling is timm's own, multiples of 32 do.

    Args:
        model: of the MaxViT, MaxxViT or Swin families of timm, or any network that holds their blocks.
        backend: of `partitioned_attention`.

    Returns:
        The model itself.

    Raises:
        ValueError: no partition attention in it, or an unknown backend. In training, also a model with dropout of
            attention weights, which the kernels do not have.

    Examples:
        >>> model = accelerate(timm.create_model("maxvit_tiny_tf_224"))  # doctest: +SKIP
        >>> model(torch.randn(1, 3, 256, 320)).shape  # doctest: +SKIP
        torch.Size([1, 1000])
    """
    check_module("model", model)
    check_backend(backend)
    blocks = [module for module in model.modules() if _ours(module, _BLOCKS) and _attentions(module)]
    if not blocks:
        raise ValueError(
            f"model must hold partition attention of timm's MaxViT or Swin, got {type(model).__name__} without any"
        )
    for block in blocks:
        for module in (block, *_attentions(block)):
            module.__class__ = _ours(module, _BLOCKS | _ATTENTIONS) or type(module)
        block.backend = backend  # type: ignore[assignment]
    return model


def restore(model: Model) -> Model:
    """Undo `accelerate`, in place; a model that is not accelerated stays as it is.

    Examples:
        >>> restore(accelerate(model)) is model  # doctest: +SKIP
        True
    """
    check_module("model", model)
    for module in model.modules():
        for theirs, ours in (_BLOCKS | _ATTENTIONS).items():
            if type(module) is ours:
                module.__class__ = theirs
                module.__dict__.pop("backend", None)
    return model


class _OnMaps:
    """An attention module of timm that takes whole maps, where it is given a partition; else it is what it was."""

    rel_pos: Any

    def forward(
        self, x: Tensor, *args: Any, partition: Partition | None = None, backend: str = "auto", **options: Any
    ) -> Tensor:
        if partition is None:
            return super().forward(x, *args, **options)  # type: ignore[misc]
        return _attention(self, x, partition, self.position_bias(partition), backend)

    def position_bias(self, partition: Partition) -> Tensor | None:
        """[heads, tokens, tokens], or None."""
        if self.rel_pos is None:
            return None
        bias = _cached_bias(self.rel_pos, list(self.rel_pos.parameters()), self.rel_pos.get_bias).flatten(0, -3)
        return _cropped(bias, self.rel_pos.window_size, (partition.h.tokens, partition.w.tokens))


class MapAttentionCl(_OnMaps, AttentionCl):
    """`AttentionCl` of maps [B, H, W, C]."""


class MapAttention2d(_OnMaps, Attention2d):
    """`Attention2d` of maps [B, C, H, W]."""


class MapWindowAttention(_OnMaps, WindowAttention):
    """Swin's `WindowAttention` of maps [B, H, W, C]."""

    def position_bias(self, partition: Partition) -> Tensor:
        return _cached_bias(self, [self.relative_position_bias_table], self._get_rel_pos_bias)[0]


class AcceleratedBlockCl(PartitionAttentionCl):
    """`PartitionAttentionCl`: windows or a grid of maps [B, H, W, C]."""

    backend: str
    forward = leaf_of_fx(PartitionAttentionCl.forward)

    def _partition_attn(self, x: Tensor) -> Tensor:
        partition = _block_or_grid(x.shape[1:3], self.partition_size, self.partition_block)
        return self.attn(x, partition=partition, backend=self.backend)


class AcceleratedBlock2d(PartitionAttention2d):
    """`PartitionAttention2d`: windows or a grid of maps [B, C, H, W]."""

    backend: str
    forward = leaf_of_fx(PartitionAttention2d.forward)

    def _partition_attn(self, x: Tensor) -> Tensor:
        partition = _block_or_grid(x.shape[2:], self.partition_size, self.partition_block)
        return self.attn(x, partition=partition, backend=self.backend)


class AcceleratedParallelBlock(ParallelPartitionAttention):
    """`ParallelPartitionAttention`: windows beside a grid, of maps [B, H, W, C]."""

    backend: str
    forward = leaf_of_fx(ParallelPartitionAttention.forward)

    def _partition_attn(self, x: Tensor) -> Tensor:
        block, grid = (_block_or_grid(x.shape[1:3], self.partition_size, block) for block in (True, False))
        attended = self.attn_block(x, partition=block, backend=self.backend)
        return torch.cat([attended, self.attn_grid(x, partition=grid, backend=self.backend)], -1)


class AcceleratedSwinBlock(SwinTransformerBlock):
    """`SwinTransformerBlock`: windows, shifted or not, of maps [B, H, W, C]."""

    backend: str
    forward = leaf_of_fx(SwinTransformerBlock.forward)

    def _attn(self, x: Tensor) -> Tensor:
        (height, width), window, shift = x.shape[1:3], self.window_size, self.shift_size
        whole = ceil_div(height, window[0]) * window[0], ceil_div(width, window[1]) * window[1]
        behind = 0, 0, 0, whole[1] - width, 0, whole[0] - height
        divides = is_known_to_be(whole[0] - height + whole[1] - width == 0)
        if any(shift) and divides and self._is_timms(x):
            _refuse_dropout(self.attn)
            return super()._attn(x)
        if not divides:  # the zeros lie behind the rolled map: what came round is in front of them
            x = _roll(F.pad(_roll(x, shift, -1), behind), shift, 1)
        partition = Partition(*map(local, whole, window, shift))
        x = self.attn(x, partition=partition, backend=self.backend)
        return x if divides else _roll(unpad(_roll(x, shift, -1), behind), shift, 1)

    def _is_timms(self, x: Tensor) -> bool:
        """Whether timm trains faster: on a CPU, whose attention wants whole windows, on maps that it has masks for."""
        if not torch.is_grad_enabled() or not _gathers(x, self.backend):
            return False
        size = tuple(self.input_resolution)
        return self.dynamic_mask or (is_known_to_be(x.shape[1] == size[0]) and is_known_to_be(x.shape[2] == size[1]))


Classes = dict[type[nn.Module], type[nn.Module]]
_BLOCKS: Classes = {
    PartitionAttentionCl: AcceleratedBlockCl,
    PartitionAttention2d: AcceleratedBlock2d,
    ParallelPartitionAttention: AcceleratedParallelBlock,
    SwinTransformerBlock: AcceleratedSwinBlock,
}
_ATTENTIONS: Classes = {
    AttentionCl: MapAttentionCl,
    Attention2d: MapAttention2d,
    WindowAttention: MapWindowAttention,
}


def _ours(module: nn.Module, classes: Classes) -> type[nn.Module] | None:
    """Our class for a module of timm's, or of ours; None for all others, subclasses too: they may do something else."""
    return next((ours for theirs, ours in classes.items() if type(module) in (theirs, ours)), None)


def _attentions(block: nn.Module) -> list[nn.Module]:
    """The attention modules of a block; none where one of them was replaced: then the block stays as it is."""
    names = [name for name in ("attn", "attn_block", "attn_grid") if hasattr(block, name)]
    modules = [block.get_submodule(name) for name in names]
    return modules if all(_ours(module, _ATTENTIONS) for module in modules) else []


def _block_or_grid(size: Sequence[int], partition_size: tuple[int, int], block: bool) -> Partition:
    """MaxViT's windows or grid on a map of (H, W) pixels; a small map is one window."""
    tokens = map(at_most, partition_size, size)
    return Partition(*map(local if block else grid, size, tokens))


def _attention(attn: Any, x: Tensor, partition: Partition, bias: Tensor | None, backend: str) -> Tensor:
    """What an attention module of timm does to every window or grid group of the map x, where they lie."""
    _refuse_dropout(attn)
    gathers = _gathers(x, backend) and is_known_to_be(partition.divides)
    if isinstance(attn, Attention2d) and not (is_plain(attn.qkv, nn.Conv2d) and is_plain(attn.proj, nn.Conv2d)):
        gathers = False  # what stands there takes maps
    attend = _attend_gathered if gathers else _attend_in_place
    if isinstance(attn, Attention2d):
        return attn.proj_drop(attend(attn, x.permute(0, 2, 3, 1), partition, bias, backend).permute(0, 3, 1, 2))
    return attn.proj_drop(attend(attn, x, partition, bias, backend))


def _refuse_dropout(attn: Any) -> None:
    if attn.training and attn.attn_drop.p > 0:
        raise ValueError(
            f"dropout of attention weights is not supported: train with attn_drop 0, not {attn.attn_drop.p}"
        )


def _gathers(x: Tensor, backend: str) -> bool:
    """Whether groups of x are copied side by side: on a CPU; a graph that is exported may run elsewhere."""
    return backend == "auto" and x.is_cpu and not is_exported()


def _attend_in_place(attn: Any, x: Tensor, partition: Partition, bias: Tensor | None, backend: str) -> Tensor:
    q, k, v = _heads(attn, _linear(attn.qkv, x))  # [B, H, W, heads, width]
    context = partitioned_attention(q, k, v, partition, bias=bias, scale=attn.scale, backend=backend)
    return _linear(attn.proj, context.flatten(3))


def _attend_gathered(attn: Any, x: Tensor, partition: Partition, bias: Tensor | None, backend: str) -> Tensor:
    """The same between copies of x and y: PyTorch's attention on a CPU copies, and q, k, v and context are four."""
    pixels = partition.view(x)  # [B, groups_h, groups_w, t_h, t_w, C]
    attended = _attend_tokens(attn, pixels.reshape(-1, partition.tokens, x.shape[3]), bias)
    return partition.join(attended.view(*pixels.shape[:5], attended.shape[2]))


def _attend_tokens(attn: Any, tokens: Tensor, bias: Tensor | None) -> Tensor:
    """Attention with projections among the tokens [n, T, C] of every group."""
    q, k, v = (t.transpose(1, 2) for t in _heads(attn, _linear(attn.qkv, tokens)))  # [n, heads, T, width]
    mask = None if bias is None else bias[None]
    context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=attn.scale)
    return _linear(attn.proj, context.transpose(1, 2).flatten(2))


def _linear(layer: Any, x: Tensor) -> Tensor:
    """A linear layer, a 1x1 convolution, or what was put in its place, of x [..., C].

    Adapters, hooks and parametrisations are called; a weight is read of a layer that has none of them.
    """
    if is_plain(layer, nn.Conv2d) or is_plain(layer, nn.Linear):
        return linear(x, layer.weight.flatten(1), layer.bias)
    takes_maps = isinstance(layer, nn.Conv2d) or any(isinstance(part, nn.Conv2d) for part in layer.modules())
    return layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if takes_maps else layer(x)


def _heads(attn: Any, qkv: Tensor) -> tuple[Tensor, ...]:
    """q, k and v [B, ..., heads, width], from all of them [B, ..., 3 heads width]."""
    heads, width = attn.num_heads, qkv.shape[-1] // (3 * attn.num_heads)
    if getattr(attn, "head_first", False):
        return qkv.view(*qkv.shape[:-1], heads, 3, width).unbind(-2)
    return qkv.view(*qkv.shape[:-1], 3, heads, width).unbind(-3)


_cached: WeakKeyDictionary[nn.Module, tuple[Any, list[Tensor], Tensor]] = WeakKeyDictionary()


def _cached_bias(module: Any, weights: list[nn.Parameter], compute: Callable[[], Tensor]) -> Tensor:
    """compute(), a module's position bias; on a CPU in inference the last one, while weights and window are the same.

    An MLP of distances takes longer there than a comparison of its weights. Other devices would have to wait for that.
    """
    if not is_inference() or module.training or type(weights[0]) is not nn.Parameter or not weights[0].is_cpu:
        return compute()
    kind = module.window_size, weights[0].dtype  # torch.equal looks at values only
    kind_then, then, bias = _cached.get(module, (None, [], weights[0]))
    if kind_then != kind or not all(map(torch.equal, then, weights)):
        bias = compute()
        _cached[module] = kind, [x.clone() for x in weights], bias
    return bias


def _roll(x: Tensor, shift: tuple[int, int], sign: int) -> Tensor:
    """A map [B, H, W, C] rolled down and right by the shift, or back."""
    return x.roll((sign * shift[0], sign * shift[1]), (1, 2))


def _cropped(bias: Tensor, window: tuple[int, int], tokens: tuple[int, int]) -> Tensor:
    """A window's position bias [heads, T, T] for its first `tokens` rows and columns: only distances count."""
    if tokens == window:
        return bias
    h, w = (slice(n) for n in tokens)
    bias = bias.unflatten(2, window).unflatten(1, window)[:, h, w, h, w]
    return bias.flatten(3, 4).flatten(1, 2)  # [heads, tokens, tokens]
