"""Aurora (Bodnar et al., arXiv 2405.13063): windows of the atmosphere [B, L, D], levels x latitudes x longitudes.

Longitude is cyclic, so the last axis of a shifted partition is. Where windows do not divide an axis, Aurora has zeros
on both of its sides: tokens that are attended where windows are not shifted, and masked where they are.
"""

from __future__ import annotations

from typing import Any

from aurora.model.swin3d import Swin3DTransformerBlock, WindowAttention
from aurora.model.util import maybe_adjust_windows
from torch import Tensor, nn

from ..._tracing import is_known_to_be, leaf_of_fx
from ...axis import local
from ...partition import Partition
from .families import Family
from .windows import GivenPartitions, TokensOf, attend, attend_with_zeros, split, trains_faster_theirs

Size = tuple[int, int, int]


class _TokensOfStep(TokensOf):
    """What a `WindowAttention` does to tokens in a step of a roll-out, each of which may have its own adapters."""

    step: int

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        return split(self.attn.qkv(x) + self.attn.lora_qkv(x, self.step), self.attn.num_heads)

    def output(self, context: Tensor) -> Tensor:
        y: Tensor = self.attn.proj_drop(self.attn.proj(context) + self.attn.lora_proj(context, self.step))
        return y

    def dropout_p(self) -> float:
        p: float = self.attn.attn_drop
        return p


class MapWindowAttention(GivenPartitions, WindowAttention):
    """`WindowAttention` of volumes [B, levels, latitudes, longitudes, D]."""

    def forward(  # type: ignore[override]  # theirs has a step
        self,
        x: Tensor,
        mask: Tensor | None = None,
        rollout_step: int = 0,
        *,
        partition: Partition | None = None,
        backend: str = "auto",
        zeros: bool = False,
    ) -> Tensor:
        if partition is None:
            y: Tensor = super().forward(x, mask, rollout_step)
            return y
        tokens = _TokensOfStep(self)
        tokens.__dict__["step"] = rollout_step
        return (attend_with_zeros if zeros else attend)(tokens, x, partition, backend)


class AcceleratedSwin3DTransformerBlock(Swin3DTransformerBlock):
    """`Swin3DTransformerBlock` of tokens [B, L, D]."""

    backend: str
    window_size: Size
    shift_size: Size
    attn: nn.Module
    norm1: Any
    norm2: Any
    drop_path: Any
    mlp: Any

    @leaf_of_fx
    def forward(self, x: Tensor, c: Tensor, res: Size, rollout_step: int, warped: bool = True) -> Tensor:
        window, shift = maybe_adjust_windows(self.window_size, self.shift_size, res)
        shifted, missing = any(shift), [-extent % tokens for extent, tokens in zip(res, window, strict=True)]
        if shifted and (trains_faster_theirs(x, self.backend) or not is_known_to_be(sum(missing) == 0)):
            y: Tensor = super().forward(x, c, res, rollout_step, warped)
            return y
        if shifted:
            partition = Partition(*map(local, res, window, shift, (False, False, warped)))
        else:  # of the zeros, half lie before the volume, and windows begin there
            partition = Partition(
                *map(local, res, window, [-(n // 2) % w for n, w in zip(missing, window, strict=True)])
            )
        options = {"partition": partition, "backend": self.backend, "zeros": not shifted}
        y = self.attn(x.unflatten(1, res), rollout_step=rollout_step, **options).flatten(1, 3)
        x = x + self.drop_path(self.norm1(y, c))
        return x + self.drop_path(self.norm2(self.mlp(x), c))


FAMILY = Family(
    blocks={Swin3DTransformerBlock: AcceleratedSwin3DTransformerBlock},
    attentions={WindowAttention: MapWindowAttention},
    inside=("attn",),
    partly={
        Swin3DTransformerBlock: "shifted windows in training on a CPU, and shifted windows that do not divide the"
        " volume, whose zeros and masks do not begin at the same places, are Aurora's"
    },
)
