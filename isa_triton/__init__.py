"""Attention over interlaced and local partitions of a feature map."""

from .functional import partitioned_attention, partitioned_attention_with_lse
from .partition import Axis, Partition

__all__ = ["Axis", "Partition", "partitioned_attention", "partitioned_attention_with_lse"]
