"""``python -m bench train``: train a segmentation network by the authors' recipe, and measure its mean IoU.

IANet on a dilated ResNet with any of the compared heads, on Cityscapes, ADE20K, LIP, VOC or COCO-Stuff from a folder.
The same command again goes on where it was. The order of the images and all chance are functions of the seed and of the
iteration, so what an interrupted run computes is what an uninterrupted one does: bit for bit on a CPU with the same
number of threads. SIGTERM and SIGINT (Ctrl-C) end the iteration and save. For several processes, on GPUs one each:

    torchrun --nproc-per-node N -m bench train ...

Batch statistics are then those of all processes, and --batch is that of all together.
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import torch

from bench import records
from bench.arguments import device, folder, from_zero, number, positive, size
from bench.compared.heads import CONTEXTS
from bench.train.recipe import RECIPES, InputError, Recipe
from isa_triton._extras import install


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    here = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="folder of the data set, as its publishers lay it out")
    add("--data-set", choices=RECIPES, help="which one it is, and whose recipe is followed unless told otherwise")
    add("--out", type=folder, default="out/train", metavar="DIR", help="folder of the results (default: out/train)")
    add("--evaluate", type=Path, metavar="CHECKPOINT", help="do not train: evaluate an earlier run by its own recipe")
    add("--head", choices=CONTEXTS, default="ISA", help="default: ISA; none is a fully convolutional network")
    add("--backbone", default="resnet101", metavar="NAME", help="a ResNet of torchvision (default: resnet101)")
    weights = "its first, or none (default: IMAGENET1K_V1)"
    add("--weights", type=name_or_none, default="IMAGENET1K_V1", metavar="NAME", help=weights)
    add("--channels", type=positive, default=512, metavar="C", help="of the head (default: 512)")
    add("--partition-size", type=size, default=(8, 8), metavar="P", help="of ISA: 8 or 8x4, height first (default: 8)")
    add("--output-stride", type=int, choices=(8, 16, 32), help="(default: the recipe's)")
    add("--crop", type=size, metavar="SIZE", help="what is seen at once (default: the recipe's)")
    add("--batch", type=positive, metavar="B", help="crops in an iteration, of all processes (the recipe's)")
    add("--lr", type=number, metavar="R", help="learning rate at first (the recipe's)")
    add("--weight-decay", type=number, metavar="W", help="(the recipe's)")
    add("--iterations", type=positive, metavar="N", help="(the recipe's)")
    precisions = ("float32", "bfloat16", "float16")
    add("--precision", choices=precisions, default="float32", help="of autocast (default: float32)")
    add("--seed", type=from_zero, default=0, help="of first weights, order, augmentation and dropout (default: 0)")
    add("--scales", type=number, nargs="+", default=[1.0], metavar="S", help="of evaluated images (default: 1)")
    add("--flip", action="store_true", help="evaluate every image flipped as well")
    add("--save-every", type=positive, default=1000, metavar="N", help="iterations (default: 1000)")
    workers = "processes that load images (default: 2; 0: this one)"
    add("--workers", type=from_zero, default=2, metavar="N", help=workers)
    add("--device", type=device, default=here, help=f"default: {here}")


def name_or_none(text: str) -> str | None:
    """A name, or "none" for None."""
    return None if text == "none" else text


def run(args: argparse.Namespace) -> None:
    if missing := [name for name in ("torchvision", "torchmetrics") if not find_spec(name)]:
        raise InputError(f"needs {' and '.join(missing)}: {install('train')}")
    from bench.train.trainer import build, evaluate, join, read_checkpoint, train  # which need them

    with join(args.device) as process:
        console = records.console(quiet=process.rank > 0)
        if args.evaluate:
            checkpoint = read_checkpoint(args.evaluate, process.device)
            network = build(checkpoint["recipe"]).to(process.device)
            network.load_state_dict(checkpoint["network"])
            evaluate(network, checkpoint["recipe"], args, process, console)
        else:
            recipe = recipe_of(args, process.world_size)
            trainer = train(recipe, args, process, console)
            if trainer.iteration == recipe.iterations:
                evaluate(trainer.network, recipe, args, process, console)


def recipe_of(args: argparse.Namespace, world_size: int) -> Recipe:
    """The data set's recipe with what the user says otherwise.

    Raises:
        InputError: arguments that are wrong together.
    """
    if args.data_set is None:
        raise InputError(f"--data-set must be one of {', '.join(RECIPES)}")
    names = {field.name for field in fields(Recipe)}
    given = {name: value for name, value in vars(args).items() if name in names and value is not None}
    recipe = Recipe(**RECIPES[args.data_set] | given)
    if recipe.channels % 16:
        raise InputError(f"--channels must be a multiple of 16, got {recipe.channels}")
    if recipe.batch % world_size:
        raise InputError(f"--batch must be a multiple of {world_size}, the number of processes, got {recipe.batch}")
    height, width = (-(-side // recipe.output_stride) for side in recipe.crop)
    if recipe.batch * (1 if recipe.head in ("PPM", "ASPP") else height * width) < 2:
        raise InputError("--batch must be at least 2: batch normalisation of one value has no variance")
    return recipe
