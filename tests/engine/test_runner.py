"""What is prepared for decoding is used, by rows that may use it, and never when the model has changed since."""

import pytest
import torch

from manyhands.check.coverage import counting
from manyhands.config import SamplingConfig
from manyhands.engine.batch import Batch, Row
from manyhands.engine.engine import Engine
from manyhands.engine.runner import Runner
from manyhands.kernels import native

from .conftest import GQA

WIDE = {**GQA, "head_dim": 16}
PROMPTS = [[5, 6, 7, 8, 9], [42], [100, 3, 100]]
GREEDY = SamplingConfig(temperature=0, max_new_tokens=12)


def tokens(engine, steps):
    return [[token.token_id for token in engine.step()] for _ in range(steps)]


@pytest.mark.parametrize("count", [3, 18])
def test_rows_in_blocks_and_in_one_piece_say_the_same(make, count):
    """In one piece each the native library takes them, some at a time; in blocks the modules do."""
    model = make(attention=WIDE)
    prompts = [[b + 1, b + 40] for b in range(count)]
    whole, blocks = Engine(model), Engine(model, paged=True)
    for engine in (whole, blocks):
        engine.add_all(prompts, GREEDY)
    with counting() as calls:
        found = tokens(whole, 12)
    assert found == tokens(blocks, 12)
    assert not native.available() or calls["mh_steps"] >= 11


def test_a_model_that_changes_in_between_is_seen(make):
    model, heard = make(attention=WIDE), []
    engines = [Engine(model), Engine(model, paged=True)]
    for engine in engines:
        engine.add_all(PROMPTS, GREEDY)
    assert tokens(engines[0], 4) == tokens(engines[1], 4)
    experts = model.layers[1].mlp.experts
    experts.down_proj = torch.nn.Parameter(-3 * experts.down_proj.detach(), requires_grad=False)
    assert tokens(engines[0], 4) == tokens(engines[1], 4)
    model.layers[1].mlp.register_forward_hook(lambda *_: heard.append(1))
    tokens(engines[0], 2)
    assert len(heard) == 2


class Dropping(torch.nn.Module):
    """A part put around another: it drops everything while it trains."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.dropout = inner, torch.nn.Dropout(1.0)

    def forward(self, *arguments):
        y, largest = self.inner(*arguments)
        return self.dropout(y), largest


@pytest.mark.parametrize("paged", [False, True])
def test_a_part_that_comes_later_does_not_train(make, paged):
    model = make(attention=WIDE)
    plain, engine = Engine(make(attention=WIDE), paged=paged), Engine(model, paged=paged)
    for one in (plain, engine):
        one.add_all(PROMPTS, GREEDY)
    assert tokens(plain, 3) == tokens(engine, 3)
    block = model.layers[1]
    block.self_attn = Dropping(block.self_attn)
    assert tokens(plain, 3) == tokens(engine, 3)
    assert block.self_attn.dropout.training


def test_logits_are_of_the_rows_that_draw(make):
    model = make()
    rows = [Row(ids, model.new_cache(), draws) for ids, draws in zip(PROMPTS, (True, False, True), strict=True)]
    batch = Batch(rows)
    assert (batch.starts, batch.last, batch.drawing, batch.num_tokens) == ([0, 5, 6], [4, 5, 8], [0, 2], 9)
    assert [(row.position, row.length) for row in rows] == [(0, 5), (0, 1), (0, 3)]
    forward = Runner(model.train()).run(batch)
    assert model.training and [row.position for row in rows] == [5, 1, 3]
    with torch.no_grad():
        right = [model.eval()(torch.tensor([PROMPTS[r]])).logits[0, -1] for r in batch.drawing]
    torch.testing.assert_close(forward.logits, torch.stack(right), atol=1e-4, rtol=1e-4)
    assert forward.routed.rows(slice(6, 9))[1].expert_ids.shape == (3, 2)
