"""The whole state of a run: what a checkpoint holds, and how it is put back, bit for bit.

A checkpoint does not say how the state lay on its processes, whose number may be another when it is read: but for the
random generators, of which each process has its own.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from manyhands import strict_json
from manyhands.checkpoint.files import building
from manyhands.checkpoint.model import save_model
from manyhands.checkpoint.sidecars import copy_tokenizer
from manyhands.checkpoint.state import (
    load_tensors,
    rng_state,
    save_tensors,
    save_whole,
    seed_rng,
    set_rng_state,
)
from manyhands.checkpoint.tuned import Tuned, write_tuned
from manyhands.checkpoint.whole import TensorReader, Whole, fill, written_together
from manyhands.errors import CheckpointError
from manyhands.files import INDEX, STATE, TUNED_WEIGHTS, WEIGHTS
from manyhands.models import AnyModel
from manyhands.models.tuned import trained_state
from manyhands.parallel.ranks import Ranks, gathered
from manyhands.train.guard import SpikeGuard
from manyhands.train.optim import Optimizers
from manyhands.train.task import Batches

_MODEL, _SLOTS = "model.", "optimizer."
_TREE = "tree"
"""Where in its file's metadata a rank's generators say what is no tensor."""


@dataclass(slots=True)
class Progress:
    """How far the run is."""

    step: int = 0
    tokens: int = 0
    elapsed: float = 0.0
    """Seconds in training steps, over all sessions of the run."""
    wall: float = 0.0
    """Seconds from the first step on with validation and saving, over all sessions."""
    lr: float | None = None
    """The learning rate of the last step."""
    max_steps: int = 0
    """Steps of the whole run as it is described now; the run's history holds how that came about."""
    planned: bool = False
    """Whether a time budget gave them."""
    validated: int = 0
    """The step of the last validation."""
    best_step: int | None = None
    """That of the best one."""
    best_loss: float | None = None
    waited: int = 0
    """Validations since the best one, or since the run last went on after its end."""

    def judge(self, loss: float) -> None:
        """Take in a validation at this step."""
        self.validated = self.step
        if loss < (math.inf if self.best_loss is None else self.best_loss):  # false for NaN
            self.best_step, self.best_loss, self.waited = self.step, loss, 0
        else:
            self.waited += self.best_step != self.step  # or else looked at again


