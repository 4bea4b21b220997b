"""Which parameter goes where, and that a restored optimiser continues bit for bit."""

import pytest
import torch
from torch import Tensor, nn

from manyhands.config.run import OptimConfig
from manyhands.errors import CheckpointError
from manyhands.train.gradients import grad_norm
from manyhands.train.muon import Muon
from manyhands.train.optim import Optimizers, build_optimizers

D, F, E, V = 8, 6, 3, 20

GROUPS = {
    "embed_tokens.weight": ("embed", (V, D)),
    "lm_head.weight": ("embed", (V, D)),
    "lm_head.bias": ("vector", (V,)),
    "norm.weight": ("vector", (D,)),
    "layers.0.input_layernorm.weight": ("vector", (D,)),
    "layers.0.self_attn.q_proj.weight": ("hidden", (D, D)),
    "layers.0.self_attn.q_proj.bias": ("vector", (D,)),
    "layers.0.self_attn.kv_a_proj_with_mqa.weight": ("hidden", (5, D)),
    "layers.0.self_attn.kv_a_layernorm.weight": ("vector", (4,)),
    "layers.0.self_attn.q_norm.weight": ("vector", (4,)),
    "layers.0.mlp.gate_proj.weight": ("hidden", (F, D)),
    "layers.0.mlp.down_proj.weight": ("hidden", (D, F)),
    "layers.1.mlp.router.weight": ("router", (E, D)),
    "layers.1.mlp.router.noise_weight": ("router", (E, D)),
    "layers.1.mlp.experts.gate_up_proj": ("gate_up", (E, 2 * F, D)),
    "layers.1.mlp.experts.down_proj": ("hidden", (E, D, F)),
    "layers.1.mlp.experts.gate_up_proj_bias": ("vector", (E, 2 * F)),
    "layers.1.mlp.experts.down_proj_bias": ("vector", (E, D)),
    "layers.1.mlp.shared_experts.up_proj.weight": ("hidden", (F, D)),
    "layers.1.mlp.shared_expert_gate.weight": ("shared_expert_gate", (1, D)),
    "layers.2.mlp.experts.up_proj": ("hidden", (E, F, D)),
    "encoder.relative_attention_bias.weight": ("vector", (4, 2)),
}


def build_model(frozen: str | None = None, experts: int = E) -> nn.Module:
    """A tree of modules that has every kind of parameter name a decoder has; so many experts are in a stack."""
    generator = torch.Generator().manual_seed(0)
    root = nn.Module()
    for path, (_, shape) in GROUPS.items():
        *parents, leaf = path.split(".")
        module = root
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, nn.Module())
            module = module.get_submodule(parent)
        shape = (experts, *shape[1:]) if "experts" in parents else shape
        param = nn.Parameter(torch.randn(shape, generator=generator), requires_grad=path != frozen)
        module.register_parameter(leaf, param)
    return root


def gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def named_groups(optimizers: Optimizers) -> dict[str, list[str]]:
    return {group["name"]: list(group["param_names"]) for group in optimizers.groups}


@pytest.mark.parametrize("name", ["muon", "adamw", "adafactor"])
@pytest.mark.parametrize("router_optim", ["muon", "adamw"])
def test_every_parameter_is_in_the_right_group_once(name: str, router_optim: str) -> None:
    config = OptimConfig.model_validate({"name": name, "router_optim": router_optim})
    optimizers = build_optimizers(build_model(), config)
    names = [param for group in named_groups(optimizers).values() for param in group]
    assert len(names) == len(set(names)) == len(GROUPS)
    for group, members in named_groups(optimizers).items():
        assert set(members) == {param for param, (expected, _) in GROUPS.items() if expected == group}
    by_muon = {g["name"] for o in optimizers.optimizers if isinstance(o, Muon) for g in o.param_groups}
    expected_muon = {"hidden", "gate_up"} | ({"router"} if router_optim == "muon" else set())
    assert by_muon == (expected_muon if name == "muon" else set())


