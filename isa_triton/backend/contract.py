"""What every backend promises, whatever computes it, and the call that it is given.

Shapes, here and wherever backends are spoken of; [H, W] stands for the map, a line [L] or a volume [D, H, W] alike:

    q, k, dq, dk    [B, H, W, heads, K]        v, out, do, dv    [B, H, W, heads, V]
    lse, dlse       [B, H, W, heads]           bias, dbias       [heads, tokens, tokens] or None
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..partition import Partition, check_partition


class Call(NamedTuple):
    """All of an attention that is not a tensor; arguments were checked by `functional`.

    Attributes:
        scale: factor of the scores.
        partition: which pixels attend which.
        with_lse: whether lse is wanted too.
        backend: "eager" or "triton".

    Examples:
        >>> call = Call(0.25, Partition.rows((4, 6)), with_lse=False, backend="eager")
        >>> Call.unflatten(*call.flat()) == call
        True
    """

    scale: float
    partition: Partition
    with_lse: bool
    backend: str

    def flat(self) -> tuple[float, list[int], bool, str]:
        """As `torch.library` takes it, which knows numbers, lists of them and strings."""
        return self.scale, self.partition.flat(), self.with_lse, self.backend

    @classmethod
    def unflatten(cls, scale: float, axes: Sequence[int], with_lse: bool, backend: str) -> Call:
        """The inverse of `flat`."""
        return cls(scale, Partition.unflatten(axes), with_lse, backend)

    def checked(self, q: Tensor) -> Call:
        """The call, for q [B, H, W, heads, K], of an operator, which may stand in anybody's graph.

        Raises:
            ValueError: the partition is that of no map, or of another than q.
        """
        check_partition(self.partition)
        if tuple(q.shape[1:-2]) != self.partition.size:
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
        >>> out, lse = backend.forward(q, q, q, None, call)
        >>> out.shape, lse.shape
        (torch.Size([1, 4, 6, 1, 16]), torch.Size([1, 4, 6, 1]))
    """

    OPAQUE: bool

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
        """``out = softmax(scale q k^T + bias) v`` inside every group, and lse, the log-sum-exp of its scores.

        0 and minus infinity for a query whose bias is minus infinity for every key in the map; its gradients are 0.
        Both as `empty_outputs` makes them; lse means something if `call.with_lse`.
        """

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        out: Tensor | None,
        lse: Tensor | None,
        do: Tensor,
        dlse: Tensor | None,
        call: Call,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dq, dk, dv and dbias, as `empty_gradients` makes them, from the gradients of out and lse (None: zero).

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


def empty_outputs(q: Tensor, v: Tensor, with_lse: bool) -> tuple[Tensor, Tensor]:
    """Uninitialised out and lse (of no elements where it is not wanted).

    Examples:
        >>> q = torch.zeros(1, 4, 6, 1, 16)
        >>> [tuple(x.shape) for x in empty_outputs(q, q, with_lse=False)]
        [(1, 4, 6, 1, 16), (0,)]
    """
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    return out, q.new_empty(q.shape[:-1] if with_lse else 0, dtype=lse_dtype(q.dtype))


def empty_gradients(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised dq, dk, dv and dbias (of no elements where there is no bias).

    Examples:
        >>> q = torch.zeros(1, 4, 6, 1, 16)
        >>> [tuple(x.shape) for x in empty_gradients(q, q, q, bias=None)]
        [(1, 4, 6, 1, 16), (1, 4, 6, 1, 16), (1, 4, 6, 1, 16), (0,)]
    """
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv, q.new_empty(0 if bias is None else bias.shape)
