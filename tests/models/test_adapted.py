"""LoRA on whole models: what it is put beside, that it computes what merged weights do, and how it goes away again."""

import copy

import pytest
import torch
from torch import Tensor, nn

from manyhands.checkpoint.model import save
from manyhands.config import SamplingConfig
from manyhands.config.adapter import LoraConfig
from manyhands.errors import ConfigError
from manyhands.generate.steps import generate
from manyhands.layers.adapted import AdaptedLinear
from manyhands.layers.packed_linear import RecordLinear
from manyhands.models import Decoder
from manyhands.models.adapted import (
    adapt,
    adapter_state,
    chosen_parts,
    is_adapted,
    low_ranks,
    merge,
    parts_of,
    sharing,
    unload,
)
from manyhands.moe.packed import RecordExperts
from manyhands.quant import pack_experts, pack_linear

from .tiny_models import tiny

ALL = ("attention", "dense", "shared", "routed")
SHARED = {"router": {"num_experts": 6}, "moe_intermediate_size": 16, "n_shared_experts": 1, "first_k_dense_replace": 1}
IDS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(3))


def model_with(attention: str = "gqa") -> Decoder:
    return tiny(attention, moe=SHARED).eval()


def stir(model: nn.Module, seed: int = 7) -> None:
    """B that is not zero, large enough to change which token is the likeliest."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for low in low_ranks(model).values():
            low.lora_B.normal_(0.0, 0.3, generator=g)


def pack(model: Decoder) -> None:
    """Experts as int4 records, attention's projections and dense networks as int8 records."""
    for block in model.layers:
        for parent in (block.self_attn, block.mlp, getattr(block.mlp, "shared_experts", None)):
            for name, layer in list(parent.named_children()) if parent is not None else []:
                if isinstance(layer, nn.Linear) and name.endswith("_proj") and name != "kv_b_proj":
                    record = pack_linear(layer.weight, layer.bias, "int8")
                    held = RecordLinear(record.layout)
                    held.record = record.record
                    setattr(parent, name, held)
    for mlp in model.sparse_layers().values():
        records = pack_experts(mlp.experts.weights(), "int4")
        mlp.experts = RecordExperts(records.layout, records.num_experts)
        mlp.experts.records = records.records


def answer(model: Decoder, ids: Tensor = IDS[:1, :6]) -> list[list[int | None]]:
    return [step.token_ids for step in generate(model, ids, SamplingConfig(max_new_tokens=6, temperature=0.0))]


@pytest.mark.parametrize("attention", ["gqa", "mqa_biased", "norm_full", "mla", "mla_low_rank_q"])
def test_as_merged(attention) -> None:
    model = model_with(attention)
    before = model(IDS).logits.detach()
    adapt(model, LoraConfig(r=3, alpha=6.0, targets=ALL), seed=1)
    torch.testing.assert_close(model(IDS).logits, before, atol=1e-5, rtol=1e-5)  # B is zero
    stir(model)
    adapted, tokens = model(IDS).logits.detach(), answer(model)
    assert not torch.allclose(adapted, before, atol=0.1)
    merge(model)
    assert not is_adapted(model)
    torch.testing.assert_close(model(IDS).logits, adapted, atol=2e-4, rtol=1e-4)
    assert answer(model) == tokens


def test_what_is_trained_and_what_is_not() -> None:
    model = model_with()
    adapt(model, LoraConfig(r=2, targets=ALL))
    stir(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(adapter_state(model))
    model.train()(IDS).logits.square().mean().backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == (name in trained), name
    assert model.layers[1].mlp.router.weight.grad is None


def test_targets() -> None:
    parts = parts_of(model_with())
    names = {group: [p.name for p in chosen_parts(parts, (group,))] for group in ALL}
    assert names["attention"][:4] == [f"layers.0.self_attn.{n}_proj" for n in "qkvo"]
    assert names["dense"] == [f"layers.0.mlp.{n}_proj" for n in ("gate", "up", "down")]
    shared = [f"layers.{i}.mlp.shared_experts.{n}_proj" for i in (1, 2) for n in ("gate", "up", "down")]
    assert names["shared"] == shared
    routed = [f"layers.{i}.mlp.experts.{n}_proj" for i in (1, 2) for n in ("gate_up", "down")]
    assert names["routed"] == routed
    assert sorted(name for group in names.values() for name in group) == sorted(parts), "every matrix is in one group"
    assert [p.name for p in chosen_parts(parts, ("q_proj",))] == [f"layers.{i}.self_attn.q_proj" for i in range(3)]
    assert [p.name for p in chosen_parts(parts, ("experts.down_proj",))] == routed[1::2]
    assert [p.name for p in chosen_parts(parts, ("layers.2.self_attn.v_proj",))] == ["layers.2.self_attn.v_proj"]
    both = chosen_parts(parts, ("down_proj", "routed"))
    assert len(both) == len({p.name for p in both}) == 7
    assert parts["layers.1.mlp.experts.gate_up_proj"].shape == (6, 32, 32)
    mla = {p.name.rpartition(".")[2] for p in chosen_parts(parts_of(model_with("mla_low_rank_q")), ("attention",))}
    assert mla == {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"targets": ("routd",)}, r"'routd' names no matrix .*routed"),
        ({"targets": ("q_proj", "router")}, "'router' names no matrix"),
        ({"targets": ("lm_head",)}, "'lm_head' names no matrix"),
        ({"targets": ()}, "name at least one"),
        ({"r": 0}, "r = 0"),
        ({"alpha": 0.0}, "alpha = 0"),
        ({"dropout": 0.1}, "routed experts have none"),
        ({"dropout": 1.0}, "dropout = 1"),
        ({"targets": ("q_proj", "experts.gate_proj")}, "'experts.gate_proj' names no matrix"),
    ],
)
def test_refused(fields, message) -> None:
    model = model_with()
    with pytest.raises(ConfigError, match=message):
        adapt(model, LoraConfig(**fields))
    assert not is_adapted(model) and all(p.requires_grad for p in model.parameters())