@dataclass(slots=True)
class TrainState:
    """Everything that changes while training."""

    model: AnyModel
    optimizers: Optimizers
    batches: Batches
    guard: SpikeGuard
    progress: Progress
    tuned: Tuned | None = None
    """Of a run that saves only what it trains: how, and of which model."""
    own: tuple[str, ...] = ()
    """What the caller brought that `run.yaml` does not hold (model, batches, valid, loss)."""

    def _weights(self) -> dict[str, Tensor]:
        """What a checkpoint holds of the model, by name: all of it, or what is trained."""
        return dict(self.model.state_dict()) if self.tuned is None else trained_state(self.model)

    def save(self, directory: Path, tokenizer_path: Path, ranks: Ranks) -> None:
        """Write a complete checkpoint at `directory`, or leave things as they were. Raises `StorageError`."""
        rng_tensors, rng_meta = rng_state()
        progress = self.progress
        document: dict[str, Any] = {
            "step": progress.step,
            "tokens": progress.tokens,
            "elapsed": progress.elapsed,
            "wall": progress.wall,
            "lr": progress.lr,
            "max_steps": progress.max_steps,
            "planned": progress.planned,
            "validated": progress.validated,
            "best": None if progress.best_step is None else {"step": progress.best_step, "loss": progress.best_loss},
            "waited": progress.waited,
            "batches": self.batches.state_dict(),
            "guard": self.guard.state_dict(),
            "world": ranks.size,
            "own": list(self.own),
        }
        generators: list[bytes] = []
        if ranks.size == 1:
            document["rng"] = rng_meta
        else:
            generators = gathered(ranks, safetensors.torch.save(rng_tensors, {_TREE: json.dumps(rng_meta)}))
        weights, slots = self._weights(), self.optimizers.state_dict()
        both = {f"{_MODEL}{name}": t for name, t in weights.items()} | {f"{_SLOTS}{n}": t for n, t in slots.items()}

        def write(tensors: Whole) -> None:
            with building(directory, own=True) as partial:
                if self.tuned is None:
                    save_model(partial, self.model, tokenizer_path, tensors.under(_MODEL))
                else:
                    write_tuned(partial, self.tuned, tensors.under(_MODEL))
                    if tokenizer_path.is_dir():
                        copy_tokenizer(tokenizer_path, partial)
                save_whole(partial / "optimizer.safetensors", tensors.under(_SLOTS))
                if not generators:
                    save_tensors(partial / "rng.safetensors", rng_tensors)
                for rank, content in enumerate(generators):
                    (partial / _rng_name(rank, ranks.size)).write_bytes(content)
                (partial / STATE).write_text(json.dumps(document), encoding="utf-8")

        written_together(both, ranks, write)

    def load(self, directory: Path, ranks: Ranks, seed: int) -> int:
        """Continue from a verified checkpoint, each rank with its part of it, whichever number of them wrote it: that
        is returned. Raises `CheckpointError` if it is not this run's.

        Of another number of ranks each begins its random generators anew, from the run's `seed`, the step, how many
        they are and which one it is.
        """
        try:
            document = json.loads((directory / STATE).read_text(encoding="utf-8"))
            progress = Progress(*(document[name] for name in ("step", "tokens", "elapsed")))
            progress.wall = document.get("wall", progress.elapsed)  # older checkpoints had one clock, and no rate
            progress.lr = document.get("lr")
            progress.max_steps, progress.planned = document["max_steps"], document["planned"]
            progress.validated, progress.waited = document.get("validated", 0), document.get("waited", 0)
            if (best := document.get("best")) is not None:
                progress.best_step, progress.best_loss = int(best["step"]), float(best["loss"])
            world = int(document.get("world", 1))
            own = tuple(map(str, document.get("own", ())))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{directory / 'state.json'}: not the state of a run: {error!r}") from None
        if own != self.own:
            raise CheckpointError(
                f"{directory}: trained with {_named(own)}, and this goes on with {_named(self.own)}: give "
                "manyhands.train what it had"
            )
        if self.tuned is not None:
            what, files = str(directory / TUNED_WEIGHTS), [directory / TUNED_WEIGHTS]
        else:
            what = f"{directory}: not this run's model"
            sharded = (directory / INDEX).is_file()
            files = sorted(directory.glob("model-*.safetensors")) if sharded else [directory / WEIGHTS]
        fill(self._weights(), TensorReader(files), what)
        slots = TensorReader([directory / "optimizer.safetensors"])
        self.optimizers.load(slots.shapes, slots)
        self.batches.load_state_dict(document["batches"])
        self.guard.load_state_dict(document["guard"])
        if world != ranks.size:
            seed_rng(seed, progress.step, ranks.size, ranks.rank)
        elif world == 1:
            set_rng_state(load_tensors(directory / "rng.safetensors"), document["rng"])
        else:
            _set_generators(directory / _rng_name(ranks.rank, world))
        self.progress = progress
        return world


def _named(own: tuple[str, ...]) -> str:
    return f"the caller's own {', '.join(own)}" if own else "what run.yaml says alone"


def _set_generators(path: Path) -> None:
    """One rank's, as they were."""
    reader = TensorReader([path])
    try:
        tree = strict_json.loads(reader.metadata(_TREE))
    except ValueError as error:
        raise CheckpointError(f"{path}: the state of random generators without its {_TREE}: {error}") from None
    set_rng_state({name: reader(name) for name in reader.shapes}, tree)


def _rng_name(rank: int, world: int) -> str:
    return f"rng-{rank:05d}-of-{world:05d}.safetensors"


def count_trained(model: AnyModel) -> int:
    """Parameters that are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def count_parameters(model: AnyModel) -> tuple[int, int]:
    """(all, active per token): an expert counts as active if a token visits it; the embedding counts as stored."""
    total = sum(p.numel() for p in model.parameters())
    idle = 0
    for moe in model.sparse_layers().values():
        router = moe.router.config
        experts = sum(p.numel() for p in moe.experts.parameters())
        idle += experts * (router.num_experts - router.num_experts_per_tok) // router.num_experts
        idle += router.idle_gate_weights(model.config.hidden_size)
    return total, total - idle


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)
