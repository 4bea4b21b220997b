"""The engine against the model without cache, without batch, without engine."""

import copy
import sys

import pytest
import torch

import manyhands as mh
from manyhands.engine.runner import Runner
from manyhands.errors import ManyhandsError, UserError
from manyhands.generate import SamplingConfig, complete, generate
from manyhands.models import Decoder

GREEDY = SamplingConfig(temperature=0, max_new_tokens=20)
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [42], [100, 3, 100], [7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7]]


def ids_of(steps, row=0):
    return [step.token_ids[row] for step in steps if step.token_ids[row] is not None]


def reason_of(steps, row=0):
    (reason,) = [step.finish_reasons[row] for step in steps if step.finish_reasons[row]]
    return reason


def with_eos(tokenizer, token_id):
    tokenizer = copy.copy(tokenizer)
    tokenizer.eos_token_id = token_id
    tokenizer.eos_token_ids = frozenset() if token_id is None else frozenset({token_id})
    return tokenizer


def test_greedy_steps_equal_full_forwards_and_their_routing(model):
    ids = list(PROMPTS[0])
    for step in generate(model, torch.tensor([ids]), GREEDY):
        with torch.no_grad():
            out = model(torch.tensor([ids]))
        assert step.token_ids == [int(out.logits[0, -1].argmax())]
        (routings,) = step.routings
        assert list(routings) == [1, 2]
        for layer, routing in routings.items():
            assert routing.expert_ids.shape == (1, 2) and routing.token_mask.tolist() == [True]
            assert torch.equal(routing.expert_ids[0], out.routings[layer].expert_ids[-1])
            torch.testing.assert_close(routing.weights[0], out.routings[layer].weights[-1], atol=1e-4, rtol=1e-4)
        ids += step.token_ids
    assert len(ids) == 7 + 20
    assert len(set(ids[7:])) > 3, "a toy that repeats itself tests nothing"


def test_a_batch_is_its_rows_alone_whenever_each_ends(model, tokenizer):
    alone = [list(generate(model, [prompt], GREEDY)) for prompt in PROMPTS]
    ends = with_eos(tokenizer, ids_of(alone[0])[4])
    alone = [list(generate(model, [prompt], GREEDY, ends)) for prompt in PROMPTS]
    together = list(generate(model, PROMPTS, GREEDY, ends))
    assert len({len(steps) for steps in alone}) > 1, "rows must end at different times"
    for row, steps in enumerate(alone):
        assert ids_of(together, row) == ids_of(steps)
        assert reason_of(together, row) == reason_of(steps)
        assert [s.texts[row] for s in together][: len(steps)] == [s.texts[0] for s in steps]
        for one, batch in zip(steps, together, strict=False):
            for layer, routing in one.routings[0].items():
                assert torch.equal(routing.expert_ids, batch.routings[row][layer].expert_ids)
        for step in together[len(steps) :]:
            assert (step.token_ids[row], step.texts[row], step.finish_reasons[row]) == (None, "", None)
            assert step.routings[row] == {}


def test_each_token_goes_through_the_model_once(make, monkeypatch):
    counts = []
    run = Runner.run

    def spy(self, batch):
        counts.append([len(row.ids) for row in batch.rows])
        return run(self, batch)

    monkeypatch.setattr(Runner, "run", spy)
    assert len(list(generate(make(), PROMPTS, GREEDY))) == 20
    assert counts == [[7, 1, 3, 11]] + [[1] * 4] * 19


def test_the_end_of_text_token_ends_without_being_shown(make, tokenizer):
    free = list(generate(make(), PROMPTS[:1], GREEDY))
    ends = with_eos(tokenizer, ids_of(free)[3])
    steps = list(generate(make(), PROMPTS[:1], GREEDY, ends))
    assert ids_of(steps) == ids_of(free)[:4]
    assert "".join(s.texts[0] for s in steps) == tokenizer.decode(ids_of(free)[:3])
    assert [s.finish_reasons[0] for s in steps] == [None, None, None, "stop"]


def test_text_is_the_decoded_tokens(make, tokenizer):
    for seed in range(3):
        sampling = SamplingConfig(seed=seed, max_new_tokens=40, temperature=2.0)
        steps = list(generate(make(), [[1]], sampling, with_eos(tokenizer, None)))
        assert "".join(s.texts[0] for s in steps) == tokenizer.decode(ids_of(steps))


def test_a_stop_string_across_tokens_ends_only_its_row(make, tokenizer):
    tokenizer = with_eos(tokenizer, None)
    free = complete(make(), tokenizer, ["return", "café"], GREEDY)
    text = free[0].text
    stop = text[5:12]
    assert text.index(stop) == 5 and stop not in free[1].text
    stopped, other = complete(make(), tokenizer, ["return", "café"], GREEDY.model_copy(update={"stop": (stop,)}))
    assert (stopped.text, stopped.finish_reason) == (text[:5], "stop")
    assert stopped.token_ids == free[0].token_ids[: len(stopped.token_ids)]
    assert len(stopped.token_ids) < 20
    assert other == free[1] and other.finish_reason == "length"


