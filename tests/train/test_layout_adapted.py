"""LoRA on a mesh of processes: A and B lie with their experts, and train, and are saved, as on one process."""

from pathlib import Path

import torch

from manyhands.checkpoint.adapters import adapter_of, write_adapter
from manyhands.config import RunConfig
from manyhands.config.adapter import LoraConfig
from manyhands.models import AnyModel, build, init_weights
from manyhands.models.adapted import adapt, low_ranks
from manyhands.parallel.group import Group, mesh_of
from manyhands.parallel.ranks import Alone
from manyhands.parallel.shards import held_rows, local, whole
from manyhands.train.layout import lay_out
from tests.gloo import on_processes

from .test_layout import GRADIENTS, WEIGHTS, _far, _run, _train  # type: ignore[import-not-found,unused-ignore]

LORA = ["trainable=['*.lora_A','*.lora_B']", "model.moe.expert_bias=true"]


def _adapted(run: RunConfig, how: str = "auto") -> AnyModel:
    model = build(run.model, how)
    init_weights(model, run.train.seed)
    adapt(model, LoraConfig(r=3, alpha=6.0), seed=2)
    with torch.no_grad():
        for low in low_ranks(model).values():
            low.lora_B.normal_(0.0, 0.05, generator=torch.Generator().manual_seed(3))
    return model


def _differences(ranks: Group, ep: int, changes: list[str], folder: str) -> dict[str, float]:
    """Of losses, norm, gradients and A and B after three steps, from one process."""
    run = _run([f"parallel.ep={ep}", *LORA, *changes])
    mesh = mesh_of(ranks, ep)
    assert mesh is not None
    one, model = _adapted(run), _adapted(run)
    lay_out(model, mesh, run.parallel.dispatch)
    experts = run.model.moe.router.num_experts  # type: ignore[union-attr]
    for name, p in model.named_parameters():
        rows = whole(p.detach())[held_rows(p)]
        assert torch.equal(local(p.detach()), rows), name
        if ".experts." in name:
            assert len(rows) <= -(-experts // ep), f"{name}: A and B lie with their experts"
    fresh = adapter_of(model)
    if ranks.rank == 0:
        for directory, adapter in (("shared", fresh), ("alone", adapter_of(one))):
            write_adapter(adapter, Path(folder) / directory, run.model)
    right, right_gradients = _train(one.double().train(), run, Alone(), ranks.size)
    results, gradients = _train(model.double().train(), run, ranks)
    found = {}
    for step, (got, want) in enumerate(zip(results, right, strict=True)):
        found[f"loss {step}"] = abs(got.loss - want.loss) / want.loss
        found[f"norm {step}"] = abs(got.grad_norm - want.grad_norm) / want.grad_norm
        assert gradients[step].keys() == right_gradients[step].keys()
        assert all("lora_" in name for name in gradients[step])
        for name, gradient in right_gradients[step].items():
            found[f"gradient {step} {name}"] = _far(gradients[step][name], gradient)
    for name, low in low_ranks(model).items():
        other = low_ranks(one)[name]
        for leaf in ("lora_A", "lora_B"):
            found[f"weight {name}.{leaf}"] = _far(whole(getattr(low, leaf).detach()), getattr(other, leaf).detach())
    return found


def _check(size: int, ep: int, tmp_path: Path, *changes: str) -> None:
    for found in on_processes(size, _differences, ep, list(changes), str(tmp_path)):
        for name, difference in found.items():
            assert difference <= (WEIGHTS if name.startswith("weight") else GRADIENTS), (name, difference)
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("shared", "alone")]
    assert files[0] == files[1], "the file of one process"


def test_two_processes_by_pairs(tmp_path) -> None:
    _check(2, 2, tmp_path)


def test_four_processes_by_tokens(tmp_path) -> None:
    _check(4, 2, tmp_path, "parallel.dispatch=by_tokens", "train.recompute=true")
