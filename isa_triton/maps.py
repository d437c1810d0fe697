"""What layers of feature maps are made of: projections over pixels, padding, attention between maps, their checks.

Feature maps are [B, C, H, W], lines [B, C, L] and volumes [B, C, D, H, W] likewise. NCHW and channels_last inputs are
both read as they lie; everything in between is channels_last, so that the attention's [B, H, W, heads, width] tensors
are views of the projections' outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from reprlib import repr as short
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ._tracing import is_exported, is_known_to_be, is_plain, is_proxy, is_transformed, leaf_of_fx, wants_torch_operators
from .axis import MOST_AXES, ceil_div, interlaced, local, pair
from .backend import check_backend
from .functional import partitioned_attention
from .norm import BATCH_NORMS, as_map, from_map
from .partition import Partition

PartitionSize = int | tuple[int, ...]  # P, or (P_h, P_w), of every axis
NormLayer = Callable[[int], nn.Module]  # from channels
Activation = Callable[[], nn.Module]
Model = TypeVar("Model", bound=nn.Module)
RELU = partial(nn.ReLU, inplace=True)

PATTERNS: dict[str, Callable[[Sequence[int], Sequence[int]], Partition]] = {
    "interlaced": lambda size, partition_size: Partition(*map(interlaced, size, partition_size)),
    "local": lambda size, partition_size: Partition(*map(local, size, partition_size)),
    "rows": lambda size, partition_size: Partition.rows(size),
    "columns": lambda size, partition_size: Partition.columns(size),
    "dense": lambda size, partition_size: Partition.dense(size),
}
MOST, LONGEST = 2**20, 2**15  # of channels, and of a partition size: more is a mistake, and would fill all memory
_HAS_ONEDNN = torch.backends.mkldnn.is_available()  # which Dynamo cannot ask
PARTITIONED = ("interlaced", "local")  # the patterns that a partition size shapes


class Pointwise(nn.Module):
    """What convolutions of single pixels are: a matrix. A subclass has the parameters."""

    weight: Tensor
    bias: Tensor | None

    def matrix(self) -> Tensor:
        """The weight [out, C, 1, 1] as [out, C], whose gradient gets the parameter's strides, 1x1 though they be.

        Optimisers' fused paths and DDP's buckets copy gradients of others. What squeezes a dimension of one element
        gives the gradient of it a neighbour's stride; in a parameter that is channels_last, that is another one.
        """
        weight = self.weight
        if weight.dim() != 4:
            return weight.flatten(1)
        if weight.stride(3) == 1:
            return weight.squeeze(3).squeeze(2)
        return weight.permute(0, 2, 3, 1).squeeze(2).squeeze(1)


class Conv1x1(Pointwise, nn.Conv2d):
    """A 1x1 convolution as a GEMM over pixels, of one input or of several that stand for their concatenation.

    [B, C_i, H, W], ... -> [B, out_channels, H, W], channels_last. The parameters are those of `nn.Conv2d`.

    >>> Conv1x1(5, 7)(torch.randn(2, 3, 4, 6), torch.randn(2, 2, 4, 6)).shape
    torch.Size([2, 7, 4, 6])
    """

    def __init__(self, in_channels: int, out_channels: int, bias: bool = False) -> None:
        super().__init__(in_channels, out_channels, kernel_size=1, bias=bias)

    @leaf_of_fx
    def forward(self, *inputs: Tensor) -> Tensor:
        return projected(inputs, self.matrix(), self.bias)


class PointwiseConv1d(Pointwise, nn.Conv1d):
    """`Conv1x1` of lines [B, C_i, L]; the parameters are those of `nn.Conv1d`.

    >>> PointwiseConv1d(5, 7)(torch.randn(2, 5, 9)).shape
    torch.Size([2, 7, 9])
    """

    def __init__(self, in_channels: int, out_channels: int, bias: bool = False) -> None:
        super().__init__(in_channels, out_channels, kernel_size=1, bias=bias)

    @leaf_of_fx
    def forward(self, *inputs: Tensor) -> Tensor:
        return from_map(projected([*map(as_map, inputs)], self.matrix(), self.bias), inputs[0].shape[2:])


class PointwiseConv3d(Pointwise, nn.Conv3d):
    """`Conv1x1` of volumes [B, C_i, D, H, W]; the parameters are those of `nn.Conv3d`.

    >>> PointwiseConv3d(5, 7)(torch.randn(2, 5, 3, 4, 6)).shape
    torch.Size([2, 7, 3, 4, 6])
    """

    def __init__(self, in_channels: int, out_channels: int, bias: bool = False) -> None:
        super().__init__(in_channels, out_channels, kernel_size=1, bias=bias)

    @leaf_of_fx
    def forward(self, *inputs: Tensor) -> Tensor:
        return from_map(projected([*map(as_map, inputs)], self.matrix(), self.bias), inputs[0].shape[2:])


POINTWISE: dict[int, Any] = {1: PointwiseConv1d, 2: Conv1x1, 3: PointwiseConv3d}  # by the axes of a map


def projected(inputs: Sequence[Tensor], matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """Maps [B, C_i, H, W], as one of the sum of their channels, times a matrix [out, C] -> [B, out, H, W]."""
    weights = matrix.split([x.shape[1] for x in inputs], dim=1)  # [out, C_i]
    in_graph = torch.compiler.is_compiling() or wants_torch_operators()
    y: Tensor | None = None
    for x, weight in zip(inputs, weights, strict=True):
        added = bias if y is None else None
        if in_graph:  # of any batch and size: inductor (torch 2.14) cannot keep a view, nor tracers `expand`
            product = _convolution(x.contiguous(memory_format=torch.channels_last), weight, added)
            y = product if y is None else y + product
        else:
            product = _product(x, weight, added)
            y = product if y is None else _added(product, y)
    assert y is not None
    return y


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [B, C, H, W] and weight [out, C] -> [B, out, H, W], channels_last."""
    if _suits_onednn(x) and x.is_contiguous(memory_format=torch.channels_last):
        return _convolution(x, weight, bias).contiguous(memory_format=torch.channels_last)
    # a batched GEMM takes NCHW transposed; folding B would copy it
    pixels, matrix = x.permute(0, 2, 3, 1).flatten(1, 2), weight.t().expand(x.shape[0], -1, -1)  # [B, C, out]
    y = torch.bmm(pixels, matrix) if bias is None else torch.baddbmm(bias, pixels, matrix)
    return y.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [B, C, H, W] convolved by weight [out, C], by oneDNN where it suits.

    It uses AVX-512 wherever it is; MKL's matrix product, elsewhere as fast, does so on Intel's CPUs alone. On one
    thread PyTorch (2.14) asks it for few maps if the convolution is dilated, which one of a single pixel may well be.
    """
    return F.conv2d(x, weight[..., None, None], bias, dilation=2 if _suits_onednn(x) else 1)


def _suits_onednn(x: Tensor) -> bool:
    """Whether products of x are faster as oneDNN's convolutions, here: a graph that is exported may run elsewhere.

    PyTorch does not ask it for few elements. Not those of subclasses: a tensor that waits for other processes would be
    copied.
    """
    if not (_HAS_ONEDNN and type(x) is Tensor and x.is_cpu and x.dtype == torch.float32):
        return False
    return not is_exported() and not is_known_to_be(x.numel() <= 20480)


def _added(x: Tensor, y: Tensor) -> Tensor:
    """x + y, in the place of x, unless a transform has made it anything but a tensor of y's size."""
    return x + y if is_transformed() else x.add_(y)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` of x [..., T, C], weight [out, C] and bias [out], by whatever is fastest where x lies."""
    if x.dim() < 3 or torch.compiler.is_compiling() or not (_suits_onednn(x) and x.is_contiguous()):
        return F.linear(x, weight, bias)
    rows = x.flatten(0, -3)[None].permute(0, 3, 1, 2)  # [1, C, n, T]
    return _convolution(rows, weight, bias).permute(0, 2, 3, 1).reshape(*x.shape[:-1], weight.shape[0])


class Attends(nn.Module):
    """What attends with a `backend` of `partitioned_attention`, an attribute that may be set at any time.

    A stage has one; a layer of stages has theirs, and setting it sets all of them.
    """

    _backend: str  # of stages alone

    @property
    def backend(self) -> str:
        names = [stage._backend for stage in _stages(self)]
        return ", ".join(dict.fromkeys(names))  # one, unless stages were given several

    @backend.setter
    def backend(self, name: str) -> None:
        set_backend(self, name)


def set_backend(network: Model, backend: str) -> Model:
    """Let every layer of this library in a network attend by a backend of `partitioned_attention`, in place.

    Args:
        network: any that holds our layers, or one of them. (`models.accelerate` sets that of others' blocks.)
        backend: "triton", "eager" or "auto".

    Returns:
        The network itself.

    Raises:
        TypeError: a network that is no module.
        ValueError: an unknown backend, or a network without a layer that attends.

    Examples:
        >>> from isa_triton import ISAModule
        >>> network = nn.Sequential(nn.Conv2d(3, 64, 1), ISAModule(64, 32, 64, 64))
        >>> set_backend(network, "eager")[1].backend
        'eager'
    """
    check_module("network", network)
    check_backend(backend)
    if not (stages := _stages(network)):
        raise ValueError(f"network must hold a layer of isa_triton that attends, got {type(network).__name__}")
    for stage in stages:
        stage._backend = backend
    return network


def _stages(network: nn.Module) -> list[Attends]:
    return [part for part in network.modules() if isinstance(part, Attends) and "_backend" in vars(part)]


class ConvNormReLU(nn.Sequential):
    """Convolution without bias, normalisation, activation: batch normalisation and ReLU unless told otherwise."""

    def __init__(self, conv: Any, norm_layer: NormLayer | None = None, activation: Activation = RELU) -> None:
        super().__init__()
        self.conv = conv
        norm_layer = BATCH_NORMS[conv.weight.dim() - 2] if norm_layer is None else norm_layer
        self.norm: Any = made("norm_layer", norm_layer, conv.out_channels)
        self.relu: Any = made("activation", activation)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.behind(self.conv(*inputs))

    def behind(self, y: Tensor) -> Tensor:
        """What comes behind the convolution."""
        y = self.norm(y)
        return _ReLU.apply(y) if _inductor_keeps_a_mask(self.relu, y) else self.relu(y)


def _inductor_keeps_a_mask(activation: nn.Module, x: Tensor) -> bool:
    """Whether `nn.ReLU` in a graph would keep a truth value a pixel for its gradient.

    Inductor (torch 2.14) moves these between memory and vectors on a CPU at 10 ns each, in the time of twenty pixels.
    """
    trains = torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting() and torch.is_grad_enabled()
    return trains and x.is_cpu and is_plain(activation, nn.ReLU)


class _ReLU(torch.autograd.Function):
    """ReLU whose gradient asks the result, which somebody keeps anyway, for its sign."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.clamp_min(0)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return dy * y.sign()

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor) -> tuple[Tensor, Any]:
        return _ReLU.apply(x), in_dims[0]


def made(name: str, make: Callable[..., nn.Module], *arguments: Any) -> nn.Module:
    """The module that an option makes. Raises TypeError, by name, where it makes none."""
    of = "of a number of channels" if arguments else "without arguments"
    try:
        module = make(*arguments)
    except TypeError as error:
        raise TypeError(f"{name} must make a torch.nn.Module, called {of}, got {short(make)}: {error}") from error
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name} must make a torch.nn.Module, called {of}, got {short(make)}: it makes {short(module)}")
    return module


def unit_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a layer's options that `ConvNormReLU` takes."""
    return {name: options[name] for name in ("norm_layer", "activation") if name in options}


def check_options(layer: nn.Module, options: Mapping[str, Any], valid: type) -> None:
    """Raises TypeError, in the layer's name, where an option is none of a TypedDict's."""
    names: frozenset[str] = valid.__optional_keys__  # type: ignore[attr-defined]
    if unknown := options.keys() - names:
        raise TypeError(
            f"{type(layer).__name__} takes no {', '.join(sorted(unknown))}; its options are {', '.join(sorted(names))}"
        )


def check_map(x: Any, channels: int, axes: int = 2) -> None:
    """Raises TypeError or ValueError where x is not [B, channels, H, W]; what `torch.fx` hands on is not looked at."""
    if is_proxy(x):
        return
    sides = ("L", "H, W", "D, H, W")[axes - 1]
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor [B, {channels}, {sides}], got {type(x).__name__}")
    if not x.is_floating_point() or x.layout != torch.strided or x.is_nested:
        raise TypeError(f"x must be a dense tensor of real floating-point numbers, got {x.dtype}, {x.layout}")
    if x.dim() != 2 + axes or x.shape[1] != channels or any(side < 1 for side in x.shape[2:]):
        raise ValueError(f"x must be [B, {channels}, {sides}] with {sides} of at least 1, got {tuple(x.shape)}")


def check_size(size: Any) -> None:
    """Raises TypeError or ValueError where (H, W) is no pair of integers of at least 1; tracers' values pass."""
    if wants_torch_operators() or is_proxy(size) or (isinstance(size, Sequence) and any(map(is_proxy, size))):
        return
    if not isinstance(size, (tuple, list)):
        raise TypeError(f"size must be a pair of integers (H, W), got {short(size)}")
    height, width = pair("size", size)
    if is_known_to_be(height < 1) or is_known_to_be(width < 1) or is_known_to_be(height * width >= MOST**2):
        raise ValueError(f"size must be at least (1, 1) and have less than 2**40 pixels, got {(height, width)}")


def make_partition(pattern: str, size: Sequence[int], partition_size: Sequence[int]) -> Partition:
    """The partition of a map of (H, W) pixels by the name of its pattern; P is clamped to the map."""
    return PATTERNS[pattern](size, [at_most(part, extent) for part, extent in zip(partition_size, size, strict=True)])


def at_most(part: int, size: int) -> int:
    """The smaller of a part and its whole."""
    if is_known_to_be(part <= size) or is_known_to_be(size % part == 0):
        return part
    return min(part, size)  # a symbol too: compilers take no side


def pads(pattern: str, padding: str) -> bool:
    """Whether a stage pads its map to a multiple of the partition size."""
    return padding == "zeros" and pattern in PARTITIONED


def attend_maps(
    q: Tensor, k: Tensor, v: Tensor, partition: Partition, num_heads: int, backend: str, dropout_p: float = 0.0
) -> Tensor:
    """Attention between maps: q, k [B, K, H, W] and v [B, V, H, W] -> context [B, V, H, W], K and V of all heads."""
    axes = range(1, q.dim() - 1)
    q, k, v = (_channels_last(x).unflatten(-1, (num_heads, -1)) for x in (q, k, v))  # [B, H, W, heads, width]
    context = partitioned_attention(q, k, v, partition, dropout_p=dropout_p, backend=backend)
    context = context.flatten(-2)  # [B, H, W, V]
    return context.permute(0, context.dim() - 1, *axes)


def _channels_last(x: Tensor) -> Tensor:
    return x.permute(0, *range(2, x.dim()), 1)


def pad_to_multiple(x: Tensor, partition_size: Sequence[int]) -> Tensor:
    """x [B, C, H, W] with zeros around it, centred, low side floor(pad / 2), up to a multiple of P on every axis."""
    pads = [ceil_div(extent, part) * part - extent for extent, part in zip(x.shape[2:], partition_size, strict=True)]
    return x if is_known_to_be(sum(pads) == 0) else F.pad(x, _around(pads))


def crop(x: Tensor, size: Sequence[int]) -> Tensor:
    """The inverse of `pad_to_multiple`: the centre of x [B, C, H, W]."""
    pads = [padded - extent for padded, extent in zip(x.shape[2:], size, strict=True)]
    return x if is_known_to_be(sum(pads) == 0) else unpad(x, _around(pads))


def _around(pads: Sequence[int]) -> list[int]:
    """As `F.pad` takes it: the last axis first, the low side before the high one."""
    return [side for pad in reversed(pads) for side in (pad // 2, pad - pad // 2)]


def unpad(x: Tensor, padding: Sequence[int]) -> Tensor:
    """The inverse of `F.pad`, of the same padding: a view, but in graphs, where it may be made of symbols."""
    if torch.compiler.is_compiling():  # slices are compared with sizes
        return F.pad(x, [-n for n in padding])
    for i in range(0, len(padding), 2):
        dim = x.dim() - 1 - i // 2
        x = x.narrow(dim, padding[i], x.shape[dim] - padding[i] - padding[i + 1])
    return x


def recomputed(layers: nn.Module, x: Tensor) -> Tensor:
    """layers(x), of which backward keeps x alone and computes the rest again, as often as it is asked for."""
    return checkpoint(_Recomputed(layers), x, use_reentrant=False)


class _Recomputed:
    """Layers, the first time; later their twins, whose running statistics count the batch that theirs have counted."""

    def __init__(self, layers: nn.Module) -> None:
        self.layers, self.again = layers, False

    def __call__(self, x: Tensor) -> Tensor:
        layers, self.again = _twin(self.layers) if self.again else self.layers, True
        return layers(x)


def _twin(layers: nn.Module) -> nn.Module:
    """Layers with the parameters of others and copies of their buffers; other threads may be running the others."""
    if "forward" in vars(layers):
        raise TypeError(
            f"recompute must be False for a {type(layers).__name__} whose forward was replaced in the object"
        )
    twin = type(layers).__new__(type(layers))
    twin.__dict__ = vars(layers).copy()
    twin._buffers = {name: None if x is None else x.clone() for name, x in layers._buffers.items()}
    twin._modules = {name: None if part is None else _twin(part) for name, part in layers._modules.items()}
    return twin


def one_of(name: str, value: str, valid: Collection[str]) -> str:
    """The value. Raises ValueError where it is not among the valid ones."""
    if not isinstance(value, str) or value not in valid:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, valid))}, got {value!r}")
    return value


def check_partition_size(value: Any, axes: int = 2) -> tuple[int, ...]:
    """(P_h, P_w) of a pair, or of one integer for both. Raises ValueError where it is neither."""
    every = (value,) * axes if type(value) is int else value
    if not isinstance(every, Sequence) or len(every) != axes or not all(type(p) is int and p >= 1 for p in every):
        wanted = ("one integer (P,)", "two integers (P_h, P_w)", "three integers (P_d, P_h, P_w)")[axes - 1]
        raise ValueError(f"partition_size must be {wanted} of at least 1, or one for all axes, got {short(value)}")
    if max(every) > LONGEST:
        raise ValueError(f"partition_size must be at most {LONGEST}, got {short(value)}")
    return tuple(every)


def each_partition_size(value: PartitionSize | Sequence[PartitionSize], axes: int = 2) -> tuple[tuple[int, ...], ...]:
    """One partition size or several, as several. Raises ValueError where there is none."""
    several = isinstance(value, Sequence) and len(value) > 0 and isinstance(value[0], Sequence)
    sizes: Any = value if several else (value,)
    return tuple(check_partition_size(size, axes) for size in sizes)


def check_axes(axes: Any) -> int:
    """The number of axes of a map. Raises ValueError where it is none of 1, 2 and 3."""
    if type(axes) is not int or not 1 <= axes <= MOST_AXES:
        raise ValueError(f"axes must be 1, 2 or 3, got {short(axes)}")
    return axes


def check_heads(num_heads: int, **widths: int) -> None:
    """Raises ValueError, by name, where num_heads is no integer of at least 1 that divides a width."""
    check_widths(num_heads=num_heads)
    for name, width in widths.items():
        if width % num_heads:
            raise ValueError(f"{name} must be a multiple of num_heads, {num_heads}, got {width}")


def check_widths(**widths: int) -> None:
    """Raises ValueError, by name, where a width is no integer of at least 1."""
    for name, width in widths.items():
        if type(width) is not int or width < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {short(width)}")
        if width > MOST:
            raise ValueError(f"{name} must be at most {MOST}, got {short(width)}")


def check_flag(name: str, value: bool) -> bool:
    """The value. Raises TypeError, by name, where it is neither True nor False."""
    if type(value) is not bool:
        raise TypeError(f"{name} must be True or False, got {short(value)}")
    return value


def check_probability(name: str, value: float, less: bool = False) -> float:
    """The value. Raises TypeError or ValueError, by name, where it is no number from 0 to 1, or not `less` than 1."""
    wanted = f"{name} must be a number from 0 to {'less than ' * less}1, got {short(value)}"
    if type(value) not in (int, float):
        raise TypeError(wanted)
    if not 0 <= value <= 1 or (less and value == 1):
        raise ValueError(wanted)
    return value


def check_module(name: str, value: Any) -> None:
    """Raises TypeError, by name, where a value is no torch.nn.Module."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, got {type(value).__name__}")
