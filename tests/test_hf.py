"""transformers' routed families: what `watch` reports is what they did; our expert backends compute what theirs do."""

import copy
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from manyhands.config import BalanceConfig
from manyhands.errors import ConfigError
from manyhands.hf import expert_weights, register_experts, use_experts, watch
from manyhands.kernels import backend_names, run_experts
from manyhands.moe import Routing, balance_objective

transformers = pytest.importorskip("transformers")

IDS = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, :5] = 0
COMMON: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 64, "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None, "intermediate_size": 40,
}  # fmt: skip
LOCAL = {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 16}
NAMED = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SHARED = NAMED | {"shared_expert_intermediate_size": 24}
GROUPS: dict[str, Any] = {
    "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16, "n_group": 4, "topk_group": 2,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "norm_topk_prob": True,
}  # fmt: skip
MLA: dict[str, Any] = GROUPS | {
    "q_lora_rank": 24, "kv_lora_rank": 20, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 10,
    "num_key_value_heads": 4,
}  # fmt: skip
LONGCAT = {"num_layers": 2, "ffn_hidden_size": 40, "expert_ffn_hidden_size": 16, "moe_topk": 3, "zero_expert_num": 2}
DBRX = {"hidden_size": 32, "ffn_hidden_size": 16, "moe_num_experts": 8, "moe_top_k": 2, "ffn_act_fn": {"name": "silu"}}

CONFIGS = {"Llama4": "Llama4TextConfig", "Gemma4": "Gemma4TextConfig"}

