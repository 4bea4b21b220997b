"""What tuning changed, as edits of the base's tensors: how a merged checkpoint is written without holding the model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from manyhands.checkpoint.source import Source
from manyhands.checkpoint.state import load_tensors
from manyhands.checkpoint.tuned import Change
from manyhands.config import BuiltConfig
from manyhands.config.tune import EsftTuning, LoraTuning
from manyhands.errors import CheckFailed, CheckpointError, ConfigError
from manyhands.families import Piece
from manyhands.files import TUNED_WEIGHTS
from manyhands.kernels.low_rank import LowRankWeights
from manyhands.models import build
from manyhands.models.adapted import merged


@dataclass(frozen=True, slots=True)
class Edit:
    """What becomes of one of our tensors."""

    apply: Callable[[Tensor, int | None], Tensor]
    """(stored tensor, None), or (one expert of a stack, its number) -> the edited one, float32: rounded once."""
    experts: frozenset[int] | None = None
    """Of a stack: those that change, the others stay bit for bit. None: all of the tensor."""
    must_change: bool = False
    """Whether a tensor, or an expert, that comes out as it was is a fault."""

    def touches(self, piece: Piece) -> bool:
        """Whether it changes that part of the tensor."""
        of_one = piece.ours_index[0] if piece.ours_index else None
        return self.experts is None or not isinstance(of_one, int) or of_one in self.experts


@dataclass(slots=True)
class Edited:
    """What edits did: names of tensors, `name[e]` for an expert's part."""

    changed: list[str] = field(default_factory=list)
    same: list[str] = field(default_factory=list)
    """Those that were to change and came out as they were."""

    def run(self, name: str, edit: Edit, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """The edited tensor as it will be written, in `dtype`; made, and looked at, an expert at a time.

        Raises `CheckFailed` for a part that must change and did not, and where shapes differ.
        """
        if edit.experts is None:
            return self._part(name, edit, tensor, None, dtype)
        out = tensor.to(dtype, copy=True)  # what is not edited stays, bit for bit
        for e in sorted(edit.experts):
            out[e] = self._part(f"{name}[{e}]", edit, tensor[e], e, dtype)
        return out

    def described(self) -> dict[str, Any]:
        """For a receipt. Raises `CheckFailed` where nothing changed."""
        if not self.changed:
            raise CheckFailed("what was tuned changes no tensor of its base, so nothing was written")
        return {"changed": sorted(set(self.changed)), "unchanged": sorted(set(self.same))}

    def _part(self, part: str, edit: Edit, tensor: Tensor, expert: int | None, dtype: torch.dtype) -> Tensor:
        edited = edit.apply(tensor, expert)
        if edited.shape != tensor.shape:
            raise CheckFailed(
                f"{part}: {list(edited.shape)} in the place of {list(tensor.shape)}, so nothing was written"
            )
        edited = edited.to(dtype)
        same = torch.equal(edited, tensor.to(dtype))
        if same and edit.must_change:
            raise CheckFailed(
                f"{part}: what was tuned changes nothing in {str(dtype).removeprefix('torch.')}, so nothing was "
                "written: try --dtype float32"
            )
        (self.same if same else self.changed).append(part)
        return edited


def edits_of(change: Change, source: Source) -> Mapping[str, Edit]:
    """Our names -> edits of `source`, its base. Raises `ConfigError` for a method whose result is no model of the
    base's kind, `CheckpointError` if the file does not fit."""
    directory, how = change.directory, change.tuned.tune
    if isinstance(how, LoraTuning):
        edits = lora_edits(lora_parts(change))
    elif isinstance(how, EsftTuning):
        state = load_tensors(directory / TUNED_WEIGHTS)
        chosen = {bank: (how.experts or {}).get(layer, ()) for bank, layer in _banks(source.config).items()}
        edits = {name: _put(tensor, chosen.get(name.rpartition(".")[0])) for name, tensor in state.items()}
    else:
        raise ConfigError(f"{directory}: {how.method} cannot be merged: what it adds depends on the token")
    for name in edits:
        if name not in source.pieces:
            raise CheckpointError(f"{directory / TUNED_WEIGHTS}: {name} is no tensor of {change.tuned.base.source}")
    return edits


def lora_parts(change: Change) -> dict[str, LowRankWeights]:
    """A, B and s by part, of a checkpoint of LoRA. Raises `ConfigError` for another method."""
    how = change.tuned.tune
    if not isinstance(how, LoraTuning):
        raise ConfigError(f"{change.directory}: {how.method} has no LoRA: PEFT has no file for what it adds")
    state = load_tensors(change.directory / TUNED_WEIGHTS)
    parts = [name.removesuffix(".lora_A") for name in state if name.endswith(".lora_A")]
    return {part: LowRankWeights(state[f"{part}.lora_A"], state[f"{part}.lora_B"], how.scale) for part in parts}


def lora_edits(parts: Mapping[str, LowRankWeights]) -> dict[str, Edit]:
    """Part (`models.adapted.parts_of`) -> (A, B, s) as edits W + s·B·A of our tensors. Where A or B is 0 there is none.

    W + s·B·A is computed in float32.
    """
    edits = {}
    for part, (A, B, scale) in parts.items():
        name = part if A.dim() == 3 else f"{part}.weight"
        there = A.flatten(-2).any(-1) & B.flatten(-2).any(-1)
        if bool(there.any()):
            some = frozenset(there.nonzero().flatten().tolist()) if A.dim() == 3 else None
            edits[name] = Edit(partial(_add, A=A, B=B, scale=scale), some, must_change=True)
    return edits


def without_delta(parts: Mapping[str, LowRankWeights], edits: Mapping[str, Edit]) -> list[str]:
    """Matrices, or experts of them, that are adapted in name alone: A or B is zero."""
    found = []
    for part, pair in parts.items():
        edit = edits.get(part if pair.A.dim() == 3 else f"{part}.weight")
        if edit is None:
            found.append(part)
        elif edit.experts is not None:
            found += [f"{part}[{e}]" for e in range(len(pair.A)) if e not in edit.experts]
    return found


def _add(weight: Tensor, expert: int | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
    if expert is not None:
        A, B = A[expert], B[expert]
    return merged(weight.float(), A, B, scale)


def _banks(config: BuiltConfig) -> dict[str, int]:
    """What experts are called in a model, and their layers."""
    with torch.device("meta"):
        model = build(config)
    layers = {id(moe.experts): layer for layer, moe in model.sparse_layers().items()}
    return {name: layers[id(module)] for name, module in model.named_modules() if id(module) in layers}


def _put(tensor: Tensor, experts: tuple[int, ...] | None) -> Edit:
    """A tensor in the place of the stored one; with `experts`, of a stack, in theirs."""
    if experts is None:
        return Edit(lambda _, __: tensor)
    place = {e: i for i, e in enumerate(experts)}

    def put(_: Tensor, expert: int | None) -> Tensor:
        assert expert is not None
        return tensor[place[expert]]

    return Edit(put, frozenset(experts))
