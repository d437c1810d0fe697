"""How wrong a kernel may be: the one error budget, for tests and for runs on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

EXTRA = ("extra_k", "extra_v")


def allowed_error(
    name: str,
    exact: Tensor,
    eager: Tensor,
    dtype: torch.dtype,
    natural: float = 0.0,
    uncertain: float = 0.0,
    equal: int = 0,
) -> float:
    """The largest difference from the fp64 result that a kernel may show.

    Twice the error of the plain formula in the same precision (three times that of a gradient's), and roundings: four
    of the largest entry, and four of what a gradient is a sum of: a peaked softmax cancels them in the plain formula,
    whose sum of p dp is made of the same numbers, but not in that of do out.

    Args:
        name: of the result; gradients begin with "d".
        exact: the result in fp64.
        eager: the result of the plain formula in `dtype`.
        dtype: of the inputs.
        natural: how large the terms are whose sum the result is, for gradients through the softmax: a group of one
            token has dq = 0, as the difference of two such terms.
        uncertain: the relative uncertainty of probabilities: their scores are fp32, known to its eps * max |lse|.
        equal: how many equal terms a result may be a sum of: their roundings, in fp32, add up instead of averaging out.
    """
    eps, largest = torch.finfo(dtype).eps, float(exact.abs().max())
    error_of_eager = float((eager.double() - exact).abs().max())
    rounding = 4 * eps * (largest + natural) + 2 * uncertain * max(largest, natural)
    rounding += equal * min(eps, torch.finfo(torch.float32).eps) * max(largest, natural)
    return (3 if name.startswith("d") else 2) * error_of_eager + rounding


def natural_scales(inputs: dict[str, Tensor], scale: float, groups: int, cosine: bool = False) -> dict[str, float]:
    """How large the terms are whose sums the gradients through the softmax are.

    Args:
        inputs: q, k, v and the gradients do and dlse; extra_k and extra_v, where there are such.
        scale: of the scores, the largest.
        groups: over all maps.
        cosine: whether vectors of queries and keys are divided by their lengths, and gradients therefore too.
    """
    q, k, v, do, dlse = (inputs[name].double() for name in ("q", "k", "v", "do", "dlse"))
    lengths = {"k": k, "v": v} | {name: inputs[name].double() for name in EXTRA if name in inputs}
    inverse = dict[str, float]()  # of the shortest
    if cosine:
        of_keys = {"q": q} | {name: x for name, x in lengths.items() if name.endswith("k")}
        inverse = {name: 1 / float(x.norm(dim=-1).min()) for name, x in of_keys.items()}
        q, *keys = (x / x.norm(dim=-1, keepdim=True) for x in of_keys.values())
        lengths |= zip(list(of_keys)[1:], keys, strict=True)
    value = max(float(x.norm(dim=-1).max()) for name, x in lengths.items() if name.endswith("v"))
    largest = max(float(x.abs().max()) for name, x in lengths.items() if name.endswith("k"))
    ds, scale = float(do.norm(dim=-1).max()) * value + float(dlse.abs().max()), abs(scale)
    dk, queries = scale * ds * float(q.abs().max()), dlse[..., 0].numel() ** 0.5
    dscale = ds * float(q.norm(dim=-1).max()) * largest * queries  # a sum of q dq
    natural = {
        "dq": scale * ds * largest, "dk": dk, "dbias": ds * groups**0.5,
        "dscale": dscale, "dextra_k": dk * queries,
    }  # fmt: skip
    if cosine:  # whose scores have some roundings more than the plain formula's, and weights and their sums then too
        arriving = float(do.abs().max())
        natural |= {"out": value, "dv": arriving, "dextra_v": arriving * queries}
    return {name: size * inverse.get(name.removeprefix("d"), 1.0) for name, size in natural.items()}