# class: (settings, score function, sparse layers, activation of ours or None where we have none)
FAMILIES: dict[str, tuple[dict[str, Any], str, list[int], str | None]] = {
    "Mixtral": (LOCAL, "softmax", [0, 1, 2], "swiglu"),
    "Qwen2Moe": (SHARED, "softmax", [0, 1, 2], "swiglu"),
    "Qwen3Moe": (NAMED | {"norm_topk_prob": True, "decoder_sparse_step": 2}, "softmax", [1], "swiglu"),
    "Olmoe": (NAMED | {"intermediate_size": 16}, "softmax", [0, 1, 2], "swiglu"),
    "DeepseekV2": (MLA | {"topk_method": "group_limited_greedy"}, "softmax", [1, 2], "swiglu"),
    "DeepseekV3": (MLA, "sigmoid", [1, 2], "swiglu"),
    "DeepseekV4": (NAMED | {"n_routed_experts": 8}, "softplus", [0, 1, 2], None),
    "GptOss": (LOCAL, "softmax", [0, 1, 2], "swiglu_oai"),
    "Glm4Moe": (GROUPS, "sigmoid", [1, 2], "swiglu"),
    "Dots1": (GROUPS, "sigmoid", [1, 2], "swiglu"),
    "GraniteMoe": (LOCAL | {"hidden_act": "gelu"}, "softmax", [0, 1, 2], "geglu"),
    "Phimoe": (LOCAL, "softmax", [0, 1, 2], "swiglu"),
    "Ernie4_5_Moe": (
        {"moe_k": 2, "moe_num_experts": 8, "moe_intermediate_size": 16, "moe_num_shared_experts": 1},
        "softmax", [1, 2], "swiglu",
    ),
    "MiniMaxM2": (LOCAL, "sigmoid", [0, 1, 2], "swiglu"),
    "HunYuanMoEV1": ({"num_experts": 8, "moe_topk": 2}, "softmax", [0, 1, 2], "swiglu"),
    "Jamba": (
        {"num_experts": 8, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
        "softmax", [1], "swiglu",
    ),
    "Afmoe": (NAMED | {"num_dense_layers": 1}, "sigmoid", [1, 2], "swiglu"),
    "Cohere2Moe": (NAMED | {"num_shared_experts": 1, "expert_selection_fn": "sigmoid"}, "sigmoid", [0, 1, 2], "swiglu"),
    "Gemma4": (
        NAMED | {
            "enable_moe_block": True, "top_k_experts": 2, "hidden_size_per_layer_input": 0, "global_head_dim": 8,
            "vocab_size_per_layer_input": 96, "layer_types": ["sliding_attention", *["full_attention"] * 2],
        },
        "softmax", [0, 1, 2], "geglu_tanh",
    ),
    "Qwen3Next": (
        SHARED | {
            "linear_num_key_heads": 2, "linear_num_value_heads": 4,
            "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        },
        "softmax", [0, 1, 2], "swiglu",
    ),
    "MiniMax": (LOCAL, "softmax", [0, 1, 2], "swiglu"),
    "Lfm2Moe": (
        NAMED | {"num_dense_layers": 1, "layer_types": ["conv", "full_attention", "full_attention"]},
        "sigmoid", [1, 2], "swiglu",
    ),
    "Kolibri1": (SHARED, "sigmoid", [0, 1, 2], "swiglu"),
    "Mellum": (NAMED, "softmax", [0, 1, 2], "swiglu"),
    "NemotronH": (
        {
            "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
            "moe_shared_expert_intermediate_size": 16, "layers_block_type": ["attention", "moe", "moe"],
        },
        "sigmoid", [1, 2], None,
    ),
    "LongcatFlash": (MLA | LONGCAT | {"n_routed_experts": 6}, "softmax", [0], None),
    "Dbrx": (
        {
            "d_model": 32, "n_heads": 4, "ffn_config": DBRX,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        },
        "softmax", [0, 1, 2], None,
    ),
}  # fmt: skip
OURS = [name for name, family in FAMILIES.items() if family[3]]


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.getLogger("transformers").setLevel(logging.ERROR)


def build(name: str, settings: dict[str, Any], head: str = "ForCausalLM", **more: Any) -> Any:
    """A random float32 model; routers with large logits and two equal rows, biases away from 0."""
    config = getattr(transformers, CONFIGS.get(name, name + "Config"))(**(COMMON | settings | more))
    config._experts_implementation = "eager"
    model = getattr(transformers, name + head)(config).float().eval()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, t in model.state_dict().items():
            if not t.is_floating_point():
                continue
            if "norm" in key:
                t.uniform_(0.5, 1.5, generator=g)
            elif t.dim() < 2:
                t.uniform_(-0.2, 0.2, generator=g)
            else:
                t.normal_(0.0, 0.5 if "embed" in key else t.shape[-1] ** -0.5, generator=g)
            if t.dim() == 2 and ("gate." in key or "router." in key) and 6 <= t.shape[0] <= 9:
                t *= 4.0
                t[1] = t[0]
    return model


def family(name: str, **more: Any) -> Any:
    return build(name, FAMILIES[name][0], **more)


class Calls:
    """Every experts module's arguments and output, and its router's input, by layer in order."""

    def __init__(self, model: nn.Module) -> None:
        self.experts: list[tuple[nn.Module, tuple[Tensor, ...], Tensor]] = []
        self.routers: list[tuple[nn.Module, Tensor]] = []
        self.scores: list[Tensor] = []
        for block in list(model.modules()):
            experts = block._modules.get("experts")
            router = block._modules.get("router") or block._modules.get("gate")
            if experts is not None and router is not None:
                experts.register_forward_hook(lambda m, args, out: self.experts.append((m, args, out)))
                router.register_forward_pre_hook(lambda m, args: self.routers.append((m, args[0])))
                router.register_forward_hook(lambda m, args, out: self.scores.append(out[0]))


def forward(model: nn.Module, **more: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS, attention_mask=MASK, use_cache=False, **more)[0]


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("name", FAMILIES)
def test_watch_reports_what_was_done(name: str) -> None:
    _, score, layers, activation = FAMILIES[name]
    model = family(name)
    expected = forward(model)
    before = hooks(model)
    with watch(model) as seen:
        calls = Calls(model)
        assert torch.equal(forward(model), expected)
    assert hooks(model) == before + 3 * len(layers)  # the three of Calls
    assert list(seen.routings) == layers and seen.forwards == 1 and expected.std() > 0.01
    for layer, (experts, (x, ids, weights), y), (router, router_x) in zip(
        layers, calls.experts, calls.routers, strict=True
    ):
        r = seen.routings[layer]
        assert (
            r.expert_ids.dtype == torch.int64 and r.weights.dtype == r.scores.dtype == r.logits.dtype == torch.float32
        )
        assert torch.equal(r.token_mask, MASK.flatten().bool()) and r.kept.all()
        order = ids.argsort(1)
        mine = r.expert_ids.argsort(1)
        assert torch.equal(ids.gather(1, order), r.expert_ids.gather(1, mine))
        assert torch.equal(weights.gather(1, order).float(), r.weights.gather(1, mine))
        functions = {
            "softmax": lambda z: z.softmax(-1),
            "sigmoid": torch.sigmoid,
            "softplus": lambda z: torch.log1p(z.exp()).sqrt(),
        }
        torch.testing.assert_close(r.scores, functions[score](r.logits), rtol=1e-4, atol=1e-6)
        chosen = r.scores.gather(1, r.expert_ids)
        assert (chosen.diff(dim=1) <= 0).all()
        if name == "Gemma4":  # returns its scores where others return logits
            torch.testing.assert_close(r.scores, calls.scores[layer], rtol=0, atol=1e-6)
            assert r.logits.min() < 0
        if isinstance(getattr(router, "weight", None), Tensor):
            bias = getattr(router, "bias", None)
            logits = nn.functional.linear(router_x.flatten(0, -2).float(), router.weight, bias)
            torch.testing.assert_close(r.logits, logits, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            again = experts.forward(x, r.expert_ids, r.weights)
            torch.testing.assert_close(again, y, rtol=0, atol=1e-5)
            if activation:
                w = expert_weights(experts)
                assert w.activation == activation
                ours = run_experts("eager", x.flatten(0, -2), r.expert_ids, r.weights, r.kept, w)
                torch.testing.assert_close(ours, y.view_as(ours), rtol=0, atol=1e-5)


def proportional(r: Routing) -> Tensor:
    """Per token, the largest over the smallest ratio of a weight to its expert's score."""
    ratio = r.weights / r.scores.gather(1, r.expert_ids)
    return ratio.amax(1) / ratio.amin(1)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("Phimoe", "Gemma4")])
def test_weights_follow_the_scores(name: str) -> None:
    """The score function is the right one: weights are chosen scores times a factor. SparseMixer and Gemma's
    per-expert scale are not of that kind."""
    model = family(name)
    with watch(model) as seen:
        forward(model)
    for r in seen.routings.values():
        torch.testing.assert_close(proportional(r), torch.ones(len(r.weights)), rtol=1e-4, atol=0)


def gradients(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    logits = model(IDS, attention_mask=MASK, use_cache=False)[0]
    nn.functional.cross_entropy(logits.flatten(0, 1), IDS.roll(-1, 1).flatten()).backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_as_near(ours: Tensor, theirs: Tensor, exact: Tensor, what: str) -> None:
    """Ours is as near to float64 as theirs, within a factor of 8; 1e-6 of the scale where theirs is exact by luck.

    How far float32 is from float64 depends on the processor's products, so no fixed distance holds everywhere.
    """
    allowed = 8 * (theirs - exact).abs().max() + 1e-6 * (1 + exact.abs().max())
    assert (ours - exact).abs().max() <= allowed, f"{what}: {(ours - exact).abs().max():.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("name", OURS)
def test_experts_equal_theirs(name: str) -> None:
    """Logits and every parameter's gradient, against transformers' eager loop."""
    model = family(name)
    with torch.no_grad():
        for key, t in model.named_parameters():  # no ties here: rounding before the router may break them
            if t.dim() == 2 and ("gate." in key or "router." in key) and 6 <= t.shape[0] <= 9:
                t[1] *= -0.7
    logits, grads = gradients(model)
    exact, exactly = gradients(copy.deepcopy(model).double())
    use_experts(model)
    assert all(m.config._experts_implementation == "manyhands" for m in model.modules() if hasattr(m, "is_transposed"))
    ours, mine = gradients(model)
    assert_as_near(ours, logits, exact, "logits")
    for key, grad in grads.items():
        assert_as_near(mine[key], grad, exactly[key], key)
    model.set_experts_implementation("eager")
    assert torch.equal(gradients(model)[0], logits)


@pytest.mark.parametrize("backend", ["manyhands", "manyhands:eager", "manyhands:grouped_mm"])
@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
@pytest.mark.parametrize("case", ["one expert takes all", "zero weights", "large values"])
def test_hostile_expert_calls(name: str, backend: str, case: str) -> None:
    model = family(name)
    experts = next(m for m in model.modules() if hasattr(m, "is_transposed"))
    use_experts(model, backend)
    g = torch.Generator().manual_seed(3)
    x = torch.randn(9, 32, generator=g) * (100.0 if case == "large values" else 1.0)
    ids = torch.rand(9, 8, generator=g).argsort(1)[:, :2] if case != "one expert takes all" else torch.full((9, 1), 5)
    weights = torch.rand(ids.shape, generator=g) * (case != "zero weights")
    results = []
    for implementation in (backend, "eager"):
        model.set_experts_implementation(implementation)
        model.zero_grad()
        inputs = x.clone().requires_grad_(), weights.clone().requires_grad_()
        y = experts(inputs[0], ids, inputs[1])
        y.square().sum().backward()
        grads = [torch.zeros(()) if p.grad is None else p.grad for p in experts.parameters()]
        results.append([y, *(t.grad for t in inputs), *grads])
    for ours, theirs in zip(*results, strict=True):
        scale = 1.0 + theirs.detach().abs().max()
        torch.testing.assert_close(ours / scale, (theirs / scale).expand_as(ours), rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["manyhands:eager", "manyhands:grouped_mm"])
def test_no_token(backend: str) -> None:
    model = family("GptOss")
    use_experts(model, backend)
    y = model.model.layers[0].mlp.experts(torch.zeros(0, 32), torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2))
    assert y.shape == (0, 32)
    y.sum().backward()


@pytest.mark.parametrize("backend", ["manyhands:eager", "manyhands:grouped_mm"])
def test_sentinels_are_not_kept(backend: str) -> None:
    """Expert parallelism marks another rank's experts with the id E: no output, and no gradient for its weight."""
    model = family("Mixtral")
    experts = model.model.layers[0].mlp.experts
    ids = torch.tensor([[0, 8], [8, 8], [3, 1]])
    weights = torch.full((3, 2), 0.5, requires_grad=True)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    expected = experts(x, ids, weights)
    use_experts(model, backend)
    y = experts(x, ids, weights)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-6)
    y.sum().backward()
    assert torch.equal(y[1], torch.zeros(32)) and weights.grad is not None and weights.grad[ids == 8].eq(0).all()


