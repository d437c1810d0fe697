"""Published weights in whatever wrapped the network that was saved: prefixes, averages beside them, parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_OF_AVERAGES = ("steps", "n_averaged")  # beside the weights of an averaged model (mmengine, torch.optim.swa_utils)


def find_prefix(state_dict: Mapping[str, Any], landmark: str, what: str) -> str:
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


def under(state_dict: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """What has a prefix, without it; bookkeeping of averaged weights (EMA) left out."""
    tensors = {key.removeprefix(prefix): x for key, x in state_dict.items() if key.startswith(prefix)}
    return {name: x for name, x in tensors.items() if name not in _OF_AVERAGES and not name.startswith("ema_")}


def plain_tensor(x: Any) -> Tensor:
    """A tensor or NumPy array as a plain tensor with values, whatever the default device is; no parameter."""
    return x.detach() if isinstance(x, Tensor) else torch.as_tensor(x, device="cpu")
