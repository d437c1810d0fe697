"""Python in a process of its own, where kernels are compiled: here they are interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run_compiling(*arguments: str) -> subprocess.CompletedProcess[str]:
    """What ``python ARGUMENTS`` says, run in the root of this project, for a terminal of 200 columns."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False, cwd=ROOT
    )
