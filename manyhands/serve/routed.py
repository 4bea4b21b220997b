"""Who went where, as the answers of the HTTP interface say it.

T tokens, L sparse layers, K experts per token, E experts.
"""

import base64
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from manyhands.engine.answer import Token
from manyhands.moe import Routing
from manyhands.serve.entries import token_text
from manyhands.text import Tokenizer


def routed_experts(routings: Mapping[int, Routing], T: int, start: int = 0) -> str:
    """vLLM's `routed_experts`: base64 of a .npy array [T − start, L, K], uint8 or uint16; no expert is the largest."""
    buffer = io.BytesIO()
    np.save(buffer, expert_array(routings, T)[start:], allow_pickle=False)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def expert_array(routings: Mapping[int, Routing], T: int) -> npt.NDArray[Any]:
    """[T, L, K] of the layers in their order; a layer with fewer experts a token is filled up with none."""
    layers = [routings[layer].expert_ids.numpy() for layer in sorted(routings)]
    E = max((routing.num_experts for routing in routings.values()), default=0)
    K = max((ids.shape[1] for ids in layers), default=0)
    found = np.full((T, len(layers), K), -1, dtype=np.int64)
    for at, ids in enumerate(layers):
        found[:, at, : ids.shape[1]] = ids
    return found.astype(np.uint8 if E < 256 else np.uint16)


def token_routing(tokenizer: Tokenizer, token: Token) -> dict[str, Any]:
    """One token of a stream for the page: by layer the experts that made it, with their weights."""
    layers: dict[str, list[list[float]]] = {}
    for layer, routing in token.routings.items():
        pairs = zip(routing.expert_ids[0].tolist(), routing.weights[0].tolist(), strict=True)
        layers[str(layer)] = [[expert, round(weight, 6)] for expert, weight in pairs if expert >= 0]
    return {"token": token_text(tokenizer, token.token_id), "layers": layers}
