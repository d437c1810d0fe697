"""Checkpoints on the disk: written whole or not at all, and read if nothing in them has changed since."""

from __future__ import annotations

import pickle
import shutil
import struct
import zipfile
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench import records
from bench.compared.heads import CONTEXTS
from bench.train.classes import Classes
from bench.train.data import DATA_SETS
from bench.train.recipe import InputError, Recipe

# What readers of archives and pickles raise where somebody else's bits are in them.
_UNREADABLE = (
    OSError, RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError,
    NotImplementedError, pickle.UnpicklingError, struct.error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def write_checkpoint(path: Path, recipe: Recipe, iteration: int, states: dict[str, Any]) -> None:
    """Write a run's recipe, iteration and states.

    Raises:
        InputError: the disk does not take it.
    """
    try:
        with records.replacing(path) as temporary:
            torch.save({"recipe": asdict(recipe), "iteration": iteration} | states, temporary)
    except (OSError, RuntimeError) as error:  # PyTorch's writer raises the latter on a full disk
        free = shutil.disk_usage(path.parent).free / 1e6
        why = error.strerror if isinstance(error, OSError) and error.strerror else "not all of it was written"
        said = f"{path} cannot be written: {why}, {free:.0f} MB are free; what was there before is whole"
        raise InputError(said) from error


def read_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    """What `write_checkpoint` wrote, its recipe as a `Recipe` that says its classes, and its "path".

    Raises:
        InputError: the file is missing, damaged or something else.
    """
    try:
        _verify(path)
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        recipe = checkpoint["recipe"]
        if recipe["head"] not in CONTEXTS:
            raise ValueError(f"its head is {recipe['head']!r}, none of {', '.join(CONTEXTS)}")
        if recipe["data_set"] not in DATA_SETS and "classes" not in recipe:
            raise ValueError(f"its data set is {recipe['data_set']!r}, none of {', '.join(DATA_SETS)}")
        # older ones name the data set alone
        classes = Classes(**recipe["classes"]) if "classes" in recipe else DATA_SETS[recipe["data_set"]].classes
        whole = checkpoint | {"recipe": Recipe(**recipe | {"classes": classes}), "path": path}
        iteration, _ = whole["iteration"], whole["network"]
        if type(iteration) is not int or iteration < 0:
            raise ValueError(f"its iteration is {iteration!r}")
        return whole
    except InputError:
        raise
    except KeyError as error:
        raise InputError(f"{path} must be a checkpoint that this command wrote: it has no {error}") from error
    except _UNREADABLE as error:
        raise InputError(f"{path} must be a checkpoint that this command wrote: {_line(error)}") from error


def _verify(path: Path) -> None:
    """Raises where a byte is another than the one that was written: PyTorch's archives hold checksums."""
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise InputError(f"{path} is damaged: {damaged} in it has another checksum than when it was written")


def restore(part: Any, checkpoint: dict[str, Any], name: str, **options: Any) -> None:
    """Load a part of a run from a checkpoint.

    Raises:
        InputError: the checkpoint has no such part, or one of another network.
    """
    path = checkpoint["path"]
    if name not in checkpoint:
        raise InputError(f"{path} has no {name}: network.pt is for evaluation, checkpoint.pt goes on with training")
    try:
        part.load_state_dict(checkpoint[name], **options)
    except _UNREADABLE as error:
        raise InputError(f"{path}, {name}, must be that of its recipe: {_line(error)}") from error


def _line(error: Exception) -> str:
    """What an exception says, or the first line below the heading of many."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[1] if len(lines) > 1 and lines[0].endswith(":") else lines[0]) if lines else type(error).__name__
