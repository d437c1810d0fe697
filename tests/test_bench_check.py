"""The check sees what is wrong, and its groups are the library's."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import arguments, cases, check, devices
from bench.__main__ import main
from bench.cases import WIDTHS, Case, errors, multiplied_as_tf32
from bench.check import named_cases, shipped_cases
from bench.tiles.compile import DTYPES
from bench.tiles.verify import problems_of
from isa_triton.backend.kernels import launch
from isa_triton.backend.triton import precision_of
from reference.budget import allowed_error
from tests.scripted_device import ScriptedDevice
from tests.test_door import formula

FEW = [
    Case("interlaced", (5, 7), (2, 3), (16, 24), heads=2),
    Case("local", (4, 7), (2, 3), (39, 16), bias=True, dtype=torch.float16),
    Case("dense", (7, 13), (7, 13), (16, 16)),
]


def run(path: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[dict[str, str]]:
    """The rows that `bench check` writes; the named cases are a few small ones."""
    monkeypatch.setattr(check, "named_cases", lambda large, tf32: FEW)
    try:
        main(["check", "--out", str(path), *arguments])
    finally:
        rows = list(csv.DictReader((path / "check.csv").read_text().splitlines()))
    return rows


@pytest.mark.slow
def test_both_backends_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run(tmp_path, monkeypatch)
    assert "6 cases, 0 beyond the error budget" in capsys.readouterr().out.replace("\n", "")
    assert [row["case"] for row in rows] == 2 * [str(case) for case in FEW]
    assert all(0 <= float(row[name]) <= 1 for row in rows for name in ("out", "lse", "dq", "dk", "dv"))
    assert [bool(row["dbias"]) for row in rows] == 2 * [False, True, False]
    assert rows[0]["forward_ms"] == ""  # the interpreter's time says nothing


def test_drawn_cases_are_counted_and_differ_with_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = [run(tmp_path, monkeypatch, "--backends", "eager", "--cases", "20", "--seed", seed) for seed in "123"]
    assert [len(rows) for rows in drawn] == [20, 20, 20]
    assert drawn[0] != drawn[1] != drawn[2]


@pytest.mark.slow
def test_a_wrong_kernel_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = launch.forward
    monkeypatch.setattr(launch, "forward", lambda *args: forward(*args[:6], args[6] * 1.01, *args[7:]))  # the scale
    with pytest.raises(SystemExit) as failure:
        run(tmp_path, monkeypatch, "--backends", "triton")
    assert failure.value.code == 1


def test_what_is_wrong_is_shrunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "errors", lambda case, *_: {"out": 2.0 * (case.size[-1] > 3)})
    with pytest.raises(SystemExit) as failure:
        run(tmp_path, monkeypatch, "--backends", "eager", "--cases", "30")
    assert failure.value.code == 1
    assert "size=(4,)" in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize("large", [False, True])
def test_cases_cover_every_kind_and_their_groups_are_the_partition_s(large: bool) -> None:
    found = named_cases(large)
    assert {case.kind for case in found} == {"interlaced", "grid", "local", "rows", "columns", "dense"}
    assert {case.partition.divides for case in found} == {case.bias for case in found} == {False, True}
    for case in {(case.kind, case.size): case for case in found}.values():
        if case.packed or case.partition.wraps:
            continue  # its groups are those of maps alone, or of a map that is rolled
        assert sum(1 for _ in case.groups()) == case.partition.groups
        for group, pixels in enumerate(case.groups()):
            grid = torch.meshgrid(*map(torch.arange, case.size), indexing="ij")
            assert bool((case.partition.seat(*(axis[pixels] for axis in grid))[0] == group).all())


# -- what attention takes beside q, k and v ----------------------------------------------------------------------------

WITH_OPTIONS = [case for case in named_cases(large=False) if case.dtype == torch.float32 and (case.heads == 6)]


OPTIONS = ("per_map", "one_head", "forbids", "scales", "valid", "extra", "cosine")


def test_every_option_is_in_a_named_case_alone_and_beside_others() -> None:
    features = [
        {name for name in OPTIONS if getattr(case, name)}
        | {f"weights {case.weights}"} | ({"share"} if case.share > 1 else set[str]()) | {f"{len(case.size)} axes"}
        for case in WITH_OPTIONS
    ]  # fmt: skip
    assert set.union(*features) == {
        *OPTIONS, "share", "1 axes", "2 axes", "3 axes",
        *(f"weights {of}" for of in cases.WEIGHTS),
    }  # fmt: skip


@pytest.mark.parametrize("case", WITH_OPTIONS, ids=str)
def test_the_formula_group_by_group_is_that_pixel_by_pixel(case: Case) -> None:
    case = replace(case, dropout=0.0)  # whose formula is that of test_dropout.py
    inputs = cases.converted(case.inputs(), torch.float64)
    given: dict[str, Any] = {name: inputs[name] for name in ("q", "k", "v", *cases.OPTIONS) if name in inputs}
    given |= {
        "cosine": case.cosine,
        "scale": given.get("scale", torch.full((case.heads,), case.scale, dtype=torch.float64)),
    }
    if case.weights == "pixels":
        given["extra_weight"] = given["extra_weight"].expand(case.maps, *case.size, -1)
    for found, wanted in zip(case.attended(inputs), formula(case.partition, given), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def of_all_maps(x: torch.Tensor) -> torch.Tensor:
    return x[:1].expand(x.shape)


DEFECTS: dict[str, tuple[str, Callable[[Any], Any]]] = {  # an argument, and what becomes of it
    "the bias of the first map serves all": ("per_map", of_all_maps),
    "the bias is rounded to fp16": ("bias", lambda given: given.half()),
    "the heads' scales are those of their neighbours": ("scale", lambda given: given.roll(1)),
    "the first head's scale serves all": ("scale", lambda given: given[:1].expand(given.shape)),
    "heads of keys follow each other": ("share", lambda given: given),
    "all pixels are valid": ("valid", torch.ones_like),
    "pixels are valid as on the first map": ("valid", of_all_maps),
    "extra keys are the next head's": ("extra_k", lambda given: given.roll(1, 2)),
    "extra values are the first map's": ("extra_v", of_all_maps),
    "extra keys weigh the same": ("extra_weight", torch.ones_like),
    "extra keys are weighted as on the first map": ("extra_weight", of_all_maps),
    "vectors keep their lengths": ("cosine", lambda given: not given),
    "extra keys have the next one's weight": ("extra_weight", lambda given: given.roll(1, -1)),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_what_loses_an_index_is_beyond_the_budget(defect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, becomes = DEFECTS[defect]
    attend = cases.partitioned_attention_with_lse

    def wrong(k: torch.Tensor, v: torch.Tensor, **given: Any) -> Any:
        if where == "share":  # 0 1 2 0 1 2 in place of 0 0 1 1 2 2
            k, v = (x.repeat(*[1] * (x.dim() - 2), given["q"].shape[-2] // x.shape[-2], 1) for x in (k, v))
        x = given.get(name := "bias" if where == "per_map" else where)
        of_all = where == "per_map" and isinstance(x, torch.Tensor) and x.dim() < 4
        if isinstance(x, torch.Tensor | bool) and not of_all:
            given[name] = becomes(x)
        return attend(k=k, v=v, **given)

    monkeypatch.setattr(cases, "partitioned_attention_with_lse", wrong)
    found = {str(case): max(errors(case, "eager").values()) for case in WITH_OPTIONS}
    assert max(found.values()) > 1, found


@pytest.mark.parametrize("name", ["dscale", "dextra_k", "dextra_v", "dbias", "dq", "dk", "dv"])
@pytest.mark.parametrize("factor", [0.0, 1.02])
def test_a_gradient_that_is_wrong_is_beyond_the_budget(
    name: str, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = cases.derivatives

    def wrong(inputs: dict[str, torch.Tensor], case: Case, backend: str | None = None) -> Any:
        found = compute(inputs, case, backend)
        return {n: x * factor if n == name and backend else x for n, x in found.items()}

    monkeypatch.setattr(cases, "derivatives", wrong)
    found = {str(case): errors(case, "eager").get(name, 0.0) for case in WITH_OPTIONS}
    assert max(found.values()) > 1, found


def test_a_gradient_at_a_pixel_that_is_not_valid_is_beyond_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    compute, (case, *_) = cases.derivatives, [case for case in WITH_OPTIONS if case.valid]

    def wrong(inputs: dict[str, torch.Tensor], case: Case, backend: str | None = None) -> Any:
        found = compute(inputs, case, backend)
        return (
            found if backend is None else found | {"dv": torch.where(inputs["valid"][..., None, None], found["dv"], 1)}
        )

    monkeypatch.setattr(cases, "derivatives", wrong)
    assert errors(case, "eager")["dv"] > 1


def test_lse_of_a_query_without_keys_is_minus_infinity(monkeypatch: pytest.MonkeyPatch) -> None:
    compute, (case, *_) = cases.derivatives, [case for case in WITH_OPTIONS if case.valid]
    assert errors(case, "eager")["lse"] <= 1

    def wrong(inputs: dict[str, torch.Tensor], case: Case, backend: str | None = None) -> Any:
        found = compute(inputs, case, backend)
        return found if backend is None else found | {"lse": found["lse"].masked_fill(found["lse"].isinf(), 0)}

    monkeypatch.setattr(cases, "derivatives", wrong)
    assert not errors(case, "eager")["lse"] <= 1


PACKED = [case for case in named_cases(large=False) if case.packed and case.dtype == torch.float32]
PACKED_DEFECTS: dict[str, Callable[[Case], Case]] = {  # which partitions packed maps have instead of theirs
    "the last map comes first": lambda case: replace(case, packed=case.packed[-1:] + case.packed[:-1]),
    "maps are transposed": lambda case: replace(case, packed=tuple(size[::-1] for size in case.packed)),
    "the last map is none": lambda case: replace(case, packed=case.packed[:-1]),
    "a pixel behind the last map is one": lambda case: replace(case, packed=(*case.packed, (1, 1))),
    "maps are one": lambda case: replace(case, packed=((sum(h * w for h, w in case.packed), 1),)),
    "windows are not moved, or grids are windows": lambda case: replace(case, kind="local", shift=()),
}


@pytest.mark.parametrize("case", PACKED, ids=lambda case: case.kind)
@pytest.mark.parametrize("defect", PACKED_DEFECTS)
def test_packed_maps_of_another_partition_are_beyond_the_budget(
    defect: str, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert max(errors(case, "eager").values()) <= 1
    wrong, batch = PACKED_DEFECTS[defect](case), Case.batch
    monkeypatch.setattr(Case, "batch", lambda case, device: batch(wrong, device))
    assert max(errors(case, "eager").values()) > 1


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedDevice]:
    """A GPU by script, whose tensors are the CPU's: kernels are interpreted there."""
    inputs = Case.inputs
    monkeypatch.setattr(Case, "inputs", lambda case, device: inputs(case))
    monkeypatch.setattr("bench.arguments.device", str)
    monkeypatch.setattr(check, "has_tf32", lambda device: True)
    monkeypatch.setattr(check, "named_cases", lambda large, tf32: [replace(case, tf32=tf32) for case in FEW[:1]])
    monkeypatch.setattr(check, "shipped_cases", lambda tf32: [Case("local", (4, 4), (2, 2), (16, 16))])
    with ScriptedDevice().installed() as device:
        yield device


