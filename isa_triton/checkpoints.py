"""Published weights in our layers.

The published layouts were read at their sources: openseg.pytorch (the authors' `ISA_Module` and `ISANet`),
mmsegmentation and PaddleSeg (`ISAHead`). They are one function with other names, and with constants that a batch
normalisation absorbs exactly, in training as in evaluation:

    BN(W x + b) = BN'(W x),  where BN' has the running mean of BN less b.

The rows of a softmax sum to one, so a bias of the values passes through attention and is such a constant too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ._state_dict import find_prefix, plain_tensor, under

_HRFORMER = "attn.q_proj.weight"  # behind the name of the layer
_HRFORMER_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj")
Tensors = dict[str, Tensor]
Names = dict[str, str]  # of a published layout's tensors -> ours

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

    Examples:
        >>> weights = from_openseg(torch.load("isanet.pth")["state_dict"], inplace_abn=True)  # doctest: +SKIP
        >>> ISAHead(2048, 512, 19, activation=partial(nn.LeakyReLU, 0.01)).load_state_dict(weights)  # doctest: +SKIP
    """
    if type(inplace_abn) is not bool:
        raise TypeError(f"inplace_abn must be True or False, got {inplace_abn!r}")
    prefix = find_prefix(state_dict, "stages.0.long_range_sa.f_value.weight", "openseg.pytorch ISA_Module")
    module = under(state_dict, prefix)
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
        tensors = {k: v for k, v in under(state_dict, root).items() if k.startswith(("isa_head.", "cls_head."))}
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

    Args:
        state_dict: of the network or of its head, with any prefix. Tensors or NumPy arrays.

    Returns:
        A state_dict that loads strictly; `ISAHead` calls their isa_channels key_channels. The values' bias becomes part
        of the normalisation behind it.

    Raises:
        TypeError: not a mapping.
        ValueError: no or several ISA heads, or tensors missing or not expected.

    Examples:
        >>> weights = from_mmseg(torch.load("isanet_r50-d8.pth")["state_dict"])  # doctest: +SKIP
        >>> ISAHead(2048, 512, 19).load_state_dict(weights)  # doctest: +SKIP
    """
    names = _head_names("conv", "bn", _STATISTICS, classifier="conv_seg")
    prefix = find_prefix(state_dict, "global_relation.value_project.weight", "mmsegmentation ISAHead")
    return _context_first(_renamed(under(state_dict, prefix), names, "mmsegmentation"))


def from_paddleseg(state_dict: Mapping[str, Any]) -> Tensors:
    """Weights of PaddleSeg's ISANet for `ISAHead`: as `from_mmseg`; its auxiliary head is left out.

    Args:
        state_dict: of the network or of its head, NumPy arrays (what ``paddle.load(path, return_numpy=True)`` returns)
            or tensors.

    Returns:
        A state_dict that loads strictly.

    Raises:
        TypeError: not a mapping.
        ValueError: no or several ISA heads, or tensors missing or not expected.

    Examples:
        >>> ISAHead(2048, 512, 19).load_state_dict(from_paddleseg(arrays))  # doctest: +SKIP
    """
    names = _head_names("_conv", "_batch_norm", _PADDLE_STATISTICS, classifier="cls.1")
    prefix = find_prefix(state_dict, "global_relation.value_project.weight", "PaddleSeg ISANet")
    tensors = {name: x for name, x in under(state_dict, prefix).items() if not name.startswith("aux.")}
    return _context_first(_renamed(tensors, names, "PaddleSeg"))


def from_hrformer(state_dict: Mapping[str, Any]) -> dict[str, Tensors]:
    """The weights of every attention in a network of HRFormer's authors (classification, pose and segmentation alike).

    Args:
        state_dict: of a network, or of one layer of it, with any prefix. Tensors or NumPy arrays.

    Returns:
        By the name that the authors' layer has in the network: a state_dict for `HRFormerAttention`, which loads
        strictly. Buffers of distances are left out, which follow from the window.

    Raises:
        TypeError: not a mapping.
        ValueError: no attention of HRFormer in it, or tensors missing or not expected.

    Examples:
        >>> found = from_hrformer(torch.load("hrt_small.pth")["model"])  # doctest: +SKIP
        >>> HRFormerAttention(32, 1).load_state_dict(found["stage2.0.branches.0.0.attn"])  # doctest: +SKIP
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a mapping from names to tensors, got {type(state_dict).__name__}")
    layers = [str(key).removesuffix(_HRFORMER) for key in state_dict if str(key).endswith(_HRFORMER)]
    if not layers:
        raise ValueError(f"state_dict holds no attention of HRFormer: no name ends with {_HRFORMER!r}")
    names = {f"{layer}.{part}": f"{layer}.{part}" for layer in _HRFORMER_LAYERS for part in ("weight", "bias")}
    found = {}
    for layer in layers:
        tensors = under(state_dict, f"{layer}attn.")
        tensors.pop("relative_position_index", None)
        table = "relative_position_bias_table"
        found[layer.removesuffix(".")] = _renamed(
            tensors, names | {table: table} if table in tensors else names, "HRFormer"
        )
    return found


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


def _renamed(tensors: Mapping[str, Any], names: Names, layout: str) -> Tensors:
    """Tensors under our names; every one is accounted for."""
    optional = {theirs for theirs, ours in names.items() if ours.endswith((".conv.bias", ".num_batches_tracked"))}
    missing, unexpected = names.keys() - tensors.keys() - optional, tensors.keys() - names.keys()
    if missing or unexpected:
        found = (("missing", missing), ("unexpected", unexpected))
        said = "; ".join(f"{word}: {', '.join(sorted(names))}" for word, names in found if names)
        raise ValueError(f"not the layout of {layout}: {said}")
    return {names[theirs]: plain_tensor(x) for theirs, x in tensors.items()}


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
        weights.setdefault(name.removesuffix("running_mean") + "num_batches_tracked", torch.tensor(0, device="cpu"))
    return weights
