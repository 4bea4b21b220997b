"""The whole state of a run: what a checkpoint holds, and how it is put back, bit for bit."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from manyhands.checkpoint.files import building
from manyhands.checkpoint.model import save_model
from manyhands.checkpoint.sidecars import copy_tokenizer
from manyhands.checkpoint.state import load_tensors, rng_state, save_tensors, set_rng_state
from manyhands.checkpoint.tuned import Tuned, write_tuned
from manyhands.errors import CheckpointError
from manyhands.files import STATE, TUNED_WEIGHTS, WEIGHTS
from manyhands.models import AnyModel
from manyhands.models.tuned import load_trained
from manyhands.train.guard import SpikeGuard
from manyhands.train.optim import Optimizers
from manyhands.train.task import Batches


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

    def save(self, directory: Path, tokenizer_path: Path) -> None:
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
            "batches": self.batches.state_dict(),
            "guard": self.guard.state_dict(),
            "rng": rng_meta,
        }
        with building(directory, own=True) as partial:
            if self.tuned is None:
                save_model(partial, self.model, tokenizer_path)
            else:
                write_tuned(partial, self.tuned, self.model)
                if tokenizer_path.is_dir():
                    copy_tokenizer(tokenizer_path, partial)
            save_tensors(partial / "optimizer.safetensors", self.optimizers.state_dict())
            save_tensors(partial / "rng.safetensors", rng_tensors)
            (partial / STATE).write_text(json.dumps(document), encoding="utf-8")

    def load(self, directory: Path) -> None:
        """Continue from a verified checkpoint. Raises `CheckpointError` if it is not this run's."""
        try:
            document = json.loads((directory / STATE).read_text(encoding="utf-8"))
            progress = Progress(*(document[name] for name in ("step", "tokens", "elapsed")))
            progress.wall = document.get("wall", progress.elapsed)  # older checkpoints had one clock, and no rate
            progress.lr = document.get("lr")
            progress.max_steps, progress.planned = document["max_steps"], document["planned"]
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{directory / 'state.json'}: not the state of a run: {error!r}") from None
        device = str(next(self.model.parameters()).device)
        if self.tuned is not None:
            load_trained(self.model, load_tensors(directory / TUNED_WEIGHTS, device), str(directory / TUNED_WEIGHTS))
        else:
            try:
                self.model.load_state_dict(load_tensors(directory / WEIGHTS, device))
            except RuntimeError as error:
                said = " ".join(str(error).split())[:300]
                raise CheckpointError(f"{directory}: not this run's model: {said}") from None
        self.optimizers.load_state_dict(load_tensors(directory / "optimizer.safetensors", device))
        self.batches.load_state_dict(document["batches"])
        self.guard.load_state_dict(document["guard"])
        set_rng_state(load_tensors(directory / "rng.safetensors"), document["rng"])
        self.progress = progress


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
