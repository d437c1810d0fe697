"""How wrong a kernel may be: the one error budget, for tests and for runs on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor


def allowed_error(
    name: str, exact: Tensor, eager: Tensor, dtype: torch.dtype, natural: float = 0.0, recomputed: float = 0.0
) -> float:
    """The largest difference from the fp64 result that a kernel may show.

    Twice the error of the plain formula in the same precision (three times that of a gradient's), and roundings: four
    of the largest entry, and one of what a gradient is a sum of.

    Args:
        name: of the result; gradients begin with "d".
        exact: the result in fp64.
        eager: the result of the plain formula in `dtype`.
        dtype: of the inputs.
        natural: how large the terms are whose sum the result is, for gradients through the softmax: a group of one
            token has dq = 0, as the difference of two such terms.
        recomputed: the relative uncertainty of probabilities formed again from lse, fp32's eps * max |lse|.
    """
    eps, largest = torch.finfo(dtype).eps, float(exact.abs().max())
    error_of_eager = float((eager.double() - exact).abs().max())
    rounding = 4 * eps * largest + eps * natural + 2 * recomputed * max(largest, natural)
    return (3 if name.startswith("d") else 2) * error_of_eager + rounding