def test_generate_is_watched_forward_by_forward() -> None:
    model = family("DeepseekV3")
    arguments = {"attention_mask": MASK, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    expected = model.generate(IDS, **arguments)
    history: list[dict[int, Routing]] = []
    with watch(model, each=history.append) as seen:
        assert torch.equal(model.generate(IDS, **arguments), expected)
    assert seen.forwards == len(history) == 4 and seen.routings is history[-1]
    assert [len(step[1].expert_ids) for step in history] == [24, 2, 2, 2]
    assert torch.equal(history[0][2].token_mask, MASK.flatten().bool()) and history[1][2].token_mask.all()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_balance_loss_of_ours_trains_their_router(checkpointing: bool) -> None:
    def train(model: Any) -> tuple[dict[int, Routing], dict[str, Tensor]]:
        model.train()
        with watch(model) as seen:
            loss = model(IDS, attention_mask=MASK, labels=IDS, use_cache=False).loss
            routings = seen.routings
            loss = loss + balance_objective(routings, BalanceConfig(aux_loss_coef=1.0, aux_scope="micro"), 2)[0]
            loss.backward()
        assert seen.routings is routings and seen.forwards == 1, "the recomputation is not a forward"
        return routings, {n: p.grad for n, p in model.named_parameters()}

    model = family("Qwen3Moe")
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    _, grads = train(model)
    _, expected = train(family("Qwen3Moe"))
    for key, grad in expected.items():
        torch.testing.assert_close(grads[key], grad, rtol=1e-5, atol=1e-7)
    _, plain = gradients(family("Qwen3Moe").train())
    router = "model.layers.1.mlp.gate.weight"
    assert not torch.allclose(grads[router], plain[router], rtol=1e-2)


def test_detach_frees_the_graph() -> None:
    model = family("Mixtral")
    for detach in (False, True):
        with watch(model, detach=detach) as seen:
            model(IDS)
        r = seen.routings[0]
        assert [t.requires_grad for t in (r.weights, r.scores, r.logits)] == [not detach] * 3


def test_bfloat16_is_reported_in_float32() -> None:
    model = family("Mixtral").bfloat16()
    with watch(model) as seen:
        calls = Calls(model)
        forward(model)
    for (_, (_, _, weights), _), r in zip(calls.experts, seen.routings.values(), strict=True):
        assert r.weights.dtype == r.scores.dtype == torch.float32
        assert torch.equal(r.weights.sort().values, weights.float().sort().values)


class Wrapper(nn.Module):
    """What PEFT does to a model: unnamed arguments passed on."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)


class ParameterWrapper(nn.Module):
    """What PEFT does to experts whose parameters it trains."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_layer(*args, **kwargs)


def test_wrapped_models_and_parts() -> None:
    model = family("Qwen2Moe")
    expected = forward(model)
    for layer in model.model.layers:
        layer.mlp.experts = ParameterWrapper(ParameterWrapper(layer.mlp.experts))
    wrapped = Wrapper(model)
    for watched in (wrapped, model, model.model):
        with watch(watched) as seen, torch.no_grad():
            assert torch.equal(wrapped(IDS, MASK)[0], expected)
        assert list(seen.routings) == [0, 1, 2]
        assert torch.equal(seen.routings[0].token_mask, MASK.flatten().bool()), "given by position"
    use_experts(model)
    torch.testing.assert_close(forward(model), expected, rtol=0, atol=1e-5)


def test_the_text_part_of_a_vision_model() -> None:
    text = COMMON | NAMED | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}}
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32}
    vision |= {"deepstack_visual_indexes": [], "num_position_embeddings": 16}
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    model = transformers.Qwen3VLMoeForConditionalGeneration(config).eval()
    model.set_experts_implementation("eager")
    expected = forward(model)
    with watch(model) as seen:
        assert torch.equal(forward(model), expected)
    assert list(seen.routings) == [0, 1, 2]
    assert torch.equal(seen.routings[2].token_mask, MASK.flatten().bool())
    use_experts(model)
    torch.testing.assert_close(forward(model), expected, rtol=0, atol=1e-5)


