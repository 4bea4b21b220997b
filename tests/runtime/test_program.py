"""Decoding as a program, whole or split, against the same model block by block in PyTorch."""

from collections.abc import Sequence

import pytest
import torch

from manyhands.checkpoint.packed import hold_records, records_of
from manyhands.config import ModelConfig, PackedConfig, Packing
from manyhands.config.packing import TRAITS
from manyhands.engine.batch import Batch, Row
from manyhands.engine.caches import Caches
from manyhands.engine.runner import Runner
from manyhands.kernels import native
from manyhands.kernels.native import step
from manyhands.layers.packed_linear import RecordLinear
from manyhands.models import Decoder, init_weights
from manyhands.moe import Experts
from manyhands.moe.packed import RecordExperts
from manyhands.quant import pack_experts, pack_linear

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no native kernels: {native.missing()}")

PLAIN = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
LATENT = {"kind": "mla", "num_attention_heads": 4, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
          "v_head_dim": 16}  # fmt: skip
ROUTER = {"num_experts": 8, "num_experts_per_tok": 3}
MOE = {"router": ROUTER, "moe_intermediate_size": 24}
V3 = {**ROUTER, "score": "sigmoid", "bias": True, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
CASES = {
    "mixtral": {},
    "olmoe": {"attention": {**PLAIN, "qk_norm": "full"}, "moe": {**MOE, "router": {**ROUTER, "norm_topk_prob": False}}},
    "qwen3": {"attention": {**PLAIN, "qk_norm": "head"}},
    "hunyuan": {"attention": {**PLAIN, "qk_norm": "head_after_rope"}, "residual_multiplier": 0.3},
    "gpt-oss": {
        "attention": {
            **PLAIN,
            "sinks": True,
            "attention_bias": True,
            "output_bias": True,
            "sliding_window": 5,
            "layer_types": ("sliding_attention", "full_attention", "sliding_attention"),
        },
        "hidden_act": "swiglu_oai",
        "moe": {**MOE, "expert_bias": True, "router": {**ROUTER, "logit_bias": True}},
    },
    "dots": {
        "attention": {**PLAIN, "qk_norm": "head"},
        "moe": {**MOE, "router": V3, "n_shared_experts": 2, "first_k_dense_replace": 1},
    },
    "qwen2": {
        "attention": {**PLAIN, "attention_bias": True},
        "moe": {
            **MOE,
            "n_shared_experts": 1,
            "shared_expert_gate": True,
            "shared_expert_intermediate_size": 32,
            "router": {**V3, "group_score": "max"},
        },
    },
    "grok": {"attention": {**PLAIN, "attn_logit_softcap": 5.0}, "output_norms": True, "hidden_act": "geglu"},
    "neighbours": {"rope": {"interleave": True, "partial_rotary_factor": 0.5}},
    "dense": {"moe": None},
    "latent": {"attention": LATENT, "rope": {"interleave": True}},
    "latent, low rank, window, biases": {
        "attention": {**LATENT, "q_lora_rank": 32, "sliding_window": 5, "attention_bias": True, "latent_norm_eps": 1e-3}
    },
}
PLAIN_PARTS = {"latent", "latent, low rank, window, biases"}
"""Cases whose up-projection of latents has a claim where it is no record."""


def packed_model(fields: dict, format: str = "float32") -> Decoder:
    """A random model whose linear layers and experts are records of the same numbers; `plain`: as they are."""
    base = {
        "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "max_position_embeddings": 64, "attention": PLAIN, "moe": MOE, "tie_word_embeddings": False,
        "initializer_range": 0.2,
    }  # fmt: skip
    config = ModelConfig(**{**base, **fields})
    model = Decoder(config)
    init_weights(model, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.state_dict().items():
        if "norm" in name or name.endswith(("bias", "sinks")):
            tensor.add_(0.5 * torch.randn(tensor.shape, generator=generator))
    if format == "plain":
        return model.eval()
    modules = dict(model.named_modules())
    packing = Packing(format=format, group_size=32 if TRAITS[format].grouped else 0)
    records = {r.name: r for r in records_of(config, PackedConfig(experts=packing, linear=packing))}
    hold_records(model, records, "auto")
    for record in records.values():
        old, new = modules[record.module], model.get_submodule(record.module)
        if isinstance(new, RecordExperts):
            new.records = pack_experts(old.weights(), format, packing.group_size).records
        else:
            new.record = pack_linear(old.weight, old.bias, format, packing.group_size).record
    return model.eval()


def decoded(model: Decoder, ids: torch.Tensor, counts: Sequence[int], native: bool = True) -> tuple:
    """The first of `ids` [1, S] in steps of so many, by a runner with its program (`native`), or by the modules."""
    runner = Runner(model)
    cache = Caches(len(model.layers)).new() if native else model.new_cache()
    states, routings, first = [], [], 0
    for count in counts:
        new, first = ids[:, first : first + count], first + count
        if native:
            forward = runner.run(Batch([Row(new[0].tolist(), cache)]), states=True)
            states.append(forward.states[None])
            routings.append(forward.routed.layers)
        else:
            with torch.inference_mode():
                hidden = model.hidden(new, None, cache)
            states.append(hidden.states)
            routings.append(hidden.routings)
    return torch.cat(states, 1), routings, runner._program


ONE_BY_ONE, CHUNKS = [1] * 12, [7, 1, 4, 1, 1, 6]
"""Of a prompt and of what follows: tokens of each step."""


@pytest.mark.parametrize("format", ["float32", "plain"])
@pytest.mark.parametrize("counts", [ONE_BY_ONE, CHUNKS, [20]], ids=["one by one", "chunks", "whole"])
@pytest.mark.parametrize("name", CASES)
def test_a_program_is_what_the_blocks_do(name: str, counts: list[int], format: str, monkeypatch) -> None:
    model = packed_model(CASES[name], format)
    ids = torch.randint(0, 50, (1, 20), generator=torch.Generator().manual_seed(2))
    states, routings, program = decoded(model, ids, counts)
    assert program.whole and program.native, program
    monkeypatch.setattr(step, "direct", lambda x: False)
    for module in model.modules():
        if isinstance(module, Experts | RecordLinear | RecordExperts):
            module.implementation = "eager"
    expected, expected_routings, _ = decoded(model, ids, counts, native=False)
    torch.testing.assert_close(states, expected, atol=3e-5, rtol=3e-5)
    for found, right in zip(routings, expected_routings, strict=True):
        assert found.keys() == right.keys()
        for layer, r in found.items():
            for field in ("expert_ids", "weights", "scores", "logits", "kept", "token_mask"):
                torch.testing.assert_close(getattr(r, field), getattr(right[layer], field), atol=3e-5, rtol=3e-5)


MLA = {"kind": "mla", "num_attention_heads": 4, "kv_lora_rank": 32, "qk_nope_head_dim": 12, "qk_rope_head_dim": 16,
       "v_head_dim": 10}  # fmt: skip


def test_latent_attention_without_a_claim_is_called_and_the_rest_is_native(monkeypatch) -> None:
    model = packed_model({"attention": MLA, "rope": {"interleave": True}})
    ids = torch.randint(0, 50, (1, 20), generator=torch.Generator().manual_seed(2))
    states, routings, program = decoded(model, ids, CHUNKS)
    why = "a latent of 32 and heads of 12 + 16 and 10, not all multiples of 16"
    assert repr(program) == f"11 of 14 parts native; self_attn of layers 0–2 called as modules ({why})"
    monkeypatch.setattr(step, "direct", lambda x: False)
    expected, right, _ = decoded(model, ids, CHUNKS, native=False)
    torch.testing.assert_close(states, expected, atol=3e-5, rtol=3e-5)
    assert [list(r) for r in routings] == [list(r) for r in right] == [[0, 1, 2]] * len(CHUNKS)


class Doubled(torch.nn.Module):
    """A wrapper, as an adapter is."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *arguments):
        y = self.inner(*arguments)
        return (2 * y[0], *y[1:]) if isinstance(y, tuple) else 2 * y


def hook(model: Decoder) -> None:
    model.layers[1].mlp.experts.register_forward_hook(lambda m, a, y: 2 * y)


def block_hook(model: Decoder) -> None:
    model.layers[1].register_forward_hook(lambda m, a, y: (2 * y[0], *y[1:]))


def adapter(model: Decoder) -> None:
    model.layers[0].self_attn.q_proj = Doubled(model.layers[0].self_attn.q_proj)


def bank(model: Decoder) -> None:
    model.layers[2].mlp.experts = Doubled(model.layers[2].mlp.experts)


def last_norm(model: Decoder) -> None:
    model.norm = Doubled(model.norm)


def head(model: Decoder) -> None:
    model.lm_head = Doubled(model.lm_head)


SPLITS = {
    "hook": (hook, {("mlp", 1)}),
    "block hook": (block_hook, {("block", 1)}),
    "adapter": (adapter, {("self_attn", 0)}),
    "bank": (bank, {("mlp", 2)}),
    "last norm": (last_norm, {("norm", None)}),
    "head": (head, {("head", None)}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SPLITS)
def test_a_part_without_a_claim_splits_the_program(name: str, dtype: torch.dtype) -> None:
    model = packed_model(CASES["qwen3"], "plain").to(dtype)
    split, called = SPLITS[name]
    split(model)
    ids = torch.arange(20)[None]
    states, routings, program = decoded(model, ids, CHUNKS)
    assert {(part.name, part.layer) for part in program.parts if part.why} == called
    expected, right, _ = decoded(model, ids, CHUNKS, native=False)
    if dtype == torch.float32:
        torch.testing.assert_close(states, expected, atol=5e-5, rtol=5e-5)
    assert (states - expected).float().norm() < 0.05 * expected.float().norm()  # modules round in between
    assert [list(r) for r in routings] == [list(r) for r in right]


def test_who_listens_is_heard() -> None:
    model, heard = packed_model({}), []
    model.layers[1].mlp.register_forward_hook(lambda *_: heard.append(1))
    decoded(model, torch.zeros(1, 6, dtype=torch.long), [4, 1, 1])
    assert len(heard) == 3


def test_the_same_numbers_whatever_the_number_of_threads() -> None:
    model, ids = packed_model(CASES["olmoe"], "bf16"), torch.arange(30)[None]
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(decoded(model, ids, [20, *[1] * 10])[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.parametrize("format", ["float32", "plain"])
@pytest.mark.parametrize("name", CASES)
def test_a_ragged_batch_is_what_each_row_is_alone(name: str, format: str) -> None:
    """Prompts, chunks and single tokens in one step."""
    model, ids = packed_model(CASES[name], format), torch.randint(0, 50, (3, 40)).tolist()
    memory, runner, single = Caches(3), Runner(model), Runner(model)
    rows, alone, done = [memory.new() for _ in range(3)], [memory.new() for _ in range(3)], [0, 0, 0]
    for counts in ((12, 3, 1), (1, 1, 1), (1, 20, 5), (2, 1, 1), (1, 1, 1)):
        new = [ids[b][n : n + count] for b, (n, count) in enumerate(zip(done, counts, strict=True))]
        found = runner.run(Batch([Row(ids, cache) for ids, cache in zip(new, rows, strict=True)]), states=True)
        right = [single.run(Batch([Row(ids, cache)]), states=True) for ids, cache in zip(new, alone, strict=True)]
        torch.testing.assert_close(found.states, torch.cat([r.states for r in right]), atol=3e-5, rtol=3e-5)
        torch.testing.assert_close(found.logits, torch.cat([r.logits for r in right]), atol=3e-5, rtol=3e-5)
        for layer, routing in found.routed.layers.items():
            assert torch.equal(routing.expert_ids, torch.cat([r.routed.layers[layer].expert_ids for r in right]))
        done = [n + count for n, count in zip(done, counts, strict=True)]