def test_the_context_limits_prompt_and_answer(make):
    model = make()  # 48 positions
    steps = list(generate(model, [[1] * 40, [1] * 47], GREEDY))
    assert len(ids_of(steps, 0)) == 8 and reason_of(steps, 0) == "length"
    assert len(ids_of(steps, 1)) == 1 and reason_of(steps, 1) == "length"
    with pytest.raises(UserError, match="48 tokens; with max_position_embeddings = 48 it may have at most 47"):
        generate(model, [[1] * 48], GREEDY)


def test_the_seed_decides(make, tokenizer):
    model = make()

    def text(seed):
        return complete(model, tokenizer, ["def"], SamplingConfig(seed=seed, max_new_tokens=30))

    state = torch.get_rng_state()
    assert text(1) == text(1) != text(2)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is not ours"


def test_an_empty_prompt_starts_a_document(make, tokenizer):
    model = make()
    assert tokenizer.eos_token_id == 0
    empty = ids_of(list(generate(model, [[]], GREEDY, tokenizer)))
    assert empty == ids_of(list(generate(model, [[0]], GREEDY, tokenizer)))
    for without in (None, with_eos(tokenizer, None)):
        with pytest.raises(UserError, match="prompt is empty"):
            generate(model, [[1], []], GREEDY, without)


@pytest.mark.parametrize(
    ("router", "why"),
    [
        ({"select": "expert_choice"}, "select = 'expert_choice'.*depend on the tokens after it"),
        ({"eval_capacity_factor": 1.5}, r"eval_capacity_factor = 1\.5.*tokens beside it"),
    ],
)
def test_a_router_that_is_not_causal_is_refused(make, router, why):
    model = make(moe={"router": {"num_experts": 4, "num_experts_per_tok": 2, **router}})
    with pytest.raises(UserError, match=why):
        generate(model, [[1]], GREEDY)


def test_hash_routing_and_dense_models_generate(make):
    hashed = make(moe={"router": {"num_experts": 4, "num_experts_per_tok": 1, "select": "hash"}})
    (first, *_) = generate(hashed, PROMPTS, GREEDY)
    assert [routings[1].expert_ids.shape for routings in first.routings] == [(1, 1)] * 4
    dense = Decoder(hashed.config.model_copy(update={"moe": None}))
    for parameter in dense.parameters():
        torch.nn.init.normal_(parameter)
    assert [step.routings for step in generate(dense, [[1]], GREEDY)] == [[{}]] * 20


def test_training_mode_is_left_as_it_was_after_every_step(make):
    router = {"num_experts": 4, "num_experts_per_tok": 2, "jitter": 0.9}
    model = make(moe={"router": router})
    expected = [step.token_ids for step in generate(model, PROMPTS, GREEDY)]
    model.train()
    model.layers[1].eval()
    before = [module.training for module in model.modules()]
    steps = generate(model, PROMPTS, GREEDY)
    for tokens in expected:
        assert next(steps).token_ids == tokens
        assert [module.training for module in model.modules()] == before


def test_what_cannot_be_continued_is_refused_on_the_call(make, tokenizer):
    model = make()
    for bad in (-1, 320):
        with pytest.raises(UserError, match=f"token id {bad}; vocab_size = 320"):
            generate(model, [[1], [2, bad, 3]], GREEDY)
    with pytest.raises(UserError, match="needs a tokenizer"):
        generate(model, [[1]], SamplingConfig(stop=("x",)))
    assert list(generate(model, [], GREEDY)) == []


def test_damaged_weights_are_an_error_in_one_line(make):
    model = make()
    torch.nn.init.constant_(model.layers[2].mlp.experts.down_proj, float("nan"))
    with pytest.raises(ManyhandsError, match="NaN or infinite"):
        list(generate(model, [[1]], GREEDY))


def test_the_room_is_the_function(make, tokenizer):
    """`mh.generate(…)`, whether or not somebody has imported `manyhands.generate` before."""
    model, sampling = make(), SamplingConfig(temperature=0, max_new_tokens=4)
    completions = mh.generate(model, tokenizer, ["def", [5, 6, 7]], sampling)
    assert completions == complete(model, tokenizer, ["def", [5, 6, 7]], sampling)
    assert completions[1].token_ids == ids_of(list(generate(model, [[5, 6, 7]], sampling, tokenizer)))
    assert mh.generate is sys.modules["manyhands.generate"]


def test_exact_is_the_engines(make, tokenizer, monkeypatch):
    sampling, runners, made = SamplingConfig(temperature=0, max_new_tokens=4), [], Runner.__init__

    def spied(self, model, exact=False):
        made(self, model, exact)
        runners.append(self)

    monkeypatch.setattr(Runner, "__init__", spied)
    plain, exact = (
        mh.generate(make(), tokenizer, ["def", [5, 6, 7]], sampling, exact=asked) for asked in (False, True)
    )
    assert [runner._exact for runner in runners] == [False, True]
    assert [c.token_ids for c in exact] == [c.token_ids for c in plain]
