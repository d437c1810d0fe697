"""What the pixels of label files mean: classes by value or by colour, as published or from a list of one's own.

A list of one's own is classes.txt or classes.json in the folder of the data; `python -m bench train --help` says what
stands in them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bench.train.recipe import IGNORED, InputError

UNKNOWN = 254  # in a table of labels: no file may hold it
MOST = 254  # classes that a byte counts, beside what is ignored or unknown
VALUES, COLOURS = 2**16, 2**24  # how many there are
OF_VALUES = ("1", "L", "LA", "P", "I", "I;16", "I;16B", "I;16L")  # modes of PIL with one number a pixel
OF_COLOURS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX")
LISTS = ("classes.txt", "classes.json")
LINE = "NAME, NAME VALUE, NAME R G B, NAME VALUE R G B, ignore VALUE or ignore R G B"
KEYS = ("name", "value", "colour", "ignore", "mirrored")  # of a class in classes.json

VALUE, COLOUR, NEITHER = "a value", "a colour", "no value and no colour"  # what an entry of a list says

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Classes:
    """The classes of a data set, in order, and what a label file holds where they are.

    Args:
        names: of the classes.
        numbers: of the classes in label files: values, or colours as 0xRRGGBB.
        ignored: further numbers, which have no class.
        by_colour: whether numbers are colours.
        mirrored: pairs of classes that a flip exchanges, as left and right arms.
        colours: that the classes are drawn in; without any those of label files, or VOC's.
    """

    names: tuple[str, ...]
    numbers: tuple[int, ...]
    ignored: tuple[int, ...] = ()
    by_colour: bool = False
    mirrored: tuple[tuple[int, int], ...] = ()
    colours: tuple[Colour, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def __str__(self) -> str:
        said = zip((*self.names, *("ignore" for _ in self.ignored)), (*self.numbers, *self.ignored), strict=True)
        return ", ".join(f"{name} {self.word(number)}" for name, number in said)

    def word(self, number: int) -> str:
        """A number of a label file as a class list has it: "7" or "128 64 128"."""
        if self.by_colour:
            return " ".join(map(str, _colour(number)))
        return str(number) if number < VALUES else f"outside 0 to {VALUES - 1}"

    @property
    def kind(self) -> str:
        """What label files hold."""
        return "colour" if self.by_colour else "value"

    @property
    def modes(self) -> tuple[str, ...]:
        """PIL's modes of pictures that may be label files."""
        return OF_COLOURS if self.by_colour else OF_VALUES

    def read(self, picture: Image.Image) -> np.ndarray:
        """The number of every pixel of a label picture [H, W]: its value, a palette's index, or its colour.

        Alpha says nothing. A mask of 1 bit holds the values 0 and 1, or black and white.
        """
        if self.by_colour:
            red, green, blue = np.moveaxis(np.asarray(picture.convert("RGB")).astype(np.int32), -1, 0)
            return red << 16 | green << 8 | blue
        values = np.asarray(picture.getchannel(0) if picture.mode == "LA" else picture)
        return np.minimum(values.astype(np.uint32), VALUES)  # what no file of 16 bits holds is one value more

    @cached_property
    def table(self) -> np.ndarray:
        """The class of every number that `read` gives, uint8."""
        table = np.full((COLOURS if self.by_colour else VALUES) + 1, UNKNOWN, np.uint8)
        table[list(self.ignored)] = IGNORED
        table[list(self.numbers)] = np.arange(len(self), dtype=np.uint8)
        return table

    @property
    def mirror(self) -> Tensor:
        """What a flip makes of every class, [256]."""
        table = torch.arange(256)
        for left, right in self.mirrored:
            table[[left, right]] = table[[right, left]]
        return table

    @property
    def palette(self) -> np.ndarray:
        """The colour that every class is drawn in, [classes, 3], uint8."""
        drawn = self.colours or (tuple(map(_colour, self.numbers)) if self.by_colour else _voc_colours(len(self)))
        return np.array(drawn, np.uint8)

    def picture(self, classes: np.ndarray) -> Image.Image:
        """A label picture of classes [H, W], uint8, which `read` and `table` read as these classes.

        It has a palette that shows them in colour, but where values need 16 bits.
        """
        numbers = np.arange(len(self)) if self.by_colour else np.array(self.numbers)
        if numbers.max() > 255:
            return Image.fromarray(numbers.astype(np.uint16)[classes])
        palette = np.zeros((256, 3), np.uint8)
        palette[numbers] = np.array([_colour(n) for n in self.numbers]) if self.by_colour else self.palette
        picture = Image.fromarray(numbers.astype(np.uint8)[classes])
        picture.putpalette(palette.tobytes())
        return picture


def _colour(number: int) -> Colour:
    return number >> 16, number >> 8 & 255, number & 255


def _voc_colours(count: int) -> tuple[Colour, ...]:
    """The first of VOC's 256 colours, all different: the bits of a number, dealt to red, green and blue in turn."""

    def channel(number: int, first: int) -> int:
        return sum((number >> (3 * i + first) & 1) << (7 - i) for i in range(3))

    return tuple((channel(n, 0), channel(n, 1), channel(n, 2)) for n in range(count))


# -- a list of one's own -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """What one line or object says, and where it stands."""

    place: str
    name: str
    value: int | None
    colour: Colour | None
    ignored: bool = False
    mirrored: str | None = None

    @property
    def kind(self) -> str:
        return VALUE if self.value is not None else NEITHER if self.colour is None else COLOUR

    @property
    def number(self) -> int | None:
        red, green, blue = self.colour or (0, 0, 0)
        return self.value if self.colour is None or self.value is not None else red << 16 | green << 8 | blue


