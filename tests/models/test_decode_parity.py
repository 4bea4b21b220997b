"""Step by step equals all at once, float32 1e-5: every attention, every rope, padding, chunks, batches (§17.9)."""

import itertools

import pytest
import torch

from .tiny_models import ATTENTION, ROPE, ids, tiny

TOL = {"rtol": 0.0, "atol": 1e-5}
every_attention = pytest.mark.parametrize("attention", list(ATTENTION))


def steps(model, x: torch.Tensor, prefill: int, mask: torch.Tensor | None = None, chunk: int = 1) -> torch.Tensor:
    """Logits [B, S, V] from a prefill and then `chunk` tokens at a time."""
    cache, out = model.new_cache(), []
    edges = [0, *([prefill] if prefill else []), *range(prefill + chunk, x.shape[1], chunk), x.shape[1]]
    for a, b in itertools.pairwise(edges):
        part = None if mask is None or bool(mask[:, a:b].all()) else mask[:, a:b]
        out.append(model(x[:, a:b], part, cache).logits)
    assert cache.length == x.shape[1]
    return torch.cat(out, 1)


@torch.no_grad()
@every_attention
@pytest.mark.parametrize("rope", ["default", "yarn"])
def test_token_by_token(attention: str, rope: str) -> None:
    model, x = tiny(attention, rope).eval(), ids()
    full = model(x).logits
    torch.testing.assert_close(steps(model, x, prefill=0), full, **TOL)
    torch.testing.assert_close(steps(model, x, prefill=5), full, **TOL)


@torch.no_grad()
@every_attention
def test_in_chunks(attention: str) -> None:
    model, x = tiny(attention).eval(), ids()
    torch.testing.assert_close(steps(model, x, prefill=4, chunk=3), model(x).logits, **TOL)


@torch.no_grad()
@pytest.mark.parametrize("rope", list(ROPE))
@pytest.mark.parametrize("attention", ["gqa", "mla"])
def test_every_rope(attention: str, rope: str) -> None:
    model, x = tiny(attention, rope).eval(), ids()
    torch.testing.assert_close(steps(model, x, prefill=3), model(x).logits, **TOL)


@torch.no_grad()
@every_attention
def test_left_padding_in_a_batch(attention: str) -> None:
    """Each sequence of a left-padded batch decodes as if it were alone."""
    model, x = tiny(attention).eval(), ids(B=3)
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[1, :3] = mask[2, :7] = False
    batched = steps(model, x, prefill=9, mask=mask)
    for b, pad in enumerate((0, 3, 7)):
        torch.testing.assert_close(batched[b, pad:], model(x[b : b + 1, pad:]).logits[0], **TOL)


@torch.no_grad()
@every_attention
def test_a_right_padded_prompt_can_be_continued(attention: str) -> None:
    """The padding then lies in the middle; it takes no position and no room in a sliding window."""
    model, x = tiny(attention).eval(), ids(B=2, S=14)
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[1, 4:8] = False
    batched = steps(model, x, prefill=8, mask=mask)
    alone = torch.cat((x[1, :4], x[1, 8:]))[None]
    torch.testing.assert_close(batched[1, mask[1]], model(alone).logits[0], **TOL)
    torch.testing.assert_close(batched[0], model(x[:1]).logits[0], **TOL)


ROUTERS = [
    {"num_experts_per_tok": 1},
    {"score": "sigmoid", "bias": True, "n_group": 3, "topk_group": 2, "routed_scaling_factor": 2.5},
    {"noisy": True, "jitter": 0.1},
    {"select": "hash", "num_experts_per_tok": 1},
]


@torch.no_grad()
@pytest.mark.parametrize("router", ROUTERS)
def test_every_causal_router(router: dict) -> None:
    model, x = tiny(router=router).eval(), ids()
    torch.testing.assert_close(steps(model, x, prefill=3), model(x).logits, **TOL)


@torch.no_grad()
@every_attention
def test_later_tokens_do_not_matter(attention: str) -> None:
    """The prefix test: logits and experts at t are those of any continuation."""
    model, x = tiny(attention).eval(), ids()
    other = x.clone()
    other[:, 7:] = (other[:, 7:] + 11) % 64
    one, two = model(x), model(other)
    torch.testing.assert_close(one.logits[:, :7], two.logits[:, :7], **TOL)
    assert not torch.allclose(one.logits[:, 7:], two.logits[:, 7:], atol=1e-2)
    for layer in one.routings:
        first, second = (o.routings[layer].expert_ids.view(2, 12, -1)[:, :7] for o in (one, two))
        assert torch.equal(first, second)


@torch.no_grad()
def test_the_window_forgets() -> None:
    """One layer with a window of 5: a token 5 back is out of sight, 4 back is not."""
    model, x = tiny("window", num_hidden_layers=1, moe=None).eval(), ids(B=1)
    base = model(x).logits[0, -1]
    for back, seen in ((5, False), (4, True)):
        other = x.clone()
        other[0, -1 - back] = (other[0, -1 - back] + 1) % 64
        assert ((model(other).logits[0, -1] - base).abs().max().item() > 1e-4) == seen


def test_the_cache_remembers_padding_only_while_there_is_any() -> None:
    cache, x = tiny("mha").new_cache(), ids()
    assert cache.extend(x, None) is None and cache.length == x.shape[1]
    assert cache.extend(x[:, :2], torch.ones(x.shape[0], 2, dtype=torch.bool)) is None
    mask = torch.zeros(x.shape[0], 1, dtype=torch.bool)
    whole = cache.extend(x[:, :1], mask)
    assert whole is not None and whole.shape == (x.shape[0], cache.length) and int((~whole).sum()) == x.shape[0]
    whole = cache.extend(x[:, :3], None)
    assert whole is not None and bool(whole[:, -3:].all()) and cache.length == x.shape[1] + 6
    cache.truncate(4)
    assert cache.length == 4 and cache.extend(x[:, :1], None) is None


@torch.no_grad()
@pytest.mark.parametrize("attention", ["mha", "gqa", "mla"])
def test_one_token_in_sixteen_bits(attention: str) -> None:
    """Its attention is computed in float32; the result is as close to float32 as the whole sequence's."""
    model, x = tiny(attention).eval(), ids()
    exact, half = model(x).logits, tiny(attention).eval().to(torch.bfloat16)
    stepwise = steps(half, x, prefill=5)
    assert stepwise.dtype == torch.bfloat16
    error = (stepwise - exact).abs().mean()
    assert error < 1.5 * (half(x).logits - exact).abs().mean() + 1e-3


@torch.no_grad()
@pytest.mark.parametrize("attention", ["gqa", "mla"])
def test_a_truncated_cache_still_knows_its_padding(attention: str) -> None:
    model, x = tiny(attention).eval(), ids(B=2)
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[1, :4] = False
    cache = model.new_cache()
    model(x[:, :8], mask[:, :8], cache)
    model(x[:, 3:6], None, cache)  # what is forgotten again
    cache.truncate(8)
    again = model(x[:, 8:], None, cache).logits
    torch.testing.assert_close(again[0], model(x[:1]).logits[0, 8:], **TOL)
    torch.testing.assert_close(again[1], model(x[1:, 4:]).logits[0, 4:], **TOL)
