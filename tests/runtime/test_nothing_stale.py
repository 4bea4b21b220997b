"""Whatever is changed between two decoding steps, the next step computes with it, while the cache lives."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from manyhands.config import SamplingConfig
from manyhands.engine.batch import Batch, Row
from manyhands.engine.caches import Caches
from manyhands.engine.engine import Engine
from manyhands.engine.runner import Runner
from manyhands.kernels import native
from manyhands.kernels.native import step
from manyhands.layers.attention import Attention
from manyhands.layers.cache import Cache, PagedCache
from manyhands.layers.linear import Linear
from manyhands.layers.norm import RMSNorm
from manyhands.layers.packed_linear import RecordLinear
from manyhands.models import Decoder
from manyhands.moe import Experts, MoELayer
from manyhands.moe.packed import RecordExperts

from .test_program import CASES, packed_model

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no native kernels: {native.missing()}")


def first(model: Decoder, *kinds: type) -> nn.Module:
    return next(m for m in model.modules() if type(m) in kinds)


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


class Twice(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *a, **k) -> object:
        y = self.inner(*a, **k)
        return (2 * y[0], y[1]) if isinstance(y, tuple) else 2 * y


def in_place(model: Decoder) -> None:
    for p in model.layers.parameters():
        p.mul_(0.5)


def through_data(model: Decoder) -> None:
    for p in model.layers.parameters():
        p.data.mul_(0.5)


def other_data(model: Decoder) -> None:
    for p in model.layers.parameters():
        p.data = p.data * 0.5


def transposed_in_place(model: Decoder) -> None:
    """The same address, shape and dtype; only the strides differ."""
    layer = model.layers[0].self_attn.q_proj
    square = layer.weight.data[:32]
    layer.weight.data = torch.cat((square.t(), layer.weight.data[32:]))
    layer.weight.data = torch.as_strided(layer.weight.data, layer.weight.shape, (1, layer.weight.shape[0]))


def loaded(model: Decoder, assign: bool) -> None:
    state = {k: v * 0.5 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.load_state_dict(state, assign=assign)


def zeroed_experts(model: Decoder) -> None:
    for layer in model.sparse_layers().values():
        for p in layer.experts.parameters():
            p.zero_()


def replaced(model: Decoder, kind: type) -> None:
    name = next(n for n, m in model.layers.named_modules() if type(m) is kind)
    parent, _, last = name.rpartition(".")
    setattr(model.layers.get_submodule(parent), last, Twice(model.layers.get_submodule(name)))


def other_block(model: Decoder) -> None:
    block = copy.deepcopy(model.layers[1])
    for p in block.parameters():
        p.mul_(0.5)
    model.layers[1] = block


def parametrized(model: Decoder) -> None:
    parametrize.register_parametrization(first(model, Linear), "weight", Doubled())


def pruned(model: Decoder) -> None:
    prune.l1_unstructured(first(model, Linear), "weight", amount=0.5)


def pruned_for_good(model: Decoder) -> None:
    pruned(model)
    prune.remove(first(model, Linear), "weight")


def tied(model: Decoder) -> None:
    model.layers[1].self_attn.q_proj.weight = model.layers[0].self_attn.q_proj.weight


def other_forward(model: Decoder) -> None:
    module = model.layers[1].self_attn.o_proj
    inner = module.forward
    module.forward = lambda x: 2 * inner(x)


def other_epsilon(model: Decoder) -> None:
    model.layers[0].input_layernorm.eps = 1.0


def other_router(model: Decoder) -> None:
    router = first(model, MoELayer).router
    router.config = router.config.model_copy(update={"routed_scaling_factor": 3.0})


def other_experts_backend(model: Decoder) -> None:
    first(model, MoELayer).experts.implementation = "eager"


def halved_output(model: Decoder) -> None:
    model.layers[0].self_attn.o_proj.register_forward_hook(lambda m, a, y: y * 0.5)


def halved_input(model: Decoder) -> None:
    model.layers[0].self_attn.register_forward_pre_hook(lambda m, a: (a[0] * 0.5, *a[1:]))


def training(model: Decoder) -> None:
    model.layers[0].mlp.router.train()


def biases(model: Decoder) -> None:
    for name, p in model.layers.named_parameters():
        if name.endswith(("bias", "sinks")):
            p.add_(1.0)


def cleared(model: Decoder) -> None:
    model.layers[0].self_attn.q_proj.bias = None


CHANGES: dict[str, Callable[[Decoder], None]] = {
    "in place": in_place,
    "through .data": through_data,
    ".data =": other_data,
    "strides": transposed_in_place,
    "load_state_dict": lambda m: loaded(m, False),
    "load_state_dict(assign)": lambda m: loaded(m, True),
    "zero experts": zeroed_experts,
    **{f"{k.__name__} replaced": lambda m, k=k: replaced(m, k) for k in (Linear, RMSNorm, Experts)},
    "a block replaced": other_block,
    "parametrization": parametrized,
    "prune": pruned,
    "prune and remove": pruned_for_good,
    "weight tying": tied,
    "forward of one": other_forward,
    "epsilon": other_epsilon,
    "router config": other_router,
    "backend": other_experts_backend,
    "hook": halved_output,
    "pre-hook": halved_input,
    "train()": training,
    "biases": biases,
    "a bias less": cleared,
    "requires_grad": lambda m: m.requires_grad_(False),
    "deepcopy": lambda m: copy.deepcopy(m),
}


class Holder:
    """Decodes as the engine does: its runner keeps a program and looks whether it is current."""

    def __init__(self, model: Decoder) -> None:
        self.runner = Runner(model)

    def steps(self, cache: Cache, first: int, last: int) -> torch.Tensor:
        """States of the tokens `first` to `last`, one by one."""
        found = [self.runner.run(Batch([Row([i], cache)]), states=True) for i in range(first, last)]
        return torch.cat([f.states for f in found])[None]


def steps(model: Decoder, cache: Cache, first: int, last: int) -> torch.Tensor:
    """The same, prepared now."""
    return Holder(model).steps(cache, first, last)


def new_cache(model: Decoder) -> PagedCache:
    return Caches(len(model.layers)).new()


def same(cache: Cache, length: int) -> Cache:
    """Another cache with the same beginning, for which nothing was prepared."""
    again = Caches(len(cache.layers)).new()
    again.take(length)
    for ours, theirs in zip(again.layers, cache.layers, strict=True):
        ours.append(*(t[..., :length, :] for t in theirs.read()))
    return again


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_is_seen(change: str, dtype: torch.dtype, monkeypatch) -> None:
    attention = {**CASES["gpt-oss"]["attention"], "qk_norm": "head"}
    model = packed_model({**CASES["gpt-oss"], "attention": attention}, "plain")
    model.to(dtype)
    other = copy.deepcopy(model)
    cache = new_cache(model)
    model.hidden(torch.arange(5)[None], None, cache)
    holder = Holder(model)
    holder.steps(cache, 5, 8)
    assert holder.runner._program.native
    for m in (model, other):
        CHANGES[change](m)
    found = holder.steps(cache, 8, 11)
    assert torch.equal(found, steps(other, same(cache, 8), 8, 11))  # prepared now
    if dtype == torch.float32:
        monkeypatch.setattr(step, "direct", lambda x: False)
        torch.testing.assert_close(found, steps(other, same(cache, 8), 8, 11), atol=5e-5, rtol=5e-5)


@torch.no_grad()
@pytest.mark.parametrize("replace", ["module", "record", "hook", "subclass"])
def test_packed_parts_too(replace: str, monkeypatch) -> None:
    model = packed_model(CASES["qwen3"], "int8")
    cache = new_cache(model)
    model.hidden(torch.arange(5)[None], None, cache)
    holder = Holder(model)
    before = holder.steps(cache, 5, 6)
    cache.truncate(5)
    experts, heard = first(model, RecordExperts), []
    if replace == "module":
        replaced(model, RecordExperts)
    elif replace == "record":
        experts.records = torch.zeros_like(experts.records)
    elif replace == "hook":
        model.layers[0].self_attn.k_proj.register_forward_hook(lambda *_: heard.append(1))
    else:
        own = {"forward": lambda self, x: 0 * RecordLinear.forward(self, x)}
        first(model, RecordLinear).__class__ = type("Own", (RecordLinear,), own)
    after = holder.steps(cache, 5, 6)
    assert heard == [1] if replace == "hook" else not torch.equal(before, after)


@torch.no_grad()
def test_a_reused_address_is_another_weight() -> None:
    """A weight of 39 rows where one of 40 was gave 40 outputs."""
    layer = Linear(32, 40).requires_grad_(False)
    torch.nn.init.normal_(layer.weight), torch.nn.init.normal_(layer.bias)
    x = torch.randn(2, 32)
    assert layer(x).shape == (2, 40)
    layer.weight.data, layer.bias.data = layer.weight.data[:39], layer.bias.data[:39]
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 17])
def test_a_bias_that_changes_is_seen_by_few_and_by_many_rows(rows: int) -> None:
    layer = Linear(32, 24).to(torch.bfloat16)
    torch.nn.init.normal_(layer.weight)
    x = torch.randn(rows, 32, dtype=torch.bfloat16)
    layer(x)
    for change in (lambda: layer.bias.fill_(3.0), lambda: layer.bias.data.fill_(5.0)):
        change()
        expected = torch.nn.functional.linear(x.float(), layer.weight.float(), layer.bias.float())
        torch.testing.assert_close(layer(x).float(), expected, atol=0.1, rtol=0.02)


@torch.no_grad()
def test_latent_attention_hears_who_replaces_its_up_projection() -> None:
    attention = {"kind": "mla", "num_attention_heads": 4, "kv_lora_rank": 32, "qk_nope_head_dim": 12,
                 "qk_rope_head_dim": 16, "v_head_dim": 10}  # fmt: skip
    model = packed_model({"attention": attention}, "plain")
    cache = new_cache(model)
    model.hidden(torch.arange(5)[None], None, cache)
    for block in model.layers:
        block.self_attn.kv_b_proj = Twice(block.self_attn.kv_b_proj)
    found = steps(model, cache, 5, 7)
    again = same(cache, 5)
    for block in model.layers:
        block.self_attn.kv_b_proj = block.self_attn.kv_b_proj.inner
        block.self_attn.kv_b_proj.weight.mul_(2)
    torch.testing.assert_close(found, steps(model, again, 5, 7), atol=5e-5, rtol=5e-5)


@torch.no_grad()
def test_a_cache_begun_in_inference_mode_goes_on_outside_and_is_copied() -> None:
    model = packed_model(CASES["qwen3"], "plain")
    with torch.inference_mode():
        cache = new_cache(model)
        model.hidden(torch.arange(5)[None], None, cache)
        steps(model, cache, 5, 7)
    other = copy.deepcopy(cache)
    torch.testing.assert_close(steps(model, cache, 7, 9), steps(model, other, 7, 9), atol=0, rtol=0)


@torch.no_grad()
def test_a_part_of_ones_own_is_called_and_one_that_ceases_to_be_heard_is_native_again() -> None:
    """A subclass that overrides a part of the reference is not computed by what never heard of it."""
    model, heard = packed_model(CASES["qwen3"], "plain"), []
    holder, cache = Holder(model), new_cache(model)
    model.hidden(torch.arange(5)[None], None, cache)
    kind = type(model.layers[0].self_attn)
    model.layers[0].self_attn.__class__ = type("Own", (Attention,), {})
    holder.steps(cache, 5, 6)
    called = lambda: [(p.name, p.layer) for p in holder.runner._program.parts if p.why]  # noqa: E731
    assert called() == [("self_attn", 0)]
    hook = model.layers[1].mlp.register_forward_hook(lambda *_: heard.append(1))
    holder.steps(cache, 6, 8)
    assert called() == [("self_attn", 0), ("mlp", 1)] and heard == [1, 1]
    hook.remove()
    model.layers[0].self_attn.__class__ = kind
    holder.steps(cache, 8, 9)
    assert called() == [] and heard == [1, 1]


def test_one_engine_hears_and_sees_what_changes_between_its_tokens() -> None:
    model, heard = packed_model(CASES["qwen3"], "plain"), []
    engine = Engine(model)
    request = engine.add([1, 2, 3], SamplingConfig(max_new_tokens=12, temperature=0.0))
    for _ in range(4):
        engine.step()
    hook = model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: heard.append(1))
    engine.step()
    assert heard == [1]
    hook.remove()
    replaced(model, Experts)
    while engine.busy:
        engine.step()
    assert heard == [1] and len(request.token_ids) == 12
    program = engine.runner._program
    assert [(p.name, p.layer) for p in program.parts if p.why] == [("mlp", 0)]
