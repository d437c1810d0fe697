"""`bench predict`: labels, overlays and a contact sheet of images of any size, in tiles of bounded memory."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torch import Tensor, nn

from bench import predict
from bench.__main__ import main
from bench.measure import Counter
from bench.terminal import Bar
from bench.train import trainer
from bench.train.data import normalised_image
from bench.train.evaluation import slide, strips, window_starts
from bench.train.prediction import Predictor, opened, tiles
from bench.train.saved import read_checkpoint
from bench.train.sheets import LINE, MARGIN, MOST, OVERLAY, THUMB, legend, spread
from tests import segmentation_data
from tests.house import ROOT
from tests.segmentation_data import COLOURS, SIZE
from tests.small_network import small

H, W = SIZE
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def small_network() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "ianet", small)
        yield


@pytest.fixture(scope="module")
def trained(small_network: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on data of one's own, told by colours: DIR/data and DIR/network.pt."""
    folder = tmp_path_factory.mktemp("trained")
    segmentation_data.own(folder / "data")
    arguments = ["train", "--data", str(folder / "data"), "--data-set", "folder", "--out", str(folder)]
    small = "--weights none --channels 16 --crop 32x48 --batch 4 --iterations 60 --lr 0.05 --workers 0"
    main([*arguments, *small.split()])
    return folder


def colours_of(pixels: np.ndarray) -> set[tuple[int, ...]]:
    """The colours in an image [H, W, 3]."""
    return set(map(tuple, pixels.reshape(-1, 3).tolist()))


def predicted(folder: Path, images: Path, out: Path, *more: str) -> dict[str, Image.Image]:
    """The label files that the command writes, by name."""
    main(["predict", "--checkpoint", str(folder / "network.pt"), "--images", str(images), "--out", str(out), *more])
    labels: dict[str, Image.Image] = {}
    for path in sorted((out / "labels").iterdir()):
        with Image.open(path) as labels[path.name]:
            labels[path.name].load()
    return labels


