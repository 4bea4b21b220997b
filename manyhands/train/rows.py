"""What a model learns of rows: the targets of rows, packed or padded.

S places in a sequence, T tokens in a micro-batch, D model width, V vocabulary.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from manyhands.config import RunConfig
from manyhands.config.decoder import as_decoder
from manyhands.engine.mode import evaluating
from manyhands.errors import ConfigError, DataError
from manyhands.files import TRAIN_TOKENS
from manyhands.generate.evaluate import Evaluation, gather_no_more, own_rows
from manyhands.layers.cross_entropy import linear_cross_entropy
from manyhands.layers.linear import Linear
from manyhands.models import Decoder, Hidden
from manyhands.moe import LoadCounter
from manyhands.moe.load import summed
from manyhands.parallel.ranks import ALONE, Ranks
from manyhands.text.packing import RowBatch, RowBatches, in_order
from manyhands.text.pairs import NO_TARGET
from manyhands.train.data import RunData
from manyhands.train.row_data import RowData, rows_config
from manyhands.train.task import Count, Forward, Loss


class Rows:
    """Predict what of each row is learnt. A batch is a `RowBatch`."""

    def batches(self, data: RunData, run: RunConfig, ranks: Ranks) -> RowBatches:
        """The rows, packed anew and shuffled in every epoch."""
        rows, sizes = rows_of(data).train_rows, (run.train.sequence_length, run.train.batch_size)
        place = run.train.seed, ranks.rank, ranks.size
        return RowBatches(rows, *sizes, *place, packed=rows_config(run).packing, sha256=data.sha256[TRAIN_TOKENS])

    def split(self, batch: RowBatch, size: int | None) -> Sequence[RowBatch]:
        """Sequences of it."""
        return batch.split(size)

    def count(self, micro: RowBatch) -> Count:
        """Padding is neither read nor a target."""
        return Count(len(micro), sum(micro.lengths), micro.targets)

    def loss(self, model: Decoder, micro: RowBatch, how: Forward) -> Loss:
        """Cross entropy, nats per target."""
        hidden, labels_T = run_rows(
            model,
            micro,
            how.dtype,
            recompute=how.recompute,
            clip_above=how.clip_above,
            keep_outputs=how.keep_outputs,
        )
        return Loss(self.mean(model, micro, hidden.states, labels_T), hidden.routings, hidden.max_logits)

    def mean(self, model: Decoder, micro: RowBatch, states: Tensor, labels_T: Tensor) -> Tensor:
        """The loss of a micro-batch from the model's states, mean over what `count` calls targets."""
        return target_loss(model, states, labels_T)

    def figures(self, loss: float, data: RunData) -> dict[str, float]:
        """None: targets are a part of the text, so bits per byte of it would say nothing."""
        return {}

    def validate(
        self, model: Decoder, data: RunData, run: RunConfig, dtype: torch.dtype, ranks: Ranks = ALONE
    ) -> Evaluation:
        """The loss on all rows that are held out."""
        sizes = run.train.sequence_length, run.train.batch_size
        batches = in_order(rows_of(data).valid_rows, *sizes, rows_config(run).packing)
        return evaluate_rows(model, batches, dtype, ranks=ranks, task=self)


def check_rows(run: RunConfig) -> None:
    """What can be known before rows are read. Raises `ConfigError` for a model or a balance that cannot learn so."""
    model = as_decoder(run.model, "learning from rows")
    if run.start is None and run.data.tokenizer is None:
        raise ConfigError("rows: name the tokenizer that cuts them (data.tokenizer), or the model they tune (start)")
    if rows_config(run).dpo_beta is not None and run.start is None:
        raise ConfigError("rows.dpo_beta: preferences are learnt by a model that is there: start says which")
    if not rows_config(run).packing:
        return
    unpacked = "say rows.packing=false"
    if run.balance.aux_scope == "sequence" and run.balance.aux_loss_coef:
        raise ConfigError(f"balance.aux_scope = 'sequence': packed rows share a sequence; {unpacked}")
    if run.balance.sequence_loss_coef:
        raise ConfigError(f"balance.sequence_loss_coef: packed rows share a sequence; {unpacked}")
    router = None if model.moe is None else model.moe.router
    if router is not None and (router.select == "soft" or (router.limited(True) and router.capacity_per == "sequence")):
        raise ConfigError(f"model.moe.router shares out each sequence, and packed rows share one; {unpacked}")


