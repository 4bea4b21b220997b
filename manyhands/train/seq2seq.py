"""What an encoder-decoder learns: to write again what was cut out of a text, or one sequence for another.

B pairs, S tokens read, T written.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from manyhands.config import EncoderDecoderConfig, RunConfig
from manyhands.errors import ConfigError
from manyhands.files import TRAIN_TOKENS
from manyhands.generate.evaluate import Evaluation
from manyhands.generate.evaluate_pairs import START_ID, evaluate_pairs, run_pairs
from manyhands.models.encoder_decoder import EncoderDecoder
from manyhands.parallel.ranks import ALONE, Ranks
from manyhands.text import PairBatch, PairBatches, SpanBatches, SpanRule, Tokenizer, pad_pairs, span_evaluation
from manyhands.text.pairs import Pair
from manyhands.train.preferences import Preferences
from manyhands.train.rows import Rows
from manyhands.train.task import Batches, Count, Forward, LanguageModelling, Loss, Task

if TYPE_CHECKING:
    from manyhands.train.data import RunData


class _OfPairs:
    """What both have in common: batches are `PairBatch`es, the loss is the mean over the targets."""

    def split(self, batch: PairBatch, size: int | None) -> Sequence[PairBatch]:
        """Rows of it."""
        return [batch] if size is None else batch.split(size)

    def count(self, micro: PairBatch) -> Count:
        """Padding is neither read nor a target."""
        targets = int(micro.target_mask_BT.sum())
        return Count(len(micro), int(micro.mask_BS.sum()) + targets, targets)

    def loss(self, model: EncoderDecoder, micro: PairBatch, how: Forward) -> Loss:
        """Cross entropy, nats per target."""
        hidden, mean = run_pairs(
            model,
            micro,
            how.dtype,
            recompute=how.recompute,
            clip_above=how.clip_above,
            keep_outputs=how.keep_outputs,
        )
        return Loss(mean, hidden.routings, hidden.max_logits)

    def figures(self, loss: float, data: "RunData") -> dict[str, float]:
        """None: targets are a part of the text, so bits per byte of it would say nothing."""
        return {}


class SpanCorruption(_OfPairs):
    """T5's task on packed text; see `text/spans.py`. What is cut out changes from epoch to epoch."""

    def batches(self, data: "RunData", run: RunConfig, ranks: Ranks) -> Batches:
        """The training text, cut anew, shuffled and corrupted in every epoch."""
        return SpanBatches(
            data.train.ids,
            span_rule(data.tokenizer, run),
            run.train.sequence_length,
            run.train.batch_size,
            run.train.seed,
            ranks.rank,
            ranks.size,
            sha256=data.sha256[TRAIN_TOKENS],
        )

    def validate(
        self, model: EncoderDecoder, data: "RunData", run: RunConfig, dtype: torch.dtype, ranks: Ranks = ALONE
    ) -> Evaluation:
        """The loss on the whole validation text, with the same spans in every run."""
        sizes = run.train.sequence_length, run.train.batch_size
        batches = span_evaluation(data.valid.ids, span_rule(data.tokenizer, run), *sizes)
        return evaluate_pairs(model, batches, dtype, ranks)


class SequencePairs(_OfPairs):
    """One sequence for another: translation, say. `train` and `valid` are pairs of token ids."""

    def __init__(self, train: Sequence[Pair], valid: Sequence[Pair], sha256: str | None = None) -> None:
        """`sha256` says which pairs they are: a run resumes on the same alone."""
        self.train, self.valid, self.sha256 = train, valid, sha256

    def batches(self, data: "RunData", run: RunConfig, ranks: Ranks) -> Batches:
        """The training pairs, in another order in every epoch."""
        sizes = run.train.batch_size, run.train.seed
        return PairBatches(self.train, *sizes, START_ID, ranks.rank, ranks.size, self.sha256)

    def validate(
        self, model: EncoderDecoder, data: "RunData", run: RunConfig, dtype: torch.dtype, ranks: Ranks = ALONE
    ) -> Evaluation:
        """The loss on all validation pairs."""
        return evaluate_pairs(model, self._valid_batches(run.train.batch_size), dtype, ranks)

    def _valid_batches(self, size: int) -> Iterable[PairBatch]:
        for first in range(0, len(self.valid), size):
            yield pad_pairs(self.valid[first : first + size], START_ID)


def task_of(run: RunConfig) -> Task:
    """What a run learns unless it is told: rows, spans for an encoder-decoder, the next token for the others."""
    if run.rows is not None:
        return Rows() if run.rows.dpo_beta is None else Preferences(run.rows.dpo_beta)
    return SpanCorruption() if isinstance(run.model, EncoderDecoderConfig) else LanguageModelling()


def check_spans(run: RunConfig) -> None:
    """What can be known before the text is read. Raises `ConfigError` for an encoder-decoder that cannot learn so."""
    if not isinstance(run.model, EncoderDecoderConfig):
        return
    if run.trace.every:
        raise ConfigError(
            f"trace.every = {run.trace.every}: a trace has one row of tokens for all layers, and an encoder-decoder two"
        )
    if run.data.tokenizer is None and run.start is None:
        SpanRule(range(run.spans.sentinels), 1, run.spans.noise_density, run.spans.mean_span_length).text_length(
            run.train.sequence_length
        )


def span_rule(tokenizer: Tokenizer, run: RunConfig) -> SpanRule:
    """How the run corrupts its text. Raises `ConfigError` for a tokenizer that has no sentinels or no end of text."""
    if tokenizer.eos_token_id is None or not tokenizer.sentinel_ids:
        raise ConfigError(
            "this tokenizer has no sentinels (<extra_id_0>, …): take T5's, or leave data.tokenizer out and one with "
            "spans.sentinels of them is trained"
        )
    return SpanRule(tokenizer.sentinel_ids, tokenizer.eos_token_id, run.spans.noise_density, run.spans.mean_span_length)
