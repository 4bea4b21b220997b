"""How well an encoder-decoder writes what it is to write: loss, perplexity, and the load of its experts.

B pairs, S tokens read, T written.
"""

import math
from collections.abc import Iterable

import torch

from manyhands.errors import DataError
from manyhands.generate.evaluate import Evaluation, gather_no_more, own_rows
from manyhands.layers.cross_entropy import linear_cross_entropy
from manyhands.models.decoder import Hidden
from manyhands.models.encoder_decoder import EncoderDecoder
from manyhands.moe import LoadCounter
from manyhands.moe.load import summed
from manyhands.parallel.ranks import ALONE, Ranks, sum_of
from manyhands.text import PairBatch

START_ID = 0
"""What a decoder reads first, and padding: T5's, and that of every vocabulary that `Tokenizer.train` makes for it."""


def run_pairs(
    model: EncoderDecoder, batch: PairBatch, dtype: torch.dtype | None = None, **how: bool | float | None
) -> tuple[Hidden, torch.Tensor]:
    """The decoder's states [B, T, D] on `batch`, and the mean loss over its targets: nats per target, 0 without any.

    `how` are further arguments of `EncoderDecoder.hidden`.
    """
    batch = batch.to(model.embed_tokens.weight.device)
    targets_BT = batch.target_mask_BT
    masks = [None if bool(mask.all()) else mask for mask in (batch.mask_BS, targets_BT)]
    hidden = model.hidden(batch.ids_BS, batch.decoder_ids(START_ID, START_ID), *masks, dtype=dtype, **how)  # type: ignore[arg-type]
    labels_N = batch.labels_BT.clamp(min=0).flatten()
    mean = linear_cross_entropy(hidden.states.flatten(0, 1), model.head_weight, labels_N, targets_BT.flatten())
    return hidden, mean


@torch.no_grad()
def evaluate_pairs(
    model: EncoderDecoder, batches: Iterable[PairBatch], dtype: torch.dtype | None = None, ranks: Ranks = ALONE
) -> Evaluation:
    """Predict every target of `batches`, each from what is read and from the targets before it.

    `ranks` share the rows of every batch, and all get the figures of the whole.

    Nothing about the model changes, and no random number is drawn. Raises `DataError` if there is no target.
    """
    was_training = model.training
    model.eval()
    moe, device = model.config.moe, model.embed_tokens.weight.device
    E = moe.router.num_experts if moe else 0
    load = {layer: LoadCounter.empty(E, device) for layer in model.config.sparse_layers}
    nats, targets = 0.0, 0
    try:
        for batch in batches:
            targets += int(batch.target_mask_BT.sum())
            rows, counted = own_rows(len(batch), ranks)
            own = batch.split(rows.stop - rows.start)[ranks.rank if counted else 0]
            hidden, mean = run_pairs(model, own, dtype)
            if not counted:
                continue
            nats += float(mean) * int(own.target_mask_BT.sum())
            for layer, routing in hidden.routings.items():
                load[layer].add(routing)
    finally:
        model.train(was_training)
    if not targets:
        raise DataError("there is no token to predict")
    gather_no_more(model, ranks)
    [nats] = sum_of([nats], ranks)
    load = summed(load, ranks)
    loss = nats / targets
    return Evaluation(
        loss=loss,
        perplexity=math.exp(loss) if loss < 700 else loss * math.inf,
        bits_per_byte=None,
        tokens=targets,
        load={layer: counter.summary() for layer, counter in load.items()},
    )