def test_groups_that_a_model_lacks() -> None:
    dense = tiny(moe=None)
    with pytest.raises(ConfigError, match="'routed, shared' names no matrix"):
        adapt(dense, LoraConfig(targets=("routed", "shared")))
    adapt(dense, LoraConfig())
    assert {name.rpartition(".")[2] for name in low_ranks(dense)} == {f"{n}_proj" for n in "qkvo"} | {
        "gate_proj",
        "up_proj",
        "down_proj",
    }


def test_twice_is_refused() -> None:
    model = model_with()
    adapt(model, LoraConfig(r=2))
    with pytest.raises(ConfigError, match="merge"):
        adapt(model, LoraConfig(r=2))


def test_the_seed_decides() -> None:
    models = [model_with() for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        torch.manual_seed(torch.initial_seed() + 1)
        adapt(model, LoraConfig(r=2), seed)
    a, b, c = (adapter_state(model) for model in models)
    name = "layers.1.mlp.experts.gate_up_proj.lora_A"
    assert all(torch.equal(a[n], b[n]) for n in a) and not torch.equal(a[name], c[name])
    assert float(a[name].detach().abs().max()) <= 32**-0.5


def test_scales() -> None:
    assert LoraConfig(r=16, alpha=8.0).scale == 0.5
    assert LoraConfig(r=16, alpha=8.0, use_rslora=True).scale == 2.0


def test_taken_away() -> None:
    model = model_with()
    before, names = copy.deepcopy(model.state_dict()), list(model.state_dict())
    adapt(model, LoraConfig(r=2, targets=ALL))
    stir(model)
    unload(model)
    assert list(model.state_dict()) == names and not is_adapted(model)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_packed_bases() -> None:
    """Gradients reach every A and B through int4 experts and int8 layers; merging says what to do instead."""
    model = model_with("norm_head").requires_grad_(False)
    pack(model)
    before = model(IDS).logits
    adapt(model, LoraConfig(r=2, targets=ALL))
    stir(model)
    model.train()(IDS).logits.square().mean().backward()
    assert all(bool(t.grad.any()) for t in adapter_state(model).values() if t.dim() == 2)
    experts = [t.grad.flatten(1).any(1) for t in adapter_state(model).values() if t.dim() == 3]
    assert all(bool(found.any()) for found in experts)
    assert not torch.allclose(model.eval()(IDS).logits, before, atol=0.05)
    with pytest.raises(ConfigError, match="is packed; `manyhands convert"):
        merge(model)
    unload(model)
    torch.testing.assert_close(model(IDS).logits, before)


def test_generation_on_packed_bases() -> None:
    """Prefill and single tokens, where packed layers run natively and round their rows, choose the same tokens."""
    model = model_with()
    pack(model)
    adapt(model, LoraConfig(r=2, targets=ALL))
    stir(model)
    tokens = torch.tensor([t for step in answer(model) for t in step])[None]
    whole = torch.cat((IDS[:1, :6], tokens), 1)
    with torch.no_grad():
        logits = model(whole).logits[0, 5:-1]
    chosen = logits.gather(1, tokens.T)[:, 0]
    assert bool((logits.amax(1) - chosen < 0.05 * logits.std()).all())


def test_a_program_is_made_anew(monkeypatch) -> None:
    """A model that has generated before it was adapted, and after it was merged: nothing prepared is left over."""
    model = model_with("norm_head")
    plain = answer(model)
    adapt(model, LoraConfig(r=3, alpha=6.0, targets=ALL), seed=1)
    assert answer(model) == plain
    stir(model)
    changed = answer(model)
    assert changed != plain
    merge(model)
    assert answer(model) == changed


def test_two_adapters_share_one_base() -> None:
    model = model_with()
    other = sharing(model)
    assert isinstance(other, Decoder)
    own = {t.data_ptr() for t in model.state_dict().values()}
    assert {t.data_ptr() for t in other.state_dict().values()} == own
    plain = model(IDS).logits.detach()
    adapt(other, LoraConfig(r=2, targets=ALL))
    stir(other)
    assert torch.equal(model(IDS).logits, plain), "the first is as it was"
    merge(other)
    assert torch.equal(model(IDS).logits, plain), "also when the second was merged"


def test_a_model_with_adapters_is_not_saved_without_them(tmp_path) -> None:
    model = model_with()
    adapt(model, LoraConfig(r=2, targets=("q_proj",)))
    with pytest.raises(ConfigError, match="has LoRA adapters"):
        save(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    merge(model)
    save(model, tmp_path / "model")


def test_a_linear_layer_that_is_adapted_has_no_claim() -> None:
    model = model_with("mla")
    adapt(model, LoraConfig(r=2, targets=("kv_b_proj",)))
    stir(model)
    assert isinstance(model.layers[0].self_attn.kv_b_proj, AdaptedLinear)
    cache, steps = model.new_cache(), []
    with torch.no_grad():
        for i in range(6):
            steps.append(model(IDS[:, i : i + 1], cache=cache).logits)
        torch.testing.assert_close(torch.cat(steps, 1), model(IDS[:, :6]).logits, atol=1e-4, rtol=1e-4)
