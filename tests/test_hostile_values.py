"""Every argument of every public callable, given what nobody should give it: taken, or refused by name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from timm import create_model
from torch import nn

from isa_triton import (
    Axis,
    InterlacedSparseSelfAttention,
    ISAHead,
    ISAModule,
    Partition,
    SelfAttention2d,
    checkpoints,
    inference,
    partitioned_attention,
    partitioned_attention_with_lse,
    tiles,
)
from isa_triton.models import accelerate, block, ianet, report, restore

HOSTILE: dict[str, Callable[[], Any]] = {  # made anew for each call: generators are used up
    "None": lambda: None,
    "True": lambda: True,
    "False": lambda: False,
    "0": lambda: 0,
    "-1": lambda: -1,
    "3": lambda: 3,
    "1.5": lambda: 1.5,
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "2**62": lambda: 2**62,
    "10**30": lambda: 10**30,
    "1j": lambda: 1j,
    "empty string": lambda: "",
    "string": lambda: "no",
    "bytes": lambda: b"no",
    "()": tuple,
    "[]": list,
    "{}": dict,
    "set": lambda: {2, 3},
    "generator": lambda: (n for n in (2, 3)),
    "object": object,
    "(0, 0)": lambda: (0, 0),
    "(-1, 2)": lambda: (-1, 2),
    "(2, 3, 4)": lambda: (2, 3, 4),
    "(2.0, 3)": lambda: (2.0, 3),
    "('2', '3')": lambda: ("2", "3"),
    "(2**62, 2**62)": lambda: (2**62, 2**62),
    "((2, 3), None)": lambda: ((2, 3), None),
    "number of NumPy": lambda: np.float32(2),
    "array": lambda: np.ones((1, 4, 6, 8), np.float32),
    "scalar tensor": lambda: torch.ones(()),
    "empty tensor": lambda: torch.ones(0),
    "integers": lambda: torch.ones(1, 4, 6, 8, dtype=torch.int64),
    "complex": lambda: torch.ones(1, 4, 6, 8, dtype=torch.complex64),
    "double": lambda: torch.ones(1, 4, 6, 8, dtype=torch.float64),
    "other channels": lambda: torch.ones(1, 5, 6, 8),
    "no rows": lambda: torch.ones(1, 4, 0, 8),
    "three dimensions": lambda: torch.ones(4, 6, 8),
    "sparse": lambda: torch.ones(1, 4, 6, 8).to_sparse(),
    "meta": lambda: torch.ones(1, 4, 6, 8, device="meta"),
    "class": lambda: int,
    "function": lambda: len,
    "module": lambda: nn.ReLU(),
    "partition": lambda: Partition.rows((5, 7)),
}

SIZE, Q = (4, 6), torch.zeros(1, 4, 6, 1, 2)
ATTENTION = {"q": Q, "k": Q, "v": Q, "partition": Partition.rows(SIZE), "bias": None, "scale": None, "backend": "auto"}
STAGE = {
    "num_heads": 1, "padding": "zeros", "backend": "auto", "norm_layer": nn.BatchNorm2d, "activation": nn.ReLU,
    "recompute": False, "partition_size": (2, 3),
}  # fmt: skip
CASCADE = {"order": "long-short"}
WIDTHS = {"in_channels": 4, "key_channels": 2, "value_channels": 2, "out_channels": 4}
X = torch.zeros(2, 4, 6, 8)
HEAD = {"in_channels": 4, "channels": 4, "num_classes": 3, "key_channels": 2}


SWIN = create_model("swin_tiny_patch4_window7_224", img_size=56, depths=(2,), embed_dim=16, num_heads=(1,))


def built(layer: Callable[..., nn.Module], x: torch.Tensor, **arguments: Any) -> Any:
    """A layer that was made has to run."""
    return layer(**arguments)(x)


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())


DOORS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {  # and arguments that it takes
    "partitioned_attention": (partitioned_attention, ATTENTION),
    "partitioned_attention_with_lse": (partitioned_attention_with_lse, ATTENTION),
    "Partition": (
        lambda h, w: partitioned_attention(Q, Q, Q, Partition(h, w)), {"h": Axis.local(4, 2), "w": Axis.local(6, 3)}
    ),
    "Partition.interlaced": (Partition.interlaced, {"size": SIZE, "stride": (2, 3)}),
    "Partition.interlaced, grid": (Partition.interlaced, {"size": SIZE, "grid": (2, 3)}),
    "Partition.local": (Partition.local, {"size": SIZE, "window": (2, 3), "shift": (1, 1), "cyclic": (True, False)}),
    "Partition.axial": (Partition.axial, {"size": SIZE, "axis": 1}),
    "Axis.interlaced": (Axis.interlaced, {"size": 6, "stride": 2}),
    "Axis.grid": (Axis.grid, {"size": 6, "tokens": 2}),
    "Axis.local": (Axis.local, {"size": 6, "window": 3, "shift": 1, "cyclic": True}),
    "Axis.whole": (Axis.whole, {"size": 6}),
    "Axis.each": (Axis.each, {"size": 6}),
    "Partition.rows": (Partition.rows, {"size": SIZE}),
    "Partition.columns": (Partition.columns, {"size": SIZE}),
    "Partition.dense": (Partition.dense, {"size": SIZE}),
    "SelfAttention2d": (partial(built, SelfAttention2d, X), WIDTHS | STAGE | {"pattern": "local"}),
    "InterlacedSparseSelfAttention": (partial(built, InterlacedSparseSelfAttention, X), WIDTHS | STAGE | CASCADE),
    "ISAModule": (partial(built, ISAModule, X), WIDTHS | STAGE | CASCADE | {"dropout": 0.1}),
    "ISAHead": (partial(built, ISAHead, X), HEAD | STAGE | CASCADE | {"dropout": 0.1, "align_corners": False}),
    "SelfAttention2d, called": (SelfAttention2d(4, 2, 2, pattern="local"), {"x": X}),
    "InterlacedSparseSelfAttention, called": (InterlacedSparseSelfAttention(4, 2, 2), {"x": X}),
    "ISAModule, called": (ISAModule(4, 2, 2, 4), {"x": X}),
    "ISAHead, called": (ISAHead(4, 4, 3, key_channels=2), {"x": X, "size": (12, 16)}),
    "fuse": (inference.fuse, {"module": network()}),
    "decompose": (inference.decompose, {"program": None}),
    "from_openseg": (checkpoints.from_openseg, {"state_dict": {}, "inplace_abn": False}),
    "from_mmseg": (checkpoints.from_mmseg, {"state_dict": {}}),
    "from_paddleseg": (checkpoints.from_paddleseg, {"state_dict": {}}),
    "ianet.from_mmseg": (ianet.from_mmseg, {"state_dict": {}}),
    "accelerate": (accelerate, {"model": SWIN, "backend": "auto"}),
    "restore": (restore, {"model": network()}),
    "report": (report, {"model": network()}),
    "ISABlock": (
        partial(built, block.ISABlock, X), {"channels": 4, "key_channels": 2, "value_channels": 2} | STAGE | CASCADE
    ),
    "insert": (lambda **given: block.insert(**{"model": network()} | given), {"after": "1", "block": nn.ReLU()}),
    "insert, model": (block.insert, {"model": network(), "after": "1", "block": nn.ReLU()}),
    "tiles.lookup": (
        tiles.lookup,
        {"target": "sm_90", "step": "forward", "key_width": 32, "value_width": 32, "dtype": "float16", "tokens": 64},
    ),
}  # fmt: skip


def calls() -> Iterator[tuple[str, str, str]]:
    for name, (_, arguments) in DOORS.items():
        for argument in arguments:
            for hostile in HOSTILE:
                yield name, argument, hostile


def outcome(name: str, argument: str, hostile: str) -> str:
    """What a call comes to: taken, refused by name, refused without one, or what else was raised."""
    call, arguments = DOORS[name]
    try:
        call(**arguments | {argument: HOSTILE[hostile]()})
    except (TypeError, ValueError) as error:
        words = str(error)
        named = re.search(rf"\b{argument}\b", words) or re.match(
            "|".join(rf"{name}\b" for name in (*arguments, "x")), words
        )
        return "refused" if named else f"unnamed: {type(error).__name__}: {error}"
    except UserWarning:
        return "taken"  # with a word of warning
    except RuntimeError as error:
        mismatch = argument == "x" and hostile in ("double", "meta")  # to the weights', as PyTorch's layers say it
        return "refused" if mismatch else f"other: {type(error).__name__}: {error}"
    except Exception as error:
        return f"other: {type(error).__name__}: {error}"
    return "taken"


def test_every_argument_is_taken_or_refused_by_name() -> None:
    outcomes = {call: outcome(*call) for call in calls()}
    assert len(outcomes) == len(HOSTILE) * sum(len(arguments) for _, arguments in DOORS.values()) > 5000
    assert {call: words for call, words in outcomes.items() if words not in ("taken", "refused")} == {}
    assert Counter(outcomes.values())["taken"] < 200
