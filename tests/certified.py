"""A part of a certificate whose items do what items should not: planted by test_bench_certify.py."""

from __future__ import annotations

import os
import signal
import sys
import time

from bench.certify.rows import Found, Name, NotRun, Setting

SAID = "the last words"


def items(setting: Setting) -> list[Name]:
    return [
        (name,)
        for name in ("right", "wrong", "raises", "crashes", "hangs", "cannot", "takes the device", "right again")
    ]


def run(setting: Setting, name: str) -> Found:
    if name == "raises":
        raise IndexError("out of bounds\nand more")
    if name in ("crashes", "hangs"):
        print(SAID, file=sys.stderr, flush=True)
    if name == "crashes":
        os.kill(os.getpid(), signal.SIGSEGV)
    if name == "hangs":
        time.sleep(1000)
    if name == "cannot":
        raise NotRun("there is no such thing here")
    if name == "takes the device":
        vars(sys.modules["__main__"])["is_well"] = lambda setting: False
    print("libraries print")
    return Found.judged("is wrong" if name == "wrong" else "", process=os.getpid())


def slow(setting: Setting) -> list[Name]:
    return [(str(i),) for i in range(4)]


def sleep(setting: Setting, name: str) -> Found:
    """What the first run is killed in."""
    if name == "2" and not os.path.exists(setting.cache):
        with open(f"{setting.cache}.pid", "w") as file:
            file.write(str(os.getpid()))
        time.sleep(1000)
    return Found("measured", "", {"process": os.getpid()})
