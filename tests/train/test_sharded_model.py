"""A model on a mesh in everything but a plain step: bfloat16, evaluation, a start, a spike, what is not finite."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from manyhands.checkpoint.model import save
from manyhands.config import RunConfig
from manyhands.errors import ConfigError, TrainingHalted
from manyhands.generate.evaluate import Evaluation, evaluate
from manyhands.layers.norm import RMSNorm
from manyhands.models import AnyModel, Decoder, build, init_weights
from manyhands.moe import Router
from manyhands.parallel import drawing
from manyhands.parallel.group import Group, mesh_of
from manyhands.parallel.ranks import ALONE, Ranks
from manyhands.parallel.shards import is_sharded, local, whole
from manyhands.text import PackedBatches, evaluation_batches
from manyhands.train.fresh import seed_rank
from manyhands.train.guard import SpikeGuard
from manyhands.train.layout import build_on
from manyhands.train.optim import build_optimizers
from manyhands.train.start import Start
from manyhands.train.step import StepResult, train_step
from manyhands.train.together import check_together
from tests.gloo import on_processes

from ..small_runs import small_run

GROUPS = ("model.moe.router.capacity_factor=1", "model.moe.router.capacity_per=group")
TOKENS = torch.randint(0, 300, (4000,), generator=torch.Generator().manual_seed(1)).numpy()


def _run(*changes: str) -> RunConfig:
    settings = ["optim.name=adamw", "train.dtype=float32", "train.experts_implementation=eager", "parallel.ep=2"]
    return small_run(Path("unused"), *settings, *changes)


def _sharded(run: RunConfig, ranks: Group) -> AnyModel:
    mesh = mesh_of(ranks, run.parallel.ep)
    assert mesh is not None
    return build_on(run, mesh, torch.device("cpu"))


def _one(run: RunConfig) -> AnyModel:
    model = build(run.model, "eager")
    init_weights(model, run.train.seed)
    return model


def _step(model: AnyModel, run: RunConfig, ranks: Ranks, guard: SpikeGuard | None = None) -> StepResult:
    model.train()
    optimizers = build_optimizers(model, run.optim)
    batch = next(PackedBatches(TOKENS, 32, run.train.batch_size, 0, ranks.rank, ranks.size))
    dtype: torch.dtype = getattr(torch, run.train.dtype)
    return train_step(model, optimizers, guard or SpikeGuard(run.guard), batch, run, 1, 1e-3, dtype, None, ranks)


def _bfloat16(ranks: Group) -> tuple[float, float, float]:
    """Loss and norm next to one process's; routers and norms stay float32, as do gradients and what is kept."""
    run = _run("train.dtype=bfloat16", "train.recompute=true")
    model, one, seen = _sharded(run, ranks), _one(run), list[torch.dtype]()
    for part in model.modules():
        if isinstance(part, Router):
            part.register_forward_hook(lambda _, args, routing: seen.append(routing.logits.dtype))
        if isinstance(part, Router | RMSNorm):
            part.register_forward_pre_hook(lambda part, args: seen.append(part.weight.dtype))
    found, right = _step(model, run, ranks), _step(one, run, ALONE)
    assert seen and set(seen) == {torch.float32}
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
    far = max(
        float((whole(p.grad) - q.grad).norm() / q.grad.norm())
        for p, q in zip(model.parameters(), one.parameters(), strict=True)
    )
    return abs(found.loss - right.loss) / right.loss, abs(found.grad_norm / right.grad_norm - 1), far


def test_bfloat16_leaves_routers_and_norms_alone() -> None:
    for loss, norm, gradient in on_processes(2, _bfloat16):
        assert loss < 1e-2 and norm < 3e-2 and gradient < 5e-2  # docs/check.md: what bfloat16 may differ by


def _evaluated(ranks: Group) -> tuple[Evaluation, Evaluation, float]:
    """By all and by one, on a text whose last batch has fewer rows than there are processes; then a step."""
    run = _run()
    model, one = _sharded(run, ranks), _one(run)

    def of(model: AnyModel, by: Ranks) -> Evaluation:
        assert isinstance(model, Decoder)
        return evaluate(model.train(), evaluation_batches(TOKENS[: 32 * 9 + 5], 32, 4), 700, ranks=by)

    found = of(model, ranks)
    assert model.training and all(map(is_sharded, model.parameters())), "as it was"
    losses = [_step(m, run, by).loss for m, by in ((model, ranks), (one, ALONE))]
    return found, of(_one(run), ALONE), abs(losses[0] - losses[1])


def test_evaluation_is_shared_out() -> None:
    found = on_processes(4, _evaluated)
    assert all(each[0] == found[0][0] for each in found)
    for many, one, step in found:
        assert (many.loss, many.bits_per_byte) == (pytest.approx(one.loss, rel=1e-6), pytest.approx(one.bits_per_byte))
        assert many.tokens == one.tokens == 32 * 9 + 4 and step < 1e-5
        assert {layer: s.load for layer, s in many.load.items()} == {layer: s.load for layer, s in one.load.items()}


