"""Weights of others in our layers, and our layers folded for inference.

The published layouts were read at their sources: openseg.pytorch (the authors' `ISA_Module` and `ISANet`),
mmsegmentation and PaddleSeg (`ISAHead`). They are one function with other names, and with constants that a batch
normalisation absorbs exactly, in training as in evaluation:

    BN(W x + b) = BN'(W x),  where BN' has the running mean of BN less b.

The rows of a softmax sum to one, so a bias of the values passes through attention and is such a constant too.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from . import eager
from .modules import (
    Conv1x1,
    ConvNormReLU,
    InterlacedSparseSelfAttention,
    SelfAttention2d,
    attend_maps,
    check_map,
    crop,
    make_partition,
    pad_to_multiple,
    pads,
)
from .partition import Axis, Partition

Tensors = dict[str, Tensor]
Names = dict[str, str]  # of a published layout's tensors -> ours

# -- published layouts -------------------------------------------------------------------------------------------------

_ABN_EPS = 1e-5  # what in-place ABN adds to |weight|
_STATISTICS = {name: name for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
_PADDLE_STATISTICS = {"weight": "weight", "bias": "bias", "_mean": "running_mean", "_variance": "running_var"}


def from_openseg(state_dict: Mapping[str, Any], *, inplace_abn: bool = False) -> Tensors:
    """The authors' weights (openseg.pytorch) for `ISAHead`, or for `ISAModule` where they are of the module alone.

    Args:
        state_dict: of a whole network with `isa_head` and `cls_head`, or of an `ISA_Module` with any prefix; of any
            number of down factors. Tensors or NumPy arrays.
        inplace_abn: that the module was built for in-place ABN, whose activation is not ReLU:
            ``activation=partial(nn.LeakyReLU, 0.01)``. Released checkpoints have it.

    Returns:
        A state_dict that loads strictly. What belongs to neither layer (backbone, auxiliary head) is left out. The
        authors' network upsamples with ``align_corners=True``.

    Raises:
        TypeError: not a mapping.
        ValueError: no or several ISA modules, tensors missing or not expected, or normalisation of the other kind.

    >>> weights = from_openseg(torch.load("isanet.pth")["state_dict"], inplace_abn=True)  # doctest: +SKIP
    >>> ISAHead(2048, 512, 19, activation=partial(nn.LeakyReLU, 0.01)).load_state_dict(weights)  # doctest: +SKIP
    """
    prefix = _find(state_dict, "stages.0.long_range_sa.f_value.weight", "openseg.pytorch ISA_Module")
    module = _under(state_dict, prefix)
    has_abn = "conv_bn.1.weight" in module
    if has_abn != inplace_abn:
        found, wanted = ("in-place ABN", True) if has_abn else ("batch normalisation and ReLU", False)
        hint = ": build the module with activation=partial(nn.LeakyReLU, 0.01)" if has_abn else ""
        raise ValueError(f"this checkpoint has {found}, so inplace_abn must be {wanted}{hint}")
    norm = "" if has_abn else ".0"

    branches = len({key.split(".")[1] for key in module if key.startswith("stages.")})
    names = _unit("conv_bn.0", f"conv_bn.1{norm}", "fuse")
    if branches > 1:
        names |= _unit("up_conv.0", f"up_conv.1{norm}", "expand")
    for i in range(branches):
        for stage in ("long_range", "short_range"):
            theirs, ours = f"stages.{i}.{stage}_sa", f"branches.{i}.{stage}"
            for role in ("query", "key"):
                names |= _unit(f"{theirs}.f_{role}.0", f"{theirs}.f_{role}.1{norm}", f"{ours}.{role}.0")
                names |= _unit(f"{theirs}.f_{role}.2", f"{theirs}.f_{role}.3{norm}", f"{ours}.{role}.1")
            names[f"{theirs}.f_value.weight"] = f"{ours}.value.weight"
            names |= _unit(f"{theirs}.W.0", f"{theirs}.W.1{norm}", f"{ours}.output")

    tensors = module
    root = prefix.removesuffix("isa_head.2.")
    if f"{root}isa_head.0.weight" in state_dict and f"{root}cls_head.weight" in state_dict:
        tensors = {k: v for k, v in _under(state_dict, root).items() if k.startswith(("isa_head.", "cls_head."))}
        names = {f"isa_head.2.{theirs}": f"isa.{ours}" for theirs, ours in names.items()}
        names |= _unit("isa_head.0", f"isa_head.1{norm}", "reduce")
        names |= {"cls_head.weight": "classifier.weight", "cls_head.bias": "classifier.bias"}
    weights = _renamed(tensors, names, "openseg.pytorch")
    if has_abn:
        scales = {name: x for name, x in weights.items() if name.endswith("norm.weight")}
        weights |= {name: x.abs() + _ABN_EPS for name, x in scales.items()}
    return _absorbed(weights)


def from_mmseg(state_dict: Mapping[str, Any]) -> Tensors:
    """Weights of mmsegmentation's ISA head for `ISAHead`, from a whole network or from the head.

    Returns:
        A state_dict that loads strictly; `ISAHead` calls their isa_channels key_channels. The values' bias becomes part
        of the normalisation behind it.

    Raises:
        TypeError: not a mapping.
        ValueError: no or several ISA heads, or tensors missing or not expected.

    >>> weights = from_mmseg(torch.load("isanet_r50-d8.pth")["state_dict"])  # doctest: +SKIP
    >>> ISAHead(2048, 512, 19).load_state_dict(weights)  # doctest: +SKIP
    """
    names = _head_names("conv", "bn", _STATISTICS, classifier="conv_seg")
    prefix = _find(state_dict, "global_relation.value_project.weight", "mmsegmentation ISAHead")
    return _context_first(_renamed(_under(state_dict, prefix), names, "mmsegmentation"))


def from_paddleseg(state_dict: Mapping[str, Any]) -> Tensors:
    """Weights of PaddleSeg's ISANet for `ISAHead`: as `from_mmseg`; its auxiliary head is left out.

    Args:
        state_dict: of the network or of its head, NumPy arrays (what ``paddle.load(path, return_numpy=True)`` returns)
            or tensors.

    >>> ISAHead(2048, 512, 19).load_state_dict(from_paddleseg(arrays))  # doctest: +SKIP
    """
    names = _head_names("_conv", "_batch_norm", _PADDLE_STATISTICS, classifier="cls.1")
    prefix = _find(state_dict, "global_relation.value_project.weight", "PaddleSeg ISANet")
    tensors = {name: x for name, x in _under(state_dict, prefix).items() if not name.startswith("aux.")}
    return _context_first(_renamed(tensors, names, "PaddleSeg"))


def _head_names(conv: str, norm: str, statistics: Names, classifier: str) -> Names:
    """The names that mmsegmentation gave and PaddleSeg took over."""

    def unit(theirs: str, ours: str) -> Names:
        return _unit(f"{theirs}.{conv}", f"{theirs}.{norm}", ours, statistics)

    names = unit("in_conv", "reduce") | unit("out_conv", "isa.fuse")
    for theirs, stage in (("global_relation", "long_range"), ("local_relation", "short_range")):
        ours = f"isa.branches.0.{stage}"
        for role in ("query", "key"):
            for i in (0, 1):
                names |= unit(f"{theirs}.{role}_project.{i}", f"{ours}.{role}.{i}")
        names |= unit(f"{theirs}.output_project", f"{ours}.output")
        names |= {f"{theirs}.value_project.{part}": f"{ours}.value.{part}" for part in ("weight", "bias")}
    return names | {f"{classifier}.{part}": f"classifier.{part}" for part in ("weight", "bias")}


def _unit(conv: str, norm: str, ours: str, statistics: Names = _STATISTICS) -> Names:
    """The names of a convolution, with or without bias, and of the normalisation behind it."""
    names = {f"{conv}.weight": f"{ours}.conv.weight", f"{conv}.bias": f"{ours}.conv.bias"}
    return names | {f"{norm}.{theirs}": f"{ours}.norm.{part}" for theirs, part in statistics.items()}


def _find(state_dict: Mapping[str, Any], landmark: str, what: str) -> str:
    """The prefix of the one module of a layout, by the name of a tensor that no other layout has."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a mapping from names to tensors, got {type(state_dict).__name__}")
    prefixes = [str(key).removesuffix(landmark) for key in state_dict if str(key).endswith(landmark)]
    if not prefixes:
        inner = next((key for key in ("state_dict", "model") if isinstance(state_dict.get(key), Mapping)), None)
        hint = f"; it holds {inner!r}: pass that" if inner else ""
        raise ValueError(f"state_dict holds no {what}: no name ends with {landmark!r}{hint}")
    if len(prefixes) > 1:
        raise ValueError(f"state_dict holds several of {what}, choose one: {', '.join(map(repr, prefixes))}")
    return prefixes[0]


