"""timm's MaxViT and Swin on this library: windows and grids where they lie, without masks or size limits.

MaxViT (Tu et al., arXiv 2204.01697, section 3) attends inside windows of a fixed size, then inside grids of a fixed
size: `Partition.local` and `Partition.interlaced(grid=)`. Swin (Liu et al., arXiv 2103.14030, section 3.2) attends
inside windows, then inside windows that are shifted: `Partition.local(shift=)`. Their position biases are the `bias` of
attention.

Nothing is copied, but in inference on a CPU: PyTorch's attention there wants the tokens of a group side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from timm.models.maxxvit import Attention2d, ParallelPartitionAttention, PartitionAttention2d, PartitionAttentionCl
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn

from .._tracing import is_inference, is_recorded, wants_torch_operators
from ..backend import check_backend
from ..functional import partitioned_attention
from ..partition import Partition

Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model, *, backend: str = "auto") -> Model:
    """Let every partition attention of a timm model run on `partitioned_attention`, in place.

    "auto" is, in inference on a CPU and where windows divide the map, torch's scaled_dot_product_attention between one
    copy of the map and another: faster there than copies of q, k, v and the result, which "eager" makes.

    No weight is touched, so checkpoints load before and after. Calling it again sets the backend anew; `restore` takes
    it back. Maps that the window or grid does not divide: MaxViT, which refuses them in timm, attends to the real
    pixels only; Swin attends to zeros behind the map too, as in timm.

    Args:
        model: of the MaxViT, MaxxViT, CoAtNet or Swin families of timm, or any network that holds their blocks.
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
    check_backend(backend)
    found = [(module, theirs) for module in model.modules() for theirs in _OURS if isinstance(module, theirs)]
    if not found:
        raise ValueError(
            f"model must hold partition attention of timm's MaxViT or Swin, got {type(model).__name__} without any"
        )
    for module, theirs in found:
        module.__class__ = _OURS[theirs]
        module.backend = backend  # type: ignore[assignment]
    return model


def restore(model: Model) -> Model:
    """Undo `accelerate`, in place; a model that is not accelerated stays as it is.

    Examples:
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
        return _block_or_grid(self.attn, x, self.partition_size, self.partition_block, self.backend)


class AcceleratedAttention2d(PartitionAttention2d):
    """`PartitionAttention2d`: windows or a grid of maps [B, C, H, W]."""

    backend: str

    def _partition_attn(self, x: Tensor) -> Tensor:
        return _block_or_grid(self.attn, x, self.partition_size, self.partition_block, self.backend)


class AcceleratedParallelAttention(ParallelPartitionAttention):
    """`ParallelPartitionAttention`: windows beside a grid, of maps [B, H, W, C]."""

    backend: str

    def _partition_attn(self, x: Tensor) -> Tensor:
        sides = ((self.attn_block, True), (self.attn_grid, False))
        attended = [_block_or_grid(attn, x, self.partition_size, block, self.backend) for attn, block in sides]
        return torch.cat(attended, -1)


class AcceleratedSwinBlock(SwinTransformerBlock):
    """`SwinTransformerBlock`: windows, shifted or not, of maps [B, H, W, C]."""

    backend: str

    def _attn(self, x: Tensor) -> Tensor:
        (height, width), window, shift = x.shape[1:3], self.window_size, self.shift_size
        bottom, right = -height % window[0], -width % window[1]
        if bottom or right:  # the zeros lie behind the rolled map: what came round is in front of them
            x = F.pad(_roll(x, shift, -1), (0, 0, 0, right, 0, bottom))
            x = _roll(x, shift, 1)
        partition = Partition.local((height + bottom, width + right), window, shift)
        bias = _cached_bias(self.attn, [self.attn.relative_position_bias_table], self.attn._get_rel_pos_bias)[0]
        x = _attention(self.attn, x, partition, bias, self.backend)
        if bottom or right:
            x = _roll(_roll(x, shift, -1)[:, :height, :width], shift, 1)
        return x


_OURS: dict[type[nn.Module], type[nn.Module]] = {
    PartitionAttentionCl: AcceleratedAttentionCl,
    PartitionAttention2d: AcceleratedAttention2d,
    ParallelPartitionAttention: AcceleratedParallelAttention,
    SwinTransformerBlock: AcceleratedSwinBlock,
}


def _block_or_grid(attn: Any, x: Tensor, partition_size: tuple[int, int], block: bool, backend: str) -> Tensor:
    """MaxViT's attention inside the windows or the grid of a map."""
    height, width = x.shape[2:] if isinstance(attn, Attention2d) else x.shape[1:3]
    tokens = min(partition_size[0], height), min(partition_size[1], width)  # a small map is one window
    size = height, width
    partition = Partition.local(size, tokens) if block else Partition.interlaced(size, grid=tokens)
    bias = None
    if (rel_pos := attn.rel_pos) is not None:
        bias = _cached_bias(rel_pos, list(rel_pos.parameters()), rel_pos.get_bias).flatten(0, -3)
        bias = _cropped(bias, partition_size, tokens)
    return _attention(attn, x, partition, bias, backend)


def _attention(attn: Any, x: Tensor, partition: Partition, bias: Tensor | None, backend: str) -> Tensor:
    """What an attention module of timm does to every window or grid group of the map x, where they lie."""
    if attn.training and attn.attn_drop.p > 0:
        raise ValueError(
            f"dropout of attention weights is not supported: train with attn_drop 0, not {attn.attn_drop.p}"
        )
    gathers = backend == "auto" and x.is_cpu and partition.divides and not torch.is_grad_enabled()
    gathers = gathers and not (wants_torch_operators() or is_recorded())  # views by strides, which may change
    attend = _attend_gathered if gathers else _attend_in_place
    if isinstance(attn, Attention2d):
        return attn.proj_drop(attend(attn, x.permute(0, 2, 3, 1), partition, bias, backend).permute(0, 3, 1, 2))
    return attn.proj_drop(attend(attn, x, partition, bias, backend))


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
    """A linear layer or a 1x1 convolution of x [..., C]."""
    return layer(x) if isinstance(layer, nn.Linear) else F.linear(x, layer.weight.flatten(1), layer.bias)


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
