"""What a run says of itself when a session begins: by which command, on which machine, from which text.

V vocabulary.
"""

import math
import platform
from typing import Any

import numpy as np
import numpy.typing as npt

from manyhands.config import RunConfig
from manyhands.plan.host import cpu_name, usable_cores, usable_memory
from manyhands.trace.origin import command_line
from manyhands.train.data import RunData
from manyhands.train.row_data import RowData

_COUNTED = 1 << 25  # tokens, at most, that the unigram is counted on: a second or so
_AT_ONCE = 1 << 22  # of them, because numpy counts in int64


def about(run: RunConfig, data: RunData, device: str) -> dict[str, Any]:
    """Fields of a `start` record: `command`, `python`, `machine`, `data`.

    `data` has `sources`, `train_tokens`, `valid_tokens`; of plain text also bytes and documents, and `unigram`: the
    validation loss, in nats per token, of knowing only how often each token occurs.
    """
    return {
        "command": command_line(),
        "python": platform.python_version(),
        "machine": {"cpu": cpu_name(), "cores": usable_cores(), "memory": usable_memory(), "device": device},
        "data": _data(run, data),
    }


def _data(run: RunConfig, data: RunData) -> dict[str, Any]:
    told: dict[str, Any] = {"sources": list(run.data.sources)}
    told |= {"train_tokens": len(data.train.ids), "valid_tokens": len(data.valid.ids)}
    if isinstance(data, RowData):
        return told | {"train_rows": len(data.train_rows), "valid_rows": len(data.valid_rows)}
    for side, file in (("train", data.train), ("valid", data.valid)):
        told |= {f"{side}_bytes": file.info.num_bytes, f"{side}_documents": file.info.num_documents}
    if run.model.kind != "encoder_decoder":
        told["unigram"] = unigram_loss(data.train.ids, data.valid.ids, run.model.vocab_size)
    return told


def unigram_loss(train: npt.NDArray[Any], valid: npt.NDArray[Any], vocab_size: int) -> float:
    """Cross entropy, nats per token, of the `valid` ids under how often each of V ids is in `train`, one added to each.

    Looks at the first 33 million of each.
    """
    counts_V, asked_V = _counts(train, vocab_size) + 1.0, _counts(valid, vocab_size)
    nats_V = math.log(float(counts_V.sum())) - np.log(counts_V)
    return float((asked_V * nats_V).sum() / max(1.0, float(asked_V.sum())))


def _counts(ids: npt.NDArray[Any], vocab_size: int) -> npt.NDArray[np.float64]:
    counts_V = np.zeros(vocab_size)
    for first in range(0, min(len(ids), _COUNTED), _AT_ONCE):
        counts_V += np.bincount(ids[first : min(first + _AT_ONCE, _COUNTED)], minlength=vocab_size)
    return counts_V