def test_group_options() -> None:
    config = OptimConfig(lr=0.01, embed_lr_scale=3.0, router_lr_scale=0.5, weight_decay=0.2, betas=(0.8, 0.9))
    config = config.model_copy(update={"momentum": 0.7, "nesterov": False, "ns_steps": 3, "eps": 1e-6})
    optimizers = build_optimizers(build_model(), config)
    optimizers.set_lr(0.1)
    groups = {group["name"]: group for group in optimizers.groups}
    assert {name: group["lr"] for name, group in groups.items()} == pytest.approx(
        {"hidden": 0.1, "gate_up": 0.1, "router": 0.05, "embed": 0.3, "shared_expert_gate": 0.1, "vector": 0.1}
    )
    assert {name for name, group in groups.items() if group["weight_decay"] == 0} == {"vector"}
    assert groups["embed"]["weight_decay"] == 0.2 and groups["embed"]["betas"] == (0.8, 0.9)
    assert groups["gate_up"]["split"] == 2 and groups["hidden"]["split"] == 1
    assert groups["embed"]["fused"] is True and groups["embed"]["eps"] == 1e-6
    hidden = groups["hidden"]
    assert (hidden["momentum"], hidden["nesterov"], hidden["ns_steps"]) == (0.7, False, 3)


def test_initial_rates_are_scaled() -> None:
    optimizers = build_optimizers(build_model(), OptimConfig(lr=0.01, embed_lr_scale=3.0))
    assert {g["name"]: g["lr"] for g in optimizers.groups}["embed"] == pytest.approx(0.03)


def test_frozen_parameter_is_in_no_group() -> None:
    frozen = "layers.1.mlp.router.weight"
    optimizers = build_optimizers(build_model(frozen), OptimConfig())
    names = {param for group in named_groups(optimizers).values() for param in group}
    assert names == set(GROUPS) - {frozen}


def test_tied_head_is_trained_once() -> None:
    model = build_model()
    model.get_submodule("lm_head").weight = model.get_submodule("embed_tokens").weight
    groups = named_groups(build_optimizers(model, OptimConfig()))
    assert groups["embed"] == ["embed_tokens.weight"]


@pytest.mark.parametrize("name", ["muon", "adamw", "adafactor"])
def test_step_moves_every_parameter_and_zero_grad_drops_gradients(name: str) -> None:
    model = build_model()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizers = build_optimizers(model, OptimConfig.model_validate({"name": name}))
    gradients(model, 1)
    optimizers.step()
    assert not [n for n, p in model.named_parameters() if torch.equal(p, before[n])]
    optimizers.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["muon", "adamw", "adafactor"])
def test_restored_state_continues_bit_for_bit(name: str) -> None:
    config = OptimConfig.model_validate({"name": name})
    first, second = build_model(), build_model()
    one, two = build_optimizers(first, config), build_optimizers(second, config)
    for seed in (1, 2):
        gradients(first, seed)
        one.step()
    state: dict[str, Tensor] = {key: value.clone() for key, value in one.state_dict().items()}
    kept = {"row_var", "col_var"} if name == "adafactor" else {"exp_avg", "exp_avg_sq"}
    assert {entry for entry in state if entry.startswith("embed_tokens.")} == {
        f"embed_tokens.weight.{key}" for key in kept | {"step"}
    }
    assert ("layers.1.mlp.experts.gate_up_proj.momentum_buffer" in state) == (name == "muon")
    second.load_state_dict(first.state_dict())
    two.load_state_dict(state)
    for seed in (3, 4):
        for model, optimizers in ((first, one), (second, two)):
            gradients(model, seed)
            optimizers.step()
    for (n, p), q in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q), n
    assert all(torch.equal(two.state_dict()[key], value) for key, value in one.state_dict().items())
    assert not any(torch.equal(state[key], value) for key, value in one.state_dict().items()), "state was not copied"


def test_load_replaces_what_was_there() -> None:
    model = build_model()
    optimizers = build_optimizers(model, OptimConfig())
    gradients(model, 1)
    optimizers.step()
    optimizers.load_state_dict({})
    assert optimizers.state_dict() == {}


