"""The decoder against transformers' own models, weights copied by name: logits, expert choices, decoding."""

import logging
from typing import Any

import pytest
import torch

from manyhands.config import AttentionConfig, ModelConfig, MoEConfig, RopeConfig, RouterConfig
from manyhands.models import Decoder

transformers = pytest.importorskip("transformers")

IDS = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(0))
COMMON: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "attn_implementation": "eager",
}  # fmt: skip
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2}
OURS: dict[str, Any] = {"vocab_size": 96, "hidden_size": 32, "max_position_embeddings": 64, "rms_norm_eps": 1e-5}


def qwen3_moe() -> tuple[Any, ModelConfig]:
    theirs = transformers.Qwen3MoeConfig(
        **COMMON, **EXPERTS, num_key_value_heads=2, head_dim=12, intermediate_size=40, moe_intermediate_size=16,
        norm_topk_prob=True, decoder_sparse_step=2, rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )  # fmt: skip
    ours = ModelConfig(
        **OURS, num_hidden_layers=3, intermediate_size=40, rope=RopeConfig(rope_theta=500.0),
        attention=AttentionConfig(num_attention_heads=4, num_key_value_heads=2, head_dim=12, qk_norm="head"),
        moe=MoEConfig(router=RouterConfig(**EXPERTS), moe_intermediate_size=16, decoder_sparse_step=2),
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(theirs), ours


def olmoe() -> tuple[Any, ModelConfig]:
    theirs = transformers.OlmoeConfig(
        **COMMON, **EXPERTS, num_key_value_heads=2, intermediate_size=16, norm_topk_prob=False,
        rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}, pad_token_id=None,
    )  # fmt: skip
    ours = ModelConfig(
        **OURS, num_hidden_layers=3, rope=RopeConfig(rope_type="linear", factor=4.0),
        attention=AttentionConfig(num_attention_heads=4, num_key_value_heads=2, head_dim=8, qk_norm="full"),
        moe=MoEConfig(router=RouterConfig(**EXPERTS, norm_topk_prob=False), moe_intermediate_size=16),
    )  # fmt: skip
    return transformers.OlmoeForCausalLM(theirs), ours


