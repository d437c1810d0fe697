"""Class lists of one's own, and what masks of every kind mean by them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench.train.classes import LINE, Classes, read_classes
from bench.train.data import DATA_SETS
from bench.train.recipe import IGNORED, InputError
from tests.segmentation_data import CLASSES_TXT, COLOURS, NUMBERS, mask

NAMES = ("road", "wall", "open water")
CHOICE = np.arange(48).reshape(4, 12) % 4
WANTED = np.where(CHOICE == 3, IGNORED, CHOICE)


def listed(text: str, folder: Path, name: str = "classes.txt") -> Classes:
    (folder / name).write_text(text)
    return read_classes(folder)


@pytest.mark.parametrize("kind", CLASSES_TXT)
def test_a_line_is_a_class(kind: str, tmp_path: Path) -> None:
    classes = listed(CLASSES_TXT[kind], tmp_path)
    assert classes.names == NAMES
    assert classes.by_colour == (kind == "colours")
    if kind == "colours":
        assert classes.palette.tolist() == [list(colour) for colour in COLOURS]
        assert [classes.word(n) for n in classes.numbers] == ["128 64 128", "70 70 70", "0 130 180"]
    else:
        assert (*classes.numbers, *classes.ignored) == NUMBERS[kind]
        assert classes.palette.tolist()[:2] == [[0, 0, 0], [128, 0, 0]]  # VOC's


def test_an_object_is_a_class(tmp_path: Path) -> None:
    items = [
        {"name": "left arm", "value": 300, "color": [1, 2, 3], "mirrored": "right arm"},
        {"name": "right arm 2", "value": 4, "colour": [4, 5, 6]},
        {"name": "right arm", "value": 5, "colour": [7, 8, 9]},
        {"name": "void", "value": 255, "ignore": True},
    ]
    classes = listed(json.dumps(items), tmp_path, "classes.json")
    assert classes == Classes(
        names=("left arm", "right arm 2", "right arm"),
        numbers=(300, 4, 5),
        ignored=(255,),
        mirrored=((0, 2),),
        colours=((1, 2, 3), (4, 5, 6), (7, 8, 9)),
    )
    assert classes.mirror[:4].tolist() == [2, 1, 0, 3]
    (tmp_path / "classes.json").unlink()
    assert listed("left arm 300 1 2 3\nright 4 4 5 6\n", tmp_path).colours == ((1, 2, 3), (4, 5, 6))


MASKS = [  # what a mask holds, by which list, in which files: WebP has no grey, and BMP no 16 bits
    *((kind, kind, ("png", "tif", "bmp")) for kind in ("values", "names")),
    ("wide", "wide", ("png", "tif")),
    *((kind, "colours", ("png", "tif", "webp", "bmp")) for kind in ("colours", "palette", "RGBA")),
]


@pytest.mark.parametrize(("kind", "by", "end"), [(kind, by, end) for kind, by, ends in MASKS for end in ends])
def test_a_mask_means_what_the_list_says_in_every_file(kind: str, by: str, end: str, tmp_path: Path) -> None:
    classes, path = listed(CLASSES_TXT[by], tmp_path), tmp_path / f"a.{end}"
    mask(CHOICE, kind).save(path, **({"lossless": True, "exact": True} if end == "webp" else {}))
    with Image.open(path) as picture:
        assert picture.mode in classes.modes
        assert np.array_equal(classes.table[classes.read(picture)], WANTED)


def test_a_palette_is_read_by_index_or_by_colour_as_the_list_says(tmp_path: Path) -> None:
    picture = mask(CHOICE, "palette")
    by_index = listed("road 9\nwall 4\nopen water 30\nignore 2\n", tmp_path)
    by_colour = listed(CLASSES_TXT["colours"], tmp_path)
    for classes in (by_index, by_colour):
        assert np.array_equal(classes.table[classes.read(picture)], WANTED)


def test_grey_masks_of_one_bit_and_of_alpha_hold_values(tmp_path: Path) -> None:
    choice = CHOICE % 2
    classes = listed("nothing\nthing\n", tmp_path)
    grey = Image.fromarray(choice.astype(np.uint8))
    pictures = [Image.fromarray(choice == 1), Image.merge("LA", [grey, grey.point(lambda v: 90 * v)])]
    for picture in pictures:
        assert np.array_equal(classes.table[classes.read(picture)], choice)


def test_numbers_beyond_16_bits_are_unknown(tmp_path: Path) -> None:
    classes = listed("nothing 0\nthing 65535\n", tmp_path)
    numbers = classes.read(Image.fromarray(np.array([[0, 65535, 65536, -1]], np.int32)))
    assert classes.table[numbers].tolist() == [[0, 1, 254, 254]]
    assert classes.word(int(numbers[0, 3])) == "outside 0 to 65535"


PUBLISHED = {name: data.classes for name, data in DATA_SETS.items()}


@pytest.mark.parametrize("name", [*PUBLISHED, *CLASSES_TXT])
def test_a_predicted_label_file_is_read_as_what_was_predicted(name: str, tmp_path: Path) -> None:
    classes = PUBLISHED.get(name) or listed(CLASSES_TXT[name], tmp_path)
    predicted = np.random.default_rng(0).integers(len(classes), size=(9, 40)).astype(np.uint8)
    classes.picture(predicted).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert np.array_equal(classes.table[classes.read(picture)], predicted)
        if name != "wide":
            assert np.array_equal(np.asarray(picture.convert("RGB")), classes.palette[predicted])


def test_drawn_colours_are_all_different() -> None:
    colours = Classes(tuple(map(str, range(254))), tuple(range(254))).palette
    assert len(np.unique(colours, axis=0)) == 254


LINES = {
    "road\n": "must list from 2 to 254 classes, got 1",
    "\n".join(f"c{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(255)): "from 2 to 254 classes, got 255",
    "road 1\nwall 2 3\n": f"line 2, must be {LINE}, got 'wall 2 3'",
    "road 1\n7\n": "line 2, must be NAME",
    "road 1\nwall 2\nignore\n": "line 3, must be NAME",
    "road 1\nwall 65536\n": "line 2, must have a value from 0 to 65535, got 65536",
    "road 1 2 3\nwall 1 2 256\n": "line 2, must have a colour of three numbers from 0 to 255, got [1, 2, 256]",
    "road 1 2 3\nwall 4\n": "line 2, must have a colour, as 'road' has a colour, got a value",
    "road\nwall 4\n": "line 2, must have no value and no colour, as 'road' has no value and no colour, got a value",
    "road 1\nwall 2\nignore 1 2 3\n": "line 3, must have a value, as 'road' has a value, got a colour",
    "road 1\nwall 1\n": "line 2, must not have the value again that 'road' has",
    "road 1 1 1\nwall 1 1 1\n": "line 2, must not have the colour again that 'road' has",
    "road\nwall\nignore 1\n": "line 3, must not have the value again that 'wall' has",
    "class 1\nclass 2\n": "line 2, must not have the name 'class' again that 'class' has",
    "road 1 9 9 9\nwall 2\n": "must have a colour for every class or for none, got 1",
}
OBJECTS = {
    "{": "classes.json must be JSON: ",
    '{"road": 1}': "must be a list of classes, as [{",
    '[{"value": 1}]': 'class 1, must be an object with a name, as in [{"name": "road", "value": 7},',
    '[{"name": "road", "id": 1}]': "class 1, must have no keys but name, value, colour, ignore, mirrored, got id",
    '[{"name": "road", "value": true}]': "class 1, must have a value from 0 to 65535, got True",
    '[{"name": "road", "colour": "red"}]': "class 1, must have a colour of three numbers from 0 to 255, got 'red'",
    '[{"name": "road", "ignore": 1}]': 'class 1, must have true or false as "ignore"',
    '[{"name": "a", "mirrored": "c"}, {"name": "b"}]': "class 1, must name another class as mirrored, got 'c'",
    '[{"name": "a", "mirrored": "b"}, {"name": "b", "mirrored": "c"}, {"name": "c"}]': "got one that is in two pairs",
}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [*(("classes.txt", *item) for item in LINES.items()), *(("classes.json", *item) for item in OBJECTS.items())],
)
def test_a_list_that_cannot_be_is_answered_in_a_line(name: str, text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as raised:
        listed(text, tmp_path, name)
    assert str(raised.value).startswith(f"{tmp_path / name}")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_folder_has_one_list_of_text(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"must have a class list, classes\.txt or classes\.json: a line a class is NAME"
    ):
        read_classes(tmp_path)
    (tmp_path / "classes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"classes\.txt cannot be read as text: "):
        read_classes(tmp_path)
    (tmp_path / "classes.json").write_text("[]")
    with pytest.raises(InputError, match=r"must have one class list, got classes\.txt and classes\.json"):
        read_classes(tmp_path)


def test_a_list_that_windows_wrote_is_read(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_bytes("\ufeffStraße 1\r\nété 2\r\n".encode())
    assert read_classes(tmp_path).names == ("Straße", "été")
