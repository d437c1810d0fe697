"""Devices for tests of sharding: processes on gloo where numbers matter, fake ones where only counts do."""

from __future__ import annotations

import faulthandler
import math
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore


def fresh_processes() -> ForkServerContext:
    """A context whose processes begin with what takes long to import, and with nothing of ours."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed.tensor.parallel", "matplotlib.pyplot", "triton", "pytest"])
    return context


def processes(devices: int, body: Callable[[], Any], folder: Path, timeout: float = 30.0) -> list[Any]:
    """What `body` returned in each of `devices` processes on gloo, or the text of what it raised; None of the dead.

    `timeout` is the group's, in seconds: how long one process waits for another.
    """
    context = fresh_processes()
    workers = [
        context.Process(target=_worker, args=(body, rank, devices, folder, timeout), daemon=True)
        for rank in range(devices)
    ]
    for worker in workers:
        worker.start()
    deadline = time.monotonic() + 3 * timeout
    for worker in workers:
        worker.join(max(0.0, deadline - time.monotonic()))
        if worker.is_alive():
            worker.kill()
            pytest.fail(f"a process hangs after {3 * timeout} s")
    paths = [folder / f"result{rank}" for rank in range(devices)]
    return [torch.load(path, weights_only=False) if path.exists() else None for path in paths]


def _worker(body: Callable[[], Any], rank: int, devices: int, folder: Path, timeout: float) -> None:
    faulthandler.dump_traceback_later(2 * timeout, exit=True)  # a process that hangs says where, and ends
    torch.set_num_threads(1)
    torch.manual_seed(0)
    store = dist.FileStore(str(folder / "store"), devices)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=devices, timeout=timedelta(seconds=timeout))
    try:
        result = body()
    except Exception:
        result = traceback.format_exc()
    torch.save(result, folder / f"result{rank}")
    os._exit(0)  # threads of a broken group do not keep a process


@contextmanager
def fake_devices(shape: tuple[int, ...], rank: int = 0) -> Iterator[DeviceMesh]:
    """A mesh of devices of which one is here: what it receives means nothing."""
    dist.init_process_group("fake", rank=rank, world_size=math.prod(shape), store=FakeStore())
    try:
        yield init_device_mesh("cpu", shape, mesh_dim_names=("rows", "batch")[: len(shape)])
    finally:
        dist.destroy_process_group()
