"""HRFormer's attention: the authors' function, written with PyTorch's own multi-head attention, and their names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isa_triton.checkpoints import from_hrformer
from isa_triton.models.hrformer import HRFormerAttention
from tests.cases import relative_error

SIZES = [(7, 14), (9, 13), (3, 20)]


def layer(partition_size: Any = 7, **options: Any) -> HRFormerAttention:
    made = HRFormerAttention(12, 3, partition_size, **options).double()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made


def by_theirs(ours: HRFormerAttention, x: Tensor) -> Tensor:
    """Zeros on both sides, the larger half behind; windows as sequences through `F.multi_head_attention_forward`."""
    (h, w), heads = ours.partition_size, ours.num_heads
    B, C, H, W = x.shape
    up, left = -H % h, -W % w
    x = F.pad(x, (left // 2, left - left // 2, up // 2, up - up // 2))
    rows, columns = x.shape[2] // h, x.shape[3] // w
    windows = x.view(B, C, rows, h, columns, w).permute(3, 5, 0, 2, 4, 1).reshape(h * w, -1, C)  # [T, n, C]
    mask = None
    if ours.relative_position_bias_table is not None:
        tokens = [(i, j) for i in range(h) for j in range(w)]
        index = [[(a - c + h - 1) * (2 * w - 1) + b - d + w - 1 for c, d in tokens] for a, b in tokens]
        bias = ours.relative_position_bias_table[torch.tensor(index)].permute(2, 0, 1)
        mask = bias.repeat(windows.shape[1], 1, 1)  # [n heads, T, T]
    layers = ours.q_proj, ours.k_proj, ours.v_proj
    y, _ = F.multi_head_attention_forward(
        *[windows] * 3, C, heads, None, torch.cat([each.bias for each in layers]), None, None, False, 0.0,
        ours.out_proj.weight, ours.out_proj.bias, attn_mask=mask, need_weights=False, use_separate_proj_weight=True,
        q_proj_weight=layers[0].weight, k_proj_weight=layers[1].weight, v_proj_weight=layers[2].weight,
    )  # fmt: skip
    y = y.view(h, w, B, rows, columns, C).permute(2, 5, 3, 0, 4, 1).reshape(B, C, rows * h, columns * w)
    return y[:, :, up // 2 : up // 2 + H, left // 2 : left // 2 + W]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("options", [{}, {"position_bias": False}, {"partition_size": (3, 4)}], ids=str)
def test_is_the_authors_function(size: tuple[int, int], options: dict[str, Any]) -> None:
    ours, x = layer(**options), torch.randn(3, 12, *size, dtype=torch.float64, requires_grad=True)
    y, expected = ours(x), by_theirs(ours, x)
    assert relative_error(y, expected) < 1e-12
    upstream, leaves = torch.randn_like(y), (x, *ours.parameters())
    for a, b in zip(
        torch.autograd.grad(y, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        assert relative_error(a, b, floor=1.0) < 1e-12


def test_weights_are_dropped_in_training_alone() -> None:
    """Of constant values all weights give the value; of those that are kept, doubled, a number of halves of it."""
    ours = layer(partition_size=(2, 3), position_bias=False, attention_dropout=0.5)
    with torch.no_grad():
        for part in (ours.q_proj, ours.k_proj, ours.v_proj):
            part.weight.zero_()
        ours.out_proj.weight.copy_(torch.eye(12))
        ours.out_proj.bias.zero_()
        x = torch.randn(2, 12, 8, 9, dtype=torch.float64)
        value = ours.v_proj.bias[:, None, None].expand(12, 8, 9)[None]
        kept = 3 * ours.train()(x) / value  # of six weights of one sixth
        assert relative_error(ours.eval()(x), value.expand(2, -1, -1, -1)) < 1e-12
    assert relative_error(kept, kept.round()) < 1e-12
    assert set(kept.round().flatten().tolist()) <= set(range(7))
    assert abs(kept.mean() - 3) < 0.3


def test_published_names_load() -> None:
    """Two layers of a network, one without a table; everything else is left out."""
    with_table, without = layer(), layer(position_bias=False)
    saved = {"module.stem.conv1.weight": torch.ones(1)}
    for name, made in (("stage2.0.branches.0.0.attn", with_table), ("stage4.0.branches.3.1.attn", without)):
        saved |= {f"module.{name}.attn.{key}": x for key, x in made.state_dict().items()}
    saved["module.stage2.0.branches.0.0.attn.attn.relative_position_index"] = with_table.relative_position_index
    found = from_hrformer(saved)
    assert list(found) == ["module.stage2.0.branches.0.0.attn", "module.stage4.0.branches.3.1.attn"]
    x = torch.randn(2, 12, 8, 9, dtype=torch.float64)
    for made, weights in zip((with_table, without), found.values(), strict=True):
        other = layer(position_bias=made is with_table)
        other.load_state_dict(weights)
        assert torch.equal(other(x), made(x))


def test_what_is_not_published_so_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no attention of HRFormer: no name ends with 'attn.q_proj.weight'"):
        from_hrformer({"conv.weight": torch.ones(1)})
    with pytest.raises(ValueError, match=r"not the layout of HRFormer: missing: k_proj.bias"):
        from_hrformer({f"a.attn.{key}": x for key, x in layer().state_dict().items() if key != "k_proj.bias"})
    with pytest.raises(TypeError, match="state_dict must be a mapping"):
        from_hrformer([])
    with pytest.raises(ValueError, match="channels must be a multiple of num_heads, 3, got 8"):
        HRFormerAttention(8, 3)
