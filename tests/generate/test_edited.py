"""What an edit does to an answer; a recorded trace replayed."""

from pathlib import Path

import pytest
import torch

from manyhands.config import ModelConfig, SamplingConfig
from manyhands.engine.engine import Engine
from manyhands.errors import UserError
from manyhands.generate.edited import effect
from manyhands.generate.replay import recorded_texts
from manyhands.models import Decoder, init_weights
from manyhands.moe import Mask, Routing
from manyhands.trace.recording import Phase, Recorder, Trace

GREEDY = SamplingConfig(max_new_tokens=10, temperature=0.0)
PROMPTS = [[5, 9, 100, 3], [7, 7, 8]]


def make(**router: object) -> Decoder:
    values = {
        "vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 48,
        "max_position_embeddings": 48, "initializer_range": 0.3,
        "attention": {"num_attention_heads": 4, "head_dim": 8},
        "moe": {
            "router": {"num_experts": 4, "num_experts_per_tok": 2, **router}, "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
        },
    }  # fmt: skip
    model = Decoder(ModelConfig(**values))
    init_weights(model, seed=1)
    return model.eval()


def record(model: Decoder, path: Path, gap: bool = False) -> list[list[int]]:
    """Greedy answers of both prompts, token by token, as a trace."""
    layers = sorted(model.sparse_layers())
    texts = []
    with Recorder(path, layers=layers, num_experts=4, num_experts_per_tok=2) as recorder:
        step = 0
        for n, prompt in enumerate(PROMPTS):
            done = Engine(model).generate([prompt], GREEDY, routing=True)[0]
            ids = prompt + done.token_ids[:-1]
            for first, last in [(0, len(prompt)), *((p, p + 1) for p in range(len(prompt), len(ids)))]:
                rows: dict[int, Routing] = {m: r.rows(slice(first, last)) for m, r in done.routings.items()}
                phase = Phase.DECODE if first else Phase.PREFILL
                if not (gap and first == len(prompt) + 3):
                    recorder.add(rows, ids[first:last], sequence=n, position=range(first, last), phase=phase, step=step)
                step += 1
            texts.append(ids)
    return texts


def test_a_recorded_trace_is_replayed_bit_for_bit(tmp_path: Path) -> None:
    model = make()
    texts = record(model, tmp_path / "trace")
    found = recorded_texts(Trace.open(tmp_path / "trace"), model)
    assert [t.recorded.token_ids for t in found] == texts and [t.prompt for t in found] == [4, 3]
    for text, ids in zip(found, texts, strict=True):
        done = effect(Engine(model), ids[: text.prompt], GREEDY, text.recorded, ids)
        assert done.original.token_ids == done.edited.token_ids and done.same_tokens == 10
        assert done.edited_loss == done.original_loss and done.tokens == len(ids) - 1


def test_another_model_is_moved_by_the_recorded_routing(tmp_path: Path) -> None:
    model, other = make(), make()
    texts = record(model, tmp_path / "trace")
    with torch.no_grad():
        for layer in other.sparse_layers().values():
            layer.router.weight.add_(torch.randn(4, 32, generator=torch.Generator().manual_seed(9)))
    text = recorded_texts(Trace.open(tmp_path / "trace"), other)[0]
    done = effect(Engine(other), texts[0][:4], GREEDY, text.recorded, texts[0])
    assert done.original_loss != done.edited_loss
    ids = torch.tensor([texts[0]])
    recorded = {n: e.rows(slice(len(texts[0]) - 1)) for n, e in text.recorded.edits.items()}
    for loss, edit in ((done.original_loss, None), (done.edited_loss, recorded)):
        with torch.no_grad():
            logits = other(ids[:, :-1], edit=edit).logits
        assert loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits[0], ids[0, 1:])), abs=1e-4)


def test_a_text_is_replayed_as_far_as_it_is_whole(tmp_path: Path) -> None:
    model = make()
    texts = record(model, tmp_path / "trace", gap=True)
    found = recorded_texts(Trace.open(tmp_path / "trace"), model)
    assert [t.recorded.token_ids for t in found] == [texts[0][:7], texts[1][:6]]


def test_a_trace_of_another_model_is_refused(tmp_path: Path) -> None:
    record(make(), tmp_path / "trace")
    with pytest.raises(UserError, match="routes to 2 of 4 experts; layer 1 of the model routes to 1 of 4"):
        recorded_texts(Trace.open(tmp_path / "trace"), make(num_experts_per_tok=1))
    with Recorder(tmp_path / "deep", layers=[0, 7], num_experts=4, num_experts_per_tok=2):
        pass
    with pytest.raises(UserError, match="routes layer 0; the model's sparse layers are"):
        recorded_texts(Trace.open(tmp_path / "deep"), make())
    with Recorder(tmp_path / "empty", layers=[1, 2], num_experts=4, num_experts_per_tok=2):
        pass
    with pytest.raises(UserError, match="there is no text in it"):
        recorded_texts(Trace.open(tmp_path / "empty"), make())


def test_a_mask_costs_what_the_masked_model_loses() -> None:
    model, mask = make(), {1: Mask((0,)), 2: Mask((1,))}
    done = effect(Engine(model), PROMPTS[0], GREEDY, mask)
    ids = torch.tensor([PROMPTS[0] + done.original.token_ids])
    for loss, edit in ((done.original_loss, None), (done.edited_loss, mask)):
        with torch.no_grad():
            logits = model(ids[:, :-1], edit=edit).logits
        assert loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits[0], ids[0, 1:])), abs=1e-4)
    assert done.edited_loss != done.original_loss and done.tokens == 13
    pairs = list(zip(done.original.token_ids, done.edited.token_ids, strict=False))
    assert all(a == b for a, b in pairs[: done.same_tokens]) and done.same_tokens < 10
