"""How one request's tokens are routed: edits of its layers, a replay as long as its tokens are those recorded.

T positions of a sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from manyhands.models import Decoder
from manyhands.moe import Replay, Routing
from manyhands.moe.edit import Edit, Edits, check_edits, replays, rows_of


@dataclass(frozen=True, slots=True, eq=False)
class Recorded:
    """The routing of a sequence that ran before, and its tokens."""

    token_ids: Sequence[int]
    """Where a request's tokens part from these, its replay ends, and the routers decide."""
    edits: Edits
    """A replay's row p is of the token at position p; what was not recorded, or is behind its end, is -1."""


class Edited:
    """One request's."""

    def __init__(self, edit: "Edits | Recorded", model: Decoder) -> None:
        """Raises `ConfigError` for what the model's layers cannot follow."""
        self._token_ids = edit.token_ids if isinstance(edit, Recorded) else None
        given = edit.edits if isinstance(edit, Recorded) else edit
        self.edits = {layer: Replay.of(e) if isinstance(e, Routing) else e for layer, e in given.items()}
        check_edits(self.edits, {layer: mlp.router.config for layer, mlp in model.sparse_layers().items()})

    @property
    def name(self) -> str | None:
        """What is computed under edits of equal names is the same; None: nobody else's, it is a replay."""
        return None if replays(self.edits) else repr(sorted(self.edits.items()))

    def rows(self, before: Sequence[int], ids: Sequence[int]) -> Edits:
        """For the tokens `ids` behind the tokens `before`."""
        if not replays(self.edits):
            return self.edits
        first, agreed = len(before), len(before) + len(ids)
        if self._token_ids is not None:
            both = zip((*before, *ids), self._token_ids, strict=False)
            agreed = next((at for at, (own, recorded) in enumerate(both) if own != recorded), len(self._token_ids))
        found = rows_of(self.edits, slice(first, min(agreed, first + len(ids))) if agreed > first else slice(0))
        return {layer: _filled(edit, len(ids)) for layer, edit in found.items()}


def _filled(edit: Edit, count: int) -> Edit:
    """A replay with rows of nothing recorded behind its own, as many as there are tokens."""
    if not isinstance(edit, Replay) or len(edit.expert_ids) == count:
        return edit

    def longer(t: Tensor, value: float) -> Tensor:
        return torch.cat((t, t.new_full((count - len(t), *t.shape[1:]), value)))

    ids, weights, kept = edit.expert_ids, edit.weights, edit.kept
    ids = ids if ids.dtype.is_signed else ids.long()
    more = None if weights is None else longer(weights, 0.0), None if kept is None else longer(kept, True)
    return Replay(longer(ids, -1), *more)
