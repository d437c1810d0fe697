"""Networks for inference: layers folded into fewer products, exported programs in PyTorch's own operators."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ._tracing import is_plain, leaf_of_fx
from .backend import plain
from .backend.contract import Call, Inputs
from .maps import (
    POINTWISE,
    Attends,
    ConvNormReLU,
    attend_maps,
    check_map,
    check_module,
    crop,
    make_partition,
    pad_to_multiple,
    pads,
)
from .modules import STAGES, InterlacedSparseSelfAttention, SelfAttention
from .norm import BATCH_NORMS


@torch.no_grad()
def fuse(module: nn.Module) -> nn.Module:
    """A copy of a network for inference, in which the layers of this library are folded; equal to rounding.

    Batch normalisation becomes part of the convolution before it. The first layers of key, query and value become one
    GEMM. Nothing stands between the values and the output's convolution but attention, which is linear in its values,
    so these two become one matrix, ``W_o (A (W_v x)) = A ((W_o W_v) x)``, unless the output is wider than the values or
    there are several heads, whose A differ.

    Args:
        module: `SelfAttention2d`, `InterlacedSparseSelfAttention`, `ISAModule`, `ISAHead`, or any network that holds
            some of them, of any dtype; it stays as it is. So do, in the copy, layers that are not exactly ours: of
            another normalisation than batch normalisation with running statistics, subclasses, adapted, hooked or
            parametrised ones. The logger "isa_triton.inference" names them, at INFO.

    Returns:
        The copy, in evaluation mode, whose parameters require no gradients. Folding it again changes nothing.

    Raises:
        ValueError: a network without a layer of this library.

    Examples:
        >>> folded = fuse(InterlacedSparseSelfAttention(64, 32, 64))
        >>> folded(torch.randn(2, 64, 13, 20)).shape
        torch.Size([2, 64, 13, 20])
    """
    check_module("module", module)
    # Tensors are copied by hand: fake ones have no deepcopy, and gradients stay behind.
    copies: dict[int, Any] = {id(x): nn.Parameter(x.clone(), requires_grad=False) for x in module.parameters()}
    copies |= {id(x): x.clone() for x in module.buffers()}
    ours = (*STAGES.values(), InterlacedSparseSelfAttention, ConvNormReLU, FoldedAttention)
    if not any(isinstance(layer, ours) for layer in module.modules()):
        raise ValueError(f"module must hold a layer of isa_triton, got {type(module).__name__} without one")
    folding = _Folding()
    folded = folding.fold(copy.deepcopy(module, copies), "").eval().requires_grad_(False)
    if folding.left:
        _logger.info("left as they are: %s", "; ".join(f"{name or 'itself'} ({why})" for name, why in folding.left))
    return folded


_logger = logging.getLogger(__name__)


class _Folding:
    """One pass over a network that is written over; what stands in several places is folded once."""

    def __init__(self) -> None:
        self.folded: dict[nn.Module, nn.Module] = {}
        self.left: list[tuple[str, str]] = []  # what stays as it is, by name, and why

    def fold(self, module: nn.Module, name: str, whole_stages: bool = True) -> nn.Module:
        """The folded form of a module; without `whole_stages`, whoever holds stages looks into them."""
        if module in self.folded:
            return self.folded[module]
        self.folded[module] = module
        if isinstance(module, (*STAGES.values(), InterlacedSparseSelfAttention)):
            stages = module.stages if isinstance(module, InterlacedSparseSelfAttention) else (module,)
            obstacle = _obstacle_to_call(module) or next(filter(None, map(_obstacle_to_stage, stages)), None)
            if obstacle is None and whole_stages:
                self.folded[module] = FoldedAttention(*stages)
                return self.folded[module]
            if obstacle is not None and whole_stages:
                self.left.append((name, obstacle))
            if type(module) not in _OURS:  # a subclass may do anything with its parts
                return module
            whole_stages = False
        elif isinstance(module, ConvNormReLU):
            if isinstance(module.norm, nn.Identity):
                return module
            if obstacle := _obstacle_to_unit(module):
                self.left.append((name, obstacle))
                return module
            weight, bias = (x.to(module.conv.weight) for x in _conv_and_norm(module))
            module.conv.weight, module.conv.bias = nn.Parameter(weight), nn.Parameter(bias)
            module.norm = nn.Identity()
            return module
        for part, child in list(module._modules.items()):
            if child is not None:
                setattr(module, part, self.fold(child, f"{name}.{part}".removeprefix("."), whole_stages))
        return module


_TORCHS_NORMS = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm
_OURS = (*STAGES.values(), InterlacedSparseSelfAttention, ConvNormReLU, *POINTWISE.values())


def _obstacle_to_call(module: nn.Module) -> str | None:
    """Why a module is not exactly what its class says."""
    others = nn.Sequential, nn.Conv1d, nn.Conv2d, nn.Conv3d
    kind = next((kind for kind in (*_OURS, *others) if type(module) is kind), None)
    if kind is None:
        return f"a {type(module).__name__} in place of a layer of ours"
    return None if is_plain(module, kind) else f"hooks of a {type(module).__name__}"


def _obstacle_to_unit(unit: nn.Module) -> str | None:
    """Why a convolution and the normalisation behind it are not one convolution; None where they are."""
    if obstacle := _obstacle_to_call(unit):
        return obstacle
    assert isinstance(unit, ConvNormReLU)
    norm = unit.norm
    of_batches = (
        any(is_plain(norm, kind) for kind in (*BATCH_NORMS.values(), *_TORCHS_NORMS)) and norm.running_mean is not None
    )
    if not of_batches and not isinstance(norm, nn.Identity):
        return f"{type(norm).__name__} is no plain batch normalisation with running statistics"
    return _obstacle_to_call(unit.conv)


def _obstacle_to_stage(stage: Any) -> str | None:
    """Why a stage cannot be folded as a whole; None where it can."""
    units = (*stage.query.children(), *stage.key.children(), stage.output)
    plain = (_obstacle_to_call(part) for part in (stage, stage.query, stage.key, stage.value))
    return next(filter(None, (*plain, *map(_obstacle_to_unit, units))), None)


class FoldedAttention(Attends):
    """Folded stages of attention in cascade: x [B, C, H, W] -> [B, out_channels, H, W], channels_last."""

    def __init__(self, *stages: SelfAttention) -> None:
        super().__init__()
        self.padded, self.partition_size = pads(stages[0].pattern, stages[0].padding), stages[0].partition_size
        self.in_channels, self.axes = stages[0].value.in_channels, stages[0].axes
        self.stages = nn.ModuleList(map(FoldedStage, stages))

    @leaf_of_fx
    def forward(self, x: Tensor) -> Tensor:
        check_map(x, self.in_channels, self.axes)
        size = x.shape[2:]
        if self.padded:
            x = pad_to_multiple(x, self.partition_size)
        for stage in self.stages:
            qkv = stage.project(x)  # type: ignore[operator]
            del x  # a stage's input is gone when its attention runs, a stage's projections when the next one projects
            x = stage.attend(*qkv)  # type: ignore[operator]
            del qkv
        return crop(x, size) if self.padded else x


class FoldedStage(Attends):
    """What `SelfAttention2d` computes between padding and cropping, in evaluation mode."""

    def __init__(self, stage: SelfAttention) -> None:
        super().__init__()
        self.pattern, self.partition_size, self._backend = stage.pattern, stage.partition_size, stage._backend
        self.num_heads = stage.num_heads
        like = stage.value.weight
        first = [_matrix(stage.query[0]), _matrix(stage.key[0])]
        self.key_channels = len(first[0][1])
        value, (output, bias) = like.to("cpu", torch.float64).flatten(1), _matrix(stage.output)
        if self.num_heads == 1 and len(output) <= len(value):
            first.append((output @ value, bias))  # the rows of A sum to one: what is added to values comes out again
            self.output = nn.Sequential(stage.output.relu)
        else:
            first.append((value, bias.new_zeros(len(value))))
            self.output = nn.Sequential(_conv1x1(output, bias, like), stage.output.relu)
        weights, biases = zip(*first, strict=True)
        self.first = _conv1x1(torch.cat(weights), torch.cat(biases), like)
        self.query, self.key = (_second(layers, like) for layers in (stage.query, stage.key))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k [B, K, H, W] and the values [B, V, H, W]."""
        first, K = self.first(x), self.key_channels  # [B, K + K + V, H, W]
        q, k = self.query(_writable(first[:, :K])), self.key(_writable(first[:, K : 2 * K]))
        return q, k, first[:, 2 * K :]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The stage's output."""
        partition = make_partition(self.pattern, q.shape[2:], self.partition_size)
        return self.output(_writable(attend_maps(q, k, v, partition, self.num_heads, self._backend)))


