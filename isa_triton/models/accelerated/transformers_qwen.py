"""The vision tower of Qwen2.5-VL (Bai et al., arXiv 2502.13923) of transformers: windows in the images' own order.

Tokens come square by square, of merge x merge patches that are one token to the language model. As they lie, they are
a map of h / merge rows of w * merge tokens, and a window of the image is one of the map, as high as it has squares and
as wide as their tokens. So nothing is sorted by windows before, and back behind.
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
from ...functional import partitioned_attention
from ...maps import at_most
from ...partition import Partition
from .families import Family
from .windows import split


class Windows(NamedTuple):
    """What attention is given in place of the bounds of sorted windows."""

    partition: Partition
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
        max_seqlen: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if not isinstance(cu_seqlens, Windows):
            y: Tensor = super().forward(hidden_states, cu_seqlens, position_embeddings, max_seqlen, **kwargs)
            return y
        assert position_embeddings is not None
        q, k, v = split(self.qkv(hidden_states), self.num_heads)  # [B H W, heads, width]
        q, k = apply_rotary_pos_emb_vision(q, k, *position_embeddings)
        partition, backend = cu_seqlens
        q, k, v = (x.view(-1, *partition.size, *x.shape[1:]) for x in (q, k, v))
        context = partitioned_attention(q, k, v, partition, scale=self.scaling, backend=backend)
        return self.proj(context.flatten(0, 2).flatten(1))


class AcceleratedVisionTransformer(Qwen2_5_VisionTransformerPretrainedModel):
    """`Qwen2_5_VisionTransformerPretrainedModel` of images or videos of one height and width."""

    backend: str
    config: Any
    spatial_merge_size: int
    spatial_merge_unit: int
    window_size: int
    patch_size: int
    permute_input_for_window_attn: Any

    def forward(self, hidden_states: Tensor, grid_thw: Tensor, **kwargs: Any) -> Any:
        sizes = {(height, width) for _, height, width in grid_thw.tolist()}
        if len(sizes) > 1 or "window_index" in kwargs or self.asks_for_layers(kwargs):
            return super().forward(hidden_states, grid_thw, **kwargs)
        as_dict = kwargs.pop("return_dict", getattr(self.config, "return_dict", True))
        tokens = len(hidden_states)
        outputs = super().forward(
            hidden_states,
            grid_thw,
            window_index=torch.arange(tokens // self.spatial_merge_unit, device=hidden_states.device),
            cu_window_seqlens=Windows(self.partition(*sizes.pop()), self.backend),
            max_window_seqlen=0,  # of no use without bounds
            return_dict=True,
            **kwargs,
        )
        order = get_vision_window_index(grid_thw, self.spatial_merge_size, self.window_size, self.patch_size)[0]
        last = outputs.last_hidden_state  # which theirs leaves sorted by windows
        outputs["last_hidden_state"] = self.permute_input_for_window_attn(last, order.to(last.device), tokens)
        return outputs if as_dict else outputs.to_tuple()

    def partition(self, height: int, width: int) -> Partition:
        """Of images of so many patches."""
        merge, square = self.spatial_merge_size, self.spatial_merge_unit
        size = height // merge, width // merge * square
        window = self.window_size // merge // self.patch_size
        return Partition(*map(local, size, map(at_most, (window, window * square), size)))

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
        Qwen2_5_VisionTransformerPretrainedModel: "layers that attend to the whole image, and calls with images of"
        " several sizes or for the tokens of every layer, are transformers'"
    },
    added=("partition", "asks_for_layers"),
)
