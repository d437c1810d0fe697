"""`python -m bench accuracy`: the tasks need what they say, heads connect what is claimed, a run leaves its files."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from torch import Generator, nn

from bench import accuracy
from bench.__main__ import main
from bench.accuracy import Run, experiments, learn
from bench.accuracy.experiments import (
    COLOURS,
    EXPERIMENTS,
    HEADS,
    IGNORED,
    KEYS,
    MOSAICS,
    QUESTIONS,
    SIZE,
    Drawn,
    share_reached,
)
from bench.paper import parameters

H, W = SIZE


def network(head: str) -> nn.Module:
    return EXPERIMENTS["keys"].networks[head](KEYS)


@pytest.fixture(scope="module")
def drawn() -> Drawn:
    return experiments.keys(32, Generator().manual_seed(3))


def test_a_rectangles_class_is_the_keys_colour(drawn: Drawn) -> None:
    for image, classes, key in zip(*drawn, strict=True):
        ((y, x),) = key.nonzero().tolist()
        assert set(classes.unique().tolist()) == {IGNORED, int(image[:, y, x].argmax())}
        assert classes[y, x] == IGNORED


def test_nothing_but_the_key_tells_its_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    images, classes, keys = experiments.keys(8, Generator().manual_seed(7))
    monkeypatch.setattr(experiments, "COLOURS", COLOURS.roll(1, 0))
    others, same_classes, same_keys = experiments.keys(8, Generator().manual_seed(7))
    assert torch.equal(classes, same_classes)
    assert torch.equal(keys, same_keys)
    assert torch.equal((images != others).any(1), keys)


def test_a_mosaic_is_one_digit_in_many_hands_that_training_and_test_do_not_share() -> None:
    seen, unseen = experiments._digits(False), experiments._digits(True)
    assert sum(map(len, seen)) == 2 * sum(map(len, unseen))
    for ours, theirs in zip(seen, unseen, strict=True):
        apart = (ours[:, None] - theirs[None]).abs().amax((2, 3))
        assert apart.min() > 0
    images, classes, evidence = experiments.mosaics(24, Generator().manual_seed(5))
    assert evidence is None
    assert images.shape == (24, 1, H, W)
    for image, class_ in zip(images, classes, strict=True):
        labelled = class_[class_ != IGNORED]
        assert len(labelled.unique()) == 1
        assert 0.1 < len(labelled) / (H * W) < 0.7
        strokes = (image[0] > 0.3) & (class_ == IGNORED)  # beyond the noise, and yet not a stroke
        assert strokes.float().mean() < 0.01
        assert 0.3 < float((image[0][class_ != IGNORED] > 0.2).float().mean()) < 0.7  # every other pixel is lost
    assert len(classes.amax((1, 2)).unique()) > 5


def test_what_the_paper_says_is_connected(drawn: Drawn) -> None:
    """Both stages in either order, and two criss-crosses, reach everything; one stage alone cannot, however often."""
    assert drawn.evidence is not None
    reached = {name: share_reached(head.stages, drawn.classes, drawn.evidence) for name, head in HEADS.items()}
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


def test_blocks_in_a_classifier_begin_as_the_identity() -> None:
    task, x = MOSAICS, torch.randn(2, 1, H, W)
    outputs, counts = [], []
    for build in EXPERIMENTS["blocks"].networks.values():
        model = build(task).eval()
        for parameter in (p for name, p in model.named_parameters() if ".isa." not in name and ".output." not in name):
            nn.init.constant_(parameter, 0.1)  # what all of them have
        outputs.append(model(x))
        counts.append(parameters(model))
    assert outputs[0].shape == (2, 10)
    assert all(torch.equal(outputs[0], output) for output in outputs[1:])
    assert counts[2] - counts[0] == 3 * (counts[1] - counts[0]) > 0


@pytest.mark.slow
def test_context_is_learned_and_its_absence_is_not() -> None:
    short_long, none = (learn(Run("keys", name, 0, 60), batch=8, tested=48) for name in ("short-long", "none"))
    assert short_long.accuracy > 0.6 > 0.5 > none.accuracy
    assert short_long.ceiling == 1
    assert none.ceiling is not None
    assert none.ceiling < 0.4


@pytest.mark.slow
def test_the_strokes_of_a_mosaic_need_the_other_digits() -> None:
    isa, none = (learn(Run("mosaics", name, 0, 60), batch=8, tested=48) for name in ("ISA", "none"))
    assert isa.accuracy > 2 * none.accuracy
    assert isa.reached is isa.ceiling is None


@pytest.mark.slow
def test_a_run_leaves_a_csv_a_table_and_a_plot_a_question(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    of = ["--experiments", "keys", "mosaics", "--networks", "none", "ISA"]
    main(["accuracy", "--out", str(tmp_path), *of, "--seeds", "2", "--steps", "4", "--workers", "1"])
    with (tmp_path / "accuracy.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    plan = [(name, head, seed) for seed in "01" for name in ("keys", "mosaics") for head in ("none", "ISA")]
    assert [(row["experiment"], row["network"], row["seed"]) for row in rows] == plan
    assert float(rows[1]["ceiling"]) == 1
    assert rows[2]["ceiling"] == ""
    pictures = {f"accuracy_{name}.png" for name in QUESTIONS if name != "blocks"}
    assert {path.name for path in tmp_path.iterdir()} == pictures | {"accuracy.csv"}
    printed = capsys.readouterr().out
    assert "keys: accuracy after 4 steps; a guess is right in 1 of 3" in printed
    assert "mosaics: accuracy after 4 steps; a guess is right in 1 of 10" in printed


def test_questions_ask_about_networks_that_exist() -> None:
    for name, experiment in EXPERIMENTS.items():
        shown = [
            question.networks or experiment.networks for question in QUESTIONS.values() if question.experiment == name
        ]
        asked = {network for networks in shown for network in networks}
        assert set(experiment.quick) <= asked <= set(experiment.networks)


def test_mistakes_are_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    mistakes = (
        (["--networks", "all"], "invalid choice: 'all'"),
        (["--steps", "0"], "whole number from 1"),
        (["--networks", "NL", "--experiments", "blocks"], "none of NL takes part in blocks"),
        (["--experiments", "mosaics"], "pip install scikit-learn"),
    )
    monkeypatch.setattr(accuracy, "find_spec", lambda _: None)
    for arguments, message in mistakes:
        with pytest.raises(SystemExit) as left:
            main(["accuracy", *arguments])
        assert left.value.code == 2
        assert message in capsys.readouterr().err