def test_load_refuses_what_does_not_fit_and_changes_nothing() -> None:
    model = build_model()
    optimizers = build_optimizers(model, OptimConfig())
    gradients(model, 1)
    optimizers.step()
    good = optimizers.state_dict()
    for bad, message in (
        (good | {"layers.9.weight.exp_avg": torch.zeros(2)}, r"layers\.9\.weight\.exp_avg has no place"),
        (good | {"norm.weight.exp_avg": torch.zeros(2)}, r"norm\.weight\.exp_avg has shape \[2\].*\[8\]"),
        ({k: v for k, v in good.items() if k != "norm.weight.step"}, r"norm\.weight\.step is missing"),
    ):
        with pytest.raises(CheckpointError, match=message):
            optimizers.load_state_dict(bad)
        assert all(value is good[key] for key, value in optimizers.state_dict().items())
    factored = build_optimizers(model, OptimConfig(name="adafactor"))
    factored.step()
    bad = factored.state_dict() | {"layers.1.mlp.experts.up_proj.row_var": torch.zeros(E, 1, D)}
    with pytest.raises(CheckpointError, match=r"up_proj\.row_var has"):
        factored.load_state_dict(bad)
    with pytest.raises(CheckpointError, match="momentum_buffer has no place"):
        build_optimizers(model, OptimConfig(name="adamw")).load_state_dict(good)


def test_grad_norm_is_joint_and_tells_of_nan() -> None:
    params = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    params[0].grad, params[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert grad_norm(iter(params)).item() == pytest.approx(5.0)
    assert params[0].grad[0] == 3.0
    params[1].grad[0] = float("nan")
    assert grad_norm(params).isnan()


def adafactor(p: Tensor, grads: list[Tensor], lr: float, decay: float) -> Tensor:
    """arXiv 1804.04235, algorithms 4 and 5, with T5's settings, in float64."""
    row, column, whole = 0.0, 0.0, 0.0
    for t, g in enumerate(grads, 1):
        kept = 1 - t**-0.8
        square = g.square()
        if p.ndim > 1:
            row = kept * row + (1 - kept) * square.mean(-1, keepdim=True)
            column = kept * column + (1 - kept) * square.mean(-2, keepdim=True)
            second = row * column / row.mean(-2, keepdim=True)
        else:
            second = whole = kept * whole + (1 - kept) * square
        update = g / second.sqrt()
        update /= update.square().mean().sqrt().clamp(min=1)
        scale = p.square().mean().sqrt().clamp(min=1e-3)
        p = p * (1 - lr * decay) - min(lr, t**-0.5) * scale * update
    return p


@pytest.mark.parametrize("path", ["norm.weight", "embed_tokens.weight", "layers.1.mlp.experts.down_proj"])
def test_adafactor_is_the_papers(path: str) -> None:
    model = build_model().double()
    optimizers = build_optimizers(model, OptimConfig(name="adafactor", lr=0.8, weight_decay=0.25))
    generator = torch.Generator().manual_seed(0)
    param = model.get_parameter(path)
    grads = [torch.randn(param.shape, generator=generator).double() * 10.0**-i for i in range(4)]
    expected = adafactor(param.detach().clone(), grads, 0.8, 0.25 if param.ndim > 1 else 0.0)
    for grad in grads:
        optimizers.zero_grad()
        param.grad = grad
        optimizers.step()
    torch.testing.assert_close(param.detach(), expected, rtol=1e-12, atol=1e-12)


def test_adafactor_moves_an_expert_alike_however_small_its_gradients_are() -> None:
    """With torch's own least value for them, 1e-7, the one with the smaller gradients would move further."""
    weight = nn.Parameter(torch.ones(3, 4, 5))
    model = nn.Module()
    model.experts = nn.Module()
    model.experts.register_parameter("up_proj", weight)
    optimizers = build_optimizers(model, OptimConfig(name="adafactor", lr=0.01, weight_decay=0.0))
    grad = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    weight.grad = torch.stack([grad, grad * 1e-6, torch.zeros(4, 5)])
    optimizers.step()
    moved = (weight.detach() - 1).abs()
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-3, atol=1e-6)
    assert moved[0].max() > 5e-3 and not moved[2].any()