def read_classes(folder: Path) -> Classes:
    """The class list of a folder.

    Raises:
        InputError: there is none, there are two, or one says what cannot be.
    """
    there = [folder / name for name in LISTS if (folder / name).is_file()]
    if not there:
        raise InputError(f"{folder} must have a class list, {' or '.join(LISTS)}: a line a class is {LINE}")
    if len(there) > 1:
        raise InputError(f"{folder} must have one class list, got {' and '.join(LISTS)}")
    (path,) = there
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors of Windows put a mark before it
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text: {error}") from error
    entries = list(_lines(path, text) if path.suffix == ".txt" else _objects(path, text))
    return _classes(path, entries)


def _lines(path: Path, text: str) -> Iterator[_Entry]:
    for n, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        place = f"{path}, line {n},"
        count = next((i for i, word in enumerate(reversed(words)) if not word.isdecimal()), len(words))
        name, numbers = " ".join(words[: len(words) - count]), [int(word) for word in words[len(words) - count :]]
        ignored = name == "ignore"
        if not name or count not in ((1, 3) if ignored else (0, 1, 3, 4)):
            raise InputError(f"{place} must be {LINE}, got {line.strip()!r}")
        value, colour = (numbers[:1], numbers[1:]) if count in (1, 4) else ([], numbers)
        yield _Entry(place, name, _value(place, value[0]) if value else None, _as_colour(place, colour), ignored)


def _objects(path: Path, text: str) -> Iterator[_Entry]:
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path} must be JSON: {error}") from error
    example = '[{"name": "road", "value": 7}, {"name": "void", "value": 255, "ignore": true}]'
    if not isinstance(items, list):
        raise InputError(f"{path} must be a list of classes, as {example}, got {type(items).__name__}")
    for n, item in enumerate(items, 1):
        place = f"{path}, class {n},"
        if not isinstance(item, dict) or not isinstance(item.get("name"), str) or not item["name"].strip():
            raise InputError(f"{place} must be an object with a name, as in {example}, got {json.dumps(item)}")
        said: dict[str, Any] = {"colour" if key == "color" else key: value for key, value in item.items()}
        if unlike := said.keys() - set(KEYS):
            raise InputError(f"{place} must have no keys but {', '.join(KEYS)}, got {', '.join(sorted(unlike))}")
        ignored, mirrored = said.get("ignore", False), said.get("mirrored")
        if not isinstance(ignored, bool) or not isinstance(mirrored, str | None):
            wanted = 'must have true or false as "ignore" and a class\'s name as "mirrored"'
            raise InputError(f"{place} {wanted}, got {json.dumps(item)}")
        value = None if said.get("value") is None else _value(place, said["value"])
        yield _Entry(place, said["name"].strip(), value, _as_colour(place, said.get("colour") or []), ignored, mirrored)


def _is_number(value: Any, below: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < below


def _value(place: str, value: Any) -> int:
    if not _is_number(value, VALUES):
        raise InputError(f"{place} must have a value from 0 to {VALUES - 1}, got {value!r}")
    return value


def _as_colour(place: str, parts: Any) -> Colour | None:
    if isinstance(parts, list) and not parts:
        return None
    if not isinstance(parts, list) or len(parts) != 3 or not all(_is_number(part, 256) for part in parts):
        raise InputError(f"{place} must have a colour of three numbers from 0 to 255, got {parts!r}")
    return parts[0], parts[1], parts[2]


def _classes(path: Path, entries: Sequence[_Entry]) -> Classes:
    """What the entries say together."""
    listed, ignored = [e for e in entries if not e.ignored], [e for e in entries if e.ignored]
    if not 2 <= len(listed) <= MOST:
        raise InputError(f"{path} must list from 2 to {MOST} classes, got {len(listed)}")
    kind = listed[0].kind
    for entry in entries:
        wanted = VALUE if entry.ignored and kind == NEITHER else kind
        if entry.kind != wanted:
            raise InputError(f"{entry.place} must have {wanted}, as {listed[0].name!r} has {kind}, got {entry.kind}")
    first: dict[str | int, _Entry] = {}
    numbers = [n if entry.number is None else entry.number for n, entry in enumerate(listed)]
    for entry, number in zip([*listed, *ignored], [*numbers, *(e.number or 0 for e in ignored)], strict=True):
        words: list[str | int] = [number] if entry.ignored else [number, entry.name]
        for word in words:
            if first.setdefault(word, entry) is not entry:
                what = (
                    f"the name {word!r}" if isinstance(word, str) else "the colour" if kind == COLOUR else "the value"
                )
                raise InputError(f"{entry.place} must not have {what} again that {first[word].name!r} has")
    names = [entry.name for entry in listed]
    pairs = set()
    for n, entry in enumerate(listed):
        if entry.mirrored is not None:
            if entry.mirrored not in names or entry.mirrored == entry.name:
                raise InputError(f"{entry.place} must name another class as mirrored, got {entry.mirrored!r}")
            pairs.add(tuple(sorted((n, names.index(entry.mirrored)))))
    sides = [side for pair in pairs for side in pair]
    if len(set(sides)) < len(sides):
        raise InputError(f"{path} must name classes as mirrored in pairs, got one that is in two pairs")
    colours = tuple(entry.colour for entry in listed if entry.colour)
    if kind == VALUE and 0 < len(colours) < len(listed):
        raise InputError(f"{path} must have a colour for every class or for none, got {len(colours)}")
    return Classes(
        names=tuple(names),
        numbers=tuple(numbers),
        ignored=tuple(entry.number or 0 for entry in ignored),
        by_colour=kind == COLOUR,
        mirrored=tuple((a, b) for a, b in sorted(pairs)),
        colours=colours if kind == VALUE else (),
    )