def mixtral() -> tuple[Any, ModelConfig]:
    theirs = transformers.MixtralConfig(
        **COMMON, num_local_experts=8, num_experts_per_tok=2, num_key_value_heads=1, head_dim=8,
        intermediate_size=16, sliding_window=7, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
    ours = ModelConfig(
        **OURS, num_hidden_layers=3, rope=RopeConfig(rope_theta=1e6),
        attention=AttentionConfig(num_attention_heads=4, num_key_value_heads=1, head_dim=8, sliding_window=7),
        moe=MoEConfig(router=RouterConfig(**EXPERTS), moe_intermediate_size=16),
    )  # fmt: skip
    return transformers.MixtralForCausalLM(theirs), ours


def deepseek_v3(q_lora_rank: int | None = 24) -> tuple[Any, ModelConfig]:
    yarn = {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
        "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.7,
    }  # fmt: skip
    theirs = transformers.DeepseekV3Config(
        **COMMON, num_key_value_heads=4, intermediate_size=40, moe_intermediate_size=16, n_routed_experts=8,
        n_shared_experts=2, num_experts_per_tok=3, n_group=4, topk_group=2, routed_scaling_factor=2.5,
        first_k_dense_replace=1, q_lora_rank=q_lora_rank, kv_lora_rank=20, qk_rope_head_dim=8, qk_nope_head_dim=12,
        v_head_dim=10, norm_topk_prob=True, rope_parameters=yarn, rope_interleave=True,
    )  # fmt: skip
    router = RouterConfig(
        num_experts=8, num_experts_per_tok=3, score="sigmoid", bias=True, n_group=4, topk_group=2,
        routed_scaling_factor=2.5,
    )  # fmt: skip
    ours = ModelConfig(
        **OURS, num_hidden_layers=3, intermediate_size=40, rope=RopeConfig(**yarn, interleave=True),
        attention=AttentionConfig(
            kind="mla", num_attention_heads=4, q_lora_rank=q_lora_rank, kv_lora_rank=20, qk_rope_head_dim=8,
            qk_nope_head_dim=12, v_head_dim=10,
        ),
        moe=MoEConfig(router=router, moe_intermediate_size=16, n_shared_experts=2, first_k_dense_replace=1),
    )  # fmt: skip
    return transformers.DeepseekV3ForCausalLM(theirs), ours


FAMILIES = {
    "qwen3_moe": qwen3_moe,
    "olmoe": olmoe,
    "mixtral": mixtral,
    "deepseek_v3": deepseek_v3,
    "deepseek_v3_full_rank_q": lambda: deepseek_v3(None),
}


def our_name(name: str) -> str:
    """transformers' parameter name as ours: only the router is called otherwise."""
    return name.removeprefix("model.").replace("mlp.gate.", "mlp.router.")


@pytest.fixture(scope="module", params=list(FAMILIES))
def pair(request: pytest.FixtureRequest) -> tuple[Any, Decoder]:
    """A transformers model and ours with the same random weights, biases and norms away from 0 and 1."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    theirs, config = FAMILIES[request.param]()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, t in theirs.state_dict().items():
            if "norm" in name:
                t.uniform_(0.5, 1.5, generator=g)
            elif "e_score_correction_bias" in name:
                t.uniform_(-0.2, 0.2, generator=g)
            else:
                t.normal_(0.0, 0.5 if "embed" in name else t.shape[-1] ** -0.5, generator=g)
    ours = Decoder(config)
    ours.load_state_dict({our_name(name): t.float().clone() for name, t in theirs.state_dict().items()}, strict=True)
    return theirs.float().eval(), ours.eval()


def expert_choices(theirs: Any, **inputs: torch.Tensor) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """Logits, and by layer the experts [T, K] its router chose."""
    chosen: dict[int, torch.Tensor] = {}
    handles = [
        layer.mlp.gate.register_forward_hook(lambda _m, _i, out, n=n: chosen.__setitem__(n, out[2]))
        for n, layer in enumerate(theirs.model.layers)
        if hasattr(layer.mlp, "gate")
    ]
    with torch.no_grad():
        logits = theirs(**inputs, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits, chosen


def assert_same_experts(routings: dict, chosen: dict[int, torch.Tensor], real: torch.Tensor | None = None) -> None:
    assert sorted(routings) == sorted(chosen)
    for layer, ids in chosen.items():
        ours = routings[layer].expert_ids
        rows = slice(None) if real is None else real.flatten()
        assert torch.equal(ours[rows].sort(-1).values, ids.view_as(ours)[rows].sort(-1).values), f"layer {layer}"


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_logits_and_experts(pair: tuple[Any, Decoder], implementation: str) -> None:
    theirs, ours = pair
    for layer in ours.config.sparse_layers:
        ours.layers[layer].mlp.experts.implementation = implementation
    logits, chosen = expert_choices(theirs, input_ids=IDS)
    with torch.no_grad():
        out = ours(IDS)
    assert logits.std() > 0.1, "a comparison of zeros would prove nothing"
    torch.testing.assert_close(out.logits, logits, rtol=0, atol=1e-4)
    assert_same_experts(out.routings, chosen)


def test_left_padding(pair: tuple[Any, Decoder]) -> None:
    theirs, ours = pair
    mask = torch.ones_like(IDS)
    mask[1, :9] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits, chosen = expert_choices(theirs, input_ids=IDS, attention_mask=mask, position_ids=positions)
    with torch.no_grad():
        out = ours(IDS, mask)
    real = mask.bool()
    torch.testing.assert_close(out.logits[real], logits[real], rtol=0, atol=1e-4)
    assert_same_experts(out.routings, chosen, real)


def test_step_by_step(pair: tuple[Any, Decoder]) -> None:
    theirs, ours = pair
    with torch.no_grad():
        expected = theirs(input_ids=IDS, use_cache=False).logits
        cache = ours.new_cache()
        steps = [ours(IDS[:, :10], cache=cache).logits]
        steps += [ours(IDS[:, i : i + 1], cache=cache).logits for i in range(10, 24)]
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=0, atol=1e-4)


def test_gradients(pair: tuple[Any, Decoder]) -> None:
    """Every parameter's gradient of the language-model loss."""
    theirs, ours = pair
    targets = IDS.roll(-1, 1).flatten()
    for model in (theirs, ours):
        model.zero_grad()
        logits = model(IDS).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets).backward()
    mine = dict(ours.named_parameters())
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(
            mine[our_name(name)].grad, p.grad, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
