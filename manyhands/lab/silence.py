"""What each expert is worth: the loss when it says nothing, and all else is as it was.

`inspect.ablate` masks an expert, so that its tokens go to their next choice and the other experts' weights share what
was its; here its tokens get nothing from it, and no other weight changes. So an expert that no token chose costs
exactly nothing.

B texts, S tokens each, T = B·S.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from manyhands.engine.runner import Runner
from manyhands.models import Decoder
from manyhands.moe.edit import NO_EDITS, Edits, Replay
from manyhands.moe.routing import Routing


@dataclass(frozen=True, slots=True)
class Silenced:
    """One expert, silent."""

    layer: int
    expert: int
    increase: float
    """Of the loss, nats per token."""
    share: float
    """Of the layer's (token, expert) pairs that are its. 1/E is even."""


@torch.inference_mode()
def silence(model: Decoder, ids_BS1: Tensor) -> list[Silenced]:
    """The rise of the loss on texts [B, S + 1] with each expert of each layer silent, one at a time, in their order.

    Each token but a text's first is predicted; all of them in one batch.
    """
    runner = Runner(model)
    whole, routings = _loss(runner, ids_BS1, NO_EDITS)
    found = []
    for layer, routing in routings.items():
        counts_E = routing.expert_counts()
        for expert in range(routing.num_experts):
            kept_TK = routing.kept & (routing.expert_ids != expert)
            loss, _ = _loss(runner, ids_BS1, {layer: Replay(routing.expert_ids, kept=kept_TK)})
            found.append(Silenced(layer, expert, loss - whole, float(counts_E[expert] / counts_E.sum())))
    return found


def _loss(runner: Runner, ids_BS1: Tensor, edits: Edits) -> tuple[float, dict[int, Routing]]:
    """Nats per token, and who went where."""
    hidden = runner.score(ids_BS1[:, :-1], None, edit=edits)
    logits_TV = runner.logits(hidden.states.flatten(0, 1)).double()
    return float(F.cross_entropy(logits_TV, ids_BS1[:, 1:].flatten())), hidden.routings
