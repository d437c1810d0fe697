"""``python -m bench train``: train a segmentation network by the authors' recipe, and measure its mean IoU.

IANet on a dilated ResNet with any of the compared heads, on Cityscapes, ADE20K, LIP, VOC or COCO-Stuff as published, or
on data of one's own. The same command again goes on where it was. The order of the images and all chance are functions
of the seed and of the iteration, so what an interrupted run computes is what an uninterrupted one does: bit for bit on
a CPU with the same number of threads. SIGTERM and SIGINT (Ctrl-C) end the iteration and save. For several processes, on
GPUs one each:

    torchrun --nproc-per-node N -m bench train ...

Batch statistics are then those of all processes, and --batch is that of all together.

A run leaves log.csv (every iteration) and checkpoint.pt (network, momentum and where it was: to go on); when it stops,
network.pt (half as large: weights, and recipe with its classes, to evaluate, to predict with and to use); when it ends,
iou.csv as well; and where tensorboard is installed, its event files.

Data of one's own, --data-set folder: images/train, images/val, labels/train and labels/val with png, jpg, tif, webp or
bmp files, where an image and its label have one name; and classes.txt, a line a class:

    NAME                    the values 0, 1, 2, ... in this order
    NAME VALUE              of grey masks of 1, 8 or 16 bits, or the index into a palette
    NAME R G B              of RGB masks, or the colour in a palette
    NAME VALUE R G B        a value, and the colour that the class is drawn in
    ignore VALUE            or ignore R G B: pixels without a class
    # what no class is

or classes.json, a list of objects with "name", "value", "colour" (or "color"), "ignore", and "mirrored": the name of
the class that a flip makes of this one, as of left arms. Alpha says nothing; images are as EXIF turns them. Every file
is decoded and counted before training starts; --check stops there.
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import torch

from bench import terminal
from bench.arguments import (
    add_device,
    add_dtype,
    add_out,
    add_partition_size,
    amount,
    from_zero,
    number,
    positive,
    size,
)
from bench.compared.heads import CONTEXTS
from bench.terminal import Terminal
from bench.train.recipe import RECIPES, InputError, Recipe
from isa_triton._extras import install


def add_arguments(parser: argparse.ArgumentParser) -> None:
    required, add = parser.add_argument_group("required"), parser.add_argument
    layout = "folder of the data set, as its publishers lay it out or as said above"
    required.add_argument("--data", type=Path, required=True, metavar="DIR", help=layout)
    what = required.add_mutually_exclusive_group(required=True)
    what.add_argument("--data-set", choices=RECIPES, help="train: which one it is, and whose recipe is followed")
    evaluated = "do not train: network.pt or checkpoint.pt of an earlier run, by its own recipe"
    what.add_argument("--evaluate", type=Path, metavar="FILE", help=evaluated)
    add(
        "--check", action="store_true", help="do not train: decode every file, and show what is there and what is wrong"
    )
    add_out(parser, default="out/train")
    add("--head", choices=CONTEXTS, default="ISA", help="what attends; none is a fully convolutional network")
    add("--backbone", default="resnet101", metavar="NAME", help="a ResNet of torchvision")
    add("--weights", type=name_or_none, default="IMAGENET1K_V1", metavar="NAME", help="its first, or none")
    add("--channels", type=positive, default=512, metavar="C", help="of the head")
    add_partition_size(parser)
    add("--output-stride", type=int, choices=(8, 16, 32), help="of the backbone (default: the recipe's)")
    add("--crop", type=size, metavar="SIZE", help="what is seen at once (default: the recipe's)")
    add("--batch", type=positive, metavar="B", help="crops in an iteration, of all processes (default: the recipe's)")
    add("--lr", type=number, metavar="R", help="learning rate at first (default: the recipe's)")
    add("--weight-decay", type=amount, metavar="W", help="of every parameter (default: the recipe's)")
    add("--iterations", type=positive, metavar="N", help="until it is done (default: the recipe's)")
    add_dtype(parser, ("float32", "bfloat16", "float16"), "of autocast")
    add("--seed", type=from_zero, default=0, metavar="N", help="of first weights, order, augmentation and dropout")
    add("--scales", type=number, nargs="+", default=[1.0], metavar="S", help="of evaluated images")
    add("--flip", action="store_true", help="evaluate every image flipped as well")
    add("--save-every", type=positive, default=1000, metavar="N", help="iterations")
    add("--workers", type=from_zero, default=2, metavar="N", help="processes that load images, or 0: this one")
    add_device(parser, "of the network", "cuda" if torch.cuda.is_available() else "cpu")
    terminal.add_arguments(parser)


def name_or_none(text: str) -> str | None:
    """A name, or "none" for None."""
    return None if text == "none" else text


def run(args: argparse.Namespace) -> None:
    check_extra()
    from bench.train.checking import check  # which need it
    from bench.train.data import data_set
    from bench.train.saved import read_checkpoint, restore
    from bench.train.trainer import build, evaluate, join, train

    if args.check and args.evaluate:
        raise InputError("--check must come with --data-set, whose files are checked, and not with --evaluate")

    with join(args.device) as process:
        said = Terminal(args, quiet=process.rank > 0)
        if args.evaluate:
            checkpoint = read_checkpoint(args.evaluate, process.device)
            check_classes(args.data, checkpoint["recipe"])
            network = build(checkpoint["recipe"]).to(process.device)
            restore(network, checkpoint, "network")
            evaluate(network, checkpoint["recipe"], args, process, said)
        else:
            recipe = recipe_of(args, process.world_size)
            if args.check:
                paths = check(data_set(recipe), args.data, process, said)
                said.end(f"{sum(map(len, paths.values()))} pairs of images and labels are in order.")
                return
            trainer = train(recipe, args, process, said)
            if trainer.iteration == recipe.iterations:
                evaluate(trainer.network, recipe, args, process, said)


def check_extra() -> None:
    """Raises InputError where the extra "train" is not installed."""
    if missing := [name for name in ("torchvision", "torchmetrics") if not find_spec(name)]:
        raise InputError(f"needs {' and '.join(missing)}: {install('train')}")


def check_classes(folder: Path, recipe: Recipe) -> None:
    """Raises InputError where a folder of one's own has other classes than a network was trained on."""
    from bench.train.classes import read_classes

    if recipe.data_set == "folder" and (listed := read_classes(folder)) != recipe.classes:
        raise InputError(f"{folder} must list the classes that the network knows, {recipe.classes}, got {listed}")


def recipe_of(args: argparse.Namespace, world_size: int) -> Recipe:
    """The data set's recipe with what the user says otherwise, and its classes.

    Raises:
        InputError: arguments that are wrong together, or a class list that is.
    """
    from bench.train.classes import read_classes
    from bench.train.data import DATA_SETS

    names = {field.name for field in fields(Recipe)}
    given = {name: value for name, value in vars(args).items() if name in names and value is not None}
    own = args.data_set == "folder"
    classes = read_classes(args.data) if own else DATA_SETS[args.data_set].classes
    recipe = Recipe(**RECIPES[args.data_set] | {"classes": classes} | given)
    if recipe.channels % 16:
        raise InputError(f"--channels must be a multiple of 16, got {recipe.channels}")
    if recipe.batch % world_size:
        raise InputError(f"--batch must be a multiple of {world_size}, the number of processes, got {recipe.batch}")
    height, width = (-(-side // recipe.output_stride) for side in recipe.crop)
    if recipe.batch * (1 if recipe.head in ("PPM", "ASPP") else height * width) < 2:
        raise InputError("--batch must be at least 2: batch normalisation of one value has no variance")
    return recipe