def _under(state_dict: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): x for key, x in state_dict.items() if key.startswith(prefix)}


def _renamed(tensors: Mapping[str, Any], names: Names, layout: str) -> Tensors:
    """Tensors under our names; every one is accounted for."""
    optional = {theirs for theirs, ours in names.items() if ours.endswith((".conv.bias", ".num_batches_tracked"))}
    missing, unexpected = names.keys() - tensors.keys() - optional, tensors.keys() - names.keys()
    if missing or unexpected:
        found = (("missing", missing), ("unexpected", unexpected))
        said = "; ".join(f"{word}: {', '.join(sorted(names))}" for word, names in found if names)
        raise ValueError(f"not the layout of {layout}: {said}")
    return {names[theirs]: torch.as_tensor(x) for theirs, x in tensors.items()}


def _context_first(weights: Tensors) -> Tensors:
    """Of a head that concatenates [context, input], for ours, which concatenates [input, context]."""
    fuse = weights["isa.fuse.conv.weight"]
    context, x = fuse.chunk(2, dim=1)
    return _absorbed(weights | {"isa.fuse.conv.weight": torch.cat([x, context], 1)})


def _absorbed(weights: Tensors) -> Tensors:
    """Every bias in front of a normalisation taken into its running mean; counters of batches where there was none."""
    weights = dict(weights)
    for name in [name for name in weights if name.endswith((".conv.bias", ".value.bias"))]:
        bias, unit = weights.pop(name), name.rpartition(".conv.bias")[0]
        if name.endswith(".value.bias"):  # attention leaves it as it is, the output projection does not
            unit = name.removesuffix("value.bias") + "output"
            bias = weights[f"{unit}.conv.weight"].flatten(1) @ bias
        weights[f"{unit}.norm.running_mean"] = weights[f"{unit}.norm.running_mean"] - bias
    for name in [name for name in weights if name.endswith("norm.running_mean")]:
        weights.setdefault(name.removesuffix("running_mean") + "num_batches_tracked", torch.tensor(0))
    return weights


