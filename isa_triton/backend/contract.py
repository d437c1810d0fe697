"""What every backend promises, whatever computes it, and the call that it is given.

Shapes, here and wherever backends are spoken of; [H, W] stands for the map, a line [L] or a volume [D, H, W] alike:

    q, k, dq, dk    [B, H, W, heads, K]        v, out, do, dv    [B, H, W, heads, V]
    lse, dlse       [B, H, W, heads]           bias, dbias       [heads, tokens, tokens], [B, heads, tokens, tokens]
                                                                 or None
    valid           [B, H, W] or None          scales, dscales   [heads] or None
    seed            [calls] or None            table             [groups, tokens] or None

k and v, and dk and dv, may have fewer heads, which divide those of q.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..partition import Partition, check_partition


class Inputs(NamedTuple):
    """The tensors of an attention.

    Attributes:
        q, k, v: on the map.
        bias: added to the scores, in any floating dtype; for all maps or for each.
        scales: of the heads, by which their scores are multiplied beside the call's scale.
        valid: which pixels exist, bool: others are never attended, and their out and gradients are zero.
        seed: of dropout, int64; more than one (`calls` of torch.func.vmap) are of as many neighbouring heads each.
        table: of packed maps [1, pixels, ...], the pixel of every token, int32, -1 for none; the call's partition is
            then that of all tokens one after another. Pixels of no token are as if not valid.

    Examples:
        >>> q = torch.zeros(1, 4, 6, 4, 16)
        >>> Inputs(q, q[:, :, :, :2], q[:, :, :, :2]).share  # heads of q that have one of k and v
        2
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None = None
    scales: Tensor | None = None
    valid: Tensor | None = None
    seed: Tensor | None = None
    table: Tensor | None = None

    @property
    def share(self) -> int:
        """How many heads of q each head of k and v serves."""
        return self.q.shape[-2] // max(1, self.k.shape[-2])

    @property
    def value_shape(self) -> tuple[int, ...]:
        """Of out: v's, with the heads of q."""
        return *self.q.shape[:-1], self.v.shape[-1]


class Call(NamedTuple):
    """All of an attention that is not a tensor; arguments were checked by `functional`.

    Attributes:
        scale: factor of the scores.
        partition: which pixels attend which.
        with_lse: whether lse is wanted too.
        backend: "eager" or "triton".
        dropout_p: the share of weights that is dropped, by the seed among the inputs.
        cosine: whether the vectors of q and k are first made of length 1, as `cosine.normalised` does.

    Examples:
        >>> call = Call(0.25, Partition.rows((4, 6)), with_lse=False, backend="eager")
        >>> Call.unflatten(*call.flat()) == call
        True
    """

    scale: float
    partition: Partition
    with_lse: bool
    backend: str
    dropout_p: float = 0.0
    cosine: bool = False

    def flat(self) -> tuple[float, list[int], bool, str, float, bool]:
        """As `torch.library` takes it, which knows numbers, lists of them and strings."""
        return self.scale, self.partition.flat(), self.with_lse, self.backend, self.dropout_p, self.cosine

    @classmethod
    def unflatten(cls, scale: float, axes: Sequence[int], with_lse: bool, backend: str, *rest: Any) -> Call:
        """The inverse of `flat`."""
        return cls(scale, Partition.unflatten(axes), with_lse, backend, *rest)

    def checked(self, q: Tensor, table: Tensor | None = None) -> Call:
        """The call, for q [B, H, W, heads, K], of an operator, which may stand in anybody's graph.

        Raises:
            ValueError: the partition is that of no map, or of another than q.
        """
        check_partition(self.partition)
        if table is not None:
            expected = self.partition.groups, self.partition.tokens
            if q.dim() != 4 or len(q) != 1 or tuple(table.shape) != expected:
                raise ValueError(f"q must be [1, pixels, heads, K] and table {expected}, got {tuple(table.shape)}")
        elif tuple(q.shape[1:-2]) != self.partition.size:
            raise ValueError(f"q must be a map of {self.partition.size}, as axes say, got shape {tuple(q.shape)}")
        return self


