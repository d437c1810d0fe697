"""Who looks at the items: a process for each part, another where one hangs or dies, a row for whatever happens.

A row is on the disk before the next item begins, so that a run that is killed goes on where it was.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO

from bench.certify.parts import OTHERS_FAIL, PARTS, Part
from bench.certify.peers import OURS
from bench.certify.rows import Certificate, Found, Item, Setting
from bench.terminal import Bar

ROOT = Path(__file__).parent.parent.parent
START = 120.0  # seconds to import what a part needs


class Ended(Exception):
    """How a process ended that should have answered."""


class Process:
    """A process of a part.

    Raises:
        Ended: it did not start.
    """

    def __init__(self, part: Part, setting: Setting, log: IO[bytes]) -> None:
        self.log, self.begin, self.well = log, log.tell(), True
        words = [sys.executable, "-m", "bench.certify.once", json.dumps(asdict(part)), json.dumps(asdict(setting))]
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment(part, setting),
            start_new_session=True,
        )  # fmt: skip
        self.rest = b""
        try:
            self._answer(START)
        except Ended:
            self.end()
            raise

    def ask(self, item: Item, limit: float) -> Found:
        """What comes out of an item; the process is not `well` where it should not be asked again.

        Raises:
            Ended: nothing did.
        """
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{json.dumps(item.name)}\n".encode())
            self.process.stdin.flush()
        except BrokenPipeError:
            raise Ended(self._death()) from None
        answer = json.loads(self._answer(limit))
        self.well = answer["well"]
        return Found(**answer["found"])

    def _answer(self, limit: float) -> bytes:
        """A line of its output."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + limit
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while b"\n" not in self.rest:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    self.end()
                    raise Ended(f"was ended after {limit:.0f} seconds: {self._last_words()}")
                if not (more := os.read(self.process.stdout.fileno(), 1 << 16)):
                    raise Ended(self._death())
                self.rest += more
        line, _, self.rest = self.rest.partition(b"\n")
        return line

    def _death(self) -> str:
        code = self.process.wait()
        how = signal.Signals(-code).name if code < 0 else f"status {code}"
        return f"its process ended with {how}: {self._last_words()}"

    def _last_words(self) -> str:
        self.log.seek(self.begin)
        lines = self.log.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")

    def end(self) -> None:
        """End it, and all that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(BrokenPipeError):
                pipe.close()  # type: ignore[union-attr]


def environment(part: Part, setting: Setting) -> dict[str, str]:
    """Where kernels are interpreted or compiled, and kept; what torch asks for to be deterministic."""
    found = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found |= {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    found |= {"TRITON_CACHE_DIR": str(Path(setting.cache) / "triton"), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    if setting.interpreted and part.interpreted:
        found["TRITON_INTERPRET"] = "1"
    if part.module == ".tools":  # else many tensors are one allocation, and what is beside a tensor is another's
        found["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    return found


def conduct(
    items: Sequence[Item], setting: Setting, certificate: Certificate, log: Path, seconds: float, bar: Bar
) -> list[Item]:
    """Look at every item, and return those for which there was no time.

    Args:
        seconds: of all items; none begins later.
        log: takes what the processes say.
    """
    deadline, todo = time.monotonic() + seconds, list(items)
    with log.open("ab+") as said:
        said.seek(0, os.SEEK_END)
        process: Process | None = None
        of = ""  # the part that the process is for
        try:
            while todo and time.monotonic() < deadline:
                item, part = todo[0], PARTS[todo[0].part]
                bar.now(str(item))
                try:
                    if process is None or of != part.letter or not process.well:
                        if process is not None:
                            process.end()
                        process, of = None, part.letter
                        process = Process(part, setting, said)
                    found = process.ask(item, part.limit)
                except Ended as end:
                    found = Found("not run" if is_of_others(item) else "failed", str(end))
                    if process is not None:
                        process.end()
                    process = None
                certificate.add(item, found)
                todo.pop(0)
                bar.advance()
        finally:
            if process is not None:
                process.end()
    return todo


def is_of_others(item: Item) -> bool:
    """Whether an item runs other people's code."""
    return item.part == OTHERS_FAIL and item.name[-1] != OURS
