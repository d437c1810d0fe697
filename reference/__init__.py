"""The paper in plain PyTorch: slow, readable, exact in fp64, and independent of the library it judges."""

from .attention import (
    affinity,
    dense_attention,
    long_range_attention,
    long_range_groups,
    masked_attention,
    short_range_attention,
    short_range_groups,
)
from .modules import InterlacedSparseSelfAttention, SelfAttention

__all__ = [
    "InterlacedSparseSelfAttention",
    "SelfAttention",
    "affinity",
    "dense_attention",
    "long_range_attention",
    "long_range_groups",
    "masked_attention",
    "short_range_attention",
    "short_range_groups",
]
