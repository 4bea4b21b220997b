"""A trace of a run: who went where in each n-th of its steps, on all ranks; rank 0 writes it.

B sequences of S tokens in a rank's micro-batch, T = B·S.
"""

import hashlib
import itertools
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import safetensors.torch
import torch
from torch import Tensor

from manyhands.config import RunConfig
from manyhands.errors import StorageError
from manyhands.files import TOKENIZER
from manyhands.models import AnyModel
from manyhands.moe import Routing
from manyhands.parallel.ranks import Ranks, gathered
from manyhands.text.packing import RowBatch
from manyhands.trace.fingerprint import routed
from manyhands.trace.part import Phase
from manyhands.trace.recorder import Recorder
from manyhands.version import __version__

_RECORDED = ("expert_ids", "weights", "kept", "token_mask")
TRACES = "traces"
"""The folder in a run's directory."""


class StepTrace:
    """Of one session: `traces/step-000123` is the one whose first recorded step was 123. Nothing is there before it."""

    def __init__(
        self, folder: Path, model: AnyModel, tokenizer: Path | None, note: Callable[[str], None], ranks: Ranks
    ) -> None:
        """`note` is told when the disk refuses: that ends the trace, and not the run."""
        self.recorder: Recorder | None = None
        self._folder, self._model, self._tokenizer, self._note = folder, model, tokenizer, note
        self._ranks = ranks
        self._texts, self._refused = 0, False

    def seeing(self, step: int, run: RunConfig) -> Callable[[Any, Mapping[int, Routing]], None] | None:
        """What `train_step` is to give its micro-batches to; None for a step that is not recorded.

        A micro-batch is a pass, with those that the other ranks have at the same time: they are numbered from `step`
        times their number in a step.
        """
        every = run.trace.every
        if not every or step % every or not self._model.config.sparse_layers:
            return None
        each = run.train.batch_size // self._ranks.size
        micros = -(-each // (run.train.micro_batch_size or each))
        return partial(self._seen, itertools.count(step * micros), step, run)

    def _seen(
        self, passes: "itertools.count[int]", step: int, run: RunConfig, micro: Any, routings: Mapping[int, Routing]
    ) -> None:
        number, mine = next(passes), _Pass.of(micro, routings)
        everyones = [mine]
        if self._ranks.size > 1:
            everyones = list(map(_Pass.unpacked, gathered(self._ranks, mine.packed())))
        if self._ranks.rank or self._refused:
            return
        try:
            if self.recorder is None:
                self.recorder = self._begin(step, run)
            for one in everyones:
                self._add(one, number)
        except StorageError as error:
            self._note(f"the trace ends here: {error}")
            self._refused = True

    def _add(self, one: "_Pass", number: int) -> None:
        assert self.recorder is not None
        lengths = one.lengths
        self.recorder.add(
            one.routings,
            one.ids,
            sequence=(self._texts + torch.arange(len(lengths))).repeat_interleave(torch.tensor(lengths)).numpy(),
            position=torch.cat([torch.arange(length) for length in lengths]).numpy(),
            phase=Phase.TRAINING,
            step=number,
        )
        self._texts += len(lengths)

    def _begin(self, step: int, run: RunConfig) -> Recorder:
        names = (f"step-{step:06d}" + (f"-{number}" if number else "") for number in itertools.count())
        moe = self._model.config.moe
        assert moe is not None
        vocabulary = self._tokenizer and (self._tokenizer / TOKENIZER if self._tokenizer.is_dir() else self._tokenizer)
        return Recorder(
            next(path for name in names if not os.path.lexists(path := self._folder / name)),
            **routed(self._model.config),
            recorded=("weights", "kept") if moe.router.limited(training=True) else ("weights",),
            limit=run.trace.max_bytes,
            every=run.trace.every,
            source=f"recorded by manyhands train {__version__}",
            tokenizer_sha256=hashlib.sha256(vocabulary.read_bytes()).hexdigest()
            if vocabulary and vocabulary.is_file()
            else None,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.recorder is not None and not self._refused:
            try:
                self.recorder.close()
            except StorageError as refused:
                self._note(str(refused))


def _texts_of(micro: Any, T: int) -> tuple[Tensor | int, list[int]]:
    """The ids [T] of a micro-batch's tokens and the lengths of its texts; −1 and [T] for what another task may give."""
    if isinstance(micro, RowBatch):
        ids_BS = micro.in_a_row()[0] if micro.packed else micro.padded()[0]
        return ids_BS.reshape(-1), micro.lengths if micro.packed else [ids_BS.shape[1]] * len(ids_BS)
    if isinstance(micro, Tensor) and micro.dim() == 2 and micro[:, :-1].numel() == T:
        return micro[:, :-1].reshape(-1), [micro.shape[1] - 1] * len(micro)
    return -1, [T]


class _Pass(NamedTuple):
    """What one rank's micro-batch adds to a trace."""

    ids: Tensor | int
    """[T]; −1 where the task's micro-batches are no texts."""
    lengths: list[int]
    """Of its texts."""
    routings: Mapping[int, Routing]

    @classmethod
    def of(cls, micro: Any, routings: Mapping[int, Routing]) -> "_Pass":
        return cls(*_texts_of(micro, len(next(iter(routings.values())).expert_ids)), routings)

    def packed(self) -> bytes:
        """As safetensors, with what a trace may hold of the routings."""
        tensors = {"lengths": torch.tensor(self.lengths)}
        if isinstance(self.ids, Tensor):
            tensors["ids"] = self.ids
        for layer, routing in self.routings.items():
            tensors |= {f"{layer}.{name}": getattr(routing, name) for name in _RECORDED}
        # copies: layers may share a tensor, the mask of padding, which safetensors does not write twice
        return safetensors.torch.save({name: t.detach().contiguous().clone() for name, t in tensors.items()})

    @classmethod
    def unpacked(cls, data: bytes) -> "_Pass":
        """From what `packed` gave."""
        tensors = safetensors.torch.load(data)
        lengths, ids = tensors.pop("lengths").tolist(), tensors.pop("ids", -1)
        found: dict[int, dict[str, Tensor]] = {}
        for path, tensor in tensors.items():
            layer, _, name = path.partition(".")
            found.setdefault(int(layer), {})[name] = tensor
        none = torch.empty(len(next(iter(found.values()))["expert_ids"]), 0)
        routings = {
            layer: Routing(parts["expert_ids"], parts["weights"], none, none, parts["kept"], parts["token_mask"])
            for layer, parts in found.items()
        }
        return cls(ids, lengths, routings)
