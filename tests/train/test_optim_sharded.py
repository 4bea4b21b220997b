"""The optimisers of a model that lies on several processes: its steps, its state by name, and other layouts."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from manyhands.config.run import OptimConfig
from manyhands.errors import CheckpointError
from manyhands.parallel.group import Group
from manyhands.parallel.shards import Rows, held_rows, local, whole
from manyhands.train.adafactor_sharded import ShardedAdafactor
from manyhands.train.optim import ADAFACTOR_EPS, Optimizers, build_optimizers
from tests.gloo import on_processes
from tests.sharded import apart, cut, gathered, give_gradients, mesh_for, random_like
from tests.train.test_optim import build_model

NAMES = ["muon", "adamw", "adafactor"]
FROZEN = "layers.0.mlp.gate_proj.weight"


def config_of(name: str) -> OptimConfig:
    # A large ε: where AdamW divides by a second moment near nothing, a rounding error would become a whole step.
    return OptimConfig.model_validate({"name": name, "lr": 0.01, "eps": 1e-3, "weight_decay": 0.1})


def step(model: nn.Module, optimizers: Optimizers, seeds: Sequence[int]) -> None:
    for seed in seeds:
        grads = random_like(build_model(experts=4), seed)
        del grads[FROZEN]
        give_gradients(model, grads)
        optimizers.step()


def built(name: str, ranks: Group | None = None, ep: int = 1) -> tuple[nn.Module, Optimizers]:
    """The model of tests/train/test_optim.py with 4 experts on the whole, cut if there are ranks."""
    model = build_model(FROZEN, 4)
    if ranks is not None:
        cut(model, mesh_for(ranks, ep))
    return model, build_optimizers(model, config_of(name))


def gathered_state(optimizers: Optimizers) -> dict[str, Tensor]:
    return {entry: whole(tensor).clone() for entry, tensor in optimizers.state_dict().items()}


def _steps(ranks: Group, eps: list[int]) -> list[tuple[str, dict[str, float], dict[str, float], list[str]]]:
    found = []
    for name in NAMES:
        one, alone = built(name)
        step(one, alone, range(3))
        for ep in eps:
            model, optimizers = built(name, ranks, ep)
            step(model, optimizers, range(3))
            assert list(optimizers.state_dict()) == list(alone.state_dict())
            state = apart(gathered_state(optimizers), gathered_state(alone))
            kept_whole = [e for e, t in optimizers.state_dict().items() if t.ndim and held_rows(t) is None]
            found.append((name, apart(gathered(model), gathered(one)), state, kept_whole))
    return found


@pytest.mark.parametrize(("size", "eps"), [(2, [2]), (4, [1, 2])])
def test_three_steps_equal_one_process(size: int, eps: list[int]) -> None:
    for rank in on_processes(size, _steps, eps):
        for name, weights, state, kept_whole in rank:
            assert max(weights.values()) <= 1e-6, (name, weights)
            assert max(state.values()) <= 1e-6, (name, state)
            assert all(entry.endswith(".col_var") for entry in kept_whole), "all else is cut as the parameters are"


class Reading:
    """A safetensors file of which a process reads its rows."""

    def __init__(self, path: Path) -> None:
        self.file = safe_open(path, "pt")
        self.shapes = {entry: self.file.get_slice(entry).get_shape() for entry in self.file.offset_keys()}
        self.elements = 0

    def read(self, entry: str, rows: Rows) -> Tensor:
        found = self.file.get_tensor(entry) if rows is None else self.file.get_slice(entry)[rows]
        self.elements += found.numel()
        return found


def _saved(ranks: Group, ep: int, folder: str) -> None:
    for name in NAMES:
        model, optimizers = built(name, ranks, ep)
        step(model, optimizers, range(2))
        state, weights = gathered_state(optimizers), gathered(model)
        if ranks.rank == 0:
            save_file({k: v.contiguous() for k, v in state.items()}, f"{folder}/{name}-state.safetensors")
            save_file(weights, f"{folder}/{name}-weights.safetensors")


def _resumed(ranks: Group, ep: int, folder: str) -> tuple[int, dict[str, dict[str, float]]]:
    elements, found = 0, {}
    for name in NAMES:
        model, optimizers = built(name, ranks, ep)
        weights = Reading(Path(folder) / f"{name}-weights.safetensors")
        for entry, param in model.named_parameters():
            local(param.detach()).copy_(weights.read(entry, held_rows(param)))
        state = Reading(Path(folder) / f"{name}-state.safetensors")
        optimizers.load(state.shapes, state.read)
        elements += state.elements
        step(model, optimizers, [2])
        one, alone = built(name)
        step(one, alone, range(3))
        found[name] = apart(gathered(model), gathered(one)) | apart(gathered_state(optimizers), gathered_state(alone))
        # and the state of a sharded model as it is, as when a run goes on with another optim section
        again = build_optimizers(model, config_of(name))
        again.load_state_dict(optimizers.state_dict())
        assert all(
            torch.equal(whole(a), whole(b))
            for a, b in zip(again.state_dict().values(), optimizers.state_dict().values(), strict=True)
        )
        with pytest.raises(CheckpointError, match="has shape"):
            again.load(state.shapes | {next(iter(state.shapes)): [99]}, state.read)
        assert len(again.state_dict()) == len(state.shapes), "nothing was changed"
    return elements, found


@pytest.mark.parametrize(("before", "after"), [((4, 4), (2, 1))])
def test_state_goes_on_with_another_layout(before: tuple[int, int], after: tuple[int, int], tmp_path: Path) -> None:
    """Each process reads its rows: over all of them, each element once (but counters and the columns of Adafactor)."""
    on_processes(before[0], _saved, before[1], str(tmp_path))
    found = on_processes(after[0], _resumed, after[1], str(tmp_path))
    for _, apart_by in found:
        for name, difference in apart_by.items():
            assert max(difference.values()) <= 1e-6, (name, difference)
    total, small = 0, 0
    for name in NAMES:
        for entry, shape in Reading(tmp_path / f"{name}-state.safetensors").shapes.items():
            total += math.prod(shape)
            if not shape or (entry.endswith("col_var") and len(shape) == 2):
                small += math.prod(shape)
    assert sum(elements for elements, _ in found) == total + (after[0] - 1) * small


@pytest.mark.parametrize("shape", [(5,), (4, 6), (3, 4, 6)])
def test_sharded_adafactor_is_torchs_on_one_process(shape: tuple[int, ...]) -> None:
    """In float64: what remains is the order in which squares are summed."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator).double()
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    mine = ShardedAdafactor([ours], 0.05, eps=ADAFACTOR_EPS, weight_decay=0.1)
    oracle = torch.optim.Adafactor([theirs], 0.05, eps=ADAFACTOR_EPS, weight_decay=0.1)
    for scale in (1.0, 100.0, 1e-3, 0.0):
        ours.grad = torch.randn(shape, generator=generator).double() * scale
        theirs.grad = ours.grad.clone()
        mine.step()
        oracle.step()
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-12, atol=1e-14)
    assert list(mine.state[ours]) == list(oracle.state[theirs])
    for slot, value in oracle.state[theirs].items():
        torch.testing.assert_close(mine.state[ours][slot], value, rtol=1e-12, atol=0, msg=slot)
