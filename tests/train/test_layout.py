"""A model on a mesh of processes trains as it does on one: weights, losses, gradients, norm, counts, bias, updates."""

from pathlib import Path
from typing import Any

import torch

from manyhands.config import RunConfig
from manyhands.models import AnyModel, build, init_weights
from manyhands.parallel.group import Group, mesh_of
from manyhands.parallel.ranks import Alone, Ranks
from manyhands.parallel.shards import held_rows, local, whole
from manyhands.text import PackedBatches
from manyhands.train.guard import SpikeGuard
from manyhands.train.layout import build_on
from manyhands.train.optim import build_optimizers
from manyhands.train.step import StepResult, train_step
from manyhands.train.trainable import freeze
from tests.gloo import on_processes

from ..small_runs import small_run

GRADIENTS = 1e-6  # of a tensor's largest: all but the router is float64, which rounds at 2⁻²⁴
WEIGHTS = 2e-6  # after AdamW, whose steps divide by the size of the gradient
STEPS = 2

CASES: dict[str, list[str]] = {
    "as it comes": [],
    "by tokens, recomputed": ["parallel.dispatch=by_tokens", "train.recompute=true"],
    "two micro-batches": ["train.micro_batch_size=1", "train.batch_size=8"],
    "tied, biases, softmax, top-1": [
        "model.tie_word_embeddings=true",
        "model.moe.expert_bias=true",
        "model.moe.router.score=softmax",
        "model.moe.router.bias=false",
        "model.moe.router.num_experts_per_tok=1",
    ],
    "every balance term": [
        "balance.aux_scope=micro",
        "balance.z_loss_coef=0.01",
        "balance.importance_coef=0.02",
        "balance.sequence_loss_coef=0.01",
        "balance.variance_coef=0.02",
        "balance.orthogonality_coef=0.01",
        "balance.simbal_coef=0.001",
    ],
    "fewer experts than processes": ["model.moe.router.num_experts=2", "model.moe.router.num_experts_per_tok=1"],
    "capacity in each sequence": [
        "model.moe.router.capacity_factor=0.75",
        "model.moe.router.capacity_per=sequence",
        "balance.aux_scope=sequence",
    ],
    "only experts are trained": ["trainable=['layers.*.mlp.experts.*']"],
    "the means of experts that were not chosen": [
        "model.moe.unchosen=average",
        "model.moe.router.norm_topk_prob=false",
    ],
    "what experts would have said that were not chosen": [
        "model.moe.unchosen=gradient",
        "model.moe.router.norm_topk_prob=false",
    ],
    "a two-level gate": [
        "model.moe.router.select=hierarchical",
        "model.moe.router.n_group=2",
        "model.moe.router.score=softmax",
        "model.moe.router.bias=false",
    ],
    "ReLU routing": [
        "model.moe.router.select=positive",
        "model.moe.router.score=relu",
        "model.moe.router.norm_topk_prob=false",
        "model.moe.router.bias=false",
        "balance.l1_coef=0.01",
    ],
}


def _run(changes: list[str]) -> RunConfig:
    settings = ["optim.name=adamw", "optim.grad_clip=0.05", "train.dtype=float32", "train.experts_implementation=eager"]
    return small_run(Path("unused"), *settings, *changes)


def _train(
    model: AnyModel, run: RunConfig, ranks: Ranks, of: int = 1
) -> tuple[list[StepResult], list[dict[str, torch.Tensor]]]:
    """The steps' results, and the whole gradients after each. Rows are in the order in which `of` ranks see them."""
    freeze(model, run.trainable)
    optimizers, guard = build_optimizers(model, run.optim), SpikeGuard(run.guard)
    tokens = torch.randint(0, 300, (4000,), generator=torch.Generator().manual_seed(1)).numpy()
    batches = PackedBatches(tokens, 32, run.train.batch_size, 0, ranks.rank, ranks.size)
    results, gradients = [], []
    for number in range(1, STEPS + 1):
        batch = next(batches).unflatten(0, (of, -1)).transpose(0, 1).flatten(0, 1)
        how = (run, number, 1e-3, torch.float64, None, ranks)
        results.append(train_step(model, optimizers, guard, batch, *how))
        gradients.append({name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None})
    return results, gradients


