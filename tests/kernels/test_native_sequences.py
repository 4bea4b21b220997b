"""Sequences of different lengths in one call, their keys and values in blocks: the same bits as each alone."""

import pytest
import torch

from manyhands.kernels import native
from manyhands.kernels.native import NativeError, library, step
from manyhands.layers.attention import attend
from manyhands.layers.rope import apply_rope

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no native kernels: {native.missing()}")
LEVELS = [(library.level_code(x), n) for x in native.levels() for n in (1, 2)] if native.available() else []
H, G, D, P = 4, 2, 32, 32
ROWS, FIRST, START = [1, 5, 40, 0, 3], [300, 0, 17, 0, 33], [0, 0, 3, 0, 35]
"""Queries of each sequence, the position of the first, and padding at the head: of the last all but one is."""


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sequences(rows: list[int], first: list[int], start: list[int], P: int = P, seed: int = 0) -> step.Sequences:
    """Blocks in any order, with a gap between the tables."""
    blocks = [-(-(n + f) // P) + 1 for n, f in zip(rows, first, strict=True)]
    order = torch.randperm(sum(blocks), generator=torch.Generator().manual_seed(seed))
    begin, table = (torch.tensor([0, *n]).cumsum(0) for n in (rows, blocks))
    return step.Sequences(begin, torch.tensor(first), table[:-1].contiguous(), order, torch.tensor(start))


def filled(who: step.Sequences, dtype: torch.dtype, P: int = P) -> tuple[torch.Tensor, torch.Tensor]:
    """A pool [N, G, P, d] of keys and of values: those of sequence s at position p are the same wherever they lie.

    What nobody may look at is not a number.
    """
    pools = [torch.full((len(who.blocks), G, P, D), float("nan"), dtype=dtype) for _ in range(2)]
    for s, (f, start) in enumerate(zip(who.first.tolist(), who.start.tolist(), strict=True)):
        length = f + int(who.begin[s + 1] - who.begin[s])
        for i, pool in enumerate(pools):
            at = draw(length, G, D, seed=10 * s + i).to(dtype)
            for p in range(start, length):
                pool[who.blocks[who.table[s] + p // P], :, p % P] = at[p]
    return pools[0], pools[1]


def alone(who: step.Sequences, s: int) -> step.Sequences:
    """One of the sequences."""
    part = slice(s, s + 1)
    begin = who.begin[s : s + 2] - who.begin[s]
    return step.Sequences(begin, who.first[part], who.table[part], who.blocks, who.start[part])


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ragged_rows(dtype: torch.dtype, window: int | None) -> None:
    who = sequences(ROWS, FIRST, START)
    cache, q, sinks = filled(who, dtype), draw(sum(ROWS), H, D, seed=99), draw(H)
    how = (0.3, window, sinks, 5.0)
    y = step.attend(q, step.cache_of(*cache), who, *how)
    for s, rows in enumerate(ROWS):
        part = slice(int(who.begin[s]), int(who.begin[s]) + rows)
        if rows:
            assert torch.equal(y[part], step.attend(q[part], step.cache_of(*cache), alone(who, s), *how))
        length, queries = FIRST[s] + rows, torch.arange(FIRST[s], FIRST[s] + rows)[:, None]
        keys = torch.arange(length)
        allowed = (keys <= queries) & (keys >= START[s]) & (keys > queries - (window or length))
        k64, v64 = (draw(length, G, D, seed=10 * s + i).to(dtype).double().transpose(0, 1) for i in range(2))
        k64, v64 = (t.repeat_interleave(H // G, 0)[None] for t in (k64, v64))
        right = attend(q[part].double().transpose(0, 1)[None], k64, v64, allowed, 0.3, 5.0, sinks.double())
        real = queries[:, 0] >= START[s]
        torch.testing.assert_close(y[part][real].double(), right[0].transpose(0, 1)[real], atol=3e-6, rtol=3e-5)
        assert not y[part][~real].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neither_blocks_nor_levels_nor_threads_show(dtype: torch.dtype) -> None:
    q, seen, plain = draw(sum(ROWS), H, D, seed=99), [], []
    for P, seed in ((32, 0), (32, 1), (7, 2), (512, 3)):
        who = sequences(ROWS, FIRST, START, P, seed)
        cache = filled(who, dtype, P)
        for level, threads in LEVELS:  # the portable level rounds between a product and a sum
            y = step.attend(q, step.cache_of(*cache), who, 0.3, level=level, threads=threads)
            (seen if level else plain).append(y)
    assert all(torch.equal(ys[0], y) for ys in (seen, plain) for y in ys)


@pytest.mark.parametrize("window", [None, 100])
def test_chunks_of_a_prompt(window: int | None) -> None:
    n = 290
    whole = sequences([n], [0], [0])
    cache, q, sizes = step.cache_of(*(held := filled(whole, torch.float32))), draw(n, H, D, seed=1), (1, 7, 64, 218)
    y = step.attend(q, cache, whole, 0.3, window)
    first = 0
    for size in sizes:
        part = step.Sequences(torch.tensor([0, size]), torch.tensor([first]), whole.table, whole.blocks)
        assert torch.equal(y[first : first + size], step.attend(q[first : first + size], cache, part, 0.3, window))
        first += size
    assert first == n and held


def test_what_a_query_does_not_see_is_never_mixed_in() -> None:
    n = 70
    k, v, q = draw(1, G, n, D, seed=1), draw(1, G, n, D, seed=2), draw(n, H, D)
    y = step.attend(q, step.cache_of(k, v), step.rectangle(1, n, 0), 0.3, 9)
    for tensor in (k, v):
        for value in ("nan", "inf"):
            broken = tensor.clone()
            broken[:, :, 40] = float(value)
            pair = (broken, v) if tensor is k else (k, broken)
            z = step.attend(q, step.cache_of(*pair), step.rectangle(1, n, 0), 0.3, 9)
            assert torch.equal(z[:40], y[:40]) and torch.equal(z[49:], y[49:])
            assert not z[40:49].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_placed_in_blocks(dtype: torch.dtype) -> None:
    who = sequences(ROWS, FIRST, START)
    pools = [torch.zeros(len(who.blocks), G, P, D, dtype=dtype) for _ in range(2)]
    rows = sum(ROWS)
    q, k, v = draw(rows, H * D), draw(rows, G * D, seed=1), draw(rows, G * D, seed=2)
    cos, sin = draw(rows, 8, seed=3), draw(rows, 8, seed=4)
    out = step.rope_and_cache(q, k, v, who, step.Rotation(cos, sin, True), step.cache_of(*pools))
    tables = (cos[None, None], sin[None, None])
    turned_q, turned_k = (
        apply_rope(t.view(1, rows, -1, D).transpose(1, 2), tables, True)[0].transpose(0, 1) for t in (q, k)
    )
    torch.testing.assert_close(out.view(rows, H, D), turned_q, atol=1e-6, rtol=1e-6)
    expected = [torch.zeros_like(pool) for pool in pools]
    for s, n in enumerate(ROWS):
        for i in range(n):
            row, p = int(who.begin[s]) + i, FIRST[s] + i
            block = who.blocks[who.table[s] + p // P]
            expected[0][block, :, p % P] = turned_k[row].to(dtype)
            expected[1][block, :, p % P] = v.view(rows, G, D)[row].to(dtype)
    torch.testing.assert_close(pools[0], expected[0], atol=1e-6, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6)
    assert torch.equal(pools[1], expected[1])


def test_bad_sequences_are_refused() -> None:
    who = sequences([2, 3], [30, 0], [0, 0])
    held, q = filled(who, torch.float32), draw(5, H, D)
    cache = step.cache_of(*held)

    def refused(match: str, **changes: list[int]) -> None:
        parts = {n: torch.tensor(changes[n]) if n in changes else getattr(who, n) for n in ("begin", "first", "table")}
        blocks = torch.tensor(changes["blocks"]) if "blocks" in changes else who.blocks
        start = torch.tensor(changes["start"]) if "start" in changes else who.start
        with pytest.raises(NativeError, match=match):
            step.attend(q, cache, step.Sequences(**parts, blocks=blocks, start=start), 1.0)

    most = 2**63 - 1
    refused("from 1 on", begin=[1, 2, 5])
    refused("sequence 1 has rows 3 to 2", begin=[0, 3, 2])
    for first in (-1, most):
        refused("sequence 0 has rows", first=[first, 0])
    refused("sequence 0 has rows", start=[-1, 0])
    for table in (-1, len(who.blocks), most):
        refused("no room for 32 positions in a table", table=[table, 0])
    for block in (-1, len(who.blocks), most):
        refused(f"in block {block}, of sequence 1", blocks=[*who.blocks.tolist()[:2], block, block])
