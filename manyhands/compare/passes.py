"""A text through a model again and again, one layer's routing changed each time: what each pass costs, text by text.

B texts, S tokens each, T = B·S, V vocabulary, K experts per token.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from manyhands.generate.evaluate import gather_no_more, own_rows
from manyhands.layers.cross_entropy import CHUNK_VALUES
from manyhands.models import Decoder, LanguageModel
from manyhands.models.decoder import Block
from manyhands.moe import Routing
from manyhands.moe.edit import Edit, Replay
from manyhands.parallel.ranks import ALONE, Ranks
from manyhands.trace.random_router import recorded_inputs


def without(routing: Routing, off_TK: Tensor) -> Replay:
    """The same routing without some of its pairs, whose weight the token's other experts take over in proportion.

    The sum of a token's weights stays as it was; a token that has no other expert left gets nothing.
    """
    weights_TK = routing.weights.detach()
    before_T1 = weights_TK.where(routing.kept, 0.0).sum(1, keepdim=True)
    kept_TK = routing.kept & ~off_TK
    left_T1 = weights_TK.where(kept_TK, 0.0).sum(1, keepdim=True)
    grown_TK = weights_TK * (before_T1 / left_T1.where(left_T1 != 0, 1.0))
    changed_T1 = (off_TK & routing.kept).any(1, keepdim=True) & (left_T1 != 0)
    return Replay(routing.expert_ids, grown_TK.where(changed_T1, weights_TK), kept_TK)


def token_nats(head: Callable[[Tensor], Tensor], states_TD: Tensor, targets_T: Tensor, vocab_size: int) -> Tensor:
    """[T] float32: nats of each target, a few logits at a time."""
    chunk = max(1, CHUNK_VALUES // vocab_size)
    rows = (slice(start, start + chunk) for start in range(0, len(targets_T), chunk))
    each = [F.cross_entropy(head(states_TD[r]).float(), targets_T[r], reduction="none") for r in rows]
    return torch.cat(each)


class Passes:
    """Texts [B, S + 1] through a model in evaluation, as it is and with one layer edited.

    An edited pass begins at its layer, from what the layers below made when the model was as it is: the numbers of a
    whole pass for less work. `plain`, and of several ranks, each pass is a whole one.
    """

    def __init__(
        self,
        model: LanguageModel,
        ids_BS1: Tensor,
        dtype: torch.dtype | None = None,
        ranks: Ranks = ALONE,
        *,
        plain: bool = False,
    ) -> None:
        self._model, self._dtype, self._ranks = model, dtype, ranks
        self._num_texts = len(ids_BS1)
        self._own, self.counted = own_rows(self._num_texts, ranks)
        """`counted`: false where this rank runs a text that another has, because it has none."""
        ids_BS1 = ids_BS1[self._own].to(model.embed_tokens.weight.device)
        self._ids_BS, self._targets_BS = ids_BS1[:, :-1].contiguous(), ids_BS1[:, 1:]
        sparse = model.sparse_layers()
        routers = {layer: mlp.router for layer, mlp in sparse.items()}
        blocks = {}
        if isinstance(model, Decoder) and ranks.size == 1 and not plain:
            blocks = {n: block for n, block in enumerate(model.layers) if n in sparse and isinstance(block, Block)}
        with recorded_inputs(routers) as inputs, recorded_inputs(blocks) as below:
            hidden = model.hidden(self._ids_BS, dtype=dtype)
        self.routings = hidden.routings
        """Of this rank's texts, per sparse layer."""
        self.inputs = inputs
        """[T, D]: what each router read."""
        self._below = below
        self.base_B = self._nats(hidden.states)
        """[B] float64: the nats of each text."""

    def nats(self, layer: int, edit: Edit) -> Tensor:
        """[B] float64: the nats of each text where this layer's routing is edited; of all ranks' texts."""
        if (x_BSD := self._below.get(layer)) is not None:
            assert isinstance(self._model, Decoder)
            return self._nats(self._model.resumed(x_BSD, layer, self._ids_BS, {layer: edit}).states)
        return self._nats(self._model.hidden(self._ids_BS, dtype=self._dtype, edit={layer: edit}).states)

    def done(self) -> None:
        """Let go of what other ranks hold."""
        gather_no_more(self._model, self._ranks)

    def _nats(self, states_BSD: Tensor) -> Tensor:
        nats_T = token_nats(
            self._model.head, states_BSD.flatten(0, 1), self._targets_BS.flatten(), self._model.config.vocab_size
        )
        nats_B = torch.zeros(self._num_texts, dtype=torch.float64)
        if self.counted:
            nats_B[self._own] = nats_T.view(self._targets_BS.shape).double().sum(1).cpu()
        return self._ranks.sum(nats_B)