def _started(ranks: Group, directory: str) -> float:
    """The largest difference of a sharded start from the checkpoint."""
    run = _run("model.moe.expert_bias=true", "train.seed=3")
    model = _sharded(run, ranks)
    Start.open(directory).load_into(model)
    source = dict(_one(_run("model.moe.expert_bias=true")).state_dict())
    return max(float((whole(t) - source[name]).abs().max()) for name, t in model.state_dict().items())


def test_each_reads_what_lies_with_it(tmp_path: Path) -> None:
    save(_one(_run("model.moe.expert_bias=true")), tmp_path / "start", family="manyhands")
    assert on_processes(2, _started, str(tmp_path / "start")) == [0.0, 0.0]


class _Largest(TorchDispatchMode):
    """Remembers the most elements of any tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in (made,) if type(made) is torch.Tensor else ():
            if tensor.device.type != "meta":
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return made


def _built(ranks: Group) -> tuple[int, int, int]:
    """Elements of the largest tensor that was made, of the largest that lies here, of the largest whole one."""
    run = _run("model.moe.moe_intermediate_size=64")
    drawn = 1 << 12  # two experts of 2 · 64 · 32 would be twice as many
    with pytest.MonkeyPatch.context() as patch, _Largest() as largest:
        patch.setattr(drawing, "_DRAWN", drawn)
        model = _sharded(run, ranks)
    held = max(local(p.detach()).numel() for p in model.parameters())
    return largest.elements, max(drawn, held), max(p.numel() for p in model.parameters())


def test_no_process_ever_holds_all_experts() -> None:
    for made, allowed, whole_stack in on_processes(4, _built):
        assert made <= allowed < whole_stack / 2


def _halted(ranks: Group) -> tuple[list[str], bool]:
    """What is said where only one process sees what is not finite, and whether a weight moved."""
    run, said = _run(), []
    model = _sharded(run, ranks)
    before = {name: local(p.detach()).clone() for name, p in model.named_parameters()}
    name = "layers.1.mlp.experts.down_proj"
    rows = local(model.get_parameter(name).detach())
    for spoil in (True, False):
        if ranks.rank == 1:
            rows[0, 0, 0] = float("nan") if spoil else before[name][0, 0, 0]
        try:
            guard = SpikeGuard(run.guard)
            if not spoil:  # a spike is a matter of numbers that all have alike
                guard.observe = lambda loss, norm: norm > 0  # type: ignore[method-assign]
            said.append(f"skipped {_step(model, run, ranks, guard).skipped}")
        except TrainingHalted as halted:
            said.append(str(halted))
    return said, all(torch.equal(before[n], local(p.detach())) for n, p in model.named_parameters())


def test_one_process_with_nan_stops_all() -> None:
    at = "weight layers.1.mlp.experts.down_proj"
    assert (
        on_processes(2, _halted) == [([f"step 1: {at} is not finite; no weight was changed", "skipped True"], True)] * 2
    )


def _noise(ranks: Group) -> list[float]:
    """The first noise of this process, of two runs and of one again."""
    found = []
    for seed in (0, 1, 0):
        seed_rank(seed, ranks)
        found.append(float(torch.rand(())))
    return found


def test_each_process_has_noise_of_its_own() -> None:
    (a, b, again), (c, d, too) = on_processes(2, _noise)
    assert (a, c) == (again, too) and len({a, b, c, d}) == 4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["model.moe.router.select=expert_choice", "model.moe.router.bias=false"], "select = 'expert_choice' looks at"),
        (["model.moe.router.select=sinkhorn", "model.moe.router.bias=false"], "select = 'sinkhorn' looks at all"),
        (["model.moe.router.capacity_factor=1.0"], "capacity_per = 'batch' looks at all tokens"),
        (["model.moe.router.eval_capacity_factor=1.0"], "capacity_per = 'batch' looks at all tokens"),
        ([*GROUPS, "model.moe.router.capacity_group=48"], "capacity_group = 48 looks at"),
        (["balance.bias_update=quantile"], "balance.bias_update = 'quantile' looks at all"),
    ],
)
def test_what_one_process_alone_can_train(changes: list[str], said: str) -> None:
    run = _run(*changes)
    with pytest.raises(ConfigError) as refused:
        check_together(run, 2)
    assert said in str(refused.value) and "of which each of 2 processes has a part: train it on one, or " in str(
        refused.value
    )
    check_together(run, 1)


def test_groups_that_no_process_cuts() -> None:
    check_together(_run(*GROUPS, "model.moe.router.capacity_group=64"), 2)  # each has two sequences of 32 tokens
