"""Other libraries on our index sets: they compute what ours does, and cost what their tiles or copies cost."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

from bench.compared import PROVIDERS, libraries
from bench.compared.modules import in_stages
from bench.measure import count, step
from bench.workload import Workload
from isa_triton import Partition

MAPS = {
    "interlaced": Partition.interlaced((16, 24), stride=(8, 4)),
    "local": Partition.local((16, 24), window=(4, 8)),
    "ragged": Partition.local((13, 23), window=(8, 8)),
}


@pytest.mark.parametrize("partition", MAPS.values(), ids=MAPS)
def test_flex_masks_exactly_the_pairs_of_a_group(partition: Partition) -> None:
    block = libraries._block_mask(partition, torch.device("cpu"))
    pixels = partition.size[0] * partition.size[1]
    group = torch.tensor([partition.seat(i // partition.size[1], i % partition.size[1])[0] for i in range(pixels)])
    together = group[:, None] == group
    mask = create_mask(block.mask_mod, 1, 1, pixels, pixels, device="cpu")[0, 0]
    assert torch.equal(mask, together)
    assert int(together.sum()) == partition.pairs
    tiles = -(-pixels // libraries.TILE)
    meet = torch.zeros(tiles, tiles, dtype=torch.bool)
    for i in range(tiles):
        for j in range(tiles):
            meet[i, j] = together[
                i * libraries.TILE : (i + 1) * libraries.TILE, j * libraries.TILE : (j + 1) * libraries.TILE
            ].any()
    assert torch.equal(block.to_dense()[0, 0].bool(), meet)


def test_flex_counts_whole_tiles() -> None:
    workload = Workload("attention", "forward", 128, 128)
    flops, peak = count(partial(step, PROVIDERS["flex"], workload))
    ours, _ = count(partial(step, PROVIDERS["isa-triton"], workload))
    rows = 128  # a tile is a row of this map; a long-range group is in every eighth, a window's row in eight
    assert flops == 2 * 768 * 128 * 128 * (rows * rows // 8 + rows * 8)
    assert flops / ours == 9.6
    assert peak == 4 * 128 * 128 * (2 * 256 + 3 * 512)  # q, k, v, the context between the stages, and the result


def test_natten_is_asked_for_the_groups_of_a_partition() -> None:
    pytest.importorskip("natten", reason="NATTEN is not installed")
    workload = Workload("attention", "forward", 16, 24, 64, 16, 32, (8, 4))
    ours, theirs = (step(PROVIDERS[name], workload)()[0] for name in ("isa", "natten"))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


def test_natten_counts_its_neighbourhoods() -> None:
    workload = Workload("attention", "forward", 64, 128)
    attention = in_stages(libraries.natten)(workload)
    with torch.device("meta"):
        q, k, v = (torch.empty(1, 64, 128, 1, width) for width in (256, 256, 512))
    assert attention(q, k, v).shape == v.shape
    assert libraries.natten_refuses(workload) is None
    assert "wide as keys" in str(libraries.natten_refuses(Workload("attention", "forward", 64, 128, 512, 256, 300)))
    flops = libraries._natten_flops(q.shape, k.shape, v.shape, Partition.local((64, 128), window=(8, 8)).flat())
    assert flops == 2 * (512 + 2 * 256) * 64 * 128 * 64  # the scores once for each half of the values
