"""What is wrong is refused at once: the exception, and the words that say what came and what would be valid."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import arguments, sharding
from bench.__main__ import COMMANDS as BENCH
from bench.__main__ import main
from bench.records import columns as columns_of
from bench.workload import Cost
from isa_triton import (
    Axis,
    InterlacedSparseSelfAttention,
    ISAHead,
    ISAModule,
    Partition,
    SelfAttention2d,
    partitioned_attention,
    partitioned_attention_with_lse,
    tiles,
)

Row = tuple[Callable[[], Any], type[Exception], str]
interlaced, local = Partition.interlaced, Partition.local
X = torch.zeros(1, 4, 6, 8)
Q = torch.zeros(1, 4, 6, 1, 2)
BIAS = torch.zeros(1, 6, 6)
EXTRA = torch.zeros(1, 3, 1, 2)
FOUR, THREE = torch.zeros(1, 4, 6, 4, 2), torch.zeros(1, 4, 6, 3, 2)
WINDOWS = local((4, 6), window=(2, 3))


def columns(*numbers: Any) -> Partition:
    """`WINDOWS`, its columns of these numbers."""
    return Partition(WINDOWS.h, Axis(*numbers))


def attend(*arguments: Any, **options: Any) -> None:
    """Attention, which must be refused in the same words with lse and without."""
    with pytest.raises((TypeError, ValueError), match=r".+") as refused:
        partitioned_attention_with_lse(*arguments, **options)
    with pytest.raises(refused.type, match=f"^{re.escape(str(refused.value))}$"):
        partitioned_attention(*arguments, **options)
    raise refused.value


def stage(*widths: Any, **keywords: Any) -> SelfAttention2d:
    return SelfAttention2d(*widths or (4, 2, 3), **{"pattern": "local", **keywords})


def isa(*widths: Any, **keywords: Any) -> InterlacedSparseSelfAttention:
    return InterlacedSparseSelfAttention(*widths or (4, 2, 3), **keywords)


PARTITIONS: list[Row] = [
    (lambda: interlaced((4, 6)), TypeError, "give exactly one of stride"),
    (lambda: interlaced((4, 6), stride=(2, 2), grid=(2, 2)), TypeError, "give exactly one of stride"),
    (lambda: interlaced((4, 6), stride=2), TypeError, "stride must be a pair of integers (h, w), got 2"),
    (lambda: interlaced((4, 6), stride=(2, 2.5)), TypeError, "stride must be a pair of integers (h, w), got (2, 2.5)"),
    (lambda: interlaced((4, 6), stride=(2.0, 2)), TypeError, "stride must be a pair of integers (h, w), got (2.0, 2)"),
    (lambda: interlaced((4, 6), stride=(float("nan"), 2)), TypeError, "stride must be a pair of integers"),
    (lambda: interlaced((4, 6), stride=(True, 2)), TypeError, "stride must be a pair of integers"),
    (lambda: interlaced((4, 6), stride=(2, 10**400)), ValueError, "stride must lie between"),
    (lambda: local(np.zeros((4, 6)), window=(2, 3)), TypeError, "size must be one to three integers"),
    (lambda: interlaced((4, 6), stride=(2, "3")), TypeError, "stride must be a pair of integers"),
    (lambda: interlaced((4, 6), stride=(0, 2)), ValueError, "stride must lie between (1, 1) and the map's (4, 6)"),
    (lambda: interlaced((4, 6), stride=(5, 2)), ValueError, "got (5, 2)"),
    (lambda: interlaced((4, 6), stride=(2, 7)), ValueError, "got (2, 7)"),
    (lambda: interlaced((4, 6), grid=(-1, 2)), ValueError, "grid must lie between"),
    (
        lambda: interlaced((4, 6, 8, 2), stride=(2, 2)),
        TypeError,
        "size must be one to three integers, got (4, 6, 8, 2)",
    ),
    (lambda: Partition.rows((4,)), TypeError, "size must be two or three integers, got (4,)"),
    (lambda: Partition.axial((4, 6), 2), ValueError, "axis must lie between -2 and 1, got 2"),
    (lambda: local((4, 6), (2, 3), cyclic=(True,)), TypeError, "cyclic must be True or False, or one of them for each"),
    (lambda: Axis.local(6, 7), ValueError, "window must lie between 1 and the axis's 6, got 7"),
    (lambda: Axis.local(6, 3, 3), ValueError, "shift must be at least 0 and less than the window 3, got 3"),
    (lambda: Axis.interlaced("6", 3), TypeError, "size must be an integer, got '6'"),
    (lambda: Axis.whole(0), ValueError, "size must be at least 1, got 0"),
    (lambda: attend(Q, Q, Q, Partition()), TypeError, "partition must have one to three axes, got 0"),
    (
        lambda: attend(Q, Q, Q, columns(6, 2, 3, 3, 1, 0, 1)),
        TypeError,
        "partition.w.cyclic must be True or False, got 1",
    ),
    (
        lambda: attend(Q, Q, Q, Partition.dense((4,))),
        ValueError,
        "q must be [B, L, heads, width], got shape (1, 4, 6, ",
    ),
    (lambda: interlaced((4, 6, 8), stride=(2, 2)), TypeError, "stride must be three integers (d, h, w), got (2, 2)"),
    (lambda: interlaced((0, 6), stride=(1, 1)), ValueError, "size must be at least (1, 1), got (0, 6)"),
    (lambda: local((4, 6), window=(5, 6)), ValueError, "window must lie between (1, 1) and the map's (4, 6)"),
    (lambda: local((4, 6), window=(2, 0)), ValueError, "got (2, 0)"),
    (lambda: local((4, 6), window=(2.5, 1)), TypeError, "window must be a pair of integers (h, w), got (2.5, 1)"),
    (lambda: local((4, 6), (2, 3), shift=1), TypeError, "shift must be a pair of integers (h, w), got 1"),
    (lambda: local((4, 6), (2, 3), (0, 3)), ValueError, "window (2, 3), got (0, 3)"),
    (lambda: local((4, 6), (2, 3), (-1, 0)), ValueError, "window (2, 3), got (-1, 0)"),
    (lambda: local((4, 6), window=None), TypeError, "window must be a pair of integers (h, w), got None"),
    (lambda: local(24, window=(2, 2)), TypeError, "size must be one to three integers, got 24"),
    (lambda: Partition.rows((4, 0)), ValueError, "size must be at least (1, 1), got (4, 0)"),
    (lambda: Partition.columns((-4, 6)), ValueError, "size must be at least"),
    (lambda: Partition.dense("ab"), TypeError, "size must be one to three integers, got 'ab'"),
    (lambda: WINDOWS.view(Q[:, 1:]), ValueError, "tensor must be [B, 4, 6, ...], got (1, 3, 6, 1, 2)"),
    (lambda: local((5, 6), window=(2, 3)).view(torch.zeros(1, 5, 6)), ValueError, "name one of its pieces()"),
]
ATTENTION: list[Row] = [
    (lambda: attend(Q.tolist(), Q, Q, WINDOWS), TypeError, "q must be a torch.Tensor, got list"),
    (lambda: attend(Q.int(), Q, Q, WINDOWS), TypeError, ", got torch.int32"),
    (lambda: attend(Q, Q[0], Q, WINDOWS), ValueError, "k must be [B, H, W, heads, width], got shape (4, 6, 1, 2)"),
    (lambda: attend(Q, Q, Q.double(), WINDOWS), TypeError, "v must have the dtype of q, torch.float32, got"),
    (lambda: attend(Q, Q.to("meta"), Q, WINDOWS), ValueError, "k must be on the device of q, cpu, got meta"),
    (
        lambda: attend(Q, Q[:, 1:], Q, WINDOWS),
        ValueError,
        "k must have the shape of q, (1, 4, 6, 1, 2), or heads that divide its heads, got (1, 3,",
    ),
    (lambda: attend(Q, Q[..., :1], Q, WINDOWS), ValueError, "k must have the shape of q"),
    (lambda: attend(Q[..., :0], Q[..., :0], Q, WINDOWS), ValueError, "q must have a width of at least 1"),
    (lambda: attend(Q, Q, Q, Partition.dense((6, 4))), ValueError, "partition is for maps of (6, 4), but q"),
    (lambda: attend(Q, Q, Q, (8, 8)), TypeError, "partition must be a Partition, got tuple"),
    (
        lambda: attend(Q, Q, Q, WINDOWS, bias=BIAS[:, 1:]),
        ValueError,
        "(1, 6, 6), or with the batch before it, got (1, 5, 6)",
    ),
    (lambda: attend(Q, Q, Q, WINDOWS, bias=BIAS[0]), ValueError, "bias must be [heads, tokens, tokens]"),
    (lambda: attend(Q, Q, Q, WINDOWS, bias=BIAS.long()), TypeError, "bias must be one of torch.float16, "),
    (lambda: attend(Q, Q, Q, WINDOWS, bias=BIAS[None, :, 1:]), ValueError, "= (1, 6, 6), or with the batch before it"),
    (
        lambda: attend(Q, Q, Q, WINDOWS, scale=torch.ones(2)),
        ValueError,
        "scale must be a number or [heads] = (1,), got",
    ),
    (lambda: attend(Q, Q, Q, WINDOWS, valid=Q), TypeError, "valid must be torch.bool, got torch.float32"),
    (
        lambda: attend(Q, Q, Q, WINDOWS, valid=Q[0, ..., 0] > 0),
        ValueError,
        "valid must be (1, 4, 6) as the map of q is",
    ),
    (lambda: attend(Q, Q, Q, WINDOWS, extra_k=EXTRA), TypeError, "extra_k and extra_v must be given together"),
    (lambda: attend(Q, Q, Q, WINDOWS, extra_weight=Q), TypeError, "extra_k and extra_v must be given together"),
    (lambda: attend(Q, Q, Q, WINDOWS, extra_k=EXTRA[:, :0], extra_v=EXTRA[:, :0]), ValueError, "at least one key"),
    (lambda: attend(Q, Q, Q, WINDOWS, extra_k=EXTRA, extra_v=EXTRA[:, :2]), ValueError, "extra_v must be [B, n, heads"),
    (
        lambda: attend(Q, Q, Q, WINDOWS, extra_k=EXTRA, extra_v=EXTRA, extra_weight=torch.ones(2)),
        ValueError,
        "extra_weight must be [n] = (3,) or (1, 4, 6, 3), got (2,)",
    ),
    (lambda: attend(FOUR, THREE, THREE, WINDOWS), ValueError, "or heads that divide its heads, got (1, 4, 6, 3, 2)"),
    (
        lambda: attend(Q, Q, Q, WINDOWS, scale="1"),
        TypeError,
        "scale must be a number, a tensor [heads] or None, got '1'",
    ),
    (lambda: attend(Q, Q, Q, WINDOWS, cosine=1), TypeError, "cosine must be True or False, got 1"),
    (
        lambda: attend(Q, Q, Q, WINDOWS, cosine=torch.tensor(True)),
        TypeError,
        "cosine must be True or False, got tensor",
    ),
    (lambda: attend(Q, Q, Q, WINDOWS, backend="cuda"), ValueError, "backend must be one of 'auto'"),
    (lambda: attend(Q, Q, Q, None), TypeError, "partition must be a Partition, got NoneType"),
    (lambda: attend(Q, Q, Q, Partition(None, None)), TypeError, "partition.h must be an Axis of integers, got None"),
    (lambda: attend(Q, Q, Q, columns(6, 2, 3, 3.0, 1)), TypeError, "partition.w must be an Axis of"),
    (
        lambda: attend(Q, Q, Q, columns(6, 2, 3, -3, 1, 5)),
        ValueError,
        "all but its origin at least 1",
    ),
    (lambda: attend(Q, Q, Q, columns(6, 2, 3, 2, 1)), ValueError, "pixel 2 is there 2 times"),
    (lambda: attend(Q, Q, Q, columns(6, 2, 3, 3, 1, 1)), ValueError, "pixel 0 is there 0 times"),
    (
        lambda: attend(Q, Q, Q, columns(6, 3, 3, 3, 1)),
        ValueError,
        "must have a pixel in every group",
    ),
    (lambda: attend(Q, Q, Q, columns(6, 2**30, 3, 2, 1)), ValueError, "neither adjacent pixels"),
    (lambda: attend(None, Q, Q, WINDOWS), TypeError, "q must be a torch.Tensor, got NoneType"),
    (lambda: attend(Q, Q, Q, WINDOWS, bias=1.0), TypeError, "bias must be a torch.Tensor, got float"),
    (lambda: attend(Q.bool(), Q, Q, WINDOWS), TypeError, "q must be one of torch.float16, "),
    (lambda: attend(Q.to(torch.complex64), Q, Q, WINDOWS), TypeError, "q must be one of torch.float16, "),
    (lambda: attend(Q, Q.to_sparse(), Q, WINDOWS), TypeError, "k must be a dense tensor, got torch.spars"),
    (
        lambda: attend(Q, Q, torch.nested.nested_tensor(list(Q), layout=torch.jagged), WINDOWS),
        TypeError,
        "v must be a dense tensor, got nested",
    ),
    (lambda: attend(Q[0], Q, Q, WINDOWS), ValueError, "q must be [B, H, W, heads, width], got shape"),
    (lambda: attend(Q, Q, Q[:, :2], WINDOWS), ValueError, "v must be [1, 4, 6, 1, 'V']"),
    (lambda: attend(Q, Q.half(), Q, WINDOWS), TypeError, "k must have the dtype of q"),
    (lambda: attend(Q, Q, Q, WINDOWS, scale=float("inf")), ValueError, "scale must be finite, got inf"),
    (lambda: attend(Q, Q, Q, WINDOWS, scale=float("nan")), ValueError, "scale must be finite, got nan"),
    (lambda: attend(Q, Q, Q, WINDOWS, scale=-(10**400)), ValueError, "scale must be finite, got -1"),
    (lambda: attend(Q, Q, Q, WINDOWS, scale=[1]), TypeError, "scale must be a number, a tensor [heads] or None"),
    (lambda: attend(Q, Q, Q, WINDOWS, backend=None), ValueError, "backend must be one of 'auto'"),
    (
        lambda: attend(*[Q.double()] * 3, WINDOWS, backend="triton"),
        ValueError,
        "backend='triton' cannot be had: the kernels take torch.float16",
    ),
]
MODULES: list[Row] = [
    (lambda: stage(pattern="dilated"), ValueError, "pattern must be one of 'interlaced', 'local'"),
    (lambda: stage(padding="reflect"), ValueError, "padding must be one of 'zeros', 'mask', got 'reflect'"),
    (lambda: stage(backend="cuda"), ValueError, "backend must be one of 'auto', 'triton', 'eager', got 'cuda'"),
    (lambda: stage(partition_size=(8,)), ValueError, "partition_size must be two integers (P_h, P_w)"),
    (lambda: stage(partition_size=0), ValueError, "two integers (P_h, P_w) of at least 1, or one for all axes, got 0"),
    (
        lambda: stage(partition_size=None),
        ValueError,
        "two integers (P_h, P_w) of at least 1, or one for all axes, got None",
    ),
    (lambda: stage(partition_size=(True, 8)), ValueError, "got (True, 8)"),
    (lambda: stage(partition_size=(0, 8)), ValueError, "partition_size must be two integers"),
    (lambda: stage(partition_size=(8.0, 8)), ValueError, "got (8.0, 8)"),
    (lambda: stage(0, 2, 3), ValueError, "in_channels must be an integer of at least 1, got 0"),
    (lambda: stage(4, -2, 3), ValueError, "key_channels must be an integer of at least 1, got -2"),
    (lambda: stage(4, 2, 3.5), ValueError, "value_channels must be an integer of at least 1, got 3.5"),
    (lambda: stage(4, 2, 3, 0), ValueError, "out_channels must be an integer of at least 1, got 0"),
    (lambda: stage()(X[:, :3]), ValueError, "x must be [B, 4, H, W] with H, W of at least 1, got (1, 3, 6, 8)"),
    (lambda: stage()(X[0]), ValueError, "got (4, 6, 8)"),
    (lambda: stage()(X[:, :, :0]), ValueError, "got (1, 4, 0, 8)"),
    (lambda: isa(order="both"), ValueError, "order must be one of 'long-short', 'short-long', got 'both'"),
    (lambda: isa(partition_size=(8,)), ValueError, "partition_size must be two integers (P_h, P_w)"),
    (lambda: isa(padding=None), ValueError, "padding must be one of"),
    (lambda: isa()(X[:, 1:]), ValueError, "x must be [B, 4, H, W]"),
    (lambda: ISAModule(4, 2, 3, 4, partition_size=()), ValueError, "partition_size must be two integers"),
    (lambda: ISAModule(4, 2, 3, 4, partition_size=8.0), ValueError, "partition_size must be two integers (P_h, P_w)"),
    (lambda: ISAModule(4, 2, 3, 4, partition_size=((8, 8), (0, 4))), ValueError, "or one for all axes, got (0, 4)"),
    (lambda: ISAModule(4, 2, 3, 0), ValueError, "out_channels must be an integer of at least 1, got 0"),
    (lambda: ISAHead(4, 3, 0), ValueError, "num_classes must be an integer of at least 1, got 0"),
    (lambda: ISAHead(4, 3, 2, partition_size=-8), ValueError, "of at least 1, or one for all axes, got -8"),
    (lambda: ISAHead(4, 3, 2, partition_size="88"), ValueError, "of at least 1, or one for all axes, got '8'"),
    (lambda: ISAHead(4, "3", 2), ValueError, "channels must be an integer of at least 1, got '3'"),
]
TILES: list[Row] = [
    (lambda: tiles.lookup("sm_90", "sideways", 8, 8, "float16", 8), ValueError, "step must be one of"),
    (lambda: tiles.lookup("sm_90", "forward", 8, 8, "int8", 8), ValueError, "dtype must be one of"),
    (lambda: tiles.backward("sm_90", 8, 8, "float64", 8), ValueError, "got 'float64'"),
    (lambda: tiles.lookup("sm_90", "group", 64, 64, "float16", 10**6), LookupError, "no tile of 'group'"),
]
COMMANDS = [
    ([], "required: COMMAND"),
    (["fly"], "invalid choice: 'fly'"),
    (["scaling", "--sizes", "64y"], "must be a side, HEIGHTxWIDTH or DEPTHxHEIGHTxWIDTH"),
    (["scaling", "--colour"], "unrecognized arguments: --colour"),
    (["scaling", "--sizes", "0"], "got '0'"),
    (["scaling", "--sizes", "8x8x8"], "--sizes must have one side or 2, as --axes says, got 3"),
    (["scaling", "--providers", "nobody"], "invalid choice: 'nobody'"),
    (["scaling", "--sizes", "16", "--partition-size", "32"], "--partition-size 32x32 is larger than the map 16x16"),
    (["scaling", "--device", "abacus"], "must be a device of this machine, got 'abacus'"),
    (["scaling", "--longest-call", "nan"], "must be a number from 0, got 'nan'"),
    (["scaling", "--memory-limit", "-1"], "must be a number from 0, got '-1'"),
    (["scaling", "--sizes", "99999999"], "must have sides of at most 32768 pixels, got '99999999'"),
    (["scaling", "--key-channels", "9" * 30], "must be at most 1048576, got '999"),
    (["scaling", "--device", "meta"], "must be a device of this machine, got 'meta', which has no memory"),
    (["sharding", "--links", "25", "fast"], "must be a number above 0, got 'fast'"),
    (["sharding", "--rate", "0"], "must be a number above 0, got '0'"),
    (
        ["sharding", "--devices", "4", "64", "--simulated-sizes", "128", "63x99"],
        "--devices 64 is more than a simulated",
    ),
    (["paper", "--out", __file__], f"must be a folder to write to, got '{__file__}': {__file__} is not one"),
    (["pictures", "--out", f"{__file__}/deeper/out"], f"{__file__} is not one"),
    (["check", "--cases", "-1"], "must be a whole number from 1, got '-1'"),
    (["check", "--backends", "cuda"], "invalid choice: 'cuda'"),
    (["overhead", "--rounds", "many"], "must be a whole number from 1, got 'many'"),
    (["models", "--networks", "resnet50"], "invalid choice: 'resnet50'"),
    (["scaling", "--size", "8"], "unrecognized arguments: --size 8"),
    (["tiles"], "required: TOOL"),
    (["tiles", "verify", "--shapes", "ISA 65"], "invalid choice: 'ISA 65'"),
]


@pytest.mark.parametrize(("call", "error", "words"), PARTITIONS + ATTENTION + MODULES + TILES)
def test_bad_calls_are_refused(call: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=re.escape(words)) as caught:
        call()
    assert type(caught.value) is error


@pytest.mark.parametrize(("line", "words"), COMMANDS, ids=lambda part: " ".join(part) if part else "none")
def test_bad_commands_exit_with_2(line: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(line)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert words in " ".join(said.split())
    command = [word for word in line[:1] if word in BENCH]
    assert f"usage: {' '.join(['python -m bench', *command])} " in said


def test_dtypes_have_short_forms_and_defaults_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser(formatter_class=arguments.Help)
    arguments.add_dtype(parser, ("float32", "bfloat16"))
    arguments.add_partition_size(parser)
    assert parser.parse_args(["--dtype", "bf16"]).dtype == parser.parse_args(["--dtype", "bfloat16"]).dtype
    assert parser.parse_args([]).dtype == "float32"
    said = " ".join(parser.format_help().split())
    assert "of all tensors; for short fp32, bf16 (default: float32)" in said
    assert "(default: 8x8)" in said
    with pytest.raises(SystemExit):
        parser.parse_args(["--dtype", "fp16"])
    assert "invalid choice: 'float16'" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["scaling", "sharding"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "must have the columns"),
        ("provider,level\n", "must have the columns"),
        ("\0", "must have the columns"),
        ("\udcff", "is not a CSV"),
        ("{columns}\nisa\n", "line 2, must hold one"),
        ("{columns}\n{words}\n", "line 2, must hold one"),
    ],
)
def test_broken_results_are_named(
    command: str, content: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = {"scaling": columns_of(Cost), "sharding": columns_of(sharding.Row)}[command]
    text = content.format(columns=",".join(columns), words=",".join("word" for _ in columns))
    file = tmp_path / f"{command}.csv"
    file.write_text(text, errors="surrogateescape")
    with pytest.raises(SystemExit) as caught:
        main([command, "--out", str(tmp_path)])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert words in said
    assert str(file) in said
    assert file.read_text(errors="surrogateescape") == text


def test_results_that_cannot_be_read_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "scaling.csv").mkdir()
    with pytest.raises(SystemExit) as caught:
        main(["scaling", "--out", str(tmp_path)])
    assert caught.value.code == 2
    assert "scaling.csv" in capsys.readouterr().err


def test_an_interrupted_command_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sharding, "run", interrupted)
    with pytest.raises(SystemExit) as caught:
        main(["sharding"])
    assert caught.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_the_tables_are_long_enough() -> None:
    assert len(PARTITIONS + ATTENTION + MODULES + TILES) + len(COMMANDS) >= 60


ENTRY = {"step": "forward", "arithmetic": "ieee", "key_width": None, "value_width": None, "tokens": None,
         "tile": [16, 16, 16, 16, 4, 1]}  # fmt: skip


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[", "is not JSON"),
        ("", "is not JSON"),
        ("{}", "must hold a list of entries, got dict"),
        ("[3]", "entry 1: must be an object with step"),
        (json.dumps([ENTRY, {"step": "forward"}]), "entry 2: must be an object"),
        (json.dumps([{**ENTRY, "step": "fly"}]), "knows no step 'fly'"),
        (json.dumps([{**ENTRY, "tokens": "64"}]), "must be positive integers or null, got [None, None, '64']"),
        (json.dumps([{**ENTRY, "key_width": 0}]), "must be positive integers or null"),
        (
            json.dumps([{**ENTRY, "bias": True}]),
            "bias must be false, for calls without one alone, or left out, got True",
        ),
        (json.dumps([{**ENTRY, "tile": [16, 16]}]), "tile must be null or 6 positive integers"),
        (json.dumps([{**ENTRY, "tile": [16, 16, 16, 16, 4, 1.5]}]), "tile must be null or 6 positive integers"),
        (json.dumps([{**ENTRY, "tile": [16, 16, 16, 16, 0, 1]}]), "tile must be null or 6 positive integers"),
        (json.dumps([{**ENTRY, "tile": [48, 16, 16, 16, 4, 1]}]), "blocks must be powers of two"),
        (json.dumps([{**ENTRY, "tile": [16, 16, 16, 48, 4, 1]}]), "blocks must be powers of two"),
    ],
)
def test_bad_tile_files_are_named(content: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "FOLDER", tmp_path)
    (tmp_path / "sm_90.json").write_text(content)
    for cached in (tiles._lookup, tiles._entries):
        cached.cache_clear()
    try:
        with pytest.raises(ValueError, match=re.escape(words)) as caught:
            tiles.lookup("sm_90", "forward", 8, 8, "float32", 8)
        assert "sm_90.json" in str(caught.value)
    finally:
        for cached in (tiles._lookup, tiles._entries):
            cached.cache_clear()
