"""Ways to compute attention over a partition, all of one `contract`; here the one that a call takes is chosen.

The folder is not called backends: Dynamo does not look into files whose path holds "triton/backends".
"""

from __future__ import annotations

from torch import Tensor

from . import eager, triton
from .contract import Backend

BY_NAME: dict[str, Backend] = {"eager": eager, "triton": triton}
BACKENDS = ("auto", "triton", "eager")  # what callers may ask for


def check_backend(backend: str) -> str:
    """The name of a backend as it was given.

    Raises:
        ValueError: the name of none.

    Examples:
        >>> check_backend("eager")
        'eager'
    """
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    return backend


def choose(backend: str, q: Tensor) -> str:
    """The kernels where they can run, for "auto" on the devices they are made for; eager otherwise.

    Args:
        backend: one of `BACKENDS`.
        q: whose dtype and device decide.

    Returns:
        "triton" or "eager".

    Raises:
        ValueError: the kernels were asked for and cannot take tensors like q.

    Examples:
        >>> choose("auto", torch.zeros(1, 4, 6, 1, 16))
        'eager'
    """
    if backend == "eager" or (backend == "auto" and q.device.type not in triton.DEVICES):
        return "eager"
    obstacle = triton.why_not(q)
    if backend == "triton" and obstacle:
        raise ValueError(f"backend='triton' cannot be had: {obstacle}")
    return "eager" if obstacle else "triton"
