"""The decoder as a whole: layer patterns, compute precision, what it returns."""

import pytest
import torch

from manyhands.config import ModelConfig, MoEConfig, RouterConfig
from manyhands.errors import ConfigError
from manyhands.models import Decoder
from manyhands.moe import MoELayer

from .tiny_models import ATTENTION, gradients, ids, tiny


def test_layer_pattern_is_that_of_the_config() -> None:
    moe = MoEConfig(router=RouterConfig(num_experts=4), first_k_dense_replace=1, decoder_sparse_step=2)
    model = tiny(moe=moe, num_hidden_layers=6)
    sparse = [i for i, block in enumerate(model.layers) if isinstance(block.mlp, MoELayer)]
    assert sparse == [1, 3, 5] == sorted(model(ids()).routings)


def test_a_dense_model_has_no_routings() -> None:
    out = tiny(moe=None)(ids())
    assert out.routings == {} and out.logits.shape == (2, 12, 64) and out.cache is None


@pytest.mark.parametrize("attention", list(ATTENTION))
def test_bf16_compute_from_float32_masters(attention: str) -> None:
    """Logits close to float32's; weights and their gradients stay float32; routing stays float32."""
    model, x = tiny(attention), ids()
    exact = model(x).logits
    out = model(x, dtype=torch.bfloat16)
    assert out.logits.dtype == torch.bfloat16
    assert {r.scores.dtype for r in out.routings.values()} == {torch.float32}
    correlation = torch.corrcoef(torch.stack((out.logits.float().flatten(), exact.flatten())))[0, 1]
    assert correlation > 0.98
    out.logits.float().square().mean().backward()
    grads = gradients(model)
    assert {g.dtype for g in grads.values()} == {torch.float32}
    assert len(grads) == len(list(model.parameters())) and all(torch.isfinite(g).all() for g in grads.values())


def test_every_parameter_has_a_gradient() -> None:
    for attention in ATTENTION:
        model = tiny(attention)
        model(ids()).logits.square().mean().backward()
        missing = [name for name, p in model.named_parameters() if p.grad is None]
        assert missing == []


def test_mha_is_gqa_with_its_keys_repeated() -> None:
    gqa, mha = tiny("gqa").eval(), tiny("mha").eval()
    weights = gqa.state_dict()
    for name, t in weights.items():
        if "k_proj" in name or "v_proj" in name:
            weights[name] = t.view(2, 8, 32).repeat_interleave(2, 0).reshape(32, 32)
    mha.load_state_dict(weights)
    torch.testing.assert_close(mha(ids()).logits, gqa(ids()).logits, rtol=1e-5, atol=1e-5)


def test_full_mask_is_no_mask() -> None:
    for attention in ("gqa", "mla", "window"):
        model, x = tiny(attention).eval(), ids()
        torch.testing.assert_close(model(x, torch.ones_like(x)).logits, model(x).logits, rtol=1e-5, atol=1e-5)


def test_sequences_of_a_batch_are_independent() -> None:
    model, x = tiny().eval(), ids(B=3)
    together = model(x).logits
    for b in range(3):
        torch.testing.assert_close(model(x[b : b + 1]).logits[0], together[b], rtol=1e-5, atol=1e-5)


def test_two_forwards_are_bit_equal() -> None:
    model, x = tiny(), ids()
    one, two = model(x), model(x)
    assert torch.equal(one.logits, two.logits)


def test_unknown_backend_is_refused_before_anything_is_built() -> None:
    with pytest.raises(ConfigError, match="did you mean 'eager'"):
        Decoder(ModelConfig(moe=MoEConfig()), experts_implementation="eagre")


def test_the_model_can_be_built_on_meta() -> None:
    """DeepSeek-sized descriptions must be countable without memory."""
    with torch.device("meta"):
        model = Decoder(ModelConfig(hidden_size=4096, moe=MoEConfig(router=RouterConfig(num_experts=256, bias=True))))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model.layers[0].mlp.experts.gate_up_proj.shape == (256, 256, 4096)
