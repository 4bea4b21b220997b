"""A trace of transformers' models is what `watch` sees, with texts, positions and passes."""

import pytest
import torch

from manyhands.errors import UserError
from manyhands.hf import record, watch
from manyhands.trace.part import Phase
from manyhands.trace.recording import Trace

transformers = pytest.importorskip("transformers")


def mixtral():
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=96, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2, bos_token_id=1, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config).eval()


IDS = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
MASK = (IDS > 0).long()


def test_generate(tmp_path):
    model, seen = mixtral(), []
    plain = model.generate(IDS, attention_mask=MASK, max_new_tokens=5, do_sample=False)
    with watch(model, each=lambda routings: seen.append(routings)):
        model.generate(IDS, attention_mask=MASK, max_new_tokens=5, do_sample=False)
    with record(model, tmp_path / "t"):
        made = model.generate(IDS, attention_mask=MASK, max_new_tokens=5, do_sample=False)
    assert torch.equal(made, plain)
    steps = list(Trace.open(tmp_path / "t").steps())
    assert [len(step) for step in steps] == [6, 2, 2, 2, 2]
    assert steps[0].token_ids.tolist() == [5, 6, 7, 8, 9, 10] and set(steps[0].phase) == {Phase.PREFILL}
    assert steps[0].position.tolist() == [0, 1, 0, 1, 2, 3] and steps[0].sequence.tolist() == [0, 0, 1, 1, 1, 1]
    for at, step in enumerate(steps[1:]):
        assert step.token_ids.tolist() == made[:, 4 + at].tolist() and set(step.phase) == {Phase.DECODE}
        assert step.position.tolist() == [2 + at, 4 + at] and step.sequence.tolist() == [0, 1]
    for step, routings in zip(steps, seen, strict=True):
        for layer, routing in routings.items():
            assert step.expert_ids[:, layer].tolist() == routing.expert_ids[routing.token_mask].tolist()


def test_forwards_without_a_cache_are_texts_of_their_own(tmp_path):
    model = mixtral()
    with record(model, tmp_path / "t", phase=Phase.SCORING), torch.no_grad():
        for _ in range(2):
            model(IDS[1:], use_cache=False)
        model.model(inputs_embeds=torch.randn(1, 3, 32))
    steps = list(Trace.open(tmp_path / "t").steps())
    assert [set(step.sequence) for step in steps] == [{0}, {1}, {2}] and steps[2].token_ids.tolist() == [-1] * 3
    assert set(steps[0].phase) == {Phase.SCORING}


def test_what_is_used_is_left_alone(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="not empty"), record(mixtral(), tmp_path):
        pass
    with record(mixtral(), tmp_path / "nothing"):
        pass
    assert not (tmp_path / "nothing").exists()