def on_gpu(path: Path, *arguments: str) -> list[dict[str, str]]:
    """The rows that `bench check` writes on the GPU by script."""
    try:
        main(["check", "--out", str(path), "--device", "cuda", *arguments])
    finally:
        rows = list(csv.DictReader((path / "check.csv").read_text().splitlines()))
    return rows


def test_a_gpu_checks_tf32_and_what_tiles_verify_compiles_and_times_it(
    gpu: ScriptedDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(devices, "clocks", lambda device: "SM 1755 of 1980 MHz, memory 2619 MHz")
    rows = on_gpu(tmp_path, "--backends", "triton")
    assert "Clocks behind the last case: SM 1755 of 1980 MHz" in capsys.readouterr().out.replace("\n", " ")
    assert [row["dtype"] for row in rows] == ["tf32", "float32"]
    assert rows[-1]["case"] == "local 2x2 of 2x4x4, 1 heads 16/16, contiguous"
    assert {(row["how"], row["note"]) for row in rows} == {("graph", "")}
    assert all(float(row["forward_ms"]) == float(row["backward_ms"]) == 0 for row in rows)  # it was given no kernels


def test_a_case_that_does_not_fit_is_not_wrong_and_one_that_fails_is(
    gpu: ScriptedDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raised: list[Exception] = [torch.OutOfMemoryError("CUDA out of memory.\nand more")]

    def failing(case: Case, *_: Any) -> dict[str, float]:
        if case.kind == "local":
            raise raised[-1]
        return {"out": 0.5}

    monkeypatch.setattr(check, "errors", failing)
    monkeypatch.setattr(check, "timed", lambda *_: {"forward_ms": 1.0, "backward_ms": 2.0, "how": "queue"})
    first, last = on_gpu(tmp_path, "--backends", "eager")
    assert (first["out"], first["how"], first["note"]) == ("0.5", "queue", "")
    assert (last["out"], last["note"]) == ("", "not checked: OutOfMemoryError: CUDA out of memory.")
    assert "2 cases, 0 beyond the error budget, 1 not checked or timed." in capsys.readouterr().out.replace("\n", " ")
    assert gpu.released == 1
    raised.append(ValueError("no such tile"))
    with pytest.raises(SystemExit):
        on_gpu(tmp_path, "--backends", "eager")
    assert "2 cases, 1 beyond the error budget" in capsys.readouterr().out.replace("\n", " ")


def test_tf32_is_the_kernels_and_the_formulas_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str | None, torch.dtype, str]] = []
    compute, cuda = cases.derivatives, torch.device("cuda")

    def derivatives(inputs: dict[str, torch.Tensor], case: Case, backend: str | None = None) -> Any:
        dtype = inputs["q"].dtype
        seen.append((backend, dtype, precision_of(dtype, cuda)))
        return compute(inputs, case, backend)

    monkeypatch.setattr(cases, "derivatives", derivatives)
    before = torch.backends.cuda.matmul.fp32_precision
    for tf32, precision in ((True, "tf32"), (False, "ieee")):
        seen.clear()
        errors(replace(FEW[0], tf32=tf32), "eager")
        assert seen[:2] == [("eager", torch.float32, precision), (None, torch.float32, precision)]
        assert seen[2][:2] == (None, torch.float64)
    with pytest.raises(ZeroDivisionError), multiplied_as_tf32(True):
        _ = 1 / 0
    assert torch.backends.cuda.matmul.fp32_precision == before


