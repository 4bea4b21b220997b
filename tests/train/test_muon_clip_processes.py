"""Three steps of a decoder by MuonClip on several processes, and the norm of its gradients: as on one process.

Matrices by Muon, router by Muon too, embeddings, head and norms by AdamW, gradients clipped, QK-Clip in every step, the
selection bias moved.
"""

from pathlib import Path

import pytest
import torch
from torch import nn

from manyhands.config import RunConfig
from manyhands.models import build, init_weights
from manyhands.parallel.group import Group
from manyhands.parallel.ranks import Alone
from manyhands.parallel.shards import laid_out, local, share, whole
from manyhands.train.gradients import clip_gradients, grad_norm, sum_gradients
from manyhands.train.guard import SpikeGuard
from manyhands.train.layout import build_on
from manyhands.train.optim import build_optimizers
from manyhands.train.step import StepResult, train_step
from manyhands.train.trainable import freeze
from tests.gloo import on_processes
from tests.sharded import cut, give_gradients, mesh_for, random_like

from ..small_runs import small_run
from .test_optim import build_model

STEPS = 3
CLIPPED = 0.02
CASES: dict[str, list[str]] = {
    "MuonClip": [],
    "two experts, tied embeddings, few rows": [
        "model.moe.router.num_experts=2",
        "model.moe.router.num_experts_per_tok=1",
        "model.tie_word_embeddings=true",
        "optim.nesterov=false",
    ],
    "Adafactor, attention is frozen": ["optim.name=adafactor", "trainable=['layers.*.mlp.*', 'norm.weight']"],
}


def _run(changes: list[str]) -> RunConfig:
    # A large ε: where AdamW divides by almost nothing, a rounding error would become a step.
    settings = {
        "optim.name": "muon", "optim.router_optim": "muon", "optim.qk_clip": CLIPPED, "optim.grad_clip": 0.5,
        "optim.eps": 1e-4, "train.dtype": "float32", "train.experts_implementation": "eager",
        "model.attention.qk_norm": "none",
    }  # fmt: skip
    return small_run(Path("unused"), *(f"{key}={value}" for key, value in settings.items()), *changes)


def _train(model: nn.Module, run: RunConfig, ranks: Group | Alone) -> list[StepResult]:
    freeze(model, run.trainable)
    optimizers, guard = build_optimizers(model, run.optim), SpikeGuard(run.guard)
    generator, found = torch.Generator().manual_seed(1), []
    for number in range(1, STEPS + 1):
        batch = torch.randint(0, 300, (8, 17), generator=generator)[ranks.rank :: ranks.size]
        found.append(train_step(model, optimizers, guard, batch, run, number, 1e-2, torch.float64, ranks=ranks))
    return found


def _differences(ranks: Group, cases: list[tuple[str, int]]) -> list[dict[str, float]]:
    found = []
    for case, ep in cases:
        run = _run(CASES[case])
        one, model = build(run.model, "eager"), build_on(run, mesh_for(ranks, ep), torch.device("cpu"))
        init_weights(one, run.train.seed)
        before = {name: p.detach().double() for name, p in one.named_parameters()}
        right = _train(one.double().train(), run, Alone())
        results = _train(model.double().train(), run, ranks)
        apart = {}
        for step, (got, want) in enumerate(zip(results, right, strict=True)):
            apart[f"loss {step}"] = abs(got.loss - want.loss) / want.loss
            apart[f"norm {step}"] = abs(got.grad_norm - want.grad_norm) / want.grad_norm
        state = model.state_dict()
        for name, value in one.state_dict().items():
            apart[name] = float((whole(state[name]) - value).abs().max())
        moved = [name for name, p in one.named_parameters() if not torch.equal(p, before[name])]
        assert moved == [name for name, p in one.named_parameters() if p.requires_grad]
        found.append(apart)
    return found


@pytest.mark.parametrize(("size", "eps"), [(2, [2]), (4, [2, 1, 4])])
def test_three_steps_are_those_of_one_process(size: int, eps: list[int]) -> None:
    cases = list(zip(CASES, eps, strict=False))
    for rank in on_processes(size, _differences, cases):
        for case, apart in zip(cases, rank, strict=True):
            wrong = {name: by for name, by in apart.items() if not by <= 1e-6}
            assert not wrong, (case, wrong)


def test_everything_acts() -> None:
    """The norm is above the clip, logits are above τ, and the bias moves: leaving out any of them is seen."""
    run = _run([])
    model = build(run.model, "eager")
    init_weights(model, run.train.seed)
    results = _train(model.double().train(), run, Alone())
    assert min(result.grad_norm for result in results) > 0.5
    found = model.state_dict()
    for change in ("optim.qk_clip=1000000", "optim.grad_clip=null", "balance.bias_update_rate=0"):
        other = build(run.model, "eager")
        init_weights(other, run.train.seed)
        _train(other.double().train(), _run([change]), Alone())
        assert any(not torch.equal(found[name], value) for name, value in other.state_dict().items()), change


def _norms(ranks: Group, eps: list[int]) -> list[tuple[float, float]]:
    """How far the norm is from one process's, and the clipped gradients from its."""
    found = []
    for ep in eps:
        model = build_model("layers.0.mlp.gate_proj.weight", experts=4)
        model.get_submodule("lm_head").weight = model.get_submodule("embed_tokens").weight
        cut(model, mesh_for(ranks, ep))
        model.register_parameter("not_cut", nn.Parameter(torch.ones(3)))
        grads = random_like(build_model(experts=4), ep)
        grads = {
            name: grads.get(name, torch.full((3,), 2.0)) for name, p in model.named_parameters() if p.requires_grad
        }
        del grads["norm.weight"]
        expected = torch.cat([grad.double().flatten() for grad in grads.values()]).norm()
        give_gradients(model, {name: grad / ranks.size if name == "not_cut" else grad for name, grad in grads.items()})
        sum_gradients(model.parameters(), ranks)
        norm = grad_norm(model.parameters(), ranks)
        clip_gradients(model.parameters(), 1.0, norm)
        clipped = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        assert clipped.keys() == grads.keys()
        far = max(float((clipped[name] - grad / (expected + 1e-6)).abs().max()) for name, grad in grads.items())
        found.append((abs(float(norm) / float(expected) - 1), far))
        clip_gradients(model.parameters(), 2.0, grad_norm(model.parameters(), ranks))
        assert all(torch.equal(clipped[name], whole(p.grad)) for name, p in model.named_parameters() if name in clipped)
        bias = model.get_parameter("layers.1.mlp.experts.down_proj_bias")
        poison = torch.zeros(bias.shape)
        poison[-1, -1] = float("nan")  # of the last expert, which one process has
        bias.grad = laid_out(share(poison, bias).clone(), bias, bias.shape)
        assert grad_norm(model.parameters(), ranks).isnan()
        assert len(local(bias)) in (0, 1, 2, 4)
    return found


@pytest.mark.parametrize(("size", "ep"), [(2, 1), (4, 2)])
def test_norm_counts_every_element_once(size: int, ep: int) -> None:
    """Over two meshes, with shards that are empty, frozen, tied and absent gradients, and one that is not cut."""
    for rank in on_processes(size, _norms, [ep]):
        for norm, clipped in rank:
            assert norm <= 1e-6 and clipped <= 1e-6