def _far(found: torch.Tensor, right: torch.Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((found - right).abs().max()) / (float(right.abs().max()) or 1.0)


def _differences(ranks: Group, ep: int, changes: list[str]) -> dict[str, float]:
    """Of everything, from one process; 0 where the bits are the same."""
    run = _run([f"parallel.ep={ep}", *changes])
    mesh = mesh_of(ranks, ep)
    assert mesh is not None
    one = build(run.model, "eager")
    init_weights(one, run.train.seed)
    model = build_on(run, mesh, torch.device("cpu"))
    state = model.state_dict()
    found = {f"fresh {name}": float(not torch.equal(whole(state[name]), p)) for name, p in one.state_dict().items()}
    for name, p in model.named_parameters():
        assert torch.equal(local(p.detach()), whole(p.detach())[held_rows(p)]), name
        assert len(local(p)) <= -(-len(p) // ranks.size), name
    # One process with micro-batches of all ranks together.
    micro = run.train.micro_batch_size
    alone = _run([*changes, f"train.micro_batch_size={'null' if micro is None else micro * ranks.size}"])
    right, right_gradients = _train(one.double().train(), alone, Alone(), ranks.size)
    results, gradients = _train(model.double().train(), run, ranks)
    for step, (got, want) in enumerate(zip(results, right, strict=True)):
        found[f"loss {step}"] = abs(got.loss - want.loss) / want.loss
        found[f"norm {step}"] = abs(got.grad_norm - want.grad_norm) / want.grad_norm
        assert got.terms.keys() == want.terms.keys()
        for name, value in want.terms.items():
            found[f"{name} {step}"] = abs(got.terms[name] - value) / max(abs(value), 1e-3)
        assert (got.skipped, got.count) == (want.skipped, want.count)
        for layer, counter in want.counters.items():
            assert torch.equal(got.counters[layer].counts, counter.counts), (step, layer)
        assert gradients[step].keys() == right_gradients[step].keys()
        for name, gradient in right_gradients[step].items():
            found[f"gradient {step} {name}"] = _far(gradients[step][name], gradient)
    state = model.state_dict()
    for name, value in one.state_dict().items():
        if name.endswith("e_score_correction_bias"):
            found[f"after {name}"] = float(not torch.equal(state[name], value))
        else:
            found[f"after {name}"] = _far(whole(state[name]), value)
    return found


def _every_case(ranks: Group, cases: list[tuple[str, int]]) -> dict[str, Any]:
    return {f"{name}, ep {ep}": _differences(ranks, ep, CASES[name]) for name, ep in cases}


def _limit(what: str) -> float:
    if what.startswith("fresh") or what.endswith("e_score_correction_bias"):
        return 0.0
    return WEIGHTS if what.startswith("after") else GRADIENTS


def _wrong(found: list[dict[str, dict[str, float]]]) -> list[str]:
    assert all(f == found[0] for f in found), "ranks see different things"
    return [
        f"{case}: {what}: {error:.1e}"
        for case, errors in found[0].items()
        for what, error in errors.items()
        if not error <= _limit(what)
    ]


def test_two_processes_are_one() -> None:
    cases = [("as it comes", 1), *((name, 2) for name in CASES if "fewer" not in name)]
    wrong = _wrong(on_processes(2, _every_case, cases))
    assert not wrong, f"{len(wrong)}: " + "; ".join(wrong[:8])


def test_four_processes_are_one() -> None:
    cases = [("as it comes", 1), ("by tokens, recomputed", 2), ("two micro-batches", 4)]
    cases += [("fewer experts than processes", ep) for ep in (1, 2)]
    wrong = _wrong(on_processes(4, _every_case, cases))
    assert not wrong, f"{len(wrong)}: " + "; ".join(wrong[:8])
