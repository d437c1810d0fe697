"""Attention over interlaced and local partitions of a feature map, without moving a pixel.

What a user calls, and below it what it rests on; a file imports from lower lines only:

    models/  sharding/        networks that use the layers; one map over several devices
    inference  checkpoints    layers folded for inference, exported programs; published weights
    modules                   SelfAttention2d, InterlacedSparseSelfAttention, ISAModule, ISAHead
    maps                      what layers of feature maps are made of: projections, padding, attention between maps
    norm                      batch normalisation that is exact on channels_last maps of a CPU too
    functional                partitioned_attention: arguments checked, a backend chosen
    ops                       operators and derivatives of every order, for autograd, compilers and torch.func
    backend/                  what a backend promises; eager, triton with its kernels/, plain: the formula
    tiles/                    how much of a problem a program of a kernel takes, by architecture: data and its look-up
    batch                     PartitionBatch: maps of several sizes in one launch
    dropout                   which weights are dropped: one hash, for tensors and for kernels
    partition                 Axis, Partition: the one equation of geometry

``python -m isa_triton`` says what is installed and which backend runs.
"""

from .axis import Axis
from .batch import PartitionBatch
from .functional import dropout_mask, missing_tokens, partitioned_attention, partitioned_attention_with_lse
from .maps import set_backend
from .modules import (
    InterlacedSparseSelfAttention,
    ISAHead,
    ISAModule,
    SelfAttention1d,
    SelfAttention2d,
    SelfAttention3d,
)
from .partition import Partition

__version__ = "0.1.0"
__all__ = [
    "Axis",
    "ISAHead",
    "ISAModule",
    "InterlacedSparseSelfAttention",
    "Partition",
    "PartitionBatch",
    "SelfAttention1d",
    "SelfAttention2d",
    "SelfAttention3d",
    "dropout_mask",
    "missing_tokens",
    "partitioned_attention",
    "partitioned_attention_with_lse",
    "set_backend",
]
