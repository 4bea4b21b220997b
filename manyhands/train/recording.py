"""A trace of a run: who went where in each n-th of its steps.

B sequences of S tokens in a micro-batch.
"""

import hashlib
import itertools
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from manyhands.config import RunConfig
from manyhands.errors import StorageError
from manyhands.files import TOKENIZER
from manyhands.models import AnyModel
from manyhands.moe import Routing
from manyhands.text.packing import RowBatch
from manyhands.trace.fingerprint import routed
from manyhands.trace.part import Phase
from manyhands.trace.recorder import Recorder
from manyhands.version import __version__

TRACES = "traces"
"""The folder in a run's directory."""


class StepTrace:
    """Of one session: `traces/step-000123` is the one whose first recorded step was 123. Nothing is there before it."""

    def __init__(self, folder: Path, model: AnyModel, tokenizer: Path | None, note: Callable[[str], None]) -> None:
        """`note` is told when the disk refuses: that ends the trace, and not the run."""
        self.recorder: Recorder | None = None
        self._folder, self._model, self._tokenizer, self._note = folder, model, tokenizer, note
        self._texts, self._refused = 0, False

    def seeing(self, step: int, run: RunConfig) -> Callable[[Any, Mapping[int, Routing]], None] | None:
        """What `train_step` is to give its micro-batches to; None for a step that is not recorded.

        A micro-batch is a pass: they are numbered from `step` times their number in a step.
        """
        every = run.trace.every
        if not every or step % every or self._refused or not self._model.config.sparse_layers:
            return None
        micros = run.train.batch_size // (run.train.micro_batch_size or run.train.batch_size)
        return partial(self._seen, itertools.count(step * micros), step, run)

    def _seen(
        self, passes: "itertools.count[int]", step: int, run: RunConfig, micro: Any, routings: Mapping[int, Routing]
    ) -> None:
        try:
            if self.recorder is None:
                self.recorder = self._begin(step, run)
            T = len(next(iter(routings.values())).expert_ids)
            ids, lengths = _texts_of(micro, T)
            self.recorder.add(
                routings,
                ids,
                sequence=(self._texts + torch.arange(len(lengths))).repeat_interleave(torch.tensor(lengths)).numpy(),
                position=torch.cat([torch.arange(length) for length in lengths]).numpy(),
                phase=Phase.TRAINING,
                step=next(passes),
            )
            self._texts += len(lengths)
        except StorageError as error:
            self._note(f"the trace ends here: {error}")
            self._refused = True

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
