"""The processes that train one network: each says that it lives, so that those left can name one that does not."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from bench.train.recipe import InputError

PATIENCE = timedelta(minutes=10)  # how long one process waits for another in an exchange
BEAT = 1.0  # seconds from one sign of life to the next
SILENCE = 5  # beats without a sign, after which a process is taken for dead


@contextmanager
def joined(backend: str) -> Iterator[tuple[int, int]]:
    """A process group of those that torchrun, or its variables by hand, name; yields this rank and their number.

    Raises:
        InputError: they did not meet, or one was dead or stopped when an exchange failed; it says which.
    """
    try:
        store, rank, size = next(iter(dist.rendezvous("env://", timeout=PATIENCE)))
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    except (dist.DistError, RuntimeError, ValueError) as error:
        address = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise InputError(f"the processes did not meet at {address}: {_line(error)}") from error
    try:
        with _Signs(dist.PrefixStore("signs of life", store), rank, size) as signs:
            try:
                yield rank, size
            except RuntimeError as error:  # of an exchange, or this process's own
                if not (silent := signs.silent()):
                    raise
                ranks = " and ".join(map(str, silent))
                said = f"rank {ranks} of {size} has died or does not move, rank {rank} waited for it: {_line(error)}"
                raise InputError(said) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


class _Signs:
    """A thread of every process counts in the store that they share."""

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self.store, self.rank, self.size, self.over = store, rank, size, threading.Event()
        self.thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> _Signs:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()

    def _beat(self) -> None:
        try:
            while not self.over.wait(BEAT):
                self.store.add(str(self.rank), 1)
        except RuntimeError:  # the store is gone, as rank 0 is; whoever waits for it will hear
            return

    def silent(self) -> list[int]:
        """The other ranks that gave no sign for a while; 0, which holds the store, where that does not answer."""
        counts: list[list[int]] = []

        def count() -> None:
            for pause in (SILENCE * BEAT, 0):
                try:
                    counts.append([self.store.add(str(other), 0) for other in range(self.size)])
                except RuntimeError:
                    return
                time.sleep(pause)

        counting = threading.Thread(target=count, daemon=True)  # a store that is stopped answers never
        counting.start()
        counting.join(2 * SILENCE * BEAT)
        if len(counts) < 2:
            return [0]
        still = [rank for rank, (before, after) in enumerate(zip(*counts, strict=True)) if before == after]
        return [rank for rank in still if rank != self.rank]


def _line(error: Exception) -> str:
    """What PyTorch says in its first line, without the place in its sources, up to the advice that follows."""
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[[^\]]*\] ", "", first).split(". ")[0]
