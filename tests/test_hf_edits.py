"""A routing given to transformers' models: replay has the bits of the run, a mask is a model without the expert."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from manyhands.errors import ConfigError
from manyhands.hf import watch
from manyhands.moe import Force, Mask, Replay, Routing, Swap

transformers = pytest.importorskip("transformers")

IDS = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(0))
COMMON: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 64, "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None, "intermediate_size": 40,
}  # fmt: skip
V3: dict[str, Any] = {
    "num_experts_per_tok": 3, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "norm_topk_prob": True, "q_lora_rank": 24,
    "kv_lora_rank": 20, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 10, "num_key_value_heads": 4,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any], int]] = {
    "Mixtral": ("num_local_experts", {"num_experts_per_tok": 2, "intermediate_size": 16}, 1),
    "Qwen3Moe": (
        "num_experts", {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}, 1,
    ),
    "Olmoe": ("num_experts", {"num_experts_per_tok": 2, "intermediate_size": 16}, 1),
    "DeepseekV3": ("n_routed_experts", V3, 2),
    "GptOss": ("num_local_experts", {"num_experts_per_tok": 2, "intermediate_size": 16}, 1),
}  # fmt: skip
"""Where the number of experts stands, other settings, and a sparse layer."""
GROUPS = {"n_group": 4, "topk_group": 2}
every_family = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(level)


def build(name: str, experts: int = 8, seed: int = 0, **more: Any) -> Any:
    key, settings, _ = FAMILIES[name]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **settings, key: experts, **more})
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for n, t in [*model.named_parameters(), *model.named_buffers()]:
            if t.is_floating_point() and "rotary" not in n and "norm" not in n:
                t.normal_(0.0, 0.5 if "gate" in n or "router" in n else 0.15)
    return model.eval()


@torch.no_grad()
def run(model: Any, edit: Any = None, ids: torch.Tensor = IDS) -> tuple[torch.Tensor, dict[int, Routing]]:
    with watch(model, edit=edit) as seen:
        logits = model(ids).logits
    return logits, seen.routings


@every_family
@pytest.mark.parametrize("more", [{}, GROUPS], ids=["", "groups"])
def test_a_replay_has_the_bits_of_the_run(name: str, more: dict[str, Any]) -> None:
    if more and name != "DeepseekV3":
        pytest.skip("has no groups")
    model = build(name, **more)
    logits, routings = run(model)
    for edit in (
        routings,
        {n: Replay(r.expert_ids) for n, r in routings.items()},
        {n: Replay.of(r, weights=True) for n, r in routings.items()},
    ):
        again, replayed = run(model, edit)
        assert torch.equal(again, logits)
        assert all(torch.equal(replayed[n].expert_ids, r.expert_ids) for n, r in routings.items())
        assert all(torch.equal(replayed[n].weights, r.weights) for n, r in routings.items())


@every_family
def test_another_router_follows_the_recorded_experts(name: str) -> None:
    model, other = build(name), build(name)
    _, routings = run(model)
    with torch.no_grad():
        for n, p in other.named_parameters():
            if n.endswith(("gate.weight", "router.weight")):
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    _, free = run(other)
    _, given = run(other, routings)
    assert any(not torch.equal(free[n].expert_ids, r.expert_ids) for n, r in routings.items())
    for n, r in routings.items():
        assert torch.equal(given[n].expert_ids.sort(1).values, r.expert_ids.sort(1).values)
        torch.testing.assert_close(given[n].weights.sum(1), expected_sum(name, given[n]))
    recorded, seen = run(other, {n: Replay.of(r, weights=True) for n, r in routings.items()})
    torch.testing.assert_close(recorded, run(model)[0])  # but for their routers they are one model
    assert len(seen) == len(routings)


def expected_sum(name: str, routing: Routing) -> torch.Tensor:
    if name == "Olmoe":  # which does not renormalise
        return routing.scores.gather(1, routing.expert_ids).sum(1)
    return torch.full((len(routing.weights),), 2.5 if name == "DeepseekV3" else 1.0)


@every_family
@pytest.mark.parametrize("off", [[5], [0, 7]])
def test_a_mask_is_a_model_that_never_had_the_expert(name: str, off: list[int]) -> None:
    model, layers = build(name), range(FAMILIES[name][2] - 1 if name != "DeepseekV3" else 1, 3)
    never = build(name, 8 - len(off))
    keep = torch.tensor([e for e in range(8) if e not in off])
    state, wanted = model.state_dict(), never.state_dict()
    never.load_state_dict({n: t if t.shape == wanted[n].shape else t[keep] for n, t in state.items()})
    logits, routings = run(model, {n: Mask(tuple(off)) for n in layers})
    expected, others = run(never)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert routings.keys() == others.keys() == set(layers)
    for n, r in routings.items():
        assert torch.equal(r.expert_ids, keep[others[n].expert_ids])
        torch.testing.assert_close(r.weights, others[n].weights)
        torch.testing.assert_close(r.scores[:, keep], others[n].scores)
        assert not r.scores[:, off].any()
    assert not torch.equal(logits, run(model)[0])


def test_a_mask_in_groups_is_what_our_router_makes_of_it() -> None:
    from manyhands.config import RouterConfig
    from manyhands.moe import Router

    model, edit = build("DeepseekV3", **GROUPS), Mask((0, 3))
    _, routings = run(model, {2: edit})
    fields = {"score": "sigmoid", "bias": True, "routed_scaling_factor": 2.5, "num_experts_per_tok": 3, **GROUPS}
    router, gate = Router(RouterConfig(**fields), 32), model.model.layers[2].mlp.gate
    router.load_state_dict(gate.state_dict())
    seen: list[torch.Tensor] = []
    handle = gate.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, 32)))
    run(model, {2: edit})
    handle.remove()
    with pytest.raises(ConfigError, match="1 of 8 experts"):
        run(model, {2: Mask((0, 1, 2, 3, 4, 5, 6))})
    router.eval()
    with pytest.raises(ConfigError, match="in the worst choice of 2 groups"):  # theirs says so where it happens
        router(seen[0], edit=edit)
    with torch.no_grad():
        ours = router(seen[0], edit=Mask((0,)))
    theirs = run(model, {2: Mask((0,))})[1][2]
    (theirs_TK, order), (ours_TK, own) = theirs.expert_ids.sort(1), ours.expert_ids.sort(1)
    assert torch.equal(theirs_TK, ours_TK)
    torch.testing.assert_close(theirs.weights.gather(1, order), ours.weights.gather(1, own))
    assert not torch.isin(routings[2].expert_ids, torch.tensor([0, 3])).any()


@every_family
def test_a_swap_is_a_model_whose_experts_changed_places(name: str) -> None:
    model, other, layer = build(name), build(name), FAMILIES[name][2]
    chosen = run(model)[1][layer].expert_ids[0]
    a, b = int(chosen[0]), next(e for e in range(8) if e not in chosen)
    with torch.no_grad():
        for n, p in other.named_parameters():
            if f"layers.{layer}.mlp.experts" in n:
                p[[a, b]] = p[[b, a]].clone()
    logits, routings = run(model, {layer: Swap(a, b)})
    torch.testing.assert_close(logits, run(other)[0], rtol=1e-4, atol=1e-5)
    assert b in routings[layer].expert_ids[0] and a not in routings[layer].expert_ids[0]


@every_family
def test_force(name: str) -> None:
    layer, K = FAMILIES[name][2], FAMILIES[name][1]["num_experts_per_tok"]
    _, routings = run(build(name), {layer: Force(tuple(range(4, 4 + K)))})
    assert routings[layer].expert_ids.sort(1).values.unique(dim=0).tolist() == [list(range(4, 4 + K))]


@every_family
def test_gradients_of_a_replay_are_those_of_the_same_experts(name: str) -> None:
    model = build(name).train()
    out: list[dict[str, torch.Tensor]] = []
    routings: dict[int, Routing] = {}
    for edit in (None, "replay"):
        model.zero_grad()
        with watch(model, edit=edit and {n: Replay(r.expert_ids) for n, r in routings.items()}) as seen:
            model(IDS, labels=IDS).loss.backward()
        routings = seen.routings
        out.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    gates = [n for n in out[0] if n.endswith(("gate.weight", "router.weight"))]
    assert gates and all(out[0][n].abs().sum() > 0 for n in gates)
    assert out[0].keys() == out[1].keys() and all(torch.equal(out[0][n], out[1][n]) for n in out[0])


def test_generation_is_masked_and_the_model_is_as_it_was() -> None:
    model = build("Mixtral")
    before = model(IDS).logits
    with watch(model, edit={1: Mask((2, 3))}) as seen:
        model.generate(IDS, max_new_tokens=4, do_sample=False)
        assert seen.forwards == 4 and not torch.isin(seen.routings[1].expert_ids, torch.tensor([2, 3])).any()
    assert torch.equal(model(IDS).logits, before)


def test_where_nothing_was_recorded_the_router_decides() -> None:
    model = build("Mixtral")
    _, free = run(model)
    ids = torch.full((24, 2), -1)
    ids[3] = torch.tensor([6, 0])
    _, given = run(model, {1: Replay(ids)})
    rest = [t for t in range(24) if t != 3]
    assert sorted(given[1].expert_ids[3].tolist()) == [0, 6]
    assert torch.equal(given[1].expert_ids[rest], free[1].expert_ids[rest])


@pytest.mark.parametrize(
    "edit, says",
    [
        ({7: Mask((1,))}, "MixtralForCausalLM: layer 7 is not routed; these are: 0, 1, 2"),
        ({1: Mask((8,))}, "has no expert 8: they are numbered from 0 to 7"),
        ({1: Mask(tuple(range(7)))}, "1 of 8 experts are left, and a token needs 2"),
        ({1: Force((1,))}, "Force names 1 experts; a token has 2"),
        ({1: Swap(1, 1)}, "Swap names experts [1, 1]: give different ones"),
        ({1: Replay(torch.zeros(3, 2).long())}, "expert_ids are [3, 2], the tokens and their experts [24, 2]"),
        ({1: Replay(torch.tensor([[1, -1]] * 24))}, "gives a token fewer than 2 experts"),
        ({1: Replay(torch.tensor([[1, 9]] * 24))}, "has no expert 9"),
    ],
)
def test_what_cannot_be_followed_is_one_clear_error(edit: Any, says: str) -> None:
    model = build("Mixtral")
    before = model(IDS).logits
    with pytest.raises(ConfigError, match=re.escape(says)):
        run(model, edit)
    assert torch.equal(model(IDS).logits, before)


def test_gradient_checkpointing_is_refused_not_recomputed_without_the_edit() -> None:
    model = build("Mixtral").train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(ConfigError, match="gradient checkpointing"), watch(model, edit={1: Mask((1,))}):
        model(IDS, labels=IDS).loss.backward()
