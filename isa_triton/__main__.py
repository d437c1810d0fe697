"""``python -m isa_triton``: versions, devices, which backend "auto" takes on each and why, whose tiles it runs with."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version

import torch

from isa_triton import __version__, tiles
from isa_triton._extras import CHECKOUT
from isa_triton.backend import choose
from isa_triton.backend.triton import DEVICES, DTYPES, INTERPRETED_TARGET, target_of, why_not

WHERE = f"in {CHECKOUT}," if CHECKOUT else f"clone the repository of isa_triton {__version__}, and there"
BENCH = f"the bench is not in the wheel: {WHERE} pip install -e '.[bench]' && python -m bench"


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv:
        asked_for_bench = argv[0] == "bench"
        print(BENCH if asked_for_bench else f"usage: python -m isa_triton (no arguments), got {argv}", file=sys.stderr)
        raise SystemExit(2)
    print(*report(), sep="\n")


def report() -> Iterator[str]:
    """The lines that are printed."""
    yield f"isa_triton {__version__}"
    yield f"torch      {torch.__version__}"
    yield f"triton     {_version_of('triton') or 'not installed: pip install triton (Linux)'}"
    for device in _devices():
        yield from ("", *_about(device))


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> list[torch.device]:
    """The accelerators of this machine that PyTorch knows, and the CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    several = [] if found is None else [torch.device(found.type, i) for i in range(torch.accelerator.device_count())]
    return [*several, torch.device("cpu")]


def _about(device: torch.device) -> Iterator[str]:
    q = torch.empty(0, device=device)  # fp32
    target, backend, obstacle = target_of(device), choose("auto", q), why_not(q)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    yield f"device {device}: {name}{f', {target}' if device.type in DEVICES else ''}"
    if backend == "triton":
        yield f'  backend="auto" takes triton for {", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)}'
    elif obstacle:
        yield f'  backend="auto" takes eager: {obstacle}'
    else:
        yield f'  backend="auto" takes eager; "triton" interprets the kernels, with the tiles of {INTERPRETED_TARGET}'
    if not obstacle:
        file = tiles.file_for(target)
        origin = "made for it" if file.stem == target else f"{file.stem}'s serve {target}"
        yield f"  tiles: {file} ({origin})"


if __name__ == "__main__":
    main()
