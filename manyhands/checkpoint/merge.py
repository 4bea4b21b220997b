"""What tuning changed, as edits of the base's tensors: how a merged checkpoint is written without holding the model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

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
from manyhands.models import build
from manyhands.models.adapted import merged


@dataclass(frozen=True, slots=True)
class Edit:
    """What becomes of one of our tensors."""

    apply: Callable[[Tensor], Tensor]
    """Stored tensor -> the edited one, float32: it is rounded once, when it is written."""
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
        """The edited tensor, looked at as it will be written, in `dtype`, expert by expert.

        Raises `CheckFailed` for one that must change and did not, and one that must not and did.
        """
        edited = edit.apply(tensor)
        if edited.shape != tensor.shape:
            raise CheckFailed(
                f"{name}: {list(edited.shape)} in the place of {list(tensor.shape)}, so nothing was written"
            )
        for e in range(len(tensor)) if edit.experts is not None else (None,):
            which = slice(None) if e is None else slice(e, e + 1)
            part, wanted = name if e is None else f"{name}[{e}]", edit.experts is None or e in edit.experts
            same = torch.equal(edited[which].to(dtype), tensor[which].to(dtype))
            if wanted and same and edit.must_change:
                raise CheckFailed(
                    f"{part}: what was tuned changes nothing in {str(dtype).removeprefix('torch.')}, so nothing was "
                    "written: try --dtype float32"
                )
            if not wanted and not same:
                raise CheckFailed(f"{part}: changed, and was not tuned, so nothing was written")
            if wanted:
                (self.same if same else self.changed).append(part)
        return edited


def edits_of(change: Change, source: Source) -> Mapping[str, Edit]:
    """Our names -> edits of `source`, its base. Raises `ConfigError` for a method whose result is no model of the
    base's kind, `CheckpointError` if the file does not fit."""
    directory, how = change.directory, change.tuned.tune
    state = load_tensors(directory / TUNED_WEIGHTS)
    if isinstance(how, LoraTuning):
        parts = {name.removesuffix(".lora_A") for name in state if name.endswith(".lora_A")}
        edits = lora_edits({part: (state[f"{part}.lora_A"], state[f"{part}.lora_B"], how.scale) for part in parts})
    elif isinstance(how, EsftTuning):
        chosen = {bank: (how.experts or {}).get(layer, ()) for bank, layer in _banks(source.config).items()}
        edits = {name: _put(tensor, chosen.get(name.rpartition(".")[0])) for name, tensor in state.items()}
    else:
        raise ConfigError(f"{directory}: {how.method} cannot be merged: what it adds depends on the token")
    for name in edits:
        if name not in source.pieces:
            raise CheckpointError(f"{directory / TUNED_WEIGHTS}: {name} is no tensor of {change.tuned.base.source}")
    return edits


def lora_edits(parts: Mapping[str, tuple[Tensor, Tensor, float]]) -> dict[str, Edit]:
    """Part (`models.adapted.parts_of`) -> (A, B, s) as edits W + s·B·A of our tensors. Where B·A is 0 there is none."""
    edits = {}
    for part, (A, B, scale) in parts.items():
        name = part if ".mlp.experts." in part else f"{part}.weight"
        if A.dim() == 2:
            if A.any() and B.any():
                edits[name] = Edit(partial(_add, A=A, B=B, scale=scale), must_change=True)
        else:
            some = frozenset((A.flatten(1).any(1) & B.flatten(1).any(1)).nonzero().flatten().tolist())
            if some:
                edits[name] = Edit(partial(_add, A=A, B=B, scale=scale), some, must_change=True)
    return edits


def _add(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
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
        return Edit(lambda _: tensor)

    def put(whole: Tensor) -> Tensor:
        edited = whole.float().clone()
        edited[list(experts)] = tensor
        return edited

    return Edit(put, frozenset(experts))