def test_watching_twice_and_failing_forwards() -> None:
    model = family("Mixtral")

    def fail(*_: Any) -> None:
        raise RuntimeError("planted")

    with watch(model) as outer, watch(model) as inner:
        forward(model)
        assert torch.equal(outer.routings[1].expert_ids, inner.routings[1].expert_ids)
        first = outer.routings
        for place in (model.model.layers[1].mlp.gate, model.model.layers[1].mlp.experts, model.model.layers[2]):
            handle = place.register_forward_hook(fail)
            with pytest.raises(RuntimeError, match="planted"):
                forward(model)
            handle.remove()
        assert torch._C._len_torch_function_stack() == 0  # type: ignore[attr-defined]
        assert outer.forwards == 1 and outer.routings is first
        forward(model)
        assert outer.forwards == inner.forwards == 2 and list(outer.routings) == [0, 1, 2]
    with pytest.raises(ValueError, match="mine"), watch(model):
        raise ValueError("mine")
    assert hooks(model) == 0


def test_masks() -> None:
    model = family("Mixtral")
    with watch(model) as seen, torch.no_grad():
        model(IDS)
        assert seen.routings[0].token_mask.all()
        with pytest.raises(ConfigError, match=r"attention_mask \(2, 1, 12, 12\).*24 routed tokens"):
            model(IDS, attention_mask=torch.zeros(2, 1, 12, 12))
        model(IDS)
        assert seen.forwards == 2


