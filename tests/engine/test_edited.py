"""Requests whose routing is edited, beside others."""

import pytest
import torch

from manyhands.config import SamplingConfig
from manyhands.engine.edited import Edited, Recorded
from manyhands.engine.engine import Engine
from manyhands.engine.prefix import Prefix
from manyhands.errors import ConfigError, UserError
from manyhands.moe import Force, Mask, Replay, Swap

GREEDY = SamplingConfig(max_new_tokens=12, temperature=0.0, logprobs=0)
PROMPTS = [[5, 9, 100, 3], [7, 7, 8], [1, 2, 3, 4, 5, 6]]
MASK = {1: Mask((0,)), 2: Mask((3,))}


def says(completion) -> tuple:
    return completion.token_ids, [said.logprob for said in completion.logprobs]


@pytest.mark.parametrize(
    "how", [{}, {"paged": True}, {"max_batch_tokens": 3}, {"speculate": 4, "exact": True}, {"exact": True}]
)
def test_a_replayed_completion_is_the_recorded_one_bit_for_bit(model, how) -> None:
    for prompt in PROMPTS:
        engine = Engine(model, max_sequences=1, **how)
        first = engine.generate([prompt], GREEDY, routing=True)[0]
        again = engine.generate([prompt], GREEDY, routing=True, edit=first.routings)[0]
        assert says(again) == says(first)
        for layer, routing in first.routings.items():
            assert torch.equal(again.routings[layer].expert_ids, routing.expert_ids)
            assert torch.equal(again.routings[layer].weights, routing.weights)


def test_a_replay_moves_another_model_to_the_recorded_experts(make) -> None:
    model, other = make(), make()
    with torch.no_grad():
        for layer in other.sparse_layers().values():
            layer.router.weight.copy_(torch.randn(4, 32, generator=torch.Generator().manual_seed(9)))
    first = Engine(model).generate(PROMPTS[:1], GREEDY, routing=True)[0]
    free = Engine(other).generate(PROMPTS[:1], GREEDY, routing=True)[0]
    edits = {layer: Replay.of(routing, weights=True) for layer, routing in first.routings.items()}
    given = Engine(other).generate(PROMPTS[:1], GREEDY, routing=True, edit=edits)[0]
    assert says(given) == says(first) != says(free)  # but for their routers they are one model


def test_neighbours_do_not_see_an_edit(make) -> None:
    model = make(moe={"router": {"num_experts": 4, "num_experts_per_tok": 2}})
    alone = [Engine(model, exact=True).generate([p], GREEDY)[0] for p in PROMPTS]
    masked = [Engine(model, exact=True).generate([p], GREEDY, edit=MASK)[0] for p in PROMPTS]
    engine = Engine(model, exact=True)
    edits = [None, MASK, {1: Mask((0,)), 2: Mask((3,))}]
    requests = [engine.add(p, GREEDY, edit=e) for e in edits for p in PROMPTS]
    while engine.busy:
        engine.step()
    found = [says(engine.completion(r)) for r in requests]
    assert found == [*map(says, alone), *map(says, masked), *map(says, masked)]
    assert [says(c) for c in alone] != [says(c) for c in masked]


def test_what_was_computed_under_an_edit_is_found_by_the_same_edit_alone(make) -> None:
    model = make(max_position_embeddings=1024)
    prompt = list(range(1, 80))
    engine = Engine(model, paged=True)
    expected = {
        name: says(Engine(model, paged=True, prefix_caching=False).generate([prompt], GREEDY, edit=edit)[0])
        for name, edit in {"plain": None, "mask": MASK, "swap": {1: Swap(0, 2)}}.items()
    }
    cached = []
    for name, edit in [("plain", None), ("mask", MASK), ("swap", {1: Swap(0, 2)}), ("mask", dict(MASK)), ("plain", {})]:
        request = engine.add(prompt, GREEDY, edit=edit)
        while engine.busy:
            engine.step()
        cached.append(request.num_cached)
        assert engine.completion(request).token_ids == expected[name][0]
    assert cached == [0, 0, 0, 64, 64]


def test_a_preempted_replay_is_computed_again_with_its_rows(make) -> None:
    model = make(max_position_embeddings=128)
    long = SamplingConfig(max_new_tokens=60, temperature=0.0)
    first = [Engine(model).generate([p], long, routing=True)[0] for p in PROMPTS]
    engine = Engine(model, cache_tokens=128, paged=True)
    requests = [engine.add(p, long, edit=c.routings) for p, c in zip(PROMPTS, first, strict=True)]
    while engine.busy:
        engine.step()
    assert any(r.num_preemptions for r in requests)
    assert [r.token_ids for r in requests] == [c.token_ids for c in first]


def test_routing_kept_with_the_blocks_is_the_edited_one(make) -> None:
    engine = Engine(make(), keep_routing=True, paged=True)
    found = engine.generate(PROMPTS[:1], GREEDY, routing=True, edit={1: Force((3,))})[0].routings[1]
    assert found.expert_ids.unique(dim=0).tolist() == [[3, -1]]


def test_a_recording_holds_as_long_as_its_tokens(make) -> None:
    model = make()
    ids = torch.tensor([[0, 1]] * 6)
    edited = Edited(Recorded([5, 6, 7, 8, 9], {1: Replay(ids.to(torch.uint8)), 2: Mask((1,))}), model)

    def rows(before: list[int], now: list[int]) -> list[bool]:
        found = edited.rows(before, now)
        assert found[2] == Mask((1,)) and len(found[1].expert_ids) == len(now)
        return (found[1].expert_ids >= 0).any(1).tolist()

    assert rows([], [5, 6, 7]) == [True] * 3
    assert rows([], [5, 0, 7]) == [True, False, False]
    assert rows([5, 6], [7, 8]) == [True, True] and rows([5, 1], [7, 8]) == [False, False]
    assert rows([5, 6, 7, 8], [9, 10]) == [True, False]  # behind its end
    free = Edited({1: Replay(ids)}, model)
    assert (free.rows([1, 2], [3] * 6)[1].expert_ids[:, 0] >= 0).tolist() == [True] * 4 + [False] * 2


def test_what_cannot_be_followed_is_refused_when_it_is_added(make) -> None:
    engine = Engine(make())
    with pytest.raises(ConfigError, match="there is no router in layer 0: these have one"):
        engine.add([1], edit={0: Mask((1,))})
    with pytest.raises(ConfigError, match="layer 1: without 3 experts 1 of 4 are left, and a token needs 2"):
        engine.generate([[1]], edit={1: Mask((1, 2, 3))})
    with pytest.raises(UserError, match="a prefix was computed without edits"):
        engine.add([1], edit=MASK, prefix=Prefix())
    assert not engine.busy
