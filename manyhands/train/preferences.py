"""Direct preference optimisation (DPO, arXiv 2305.18290): the better of two answers is made likelier.

    loss = −log σ(β·[(log π(chosen) − log ref(chosen)) − (log π(rejected) − log ref(rejected))])      equation 7

π is the model, ref the one that it started from: what it said of each answer is computed once and stored, so that no
second model is held. Rows stand in pairs, each better answer before the worse, and a pair is in one sequence.

R rows, N targets of a row, D model width.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from manyhands import strict_json
from manyhands.config import RunConfig
from manyhands.engine.mode import evaluating
from manyhands.errors import ConfigError, DataError
from manyhands.files import TRAIN_TOKENS, VALID_TOKENS, write_atomic, writing
from manyhands.generate.evaluate import Evaluation
from manyhands.models import Decoder
from manyhands.parallel.ranks import ALONE, Ranks
from manyhands.text.packing import RowBatch, RowBatches, batch_of, bins_of, in_order, places_of
from manyhands.text.pairs import NO_TARGET
from manyhands.text.row_file import RowFile
from manyhands.train.data import RunData
from manyhands.train.row_data import RowData, rows_config
from manyhands.train.rows import Rows, evaluate_rows, rows_of, run_rows, target_loss
from manyhands.train.start import Start
from manyhands.train.state import pick_device
from manyhands.train.task import Count

PAIR = 2
REFERENCE = "reference.json"


class Preferences(Rows):
    """Of two answers make the better one likelier than it was, beside the other. A target is a pair."""

    def __init__(self, beta: float) -> None:
        self.beta = beta

    def batches(self, data: RunData, run: RunConfig, ranks: Ranks) -> RowBatches:
        """Pairs, packed anew and shuffled in every epoch."""
        rows, sizes = rows_of(data), (run.train.sequence_length, run.train.batch_size)
        place = run.train.seed, ranks.rank, ranks.size
        return RowBatches(
            rows.train_rows,
            *sizes,
            *place,
            packed=rows_config(run).packing,
            sha256=data.sha256[TRAIN_TOKENS],
            group=PAIR,
            reference=_known(rows.train_reference),
        )

    def count(self, micro: RowBatch) -> Count:
        """A target is a pair of rows."""
        return Count(len(micro), sum(micro.lengths), len(micro.rows) // PAIR)

    def mean(self, model: Decoder, micro: RowBatch, states: Tensor, labels_T: Tensor) -> Tensor:
        """−log σ(β·margin), mean over the pairs."""
        margins = margins_of(row_likelihoods(model, micro, states, labels_T), micro)
        return -F.logsigmoid(self.beta * margins).mean()

    def validate(
        self, model: Decoder, data: RunData, run: RunConfig, dtype: torch.dtype, ranks: Ranks = ALONE
    ) -> Evaluation:
        """The loss on all pairs that are held out: ln 2 before anything is learnt."""
        rows, sizes = rows_of(data), (run.train.sequence_length, run.train.batch_size)
        known = _known(rows.valid_reference)
        batches = in_order(rows.valid_rows, *sizes, rows_config(run).packing, PAIR, known)
        return evaluate_rows(model, batches, dtype, ranks=ranks, task=self)


def margins_of(likelihoods_R: Tensor, batch: RowBatch) -> Tensor:
    """[R / 2] float32: how much likelier each better answer became, beside the worse, than by the reference."""
    known_R = torch.tensor([value for sequence in batch.reference for value in sequence], dtype=torch.float64)
    gained_R2 = (likelihoods_R.double() - known_R.to(likelihoods_R.device)).view(-1, PAIR)
    return (gained_R2[:, 0] - gained_R2[:, 1]).float()


def row_likelihoods(model: Decoder, batch: RowBatch, states: Tensor, labels_T: Tensor) -> Tensor:
    """[R] float32: the log-likelihood of each row's targets, in nats."""
    states_TD = states.flatten(0, -2)
    if batch.packed:
        places = zip(torch.split(states_TD, batch.lengths), torch.split(labels_T, batch.lengths), strict=True)
    else:
        places = zip(states.unbind(0), labels_T.view(states.shape[:2]).unbind(0), strict=True)
    return torch.stack([-target_loss(model, x_SD, y_S) * (y_S != NO_TARGET).sum() for x_SD, y_S in places])


@torch.no_grad()
def reference_of(model: Decoder, rows: RowFile, run: RunConfig) -> npt.NDArray[np.float64]:
    """[R]: what `model` says of every row."""
    dtype: torch.dtype = getattr(torch, run.train.dtype)
    packed, size = rows_config(run).packing, run.train.micro_batch_size or run.train.batch_size
    places = places_of(rows, PAIR)
    bins = bins_of(places, np.arange(len(places)), run.train.sequence_length, packed, PAIR)
    found = np.empty(len(rows), dtype=np.float64)
    with evaluating(list(model.modules())):
        for first in range(0, len(bins), size):
            some: Sequence[Sequence[int]] = bins[first : first + size]
            batch = batch_of(rows, some, packed)
            hidden, labels_T = run_rows(model, batch, dtype)
            likelihoods_R = row_likelihoods(model, batch, hidden.states, labels_T)
            found[[number for bin in some for number in bin]] = likelihoods_R.double().cpu().numpy()
    return found


def with_reference(
    data: RunData, directory: Path, run: RunConfig, base: Start | None, say: Callable[[str], None]
) -> RunData:
    """`data` with what `base`, the model that the run starts from, says of every row; from `directory` if it is there.

    Raises `ConfigError` for a run that starts from no model, `DataError` for files that are not what was computed.
    """
    if not isinstance(data, RowData) or rows_config(run).dpo_beta is None:
        return data
    done = directory / REFERENCE
    sides = {TRAIN_TOKENS: data.train_rows, VALID_TOKENS: data.valid_rows}
    if not done.is_file():
        if base is None:
            raise ConfigError("rows.dpo_beta: preferences are learnt by a model that is there: start says which")
        say("asking the model what it says of both answers of every row")
        dtype = torch.float32 if run.train.dtype == "float32" else None  # else as it lies there, mapped
        model = base.model(run.train.experts_implementation, dtype, pick_device(run.train.device))
        assert isinstance(model, Decoder)
        for name, rows in sides.items():
            with writing(_path(directory, name)) as file:
                np.save(file, reference_of(model, rows, run), allow_pickle=False)
        write_atomic(done, json.dumps(_digests(directory, data)))
    try:
        said: Any = strict_json.loads(done.read_bytes())
        kept = [np.load(_path(directory, name), allow_pickle=False) for name in sides]
        right = said == _digests(directory, data)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{done}: cannot be read: {' '.join(str(error).split())[:200]}") from None
    if not right:
        raise DataError(f"{done}: what the first model said is not of these rows, or was changed; start a new run")
    return replace(data, train_reference=kept[0], valid_reference=kept[1])


def _path(directory: Path, name: str) -> Path:
    return (directory / name).with_suffix(".reference.npy")


def _digests(directory: Path, data: RunData) -> dict[str, str]:
    """Of the rows and of what was said of them."""
    files = {name: _path(directory, name) for name in (TRAIN_TOKENS, VALID_TOKENS)}
    own = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files.values()}
    return {**own, **{name: data.sha256[name] for name in files}}


def _known(reference: npt.NDArray[np.float64] | None) -> npt.NDArray[np.float64]:
    if reference is None:
        raise DataError("this run's data has no reference: preferences are learnt beside what the first model says")
    return reference
