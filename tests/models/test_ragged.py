"""Sequences of different lengths in one pass without padding: each as it is alone, for every kind of attention."""

import pytest
import torch

from manyhands.config import RopeConfig
from manyhands.errors import ConfigError
from manyhands.models import Decoder, init_weights

from .tiny_models import ATTENTION, gradients, ids, tiny

TOL = {"rtol": 0.0, "atol": 1e-5}


@torch.no_grad()
@pytest.mark.parametrize("attention", list(ATTENTION))
@pytest.mark.parametrize("score", [{}, {"select": "hash", "num_experts_per_tok": 1}])
def test_rows_are_each_as_alone(attention: str, score: dict) -> None:
    """Prompts, chunks of prompts and single tokens beside each other."""
    model, x = tiny(attention, router=score).eval(), ids(B=3, S=20)
    caches, done, states, experts = [model.new_cache() for _ in range(3)], [0, 0, 0], [[], [], []], [[], [], []]
    for counts in ((7, 3), (1, 5, 12), (1, 1, 1), (4, 1, 2), (7, 10, 5)):
        parts = [x[b, done[b] : done[b] + n] for b, n in enumerate(counts)]
        hidden = model.hidden_rows(torch.cat(parts)[None], counts, caches[: len(counts)])
        assert hidden.states.shape == (1, sum(counts), 32)
        for b, part in enumerate(hidden.states[0].split(list(counts))):
            states[b].append(part)
            experts[b].append(hidden.routings[1].expert_ids.split(list(counts))[b])
            done[b] += counts[b]
    assert done == [cache.length for cache in caches] == [20, 20, 20]
    for b in range(3):
        right = model.hidden(x[b : b + 1])
        torch.testing.assert_close(torch.cat(states[b]), right.states[0], **TOL)
        assert torch.equal(torch.cat(experts[b]), right.routings[1].expert_ids)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["gqa", "window", "mla"])
def test_a_row_may_have_had_padding(attention: str) -> None:
    model, x = tiny(attention).eval(), ids(B=2, S=12)
    padded, plain = model.new_cache(), model.new_cache()
    mask = torch.ones(1, 9, dtype=torch.bool)
    mask[0, 2:6] = False
    model(x[:1, :9], mask, padded)
    model(x[1:, :9], cache=plain)
    hidden = model.hidden_rows(torch.cat((x[0, 9:], x[1, 9:]))[None], [3, 3], [padded, plain])
    real = torch.cat((x[0, :2], x[0, 6:]))[None]
    torch.testing.assert_close(hidden.states[0, :3], model.hidden(real).states[0, -3:], **TOL)
    torch.testing.assert_close(hidden.states[0, 3:], model.hidden(x[1:]).states[0, -3:], **TOL)


def test_a_cache_of_another_model_is_refused() -> None:
    model = tiny().eval()
    with pytest.raises(ConfigError, match="not the model's 3 layers"):
        model.hidden_rows(ids(B=1), [12], [tiny(num_hidden_layers=2).new_cache()])


LENGTHS = (7, 1, 12, 4, 9)


def learn(model: Decoder, packed: bool, clip: float | None = None, **how: bool) -> tuple[torch.Tensor, dict, dict]:
    """States of documents of these lengths, all gradients of a loss of them, the largest logits."""
    texts = torch.split(ids(B=1, S=sum(LENGTHS)), list(LENGTHS), 1)
    model.zero_grad()
    if packed:
        found = [model.hidden(torch.cat(texts, 1), documents=LENGTHS, clip_above=clip, **how)]
    else:
        found = [model.hidden(text, clip_above=clip, **how) for text in texts]
    states = torch.cat([hidden.states[0] for hidden in found])
    (states * torch.linspace(-1, 1, states.numel(), dtype=states.dtype).view_as(states)).sum().backward()
    layers = found[0].max_logits
    largest = {layer: torch.stack([hidden.max_logits[layer] for hidden in found]).amax(0) for layer in layers}
    return states.detach(), gradients(model), largest


