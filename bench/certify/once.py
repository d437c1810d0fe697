"""``python -m bench.certify.once PART SETTING``, both in JSON: looks at items, one for each line of its input.

It answers each with a line, and says nothing else on its output. Where its input ends whoever asked is gone: then it
ends too, whatever it is doing, with all processes that it has started.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from dataclasses import asdict, replace

import torch

from bench import devices, measure
from bench.certify.parts import Part
from bench.certify.rows import Found, Name, NotRun, Setting


def main(part_: str, setting_: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    asked: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_listen, args=(asked,), daemon=True).start()
    part, setting = Part(**json.loads(part_)), Setting(**json.loads(setting_))
    if torch.device(setting.device).index is not None:
        torch.accelerator.set_device_index(torch.device(setting.device).index)
    part.all(setting)  # imports it
    print("ready", file=answers, flush=True)
    while True:
        found = look(part, setting, tuple(json.loads(asked.get())))
        print(json.dumps({"found": asdict(found), "well": is_well(setting)}), file=answers, flush=True)


def _listen(asked: queue.Queue[str]) -> None:
    for line in sys.stdin:
        asked.put(line)
    os.killpg(os.getpgid(0), signal.SIGKILL)


def look(part: Part, setting: Setting, name: Name) -> Found:
    """What comes out of an item, whatever it raises."""
    begin = time.monotonic()
    try:
        found = part.look(setting, name)
    except NotRun as reason:
        found = Found("not run", str(reason))
    except torch.OutOfMemoryError as error:
        found = Found("not run", measure.in_a_line(error))
    except Exception as error:  # of anything that can be wrong with a machine: a row
        traceback.print_exc()
        found = Found("failed", measure.in_a_line(error))
    return replace(found, seconds=round(time.monotonic() - begin, 2))


def is_well(setting: Setting) -> bool:
    """Whether the device still works here: an illegal access takes it from a process for good."""
    try:
        devices.release(setting.device)
        if not setting.interpreted:
            torch.get_device_module(setting.device).synchronize()
    except RuntimeError:
        return False
    return True


if __name__ == "__main__":
    main(*sys.argv[1:])