REFUSED = {
    "Llama4": (LOCAL, "ForCausalLM", r"layers.0.feed_forward \(Llama4TextMoe\) does not call stacked experts"),
    "JetMoe": (LOCAL | {"kv_channels": 8}, "ForCausalLM", "JetMoeAttention"),
    "Zaya": (NAMED | {"num_experts_per_tok": 1, "router_hidden_size": 16}, "ForCausalLM", "8 experts but logits for 9"),
    "Llama": ({}, "ForCausalLM", "LlamaForCausalLM has no routed layer"),
    "SwitchTransformers": (
        {"d_model": 32, "d_ff": 40, "d_kv": 8, "num_layers": 2, "num_heads": 4, "num_experts": 4},
        "ForConditionalGeneration", r"\(SwitchTransformersSparseMLP\) does not call stacked experts",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_watch_refuses_by_name(name: str) -> None:
    settings, head, message = REFUSED[name]
    model = build(name, settings, head)
    with pytest.raises(ConfigError, match=message) as caught, watch(model):
        forward(model)
    assert "\n" not in str(caught.value) and name in str(caught.value)
    assert hooks(model) == 0 and torch._C._len_torch_function_stack() == 0  # type: ignore[attr-defined]


def test_watch_refuses_what_it_would_misread() -> None:
    model = family("Mixtral")
    both = nn.ModuleDict({"encoder": model.model, "decoder": family("Mixtral").model})
    with pytest.raises(ConfigError, match=r"several stacks.*decoder.layers, encoder.layers"), watch(both):
        pass
    block = model.model.layers[1].mlp
    block.experts._is_expert_parallel = True
    with pytest.raises(ConfigError, match="expert-parallel"), watch(model):
        forward(model)
    block.experts._is_expert_parallel = False
    block.forward = lambda x: x
    with pytest.raises(ConfigError, match=r"layers.1.mlp.*ran without calling its experts"), watch(model):
        forward(model)
    del block.experts
    with pytest.raises(ConfigError, match=r"layers.1.mlp.gate \(MixtralTopKRouter\) routes"), watch(model):
        pass


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in OURS])
def test_experts_we_cannot_run_are_refused(name: str) -> None:
    model = family(name)
    expected = forward(model)
    with pytest.raises(ConfigError, match=name):
        use_experts(model)
    assert torch.equal(forward(model), expected)