def test_what_is_predicted_is_what_evaluation_scores(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As label files of a data set of one's own, predictions are right in every pixel."""
    labels = predicted(trained, trained / "data/images/val", tmp_path / "labels")
    folder = tmp_path / "data"
    for split in ("train", "val"):
        (folder / "images" / split).parent.mkdir(parents=True, exist_ok=True)
        (folder / "images" / split).symlink_to(trained / "data/images/val")
        (folder / "labels" / split).parent.mkdir(parents=True, exist_ok=True)
        (folder / "labels" / split).symlink_to(tmp_path / "labels/labels")
    (folder / "classes.txt").write_text((trained / "data/classes.txt").read_text())
    capsys.readouterr()
    evaluate = ["train", "--data", str(folder), "--evaluate", str(trained / "network.pt"), "--workers", "0"]
    main([*evaluate, "--out", str(tmp_path), "--format", "json"])
    rows = json.loads(capsys.readouterr().out)[0]["rows"]
    assert rows[-1] == {"class": "mean", "IoU": "1.0000"}
    assert {picture.size for picture in labels.values()} == {(W, H)}
    colours = {c for picture in labels.values() for c in colours_of(np.asarray(picture.convert("RGB")))}
    assert len(colours) > 1
    assert colours <= set(COLOURS)


def test_files_of_every_kind_are_labelled_as_exif_turns_them(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with Image.open(trained / "data/images/train/scene 0.png") as picture:
        picture.load()
    turned = picture.transpose(Image.Transpose.ROTATE_90)  # which EXIF's 6 turns back
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for name, options in {"a.png": {}, "b.tif": {}, "c.webp": {"lossless": True}}.items():
        turned.save(tmp_path / "images" / name, exif=exif, **options)
    picture.save(tmp_path / "images" / "d.bmp")
    picture.convert("RGBA").save(tmp_path / "images" / "e.png")
    labels = predicted(trained, tmp_path / "images", tmp_path / "out")
    assert list(labels) == ["a.png", "b.png", "c.png", "d.png", "e.png"]
    first, *others = (np.asarray(each) for each in labels.values())
    assert first.shape == SIZE
    assert all(np.array_equal(first, other) for other in others)
    assert opened(tmp_path / "out" / "contact_sheet.png").width > 900
    assert {path.name for path in (tmp_path / "out" / "overlays").iterdir()} == set(labels)


def test_an_overlay_shows_the_image_through_the_colours_and_a_legend_of_shares(trained: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    large = np.random.default_rng(0).integers(0, 256, (90, 2 * OVERLAY, 3)).astype(np.uint8)
    Image.fromarray(large).save(images / "wide.png")
    with Image.open(trained / "data/images/train/scene 0.png") as picture:
        picture.save(images / "scene.png")
        image = np.asarray(picture).astype(int)
    labels = predicted(trained, images, tmp_path / "out")
    colours = np.asarray(labels["scene.png"].convert("RGB")).astype(int)
    overlay = opened(tmp_path / "out/overlays/scene.png")
    assert overlay.width >= W
    assert np.abs(np.asarray(overlay)[:H, :W] - (image + colours) / 2).max() <= 1
    assert colours_of(colours) <= colours_of(np.asarray(overlay)[H:])
    wide = opened(tmp_path / "out/overlays/wide.png")
    assert wide.width == OVERLAY
    assert labels["wide.png"].size == (2 * OVERLAY, 90)


def test_a_legend_has_as_many_lines_as_it_needs() -> None:
    entries = [(f"a class of a long name, {i}", (i, 0, 0)) for i in range(5)]
    heights = [legend(entries, width).height for width in (2000, 700, 100)]
    assert heights == [heights[0], heights[0] + LINE, heights[0] + 4 * LINE]


def test_the_commands_of_the_recipe_write_the_sheet_that_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In two steps in place of 300, which no pixel says: the sheet has the size and the text of the committed one."""
    monkeypatch.chdir(tmp_path)
    page = (ROOT / ".docs/recipes/train-on-your-own-data.md").read_text()
    (drawing,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(drawing, "the recipe", "exec"), {})
    (recipe,) = re.findall(r'^recipe="(.*)"$', page, re.MULTILINE)
    train, label = re.findall(r"^python -m tests.small_network (.*)$", page, re.MULTILINE)
    main([*train.replace("$recipe", recipe).split(), "--iterations", "2", "--workers", "0"])
    main(label.split())
    committed = ROOT / "bench" / "results" / "contact_sheet.png"
    written = opened(tmp_path / "runs/colours/seen/contact_sheet.png")
    assert written.size[0] == opened(committed).size[0]
    top = (0, LINE + MARGIN, THUMB[0], LINE + MARGIN + THUMB[1])  # the first photograph, beside its overlay
    difference = np.asarray(written.crop(top)).astype(int) - np.asarray(opened(committed).crop(top))
    assert np.abs(difference).mean() < 2
    assert committed.stat().st_size < 400_000


@pytest.mark.parametrize("count", [1, 2, MOST, MOST + 1, 1000])
def test_a_contact_sheet_shows_images_from_the_first_to_the_last(count: int) -> None:
    shown = sorted(spread(count))
    assert len(shown) == min(count, MOST)
    assert (shown[0], shown[-1]) == (0, count - 1)
    gaps = {b - a for a, b in itertools.pairwise(shown)}
    assert max(gaps, default=1) - min(gaps, default=1) <= 1


def test_tiles_say_of_a_pixel_what_the_whole_image_does_where_the_network_sees_no_edge() -> None:
    """A network that sees 4 pixels far: from 4 pixels inside every edge between tiles on, tiles are exact."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 5, padding=2), nn.ReLU(), nn.Conv2d(6, 4, 5, padding=2)]
    network, reach = nn.Sequential(*layers), 4
    x, tile = torch.randn(1, 3, 70, 93), (32, 40)
    with torch.no_grad():
        whole, tiled = network(x), slide(network, x, tile)
    inside = torch.ones(70, 93, dtype=torch.bool)
    for length, window, rows in ((70, tile[0], inside), (93, tile[1], inside.T)):
        for start in window_starts(length, window):
            for edge in {start, start + window} - {0, length}:
                rows[max(0, edge - reach) : edge + reach] = False
    assert 0.2 < inside.double().mean() < 0.9
    assert torch.allclose(tiled[..., inside], whole[..., inside], rtol=0, atol=1e-5)
    assert not torch.allclose(tiled, whole, rtol=0, atol=1e-3)


@pytest.mark.parametrize("size", [(70, 40), (33, 90), (20, 20), (64, 64)], ids=str)
def test_strips_are_done_as_soon_as_no_tile_reaches_them(size: tuple[int, int]) -> None:
    called: list[int] = []

    def network(x: Tensor) -> Tensor:
        called.append(len(called))
        return torch.cat([x, x], 1)

    x, across = torch.randn(1, 3, *size), len(window_starts(size[1], 32))
    parts, row = [], 0
    for part in strips(network, x, (24, 32)):
        row += part.shape[2]
        parts.append(part)
        assert row == size[0] or len(called) == across * len([t for t in window_starts(size[0], 24) if t < row])
    assert torch.allclose(torch.cat(parts, 2), torch.cat([x, x], 1))
    assert len(called) == tiles(size, (24, 32))


@pytest.mark.parametrize("limit", [1e9, 6.5e6, 4.6e6])
def test_bytes_alive_stay_below_the_bound_and_the_bound_decides_the_tile(limit: float, trained: Path) -> None:
    with Counter() as counter:
        predictor = Predictor(read_checkpoint(trained / "network.pt", CPU), CPU, (256, 256), limit)
        size = (300, 500)
        tile = predictor.tile(Path("a.png"), size)
        live = counter.live_bytes
        image = torch.zeros(3, *size, dtype=torch.uint8)
        calls: list[None] = []
        labels = predictor.labels(image, tile, lambda: calls.append(None))
    assert labels.shape == size
    assert len(calls) == tiles(size, tile)
    assert counter.peak_bytes <= predictor.bytes_needed(tile, size) <= limit
    assert counter.peak_bytes - live > 0.3 * (predictor.bytes_needed(tile, size) - 10 * 300 * 500)
    assert tile == {1e9: (256, 256), 6.5e6: (128, 128), 4.6e6: (64, 64)}[limit]


def test_evaluation_sees_what_a_predictor_sees(trained: Path) -> None:
    predictor = Predictor(read_checkpoint(trained / "network.pt", CPU), CPU, None, 1e9)
    image = torch.randint(256, (3, 45, 70), dtype=torch.uint8)
    with torch.inference_mode():
        logits = slide(lambda x: predictor.network(x)["out"], normalised_image(image[None]), (32, 48))
    labels = predictor.labels(image, predictor.tile(Path("a.png"), (45, 70)), lambda: None)
    assert np.array_equal(labels, logits[0].argmax(0).numpy())


def test_progress_counts_tiles_and_says_what_is_left(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    advanced: list[Any] = []
    monkeypatch.setattr(Bar, "advance", lambda *args: advanced.append(args))
    monkeypatch.setattr(predict, "SPOKEN", 15.0)
    ticks = itertools.count(100, 10)  # a tile takes 10 seconds
    monkeypatch.setattr(predict, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    predicted(trained, trained / "data/images/val", tmp_path)
    printed = capsys.readouterr().out
    total = 2 * tiles(SIZE, (32, 48))
    assert len(advanced) == total
    assert f"2 images by {trained / 'network.pt'}, iteration 60 of 60, in tiles of 32x48, to {tmp_path}\n" in printed
    assert re.findall(r"\d+ of .* left", printed) == [
        f"{done} of {total} tiles, 0:{10 * (total - done) // 60:02}:{10 * (total - done) % 60:02} left"
        for done in range(2, total + 1, 2)
    ]
    assert f"Wrote {tmp_path}/labels, {tmp_path}/overlays, {tmp_path}/contact_sheet.png" in printed


def test_an_image_beyond_pils_limit_is_read_where_memory_allows(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    main(["predict", "--checkpoint", str(trained / "network.pt"), "--images", str(trained / "data/images/val")])
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_published_classes_are_predicted_as_their_label_files_have_them(tmp_path: Path) -> None:
    city = segmentation_data.cityscapes(tmp_path / "city")
    more = ["--crop", "32", "--batch", "2", "--iterations", "1", "--workers", "0", "--weights", "none"]
    main(["train", "--data", str(city), "--data-set", "cityscapes", "--out", str(tmp_path), *more])
    labels = predicted(tmp_path, city / "leftImg8bit/val/aachen", tmp_path / "out")
    values = np.concatenate([np.asarray(picture).ravel() for picture in labels.values()])
    recipe = read_checkpoint(tmp_path / "network.pt", CPU)["recipe"]
    assert set(values.tolist()) <= set(recipe.classes.numbers)


def test_mistakes_are_named_in_a_line(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty, twice, broken, floats = (tmp_path / name for name in ("empty", "twice", "broken", "floats"))
    for folder in (empty, twice, broken, floats):
        folder.mkdir()
    (empty / "notes.txt").touch()
    for name in ("A.png", "a.jpg"):
        Image.new("RGB", (9, 9)).save(twice / name)
    Image.new("RGB", (900, 900)).save(broken / "b.png")
    content = (broken / "b.png").read_bytes()
    (broken / "b.png").write_bytes(content[: len(content) // 2])
    Image.new("F", (9, 9)).save(floats / "c.tif")
    network, images = str(trained / "network.pt"), trained / "data/images/val"
    for arguments, message in (
        ((network, tmp_path / "nowhere"), f"--images must be a folder of images, got {tmp_path / 'nowhere'}"),
        ((network, empty), f".png, .jpg, .jpeg, .tif, .tiff, .webp, .bmp, got none in {empty}"),
        ((network, twice), f"{twice / 'a.jpg'} must have another name than A.png: both would be a.png"),
        ((network, broken), f"{broken / 'b.png'} cannot be read: "),
        ((network, floats), f"{floats / 'c.tif'} must be an image of 8 or 16 bits a channel, got one of mode F"),
        ((str(images / "scene 0.png"), images), "scene 0.png must be a checkpoint that this command wrote"),
        ((network, images, "--out", str(images)), "--out must be another folder than that of the images, got "),
        ((network, images, "--memory-limit", "0.0001"), f"{images / 'scene 0.png'} has 48x80 pixels, which need "),
    ):
        checkpoint, folder, *more = arguments
        common = ["predict", "--out", str(tmp_path / "out")]
        with pytest.raises(SystemExit) as stopped:
            main([*common, "--checkpoint", checkpoint, "--images", str(folder), *more])
        assert stopped.value.code == 2
        said = capsys.readouterr().err.strip().partition("error: ")[2]
        assert said.startswith(message) or message in said
        assert "\n" not in said
