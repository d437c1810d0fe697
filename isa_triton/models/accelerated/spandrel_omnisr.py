"""OmniSR (Wang et al., arXiv 2304.10244) of spandrel: windows, then a grid, of maps [B, C, H, W]."""

from __future__ import annotations

from typing import Any

from spandrel.architectures.OmniSR.__arch.OSA import Attention, OSA_Block
from torch import Tensor, nn

from ..._tracing import leaf_of_fx
from ...axis import grid, local
from ...partition import Partition
from .families import Family
from .restoration import TRAINING, bias_of
from .windows import GivenPartitions, TokensOf, attend, cached_bias, project, trains_faster_theirs

WINDOWS, GRID = 2, 8  # where attention stands in a block's layers, each between two layers that move pixels


class _TokensOfAttention(TokensOf):
    """What an `Attention` does to tokens; it has a number under the name `heads`."""

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.unflatten(-1, (self.attn.heads, -1)) for t in project(self.attn.to_qkv, x).chunk(3, -1))

    def factor(self) -> float:
        factor: float = self.attn.scale
        return factor

    def output(self, context: Tensor) -> Tensor:
        attended: Tensor = self.attn.to_out(context)
        return attended

    def dropout_p(self) -> float:
        p: float = self.attn.attend[1].p
        return p

    def position_bias(self, partition: Partition) -> Tensor | None:
        if not self.attn.with_pe:
            return None
        table, window = self.attn.rel_pos_bias.weight, (partition.h.tokens, partition.w.tokens)
        return cached_bias(self.attn, [table], lambda: bias_of(table, self.attn.rel_pos_indices), window)


class MapAttention(GivenPartitions, Attention):
    """`Attention` of maps [B, H, W, C]."""

    def of_map(self, x: Tensor, partition: Partition, backend: str) -> Tensor:
        return attend(_TokensOfAttention(self), x, partition, backend)


class AcceleratedOSABlock(OSA_Block):
    """`OSA_Block` of maps [B, C, H, W], without the layers that move pixels to windows and back."""

    backend: str
    layer: nn.Sequential

    @leaf_of_fx
    def forward(self, x: Tensor) -> Tensor:
        if trains_faster_theirs(x, self.backend):
            y: Tensor = super().forward(x)
            return y
        for i, layer in enumerate(self.layer):
            if i in (WINDOWS, GRID):
                x = self.attended(x, layer, local if i == WINDOWS else grid)
            elif {i - 1, i + 1}.isdisjoint((WINDOWS, GRID)):
                x = layer(x)
        return x

    def attended(self, x: Tensor, layer: Any, axis: Any) -> Tensor:
        """A layer with attention, and what it is added to."""
        window = self.layer[WINDOWS - 1].axes_lengths["w1"]  # type: ignore[index]  # of einops
        partition = Partition(*(axis(extent, window) for extent in x.shape[2:]))
        x = x.permute(0, 2, 3, 1)
        return (layer.fn(layer.norm(x), partition=partition, backend=self.backend) + x).permute(0, 3, 1, 2)


FAMILY = Family(
    blocks={OSA_Block: AcceleratedOSABlock},
    attentions={Attention: MapAttention},
    inside=(f"layer.{WINDOWS}.fn", f"layer.{GRID}.fn"),
    partly={OSA_Block: TRAINING},
    added=("attended",),
)