def rows_of(data: RunData) -> RowData:
    """`data` as what `prepare_rows` makes. Raises `DataError` for a plain text's."""
    if not isinstance(data, RowData):
        raise DataError("this run's data is plain text: rows are learnt by a run that has rows")
    return data


def run_rows(model: Decoder, batch: RowBatch, dtype: torch.dtype | None, **how: Any) -> tuple[Hidden, Tensor]:
    """The model's states [1, T, D] or [B, S, D] of a batch, on the device of the model, and the labels [T] of each.

    `how` is for `Decoder.hidden`.
    """
    device = model.embed_tokens.weight.device
    if batch.packed:
        ids, labels = batch.in_a_row()
        hidden = model.hidden(ids.to(device), dtype=dtype, documents=batch.lengths, **how)
    else:
        ids, real, labels = batch.padded()
        hidden = model.hidden(ids.to(device), None if real.all() else real.to(device), dtype=dtype, **how)
    return hidden, labels.to(device).flatten()


def target_loss(model: Decoder, states: Tensor, labels_T: Tensor) -> Tensor:
    """Mean cross entropy of the labels, float32, 0 where there are none; the head is asked for nothing else."""
    asked = labels_T != NO_TARGET
    states_ND, targets_N = states.flatten(0, -2)[asked], labels_T[asked]
    if model.lm_head is None or type(model.lm_head) is Linear:
        return linear_cross_entropy(
            states_ND, model.head_weight, targets_N, torch.ones_like(targets_N, dtype=torch.bool), model.head_bias
        )
    total = F.cross_entropy(model.head(states_ND).float(), targets_N, reduction="sum")
    return total / max(1, len(targets_N))


@torch.no_grad()
def evaluate_rows(
    model: Decoder,
    batches: Iterable[RowBatch],
    dtype: torch.dtype | None = None,
    say: Callable[[int], None] | None = None,
    ranks: Ranks = ALONE,
    task: Rows | None = None,
) -> Evaluation:
    """The loss per target of `task` (None: `Rows`, in nats) over all `batches`, and the experts' load over all tokens.

    Nothing about the model changes, and no random number is drawn. Raises `DataError` if there is no target. `say` is
    given the targets so far. `ranks` share the sequences of every batch, and all get the figures of the whole.
    """
    E = model.config.moe.router.num_experts if model.config.moe else 0
    device = model.embed_tokens.weight.device
    load = {layer: LoadCounter.empty(E, device) for layer in model.config.sparse_layers}
    learnt = task or Rows()
    nats, targets = torch.zeros((), dtype=torch.float64, device=device), 0
    with evaluating(list(model.modules())):
        for batch in batches:
            targets += learnt.count(batch).targets
            rows, counted = own_rows(len(batch), ranks)
            own = batch.split(rows.stop - rows.start)[ranks.rank if counted else 0]
            hidden, labels_T = run_rows(model, own, dtype)
            loss = learnt.mean(model, own, hidden.states, labels_T)
            if counted:
                nats += loss.double() * learnt.count(own).targets
                for layer, routing in hidden.routings.items():
                    load[layer].add(routing)
            if say is not None:
                say(targets)
    gather_no_more(model, ranks)
    nats = ranks.sum(nats)
    load = summed(load, ranks)
    if not targets:
        raise DataError("there is no token to predict")
    mean = float(nats) / targets
    perplexity = math.exp(mean) if mean < 700 else math.inf
    return Evaluation(mean, perplexity, None, targets, {layer: counter.summary() for layer, counter in load.items()})