def _writable(x: Tensor) -> Tensor:
    """x for an activation that writes over it; a copy where autograd may need what was there."""
    return x.clone() if x.requires_grad else x


def _second(layers: nn.Sequential, like: Tensor) -> nn.Sequential:
    """What a query or key projection does after its first convolution."""
    first, second = layers
    assert isinstance(first, ConvNormReLU)
    assert isinstance(second, ConvNormReLU)
    return nn.Sequential(first.relu, _conv1x1(*_matrix(second), like), second.relu)


def _conv_and_norm(unit: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias, in fp64 on the CPU, of a convolution that does what a convolution and its norm do."""
    assert isinstance(unit, ConvNormReLU)
    conv, norm = unit.conv, unit.norm
    if isinstance(norm, nn.Identity):
        bias = conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias
        return conv.weight.to("cpu", torch.float64), bias.to("cpu", torch.float64)
    tensors = (conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    exact: Any = (None if x is None else x.to("cpu", torch.float64) for x in tensors)
    weight, bias, mean, variance, scale, shift = exact
    return fuse_conv_bn_weights(weight, bias, mean, variance, norm.eps, scale, shift)


def _matrix(unit: nn.Module) -> tuple[Tensor, Tensor]:
    """`_conv_and_norm` of a 1x1 convolution, the weight as a matrix [out, in]."""
    weight, bias = _conv_and_norm(unit)
    return weight.flatten(1), bias


def _conv1x1(weight: Tensor, bias: Tensor, like: Tensor) -> Any:
    """A pointwise convolution with this weight [out, in] and bias [out]; else as one whose weight is like another."""
    of_pixels = like.shape[2:]
    conv = POINTWISE[len(of_pixels)](weight.shape[1], weight.shape[0], bias=True)
    conv.weight = nn.Parameter(weight.view(*weight.shape, *of_pixels).to(like))
    conv.bias = nn.Parameter(bias.to(like))
    return conv


def decompose(program: ExportedProgram) -> ExportedProgram:
    """An exported program in PyTorch's own operators, for runtimes that do not know ours (ONNX).

    Every group's scores exist at once in it. With open sizes it takes maps of several groups of several tokens, if the
    example was one: PyTorch has another program where there is one (ONNX files have not).

    Args:
        program: of `torch.export.export`, of any network that holds our layers.

    Returns:
        A program of the same signature.

    Examples:
        >>> layer = fuse(InterlacedSparseSelfAttention(64, 32, 64))
        >>> program = decompose(torch.export.export(layer, (torch.randn(1, 64, 13, 20),)))
        >>> torch.onnx.export(program, f="layer.onnx")  # doctest: +SKIP
    """
    if not isinstance(program, ExportedProgram):
        raise TypeError(f"program must be what torch.export.export returns, got {type(program).__name__}")
    table = torch.export.default_decompositions()
    table[torch.ops.isa_triton.forward.default] = _plain_forward
    return program.run_decompositions(table)


def _plain_forward(*tensors_and_call: Any) -> tuple[Tensor, Tensor]:
    n = len(Inputs._fields)
    call = Call.unflatten(*tensors_and_call[n:])
    return plain.attention(Inputs(*tensors_and_call[:n]), call.scale, call.partition, call.dropout_p, call.cosine)