def test_the_budget_of_tf32_is_that_of_its_fraction(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part in 2000 is a rounding of tf32, and none of fp32; a part in 20 is of neither."""
    compute, allow, found, asked = cases.derivatives, cases.allowed_error, {}, set()

    def allowed(name: str, exact: Any, eager: Any, dtype: torch.dtype, natural: float, uncertain: float, _: int) -> Any:
        asked.add((dtype, round(uncertain / torch.finfo(dtype).eps / float(exact_lse[-1]), 6)))
        return allow(name, exact, eager, dtype, natural, uncertain)

    exact_lse: list[float] = []
    monkeypatch.setattr(cases, "allowed_error", allowed)
    for wrong in (1 / 2000, 1 / 20):

        def derivatives(inputs: Any, case: Case, backend: str | None = None, wrong: float = wrong) -> Any:
            results = compute(inputs, case)
            exact_lse.append(float(results["lse"].abs().max()))
            return {name: result * (1 + wrong * (backend is not None)) for name, result in results.items()}

        monkeypatch.setattr(cases, "derivatives", derivatives)
        for tf32 in (True, False):
            found[wrong, tf32] = errors(replace(FEW[0], tf32=tf32), "eager")["out"] <= 1
    assert asked == {(torch.float16, 1.0), (torch.float32, 1.0)}
    assert found == {(1 / 2000, True): True, (1 / 2000, False): False, (1 / 20, True): False, (1 / 20, False): False}


def test_named_cases_of_fp32_are_checked_as_tf32_too() -> None:
    without, with_ = named_cases(large=True), named_cases(large=True, tf32=True)
    more = with_[len(without) :]
    assert with_[: len(without)] == without
    assert not any(case.tf32 for case in without)
    assert [replace(case, tf32=False) for case in more] == [case for case in without if case.dtype == torch.float32]
    assert {case.arithmetic for case in with_} == {"tf32", "float32", "float16", "bfloat16"}


@pytest.mark.parametrize("tf32", [False, True])
def test_shipped_cases_are_the_problems_that_tiles_verify_compiles(tf32: bool) -> None:
    problems, found = list(problems_of(tf32)), list(shipped_cases(tf32))
    assert len(found) == len(problems) == 48 + 22 * tf32
    for case, problem in zip(found, problems, strict=True):
        assert case.partition == problem.partition
        assert (*case.widths, case.arithmetic, case.heads) == (
            problem.key_width, problem.value_width, problem.dtype, problem.heads
        )  # fmt: skip
        assert (case.bias, case.maps, case.dtype) == (problem.bias, problem.maps, DTYPES[problem.dtype])


def test_what_is_drawn_for_a_gpu_has_few_widths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn: list[Case] = []

    def errors(case: Case, *_: Any) -> dict[str, float]:
        drawn.append(case)
        return {"out": 0.5}

    monkeypatch.setattr(check, "errors", errors)
    monkeypatch.setattr(check, "timed", lambda *_: {})
    monkeypatch.setattr(check, "has_tf32", lambda device: True)
    monkeypatch.setattr("bench.arguments.device", str)
    main(["check", "--out", str(tmp_path), "--backends", "triton", "--cases", "200", "--device", "cuda"])
    assert {case.widths for case in drawn} == set(WIDTHS)
    assert {case.arithmetic for case in drawn} == {"tf32", "float32", "float16", "bfloat16"}
    assert max(max(case.size) for case in drawn) > 12
    drawn.clear()
    monkeypatch.setattr(check, "has_tf32", lambda device: False)
    main(["check", "--out", str(tmp_path), "--backends", "triton", "--cases", "200"])
    assert len({case.widths for case in drawn}) > 50
    assert {case.arithmetic for case in drawn} == {"float32", "float16"}


def test_a_gpu_and_the_interpreter_exclude_each_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "empty", lambda *_, device: None)  # any device is this machine's
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for command in ("check", "scaling", "train"):
        with pytest.raises(SystemExit):
            main([command, "--device", "cuda"])
        assert "--device: must be cpu where TRITON_INTERPRET=1 interprets the kernels, got 'cuda': unset it" in (
            capsys.readouterr().err.replace("\n", " ")
        )
    monkeypatch.delenv("TRITON_INTERPRET")
    assert arguments.device("cuda") == "cuda"


# -- the budget --------------------------------------------------------------------------------------------------------


def test_the_budget_is_the_eager_error_and_roundings() -> None:
    exact = torch.tensor([2.0, -4.0], dtype=torch.float64)
    eps = torch.finfo(torch.float16).eps
    eager = (exact + 0.5).half()
    assert allowed_error("out", exact, eager, torch.float16) == pytest.approx(2 * 0.5 + 16 * eps)
    assert allowed_error("dq", exact, eager, torch.float16, natural=3.0) == pytest.approx(3 * 0.5 + 28 * eps)
    assert allowed_error("dq", exact, eager, torch.float16, uncertain=0.1) == pytest.approx(1.5 + 16 * eps + 0.8)
