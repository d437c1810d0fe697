"""What to type where an optional package is missing."""

from __future__ import annotations

from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
CHECKOUT = _ROOT if (_ROOT / "pyproject.toml").is_file() else None  # or None, where the wheel is installed


def install(extra: str) -> str:
    """The command that installs an extra: into the checkout, from any folder, or beside the wheel."""
    if CHECKOUT is None:
        return f"pip install 'isa-triton[{extra}]'"
    return f"pip install -e '{'.' if Path.cwd() == CHECKOUT else CHECKOUT}[{extra}]'"
