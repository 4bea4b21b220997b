"""Whether a model's weights are still those that a cache was computed with."""

from itertools import chain
from operator import is_

import torch
from torch import Tensor

from manyhands.models import Decoder
from manyhands.runtime.snapshot import Snapshot

_ENDS = 16
"""Numbers at either end of a tensor that are compared: PyTorch does not count what is written through `.data`."""


class Weights:
    """What a model was made of when somebody last looked."""

    def __init__(self, model: Decoder) -> None:
        self._model = model
        self._look()

    def changed(self) -> bool:
        """Whether anything was replaced or written to since the last look. This is the next one."""
        same = (
            all(map(is_, self._parts(), self._roots))
            and self._snapshot.holds()
            and self._versions() == self._counted
            and torch.equal(torch.cat(self._ends), self._read)
        )
        if not same:
            self._look()
        return not same

    def _parts(self) -> list[object]:
        m = self._model
        return [m.layers, m.norm, m.embed_tokens, m.lm_head, m.config]

    def _look(self) -> None:
        m = self._model
        self._roots = self._parts()
        self._snapshot = Snapshot([part for part in self._roots if isinstance(part, torch.nn.Module)])
        self._tensors = [t.detach() for t in chain(m.parameters(), m.buffers())]
        self._counted = self._versions()
        self._ends = list(chain.from_iterable(map(_ends, self._tensors)))
        self._read = torch.cat(self._ends)

    def _versions(self) -> list[int | None]:
        """How often each was written to; None for an inference tensor, which does not count."""
        return [None if t.is_inference() else t._version for t in self._tensors]


def _ends(t: Tensor) -> tuple[Tensor, Tensor]:
    """Views of bytes; of a tensor that does not lie in one piece, of a part that does."""
    while not t.is_contiguous():
        t = t[0]
    flat, count = t.reshape(-1).view(torch.uint8), _ENDS * t.element_size()
    return flat[:count], flat[-count:]