# -- inference ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def fuse(module: nn.Module) -> nn.Module:
    """A copy of a network for inference, in which every layer of this library is folded; equal to rounding.

    Batch normalisation becomes part of the convolution before it. The first layers of key, query and value become one
    GEMM. Nothing stands between the values and the output's convolution but attention, which is linear in its values,
    so these two become one matrix, ``W_o (A (W_v x)) = A ((W_o W_v) x)``, unless the output is wider than the values.

    Args:
        module: `SelfAttention2d`, `InterlacedSparseSelfAttention`, `ISAModule`, `ISAHead`, or any network that holds
            some of them, of any dtype; it stays as it is. Subclasses stay as they are, too.

    Returns:
        The copy, in evaluation mode, whose parameters require no gradients.

    Raises:
        ValueError: nothing to fold, or a normalisation that is not a batch normalisation with running statistics.

    >>> fused = fuse(InterlacedSparseSelfAttention(64, 32, 64))
    >>> fused(torch.randn(2, 64, 13, 20)).shape
    torch.Size([2, 64, 13, 20])
    """
    # Tensors are copied by hand: fake ones have no deepcopy, and gradients stay behind.
    copies: dict[int, Any] = {id(x): nn.Parameter(x.clone(), requires_grad=False) for x in module.parameters()}
    copies |= {id(x): x.clone() for x in module.buffers()}
    fused = _fuse(copy.deepcopy(module, copies), {}).eval().requires_grad_(False)
    if not any(isinstance(layer, (FusedAttention, ConvNormReLU)) for layer in fused.modules()):
        raise ValueError(f"module must hold a layer of isa_triton, got {type(module).__name__} without one")
    return fused


def _fuse(module: nn.Module, folded: dict[nn.Module, nn.Module]) -> nn.Module:
    """The folded form of a module, which is written over; what stands in several places is folded once."""
    if module in folded:
        return folded[module]
    folded[module] = module
    if type(module) is SelfAttention2d:
        folded[module] = FusedAttention(module)
    elif type(module) is InterlacedSparseSelfAttention:
        folded[module] = FusedAttention(*module.stages)
    elif type(module) is ConvNormReLU:
        weight, bias = (x.to(module.conv.weight) for x in _folded(module))
        module.conv.weight, module.conv.bias = nn.Parameter(weight), nn.Parameter(bias)
        module.norm = nn.Identity()
    else:
        for name, child in list(module._modules.items()):
            if child is not None:
                setattr(module, name, _fuse(child, folded))
    return folded[module]


