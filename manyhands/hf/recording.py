"""A trace of a transformers model: every forward of it, `generate`'s included.

B sequences of S tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from manyhands.hf.routings import argument, watch
from manyhands.moe import Routing
from manyhands.trace.part import Phase
from manyhands.trace.recorder import Recorder, new_directory
from manyhands.version import __version__


class Recording:
    """What `record` has recorded so far."""

    def __init__(self, path: str | Path, limit: int | None, phase: Phase | None) -> None:
        self.path = new_directory(path)
        self.recorder: Recorder | None = None
        """None before the first forward, which says how many experts there are."""
        self._limit, self._phase = limit, phase
        self._steps = self._texts = 0
        self._running: Tensor | None = None
        """[B] the texts of the last forward, which the next goes on with if it has a cache."""
        self._given: dict[str, Any] = {}

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward begins: what it is given, and how much its cache holds, which will have grown when it ends."""
        found = {name: argument(model, args, kwargs, name) for name in ("input_ids", "attention_mask")}
        cache = argument(model, args, kwargs, "past_key_values")
        past = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
        if isinstance(found["input_ids"], Tensor) or not self._given:
            self._given = found | {"past": past}

    def each(self, routings: dict[int, Routing]) -> None:
        """A forward has ended. For `watch`."""
        first = next(iter(routings.values()))
        T, given = len(first.expert_ids), self._given
        self._given = {}
        if self.recorder is None:
            self.recorder = Recorder(
                self.path,
                layers=sorted(routings),
                num_experts=max(r.num_experts for r in routings.values()),
                num_experts_per_tok=max(r.expert_ids.shape[1] for r in routings.values()),
                limit=self._limit,
                source=f"recorded by manyhands.hf.record {__version__}",
            )
        ids, past = given.get("input_ids"), given.get("past", 0)
        tokens = ids if isinstance(ids, Tensor) and ids.dim() == 2 and ids.numel() == T else None
        B = 1 if tokens is None else len(tokens)
        S = T // B
        position_BS = past + torch.arange(S).expand(B, S)
        mask = given.get("attention_mask")
        if isinstance(mask, Tensor) and mask.shape == (B, past + S):  # padding in front is no part of a text
            position_BS = (mask.cpu().long().cumsum(1) - 1).clamp(min=0)[:, past:]
        if past == 0 or self._running is None or len(self._running) != B:
            self._running = self._texts + torch.arange(B)
            self._texts += B
        phase = self._phase
        if phase is None:
            phase = Phase.DECODE if past and S == 1 else Phase.PREFILL
        self.recorder.add(
            routings,
            -1 if tokens is None else tokens.reshape(-1),
            sequence=self._running.repeat_interleave(S).numpy(),
            position=position_BS.reshape(-1).numpy(),
            phase=phase,
            step=self._steps,
        )
        self._steps += 1


@contextmanager
def record(
    model: nn.Module, path: str | Path, *, limit: int | None = None, phase: Phase | None = None
) -> Iterator[Recording]:
    """Record every forward of a transformers model as a trace in a new directory `path`.

        with record(model, "trace"):
            model.generate(**inputs)

    Each forward is a step; each row of `input_ids` is a text, which the next forward goes on with if it is given a
    cache. `phase` None: forwards of one token behind a cache are decoding, others prefill. `limit` as for `Recorder`.
    The output stays the same, bit for bit. Raises what `watch` does, `UserError` for a directory that is used, and
    `StorageError` if the disk refuses. A block in which no forward ran leaves no trace.
    """
    recording = Recording(path, limit, phase)
    with watch(model, each=recording.each, detach=True):
        handles = [
            part.register_forward_pre_hook(recording.before, with_kwargs=True, prepend=True) for part in _parts(model)
        ]
        try:
            yield recording
        finally:
            for handle in handles:
                handle.remove()
            if recording.recorder is not None:
                recording.recorder.close()


def _parts(model: nn.Module) -> list[nn.Module]:
    """Whichever of them is called first is given what the forward is of."""
    from transformers import PreTrainedModel

    return [part for part in model.modules() if isinstance(part, PreTrainedModel)] or [model]
