"""The vision tower of Qwen2.5-VL (Bai et al., arXiv 2502.13923) of transformers: windows in the images' own order.

Tokens come square by square, of merge x merge patches that are one token to the language model. As they lie, they are
a map of h / merge rows of w * merge tokens, and a window of the image is one of the map, as high as it has squares and
as wide as their tokens. So nothing is sorted by windows before, and back behind. Images of several sizes are packed
maps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLVisionAttention,
    apply_rotary_pos_emb_vision,
)
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY
from transformers.vision_utils import get_vision_window_index

from ...axis import local
from ...batch import PartitionBatch
from ...functional import partitioned_attention
from ...maps import at_most
from ...partition import Partition
from .families import Family
from .windows import split


class Windows(NamedTuple):
    """What attention is given in place of the bounds of sorted windows."""

    partition: Partition | PartitionBatch
    backend: str


class MapVisionAttention(Qwen2_5_VLVisionAttention):
    """`Qwen2_5_VLVisionAttention` of tokens [B H W, C]; the whole image attends where `cu_seqlens` are bounds."""

    num_heads: int
    scaling: float
    qkv: nn.Module
    proj: nn.Module

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor | Windows,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if not isinstance(cu_seqlens, Windows):
            y: Tensor = super().forward(hidden_states, cu_seqlens, position_embeddings=position_embeddings, **kwargs)
            return y
        assert position_embeddings is not None
        q, k, v = split(self.qkv(hidden_states), self.num_heads)  # [B H W, heads, width]
        q, k = apply_rotary_pos_emb_vision(q, k, *position_embeddings)
        partition, backend = cu_seqlens
        if isinstance(partition, Partition):
            q, k, v = (x.view(-1, *partition.size, *x.shape[1:]) for x in (q, k, v))
        context = partitioned_attention(q, k, v, partition, scale=self.scaling, backend=backend)
        return self.proj(context.view(hidden_states.shape))


class AcceleratedVisionTransformer(Qwen2_5_VisionTransformerPretrainedModel):
    """`Qwen2_5_VisionTransformerPretrainedModel` of images and videos."""

    backend: str
    config: Any
    spatial_merge_size: int
    spatial_merge_unit: int
    window_size: int
    patch_size: int

    def forward(self, hidden_states: Tensor, grid_thw: Tensor, **kwargs: Any) -> Any:
        is_registered = self.config._attn_implementation not in ("eager", "sdpa")  # a user's own attention
        if is_registered or "window_index" in kwargs or self.asks_for_layers(kwargs):
            return super().forward(hidden_states, grid_thw, **kwargs)
        as_dict = kwargs.pop("return_dict", getattr(self.config, "return_dict", True))
        tokens = len(hidden_states)
        outputs = super().forward(
            hidden_states,
            grid_thw,
            window_index=torch.arange(tokens // self.spatial_merge_unit, device=hidden_states.device),
            cu_window_seqlens=Windows(self.partition(grid_thw.tolist(), hidden_states.device), self.backend),
            return_dict=True,
            **kwargs,
        )
        order = get_vision_window_index(grid_thw, self.spatial_merge_size, self.window_size, self.patch_size)[0]
        last = outputs.last_hidden_state  # which theirs leaves sorted by windows
        outputs["last_hidden_state"] = last.view(len(order), -1, last.shape[-1])[order.to(last.device)].view(last.shape)
        return outputs if as_dict else outputs.to_tuple()

    def partition(self, grids: list[tuple[int, int, int]], device: torch.device) -> Partition | PartitionBatch:
        """Of images or videos of (frames, height, width) patches."""
        merge, square = self.spatial_merge_size, self.spatial_merge_unit
        side = self.window_size // merge // self.patch_size
        sizes = [(h // merge, w // merge * square) for frames, h, w in grids for _ in range(frames)]
        size, window = sizes[0], (side, side * square)
        if len(set(sizes)) > 1:
            return PartitionBatch.local(sizes, window, device=device)
        return Partition(*map(local, size, map(at_most, window, size)))

    def asks_for_layers(self, options: dict[str, Any]) -> bool:
        """Whether somebody wants to see the tokens or weights of layers, which are sorted by windows in theirs."""
        return any(
            options.get(name, getattr(self.config, name, False))
            for name in ("output_hidden_states", "output_attentions")
        )


# what models show of their layers, which transformers looks up by the name of a class
dict.__setitem__(
    _CAN_RECORD_REGISTRY, str(AcceleratedVisionTransformer), AcceleratedVisionTransformer._can_record_outputs
)

FAMILY = Family(
    blocks={Qwen2_5_VisionTransformerPretrainedModel: AcceleratedVisionTransformer},
    attentions={Qwen2_5_VLVisionAttention: MapVisionAttention},
    inside=("blocks.*.attn",),
    partly={
        Qwen2_5_VisionTransformerPretrainedModel: "layers that attend to the whole image, and calls for the tokens of"
        " every layer, are transformers'"
    },
    added=("partition", "asks_for_layers"),
)