class FusedAttention(nn.Module):
    """Folded stages of attention in cascade: x [B, C, H, W] -> [B, out_channels, H, W], channels_last."""

    def __init__(self, *stages: SelfAttention2d) -> None:
        super().__init__()
        self.padded, self.partition_size = pads(stages[0].pattern, stages[0].padding), stages[0].partition_size
        self.in_channels = stages[0].value.in_channels
        self.stages = nn.ModuleList(map(FusedStage, stages))

    def forward(self, x: Tensor) -> Tensor:
        check_map(x, self.in_channels)
        size = x.shape[2:]
        if self.padded:
            x = pad_to_multiple(x, self.partition_size)
        for stage in self.stages:
            qkv = stage.project(x)  # type: ignore[operator]
            del x  # a stage's input is gone when its attention runs, a stage's projections when the next one projects
            x = stage.attend(*qkv)  # type: ignore[operator]
            del qkv
        return crop(x, size) if self.padded else x


class FusedStage(nn.Module):
    """What `SelfAttention2d` computes between padding and cropping, in evaluation mode."""

    def __init__(self, stage: SelfAttention2d) -> None:
        super().__init__()
        self.pattern, self.partition_size, self.backend = stage.pattern, stage.partition_size, stage.backend
        like = stage.value.weight
        first = [_matrix(stage.query[0]), _matrix(stage.key[0])]
        self.key_channels = len(first[0][1])
        value, (output, bias) = like.to("cpu", torch.float64).flatten(1), _matrix(stage.output)
        if len(output) <= len(value):
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
        partition = make_partition(self.pattern, (q.shape[2], q.shape[3]), self.partition_size)
        return self.output(_writable(attend_maps(q, k, v, partition, self.backend)))


def _writable(x: Tensor) -> Tensor:
    """x for an activation that writes over it; a copy where autograd may need what was there."""
    return x.clone() if x.requires_grad else x


def _second(layers: nn.Sequential, like: Tensor) -> nn.Sequential:
    """What a query or key projection does after its first convolution."""
    first, second = layers
    assert isinstance(first, ConvNormReLU)
    assert isinstance(second, ConvNormReLU)
    return nn.Sequential(first.relu, _conv1x1(*_matrix(second), like), second.relu)


def _folded(unit: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias, in fp64 on the CPU, of a convolution that does what a convolution and its norm do."""
    assert isinstance(unit, ConvNormReLU)
    conv, norm = unit.conv, unit.norm
    if not isinstance(norm, _BatchNorm) or norm.running_mean is None:
        raise ValueError(f"only batch normalisation with running statistics folds into a convolution, got {norm}")
    tensors = (conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    exact: Any = (None if x is None else x.to("cpu", torch.float64) for x in tensors)
    weight, bias, mean, variance, scale, shift = exact
    return fuse_conv_bn_weights(weight, bias, mean, variance, norm.eps, scale, shift)


def _matrix(unit: nn.Module) -> tuple[Tensor, Tensor]:
    """`_folded` of a 1x1 convolution, the weight as a matrix [out, in]."""
    weight, bias = _folded(unit)
    return weight.flatten(1), bias


def _conv1x1(weight: Tensor, bias: Tensor, like: Tensor) -> Conv1x1:
    """A 1x1 convolution with this weight [out, in] and bias [out], of the dtype and on the device of another tensor."""
    conv = Conv1x1(weight.shape[1], weight.shape[0], bias=True)
    conv.weight, conv.bias = nn.Parameter(weight[..., None, None].to(like)), nn.Parameter(bias.to(like))
    return conv


# -- export ------------------------------------------------------------------------------------------------------------


def decompose(program: ExportedProgram) -> ExportedProgram:
    """An exported program in PyTorch's own operators, for runtimes that do not know ours (ONNX).

    Every group's scores exist at once in it.

    >>> layer = fuse(InterlacedSparseSelfAttention(64, 32, 64))
    >>> program = decompose(torch.export.export(layer, (torch.randn(1, 64, 13, 20),)))
    >>> torch.onnx.export(program, f="layer.onnx")  # doctest: +SKIP
    """
    table = torch.export.default_decompositions()
    table[torch.ops.isa_triton.forward.default] = _plain_forward
    return program.run_decompositions(table)


def _plain_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, h: Any, w: Any, *_: Any
) -> tuple[Tensor, Tensor]:
    return eager.plain(q, k, v, bias, scale, Partition(Axis(*h), Axis(*w)))
