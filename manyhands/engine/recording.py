"""An engine's passes as a trace: which tokens of which requests shared each of them, and who went where.

T tokens of a pass, L sparse layers, K experts per token.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from manyhands.engine.batch import Row
from manyhands.engine.ledger import bytes_of_experts
from manyhands.engine.request import Request
from manyhands.engine.runner import Routed
from manyhands.errors import StorageError
from manyhands.models import AnyModel
from manyhands.text import Tokenizer
from manyhands.trace.fingerprint import fingerprint, routed, tokenizer_sha256
from manyhands.trace.part import Array, Phase
from manyhands.trace.recorder import Recorder

_log = logging.getLogger(__name__)


class PassRecorder:
    """Gives a `Recorder` the passes of one engine. A request's number is its sequence's."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder: Recorder | None = recorder
        self._steps = 0

    def ran(self, rows: Sequence[Row], requests: Sequence[Request], routed: Routed) -> None:
        """A pass that has run: the rows' caches hold its tokens.

        Where the runner ran it in several, each is a step. Tokens that were guessed and not taken are recorded as well,
        for they ran: what comes later at the same place of a sequence stands instead of them. A token that was found
        in the cache did not run, and is not recorded. A disk that refuses ends the recording, and nothing else.
        """
        if self._recorder is None:
            return
        (ids_LTK, weights_LTK), sizes = routed.experts(), routed.sizes
        try:
            self._recorder.add_arrays(
                ids_LTK.numpy(force=True).swapaxes(0, 1),
                weights=weights_LTK.numpy(force=True).swapaxes(0, 1),
                token_ids=rows[0].ids if len(rows) == 1 else [token for row in rows for token in row.ids],
                step=self._steps
                if len(routed.sizes) == 1
                else self._steps + _spread(range(len(routed.sizes)), routed.sizes),
                **_whose(rows, requests),
            )
        except StorageError as error:
            _log.warning("the trace ends here: %s", error)
            self._recorder = None
        self._steps += len(sizes)


def _whose(rows: Sequence[Row], requests: Sequence[Request]) -> dict[str, Any]:
    """Sequence, position and phase of the tokens of a pass."""
    if len(rows) == 1 and len(rows[0].ids) == 1:  # decoding alone: not worth an array
        position, request = rows[0].position - 1, requests[0]
        phase = Phase.PREFILL if position < len(request.prompt_ids) else Phase.DECODE
        return {"sequence": request.id, "position": position, "phase": phase}
    counts, ends = [len(row.ids) for row in rows], [row.position for row in rows]
    behind = np.arange(sum(counts)) - _spread(np.cumsum(counts) - counts, counts)
    position_T = _spread([end - count for end, count in zip(ends, counts, strict=True)], counts) + behind
    prompt_T = _spread([len(request.prompt_ids) for request in requests], counts)
    phase_T = np.where(position_T < prompt_T, int(Phase.PREFILL), int(Phase.DECODE))
    return {"sequence": _spread([r.id for r in requests], counts), "position": position_T, "phase": phase_T}


def _spread(values: Any, counts: Sequence[int]) -> Array:
    """Each value as often as its count says."""
    return np.repeat(np.asarray(values), counts)


def recorder_for(
    model: AnyModel, tokenizer: Tokenizer | None, path: str | Path, source: str, limit: int | None = None
) -> Recorder:
    """A recorder of a model's routing in `path`. Raises `UserError` for a model without a sparse layer, and what
    `Recorder` does."""
    fields, sizes = routed(model.config), bytes_of_experts(model)
    return Recorder(
        path,
        **fields,
        limit=limit,
        source=source,
        model=fingerprint(model),
        tokenizer_sha256=None if tokenizer is None else tokenizer_sha256(tokenizer),
        record_bytes=tuple(sizes[layer] for layer in fields["layers"]),
    )
