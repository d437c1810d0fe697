"""Packed maps as one line whose groups lie one after another, for backends that know pixels by strides."""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import Inputs


def gathered(inputs: Inputs) -> Inputs:
    """The inputs [1, groups * tokens, ...] of a partition in windows; tokens that do not exist are not valid."""
    assert inputs.table is not None
    q, k, v = (gather(x, inputs.table) for x in inputs[:3])
    valid = (inputs.table.flatten() >= 0)[None]
    if inputs.valid is not None:
        valid = valid & gather(inputs.valid, inputs.table)
    return inputs._replace(q=q, k=k, v=v, valid=valid, table=None)


def gather(x: Tensor, table: Tensor) -> Tensor:
    """[1, pixels, ...] -> [1, groups * tokens, ...], of tokens that do not exist any pixel."""
    return x.index_select(1, _pixels(table))


def scatter(x: Tensor, table: Tensor, like: Tensor) -> Tensor:
    """[1, groups * tokens, ...], 0 where no token exists -> [1, pixels, ...] of `like`, 0 where no token lies."""
    return x.new_zeros(1, like.shape[1], *x.shape[2:]).index_add(1, _pixels(table), x)


def scatter_lse(lse: Tensor, table: Tensor, like: Tensor) -> Tensor:
    """The same of lse, minus infinity where no token lies."""
    exists = (table.flatten() >= 0)[None, :, None]
    there = scatter(exists.to(lse.dtype), table, like) > 0
    return torch.where(there, scatter(lse.masked_fill(~exists, 0), table, like), -torch.inf)


def _pixels(table: Tensor) -> Tensor:
    return table.flatten().clamp(min=0).to(torch.int64)