@pytest.mark.parametrize("attention", [*ATTENTION, "sinks", "cap"])
def test_packed_documents_are_each_as_alone(attention: str) -> None:
    """States, every gradient and QK-Clip's logits, in float64 (the router is float32); recomputed too."""
    more = {"sinks": {"sinks": True}, "cap": {"attn_logit_softcap": 5.0}}.get(attention)
    if more is None:
        model = tiny(attention)
    else:
        config = tiny("window").config
        model = Decoder(config.model_copy(update={"attention": config.attention.model_copy(update=more)}))
        init_weights(model, 0)
    model = model.double().train()
    alone, wanted, most = learn(model, packed=False, clip=0.0)
    for how in ({}, {"recompute": True}):
        states, found, largest = learn(model, packed=True, clip=0.0, **how)
        torch.testing.assert_close(states, alone, rtol=0, atol=1e-6)
        assert found.keys() == wanted.keys() and largest.keys() == most.keys() and len(largest) == 3
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-6 * float(gradient.abs().max()))
        for layer, logits_H in most.items():
            torch.testing.assert_close(largest[layer], logits_H, rtol=1e-5, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["gqa", "window", "mla"])
def test_a_packed_document_sees_no_neighbour(attention: str) -> None:
    """Other tokens before and behind it change not one bit of it in float64's attention."""
    model, x = tiny(attention).double().eval(), ids(B=1, S=sum(LENGTHS))
    other = x.clone()
    other[:, :8], other[:, 20:] = (other[:, :8] + 1) % 64, (other[:, 20:] + 1) % 64
    one, two = (model.hidden(t, documents=LENGTHS).states[0, 8:20] for t in (x, other))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-12)
    assert not torch.allclose(model.hidden(x).states[0, 8:20], one, atol=1e-3), "as one text they would see each other"


def test_long_documents_turn_by_their_own_length() -> None:
    """LongRoPE takes the long factors for a long document alone, not for what is packed with it."""
    rope = RopeConfig(
        rope_type="longrope", short_factor=(1.0,) * 4, long_factor=(3.0,) * 4, original_max_position_embeddings=8,
        factor=4.0,
    )  # fmt: skip
    model = tiny("gqa", max_position_embeddings=32).config.model_copy(update={"rope": rope})
    decoder = Decoder(model).double()
    init_weights(decoder, 0)
    alone, wanted, _ = learn(decoder, packed=False)
    states, found, _ = learn(decoder, packed=True)
    torch.testing.assert_close(states, alone, rtol=0, atol=1e-6)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-6 * float(gradient.abs().max()))


@pytest.mark.parametrize("lengths", [(3, 4), (5, 0, 7), (13, -1), ()])
def test_documents_that_are_not_the_tokens_are_refused(lengths: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"documents: .* for ids \[1, 12\]"):
        tiny().hidden(ids(B=1), documents=lengths)


def test_documents_are_for_one_row_without_mask_or_cache() -> None:
    model = tiny()
    for arguments in ((ids(B=2), None, None), (ids(B=1), torch.ones(1, 12), None), (ids(B=1), None, model.new_cache())):
        with pytest.raises(ConfigError, match="neither mask nor cache"):
            model.hidden(*arguments, documents=(5, 7))


def test_a_router_of_whole_sequences_refuses_documents() -> None:
    """Room for each sequence would be shared by texts that have nothing to do with each other."""
    router = {"capacity_factor": 1.0, "capacity_per": "sequence", "num_experts_per_tok": 1}
    model = tiny(router=router)
    with pytest.raises(ConfigError, match="shares out each sequence as a whole"):
        model.train().hidden(ids(B=1), documents=(5, 7))
    model.eval().hidden(ids(B=1), documents=(5, 7))  # in evaluation it has no limit
