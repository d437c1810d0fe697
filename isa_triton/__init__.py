"""Attention over interlaced and local partitions of a feature map."""

from .functional import partitioned_attention, partitioned_attention_with_lse
from .modules import InterlacedSparseSelfAttention, ISAHead, ISAModule, SelfAttention2d
from .partition import Axis, Partition

__all__ = [
    "Axis",
    "ISAHead",
    "ISAModule",
    "InterlacedSparseSelfAttention",
    "Partition",
    "SelfAttention2d",
    "partitioned_attention",
    "partitioned_attention_with_lse",
]
