"""The texts of a recorded trace, as what a request can follow.

T positions, L sparse layers, K experts per token, E experts.
"""

from dataclasses import dataclass

import numpy as np
import torch

from manyhands.engine.edited import Recorded
from manyhands.errors import UserError
from manyhands.models import Decoder
from manyhands.moe import Replay
from manyhands.trace.part import Array
from manyhands.trace.recording import Phase, Trace

MOST_TOKENS = 1 << 18
"""That are read of a trace, so that a long recording does not fill the memory."""


@dataclass(frozen=True, slots=True)
class Text:
    """One recorded sequence, from its first token on."""

    sequence: int
    prompt: int
    """So many of its tokens were given; the others the model had made."""
    recorded: Recorded


def recorded_texts(trace: Trace, model: Decoder) -> list[Text]:
    """The sequences of a trace, by number, as far as they are whole from their first token on.

    A position that ran again counts as it ran last. Raises `UserError` for a trace of another model's layers or
    experts, of too many tokens, or without a text whose tokens are known; `DataError` as `Trace.parts` does.
    """
    manifest, routers = trace.manifest, {n: mlp.router.config for n, mlp in model.sparse_layers().items()}
    if missing := [n for n in manifest.layers if n not in routers]:
        raise UserError(f"{trace.path}: routes layer {missing[0]}; the model's sparse layers are {sorted(routers)}")
    E, K = manifest.num_experts, manifest.num_experts_per_tok
    for n in manifest.layers:
        if (routers[n].num_experts, routers[n].num_experts_per_tok) != (E, K):
            own = f"{routers[n].num_experts_per_tok} of {routers[n].num_experts}"
            raise UserError(f"{trace.path}: routes to {K} of {E} experts; layer {n} of the model routes to {own}")
    if len(trace) > MOST_TOKENS:
        raise UserError(f"{trace.path}: {len(trace):,} tokens; at most {MOST_TOKENS:,} are replayed: record fewer")
    rows: dict[int, dict[int, tuple[int, int, Array]]] = {}
    for part in trace.parts():
        for at, (sequence, position) in enumerate(zip(part.sequence.tolist(), part.position.tolist(), strict=True)):
            rows.setdefault(sequence, {})[position] = int(part.token_ids[at]), int(part.phase[at]), part.expert_ids[at]
    texts = []
    for number, found in sorted(rows.items()):
        length = next((p for p in range(len(found)) if p not in found or found[p][0] < 0), len(found))
        if not length:
            continue
        ids_TLK = np.stack([found[p][2] for p in range(length)]).astype(np.int64)
        ids_TLK[ids_TLK == manifest.none] = -1
        edits = {n: Replay(torch.from_numpy(ids_TLK[:, i].copy())) for i, n in enumerate(manifest.layers)}
        made = [p for p in range(length) if found[p][1] == Phase.DECODE]
        texts.append(Text(number, made[0] if made else length, Recorded([found[p][0] for p in range(length)], edits)))
    if not texts:
        raise UserError(f"{trace.path}: there is no text in it whose first tokens and their numbers were recorded")
    return texts