def test_another_gate_is_refused_not_approximated() -> None:
    model = family("GptOss", swiglu_alpha=1.7)
    with pytest.raises(ConfigError, match="GptOssExperts computes its own gate"):
        use_experts(model)
    register_experts()
    model.set_experts_implementation("manyhands")
    with pytest.raises(ConfigError, match="GptOssExperts computes its own gate"):
        forward(model)


@pytest.fixture
def _registry() -> Iterator[dict[str, Any]]:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    yield ALL_EXPERTS_FUNCTIONS


def test_names(_registry: dict[str, Any]) -> None:
    theirs = {"batched_mm", "grouped_mm"}
    assert register_experts() == register_experts() == ["manyhands", *(f"manyhands:{name}" for name in backend_names())]
    assert theirs | set(register_experts()) <= set(_registry)
    with pytest.raises(ConfigError, match="manyhands:grouped_mm"):
        use_experts(family("Mixtral"), "manyhands:grouped")
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no experts"):
        use_experts(build("Llama", {}))
    model = transformers.MixtralForCausalLM._from_config(family("Mixtral").config, experts_implementation="manyhands")
    assert model.config._experts_implementation == "manyhands"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_models() -> None:
    """Experts run outside the compiled graph; hooks that a compiled layer does not call are an error."""
    model = family("Mixtral", num_hidden_layers=1)
    expected = forward(model)
    use_experts(model)
    model.model.layers[0].mlp = torch.compile(model.model.layers[0].mlp, backend="eager")
    torch.testing.assert_close(forward(model), expected, rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match=r"compiled before watch\(\)"), watch(model):
        forward(model)
