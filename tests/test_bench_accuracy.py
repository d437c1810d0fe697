"""`python -m bench accuracy`: the task needs what it says, heads connect what is claimed, a run leaves its files."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bench.__main__ import main
from bench.commands import accuracy
from bench.commands.accuracy import (
    COLOURS,
    HEADS,
    IGNORED,
    QUESTIONS,
    QUICK,
    SIZE,
    draw,
    learn,
    network,
    share_reached,
)
from bench.commands.paper import parameters

H, W = SIZE


@pytest.fixture(scope="module")
def drawn() -> tuple[Tensor, Tensor, Tensor]:
    return draw(32, torch.Generator().manual_seed(3))


def test_a_rectangles_class_is_the_keys_colour(drawn: tuple[Tensor, Tensor, Tensor]) -> None:
    for image, classes, key in zip(*drawn, strict=True):
        ((y, x),) = key.nonzero().tolist()
        assert set(classes.unique().tolist()) == {IGNORED, int(image[:, y, x].argmax())}
        assert classes[y, x] == IGNORED


def test_nothing_but_the_key_tells_its_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    images, classes, keys = draw(8, torch.Generator().manual_seed(7))
    monkeypatch.setattr(accuracy, "COLOURS", COLOURS.roll(1, 0))
    others, same_classes, same_keys = draw(8, torch.Generator().manual_seed(7))
    assert torch.equal(classes, same_classes)
    assert torch.equal(keys, same_keys)
    assert torch.equal((images != others).any(1), keys)


def test_what_the_paper_says_is_connected(drawn: tuple[Tensor, Tensor, Tensor]) -> None:
    """Both stages in either order, and two criss-crosses, reach everything; one stage alone cannot, however often."""
    _, classes, keys = drawn
    reached = {name: share_reached(head.stages, classes, keys) for name, head in HEADS.items()}
    incomplete = {"none", "long", "short", "long twice", "short twice"}
    assert {name for name, share in reached.items() if share < 1} == incomplete
    assert reached["none"] < reached["short"] < 0.3
    assert reached["none"] < reached["long"] < 0.5
    assert reached["long twice"] == reached["long"]


@pytest.mark.parametrize("name", HEADS)
def test_the_stages_of_a_head_are_what_its_module_connects(name: str) -> None:
    """A key at one pixel changes just those logits that the stages say."""
    torch.manual_seed(1)
    model = network(name).double().eval()
    for module in model.modules():  # blocks that begin as the identity are no longer
        if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith(("gamma", "output.weight", "output.bias")):
            nn.init.normal_(parameter)
    x = torch.rand(1, 3, H, W, dtype=torch.float64)
    key = torch.zeros(1, H, W, dtype=torch.bool)
    key[0, 9, 14] = True
    change = (model(x + key.unsqueeze(1)) - model(x)).abs().amax(1)
    everything = torch.zeros(1, H, W, dtype=torch.long)
    assert float((change > 0).double().mean()) == pytest.approx(share_reached(HEADS[name].stages, everything, key))


def test_twice_has_the_parameters_of_both_stages() -> None:
    counts = {name: parameters(network(name)) for name in HEADS}
    equal = {counts[name] for name in ("ISA", "short-long", "long twice", "short twice", "ISA P=2")}
    assert len(equal) == 1
    assert counts["long"] == counts["short"] == counts["dense"] < counts["ISA"]
    assert network("none")(torch.randn(2, 3, H, W)).shape == (2, len(COLOURS), H, W)


def test_context_is_learned_and_its_absence_is_not() -> None:
    isa, none = (learn(name, seed=0, steps=60, batch=8, tested=48) for name in ("short-long", "none"))
    assert isa.accuracy > 0.6 > 0.5 > none.accuracy
    assert isa.ceiling == 1
    assert none.ceiling < 0.4


def test_a_run_leaves_a_csv_a_table_and_a_plot_a_question(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(
        [
            "accuracy",
            "--out",
            str(tmp_path),
            "--heads",
            "none",
            "ISA P=4",
            "--seeds",
            "2",
            "--steps",
            "4",
            "--workers",
            "1",
        ]
    )
    with (tmp_path / "accuracy.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["head"], row["seed"]) for row in rows] == [
        ("none", "0"),
        ("ISA P=4", "0"),
        ("none", "1"),
        ("ISA P=4", "1"),
    ]
    assert float(rows[1]["ceiling"]) == 1
    pictures = {f"accuracy_{name}.png" for name in QUESTIONS}
    assert {path.name for path in tmp_path.iterdir()} == pictures | {"accuracy.csv"}
    printed = capsys.readouterr().out
    assert "Accuracy after 4 steps; a guess is right in 1 of 3" in printed
    assert "ISA P=4" in printed


def test_questions_ask_about_heads_that_exist() -> None:
    asked = {head for _, heads in QUESTIONS.values() for head in heads}
    assert asked == set(HEADS)
    assert set(QUICK) <= set(HEADS)


def test_mistakes_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--heads", "all"], "invalid choice: 'all'"),
        (["--steps", "0"], "whole number from 1"),
    ):
        with pytest.raises(SystemExit):
            main(["accuracy", *arguments])
        assert message in capsys.readouterr().err