class Backend(Protocol):
    """A module that computes attention and its first derivatives. Tensors have any strides, results are contiguous.

    Attributes:
        OPAQUE: whether tools that look at operators must see one operator, for its inside is not PyTorch's own.

    Examples:
        >>> from isa_triton.backend import eager
        >>> backend: Backend = eager
        >>> q, call = torch.zeros(1, 4, 6, 1, 16), Call(0.25, Partition.rows((4, 6)), with_lse=True, backend="eager")
        >>> out, lse = backend.forward(Inputs(q, q, q), call)
        >>> out.shape, lse.shape
        (torch.Size([1, 4, 6, 1, 16]), torch.Size([1, 4, 6, 1]))
    """

    OPAQUE: bool

    def forward(self, inputs: Inputs, call: Call) -> tuple[Tensor, Tensor]:
        """``out = softmax(scale q k^T + bias) v`` inside every group, and lse, the log-sum-exp of its scores.

        Of a call with `cosine`, q and k are of length 1 there.
        With dropout the softmax is multiplied by `dropout.factors`, and lse is what it is without.
        0 and minus infinity for a query without a key, because none is valid or its bias is minus infinity for every
        key in the map, and for one that is not valid; its gradients are 0.
        Both as `empty_outputs` makes them; lse means something if `call.with_lse`.
        """

    def backward(
        self, inputs: Inputs, out: Tensor | None, lse: Tensor | None, do: Tensor, dlse: Tensor | None, call: Call
    ) -> Gradients:
        """The gradients, as `empty_gradients` makes them, from those of out and lse (None: zero).

        out and lse are what forward returned, where `keeps_output` said that they are needed.
        """

    def keeps_output(self, q: Tensor, v: Tensor, partition: Partition) -> bool:
        """Whether backward needs out and lse beside the inputs."""


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64: sums over half-precision scores are kept in fp32.

    Examples:
        >>> lse_dtype(torch.bfloat16)
        torch.float32
    """
    return torch.promote_types(dtype, torch.float32)


def unfinished_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of gradients that are yet to be added or divided: fp16 may hold the results and not what they are made of.

    Examples:
        >>> [unfinished_dtype(dtype) for dtype in (torch.float16, torch.bfloat16)]
        [torch.float32, torch.bfloat16]
    """
    return torch.float32 if dtype == torch.float16 else dtype


def empty_outputs(inputs: Inputs, with_lse: bool) -> tuple[Tensor, Tensor]:
    """Uninitialised out and lse (of no elements where it is not wanted).

    Examples:
        >>> q = torch.zeros(1, 4, 6, 1, 16)
        >>> [tuple(x.shape) for x in empty_outputs(Inputs(q, q, q), with_lse=False)]
        [(1, 4, 6, 1, 16), (0,)]
    """
    q = inputs.q
    lse = q.new_empty(q.shape[:-1] if with_lse else 0, dtype=lse_dtype(q.dtype))
    return q.new_empty(inputs.value_shape), lse


class Gradients(NamedTuple):
    """Those of `Inputs`; dbias and dscales are of no elements where there is no bias, or no scales.

    Examples:
        >>> Gradients._fields
        ('dq', 'dk', 'dv', 'dbias', 'dscales')
    """

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbias: Tensor
    dscales: Tensor


def empty_gradients(inputs: Inputs) -> Gradients:
    """Uninitialised.

    Examples:
        >>> q = torch.zeros(1, 4, 6, 1, 16)
        >>> [tuple(x.shape) for x in empty_gradients(Inputs(q, q, q))]
        [(1, 4, 6, 1, 16), (1, 4, 6, 1, 16), (1, 4, 6, 1, 16), (0,), (0,)]
    """
    q, k, v, bias, scales, *_ = inputs
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    dbias, dscales = (q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (bias, scales))
    return Gradients(dq, dk, dv, dbias, dscales)
