"""The paper and what it compares with in plain PyTorch: slow, readable, exact in fp64, independent of the library."""

from .attention import (
    affinity,
    dense_attention,
    long_range_attention,
    long_range_groups,
    masked_attention,
    short_range_attention,
    short_range_groups,
)
from .cgnl import CGNL, CGNLx, compact_generalized_attention, gaussian_expansion
from .context import ASPP, PPM, Pooled
from .criss_cross import RCCA, RCCAHead, criss_cross_attention
from .modules import ConvNormReLU, InterlacedSparseSelfAttention, SelfAttention
from .nonlocal_ import SA, NonLocal

__all__ = [
    "ASPP",
    "CGNL",
    "PPM",
    "RCCA",
    "SA",
    "CGNLx",
    "ConvNormReLU",
    "InterlacedSparseSelfAttention",
    "NonLocal",
    "Pooled",
    "RCCAHead",
    "SelfAttention",
    "affinity",
    "compact_generalized_attention",
    "criss_cross_attention",
    "dense_attention",
    "gaussian_expansion",
    "long_range_attention",
    "long_range_groups",
    "masked_attention",
    "short_range_attention",
    "short_range_groups",
]
