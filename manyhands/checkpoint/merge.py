"""What tuning changed, as edits of the base's tensors: how a merged checkpoint is written without holding the model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from manyhands.checkpoint.source import Source
from manyhands.checkpoint.state import load_tensors
from manyhands.checkpoint.tuned import Change
from manyhands.config.tune import EsftTuning
from manyhands.errors import CheckpointError, ConfigError
from manyhands.families import Piece
from manyhands.files import TUNED_WEIGHTS


@dataclass(frozen=True, slots=True)
class Edit:
    """What becomes of one of our tensors."""

    apply: Callable[[Tensor], Tensor]
    """Stored tensor -> the edited one, float32: it is rounded once, when it is written."""
    experts: frozenset[int] | None = None
    """Of a stack: those that change, the others stay bit for bit. None: all of the tensor."""

    def touches(self, piece: Piece) -> bool:
        """Whether it changes that part of the tensor."""
        of_one = piece.ours_index[0] if piece.ours_index else None
        return self.experts is None or not isinstance(of_one, int) or of_one in self.experts


def edits_of(change: Change, source: Source) -> Mapping[str, Edit]:
    """Our names -> edits of `source`, its base. Raises `ConfigError` for a method whose result is no model of the
    base's kind, `CheckpointError` if the file does not fit."""
    directory, tuned = change.directory, change.tuned
    if not isinstance(tuned.tune, EsftTuning):
        raise ConfigError(
            f"{directory}: tune.method = {tuned.tune.method!r} cannot be merged: what it adds depends on the token"
        )
    state = load_tensors(directory / TUNED_WEIGHTS)
    chosen = tuned.tune.experts or {}
    edits = {}
    for name, tensor in state.items():
        if name not in source.pieces:
            raise CheckpointError(f"{directory / TUNED_WEIGHTS}: {name} is no tensor of {tuned.base.source}")
        of_layer = int(name.split(".")[1]) if ".mlp.experts." in name else None
        edits[name] = _whole(tensor) if of_layer is None else _some(tensor, chosen[of_layer])
    return edits


def _whole(tensor: Tensor) -> Edit:
    return Edit(lambda _: tensor)


def _some(stack: Tensor, experts: tuple[int, ...]) -> Edit:
    def put(whole: Tensor) -> Tensor:
        edited = whole.float().clone()
        edited[list(experts)] = stack
        return edited

    return Edit(put, frozenset(experts))
