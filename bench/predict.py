"""``python -m bench predict``: what a network that `train` has trained sees in a folder of images.

Writes, for every image NAME.* (png, jpg, tif, webp or bmp; as EXIF turns it):

    labels/NAME.png      the class of every pixel, as label files of the training data have it: the same values, with a
                         palette in the classes' colours; or, where those are told by colour, the same colours
    overlays/NAME.png    the image seen through the colours of its classes, at most 1600 pixels a side, with a legend
    contact_sheet.png    all of them small (48 from the first to the last, where there are more)

Large images are cut into tiles that overlap by a third; where they do, logits are averaged, as --evaluate does it. A
tile is what the network was trained on, unless --tile says otherwise or --memory-limit is less than what it takes: then
it is halved until everything fits.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from bench import terminal
from bench.arguments import add_device, add_out, number, size
from bench.records import format_size, replacing
from bench.terminal import Bar, Table, Terminal
from bench.train import check_extra
from bench.train.recipe import InputError

if TYPE_CHECKING:
    from PIL import Image

    from bench.train.prediction import Predictor

SPOKEN = 20.0  # seconds to a line for who watches


def add_arguments(parser: argparse.ArgumentParser) -> None:
    required, add = parser.add_argument_group("required"), parser.add_argument
    trained = "network.pt or checkpoint.pt that train has written"
    required.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", help=trained)
    required.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of images")
    add_out(parser, default="out/predict")
    add("--tile", type=size, metavar="SIZE", help="what the network sees at once (default: the recipe's crop)")
    bound = "of weights, activations, an image and its results, beside Python and torch: tiles are as small as it takes"
    add("--memory-limit", type=number, default=6.0, metavar="GB", help=bound)
    add_device(parser, "of the network", "cuda" if torch.cuda.is_available() else "cpu")
    terminal.add_arguments(parser)


@dataclass(frozen=True)
class Work:
    """An image that is to be labelled."""

    path: Path
    size: tuple[int, int]  # height and width, as it is shown
    tile: tuple[int, int]
    tiles: int


def run(args: argparse.Namespace) -> None:
    check_extra()
    from bench.train.prediction import Predictor, as_bytes, large_images, opened  # which need it
    from bench.train.saved import read_checkpoint
    from bench.train.sheets import MOST, OVERLAY, ContactSheet, overlay, shrunk, spread

    said, device = Terminal(args), torch.device(args.device)
    checkpoint = read_checkpoint(args.checkpoint, device)
    recipe, iteration = checkpoint["recipe"], checkpoint["iteration"]
    with large_images():
        paths = images(args.images, args.out, said)
        predictor = Predictor(checkpoint, device, args.tile, args.memory_limit * 1e9)
        del checkpoint  # with the momentum of every weight, maybe
        works = [planned(path, predictor) for path in paths]
        what = f"{args.checkpoint}, iteration {iteration} of {recipe.iterations}"
        said.say(f"{len(works)} images by {what}, in tiles of {tiles_in_words(works)}, to {args.out}")
        shown = spread(len(works))
        few = f"{len(shown)} of {len(works)} images" if len(works) > MOST else f"{len(works)} images"
        sheet = ContactSheet(f"{few} by {what}", recipe.classes)
        pixels = np.zeros((len(works), len(recipe.classes)), np.int64)
        with said.progress("tiles", sum(work.tiles for work in works)) as bar:
            tell = clock(works, bar, said)
            for i, work in enumerate(works):
                bar.now(work.path.name)
                picture = opened(work.path)
                small, x = shrunk(picture, OVERLAY, OVERLAY), as_bytes(picture)
                del picture  # an image is large: one copy is enough
                labels = predictor.labels(x, work.tile, tell)
                del x
                save(recipe.classes.picture(labels), args.out / "labels" / f"{work.path.stem}.png")
                save(overlay(small, labels, recipe.classes), args.out / "overlays" / f"{work.path.stem}.png")
                pixels[i] = np.bincount(labels.ravel(), minlength=len(recipe.classes))
                if i in shown:
                    sheet.add(work.path.name, small, labels)
        path = args.out / "contact_sheet.png"
        save(sheet.drawn(), path)
    shares, holders = 100 * pixels.sum(0) / pixels.sum(), (pixels > 0).sum(0)
    rows = [[name, f"{shares[i]:.2f}", int(holders[i])] for i, name in enumerate(recipe.classes.names)]
    said.show(Table("What was seen", ("class", "% of pixels", "images"), rows))
    said.end(f"{len(works)} images are labelled.", args.out / "labels", args.out / "overlays", path)


def images(folder: Path, out: Path, said: Terminal) -> list[Path]:
    """The images of a folder, by name.

    Raises:
        InputError: there are none, two would be written to one file, or results would lie among them.
    """
    from bench.train.data import OWN

    if not folder.is_dir():
        raise InputError(f"--images must be a folder of images, got {folder}")
    if out.resolve() == folder.resolve():
        raise InputError(f"--out must be another folder than that of the images, got {out} for both")
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    found = [path for path in files if path.suffix.lower() in OWN]
    if not found:
        raise InputError(f"--images must be a folder of images that end in {', '.join(OWN)}, got none in {folder}")
    if left_out := [path.name for path in files if path.suffix.lower() not in OWN]:
        said.say(f"{len(left_out)} files are no images and left out: {', '.join(left_out[:3])}")
    names: dict[str, Path] = {}
    for path in found:
        if names.setdefault(path.stem.lower(), path) != path:
            other = names[path.stem.lower()]
            raise InputError(f"{path} must have another name than {other.name}: both would be {path.stem}.png", path)
    return found


def planned(path: Path, predictor: Predictor) -> Work:
    """What an image will take, from its header."""
    from bench.train.data import check_shades, read, shown_size
    from bench.train.prediction import tiles

    picture = read(path, whole=False)
    check_shades(picture, path)
    width, height = shown_size(picture)
    tile = predictor.tile(path, (height, width))
    return Work(path, (height, width), tile, tiles((height, width), tile))


def tiles_in_words(works: Sequence[Work]) -> str:
    """The tiles that the images are cut into, the largest first."""
    return ", ".join(format_size(tile) for tile in sorted({work.tile for work in works}, reverse=True))


def clock(works: Sequence[Work], bar: Bar, said: Terminal) -> Callable[[], None]:
    """What is called after every tile: it moves the bar, and now and then says in a line what is left."""
    begin = last = time.monotonic()
    done, total = 0, sum(work.tiles for work in works)

    def tell() -> None:
        nonlocal done, last
        done += 1
        bar.advance()
        now = time.monotonic()
        if now - last >= SPOKEN:
            left = timedelta(seconds=round((now - begin) / done * (total - done)))
            said.say(f"{done} of {total} tiles, {left} left")
            last = now

    return tell


def save(picture: Image.Image, path: Path) -> None:
    """Write a PNG whole or not at all."""
    with replacing(path) as temporary:
        picture.save(temporary, "PNG", optimize=path.name == "contact_sheet.png")
