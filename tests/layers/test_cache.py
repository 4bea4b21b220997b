"""Every kind of cache gives the logits of every other, bit for bit, and remembers what it was told to."""

import itertools

import pytest
import torch

from manyhands.engine.blocks import Blocks
from manyhands.errors import ConfigError
from manyhands.layers.cache import ContiguousLayer, LatentLayer, PagedCache, Pool

from ..models.tiny_models import ATTENTION, ids, tiny

every_attention = pytest.mark.parametrize("attention", list(ATTENTION))
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def paged(model, blocks, pools=None):
    pools = pools or [Pool(blocks.block_size) for _ in model.layers]
    return PagedCache(pools, blocks.new_table())


@torch.no_grad()
@every_attention
@every_dtype
def test_kinds_agree_bit_for_bit(attention: str, dtype: torch.dtype) -> None:
    """Two sequences that take turns in one pool of blocks, each against a cache of its own in one piece."""
    model, blocks = tiny(attention).to(dtype).eval(), Blocks(20, block_size=4)
    pools = [Pool(4) for _ in model.layers]
    own, shared = [model.new_cache() for _ in range(2)], [paged(model, blocks, pools) for _ in range(2)]
    assert type(own[0].layers[0]) is (LatentLayer if attention.startswith("mla") else ContiguousLayer)
    x = ids(B=2, S=16)
    for start, end in itertools.pairwise((0, 7, 8, 9, 14, 16)):
        for b in range(2):
            one = model(x[b : b + 1, start:end], cache=own[b])
            two = model(x[b : b + 1, start:end], cache=shared[b])
            assert torch.equal(one.logits, two.logits)
            for layer in one.routings:
                assert torch.equal(one.routings[layer].expert_ids, two.routings[layer].expert_ids)
    assert blocks.num_used == 8
    for a, b in zip(own[0].layers, shared[0].layers, strict=True):
        assert (a.length, a.dtype, a.rows, a.values_per_token) == (b.length, b.dtype, b.rows, b.values_per_token)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["gqa", "mla"])
@pytest.mark.parametrize("kind", ["whole", "paged"])
def test_a_fork_goes_its_own_way(attention: str, kind: str) -> None:
    model, x, blocks = tiny(attention).eval(), ids(B=2, S=14), Blocks(20, block_size=4)
    cache = model.new_cache() if kind == "whole" else paged(model, blocks)
    model(x[:1, :6], cache=cache)
    twin = cache.fork()
    used = blocks.num_used
    other = torch.cat((x[:1, :6], x[1:, 6:]), 1)
    for which, text in ((cache, x[:1]), (twin, other), (cache, None), (twin, None)):
        if text is not None:
            got = model(text[:, 6:10], cache=which).logits
        else:
            text = x[:1] if which is cache else other
            got = model(text[:, 10:], cache=which).logits
        alone = model(text[:, : which.length]).logits[:, -got.shape[1] :]
        torch.testing.assert_close(got, alone, rtol=0.0, atol=1e-5)
    if kind == "paged":
        assert used == 2 and blocks.num_used == 7, "the first block is held by both"


@torch.no_grad()
@pytest.mark.parametrize("kind", ["whole", "paged"])
def test_what_is_truncated_is_forgotten(kind: str) -> None:
    model, x, blocks = tiny().eval(), ids(B=1, S=12), Blocks(9, block_size=4)
    cache = model.new_cache() if kind == "whole" else paged(model, blocks)
    model(x[:, :10], cache=cache)
    cache.truncate(3)
    assert cache.length == 3 and blocks.num_used == (kind == "paged")
    got = model(x[:, 3:], cache=cache).logits
    torch.testing.assert_close(got, model(x).logits[:, 3:], rtol=0.0, atol=1e-5)
    cache.truncate(0)
    torch.testing.assert_close(model(x, cache=cache).logits, model(x).logits, rtol=0.0, atol=1e-5)


def test_a_cache_of_blocks_refuses_what_it_cannot_hold() -> None:
    model, blocks = tiny().eval(), Blocks(9, block_size=4)
    with pytest.raises(ConfigError, match="one sequence without padding"):
        paged(model, blocks).extend(ids(B=2), None)
    pool = Pool(4)
    table = blocks.new_table()
    table.grow(3)
    pool.write(table, 0, [torch.zeros(1, 2, 3, 8)])
    with pytest.raises(ConfigError, match="made for another model"):
        pool.write(table, 0, [torch.zeros(1, 3, 3, 8)])
