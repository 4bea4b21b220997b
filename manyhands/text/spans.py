"""T5's span corruption (arXiv 1910.10683 §3.1.4): pieces of a text are cut out, and are to be written again.

    read    Thank you <extra_id_0> me to your party <extra_id_1> week. </s>
    write   <extra_id_0> for inviting <extra_id_1> last </s>

A text of L tokens loses round(density · L) of them in round(lost / mean) spans; each leaves a sentinel behind, in the
order of the text. The lengths depend on L alone, so a batch of equal texts needs no padding. L = 568, 15 % and 3 give
512 tokens to read and 114 to write (T5 and Switch); 141 give 128 and 29; 70 give 64 and 14.

N tokens in all, B texts in a batch, L tokens of text in each, P spans.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from manyhands.errors import ConfigError, DataError
from manyhands.text.batches import cut_tokens
from manyhands.text.pairs import PairBatch
from manyhands.text.walk import Walk, bits_of

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class SpanRule:
    """How much is cut out of a text, and what is put in its place."""

    sentinels: Sequence[int]
    """Token ids; the first span leaves the first."""
    eos_token_id: int
    """Behind what is read and behind what is written."""
    noise_density: float = 0.15
    """Share of the tokens that is lost."""
    mean_span_length: float = 3.0

    def lost(self, length: int) -> tuple[int, int]:
        """(tokens lost, spans) of a text of `length` ≥ 2 tokens: at least one, and at least one that stays."""
        tokens = min(max(round(length * self.noise_density), 1), length - 1)
        spans = min(max(round(tokens / self.mean_span_length), 1), tokens, length - tokens)
        return tokens, spans

    def lengths(self, length: int) -> tuple[int, int]:
        """(tokens to read, tokens to write) for a text of `length`, both with their end."""
        tokens, spans = self.lost(length)
        return length - tokens + spans + 1, tokens + spans + 1

    def text_length(self, sequence_length: int) -> int:
        """L: the longest text of which at most `sequence_length` tokens are left to read.

        Raises `ConfigError` for less than 3, and if there are fewer sentinels than it has spans.
        """
        if sequence_length < 3:
            raise ConfigError(f"sequence_length = {sequence_length}: span corruption needs 3 tokens to read at least")
        length = 2
        while self.lengths(length + 1)[0] <= sequence_length:
            length += 1
        if (spans := self.lost(length)[1]) > len(self.sentinels):
            raise ConfigError(
                f"sequence_length = {sequence_length}: a text has {spans} spans, and there are "
                f"{len(self.sentinels)} sentinels; it takes more of them, or a shorter sequence"
            )
        return length

    def mask(self, length: int, bits: Sequence[np.random.PCG64]) -> npt.NDArray[np.bool_]:
        """[B, L], true where a token is lost; a row for each generator.

        What stays and what is lost are each cut into P parts at random, and laid in turn: a text begins with what
        stays and ends with what is lost.
        """
        lost, spans = self.lost(length)
        kept = length - lost
        raw_BR = np.stack([one.random_raw(length - 2) for one in bits])
        parts_BP2 = np.stack([_cut(raw_BR[:, : kept - 1], kept, spans), _cut(raw_BR[:, kept - 1 :], lost, spans)], -1)
        turns = np.tile([False, True], len(bits) * spans)
        return np.repeat(turns, parts_BP2.ravel()).reshape(len(bits), length)

    def corrupt(self, ids_BL: Ids, mask_BL: npt.NDArray[np.bool_]) -> tuple[Ids, Ids]:
        """(what is read, what is to be written), where `mask` says what is lost: equally many in each row."""
        return self._replace(ids_BL, mask_BL), self._replace(ids_BL, ~mask_BL)

    def batch(self, ids_BL: Ids, bits: Sequence[np.random.PCG64]) -> PairBatch:
        """Texts, corrupted; one generator for each row."""
        read_BS, written_BT = self.corrupt(ids_BL, self.mask(ids_BL.shape[1], bits))
        ids_BS, labels_BT = torch.from_numpy(read_BS), torch.from_numpy(written_BT)
        return PairBatch(ids_BS, torch.ones_like(ids_BS, dtype=torch.bool), labels_BT)

    def _replace(self, ids_BL: Ids, gone_BL: npt.NDArray[np.bool_]) -> Ids:
        """A sentinel for each run of what is gone, and the end behind the rest."""
        B = len(ids_BL)
        before_BL = np.concatenate([np.zeros((B, 1), dtype=np.bool_), gone_BL[:, :-1]], 1)
        first_BL = gone_BL & ~before_BL
        number_BL = np.maximum(first_BL.cumsum(1) - 1, 0)
        replaced_BL = np.where(first_BL, np.asarray(self.sentinels, dtype=np.int64)[number_BL], ids_BL)
        left_BS = replaced_BL[~gone_BL | first_BL].reshape(B, -1)
        return np.concatenate([left_BS, np.full((B, 1), self.eos_token_id, dtype=np.int64)], 1)


class SpanBatches:
    """An endless iterator of `PairBatch`es from a row of tokens: cut anew, shuffled and corrupted in every epoch.

    What is lost is a function of seed, epoch and place alone. `state_dict` is the exact position, as that of
    `PackedBatches` is.
    """

    def __init__(
        self,
        tokens: npt.NDArray[Any],
        rule: SpanRule,
        sequence_length: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        sha256: str | None = None,
    ) -> None:
        """`tokens [N]`; `sequence_length` is what the encoder reads. Raises `DataError` for N < L; `ConfigError`."""
        self.length = L = rule.text_length(sequence_length)
        if len(tokens) < L:
            raise DataError(
                f"{len(tokens)} tokens are too few for one text of {L}, of which sequence_length = {sequence_length} "
                "are left to read; add text or shorten the sequence"
            )
        self.tokens, self.rule, self.seed = tokens, rule, seed
        identity: dict[str, int | float | str] = {
            **({} if sha256 is None else {"sha256": sha256}),
            "sequence_length": sequence_length,
            "batch_size": batch_size,
            "num_tokens": len(tokens),
            "seed": seed,
            "noise_density": rule.noise_density,
            "mean_span_length": rule.mean_span_length,
        }
        self.walk = Walk(self._cut, identity, batch_size, rank, world_size)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> PairBatch:
        starts_B, epochs_B = self.walk.take()
        ids_BL = self.tokens[starts_B[:, None] + np.arange(self.length)].astype(np.int64)
        # + 1: NumPy takes [seed, epoch, 0] for [seed, epoch], which shuffles the epoch.
        bits = [bits_of(self.seed, int(epoch), int(start) + 1) for start, epoch in zip(starts_B, epochs_B, strict=True)]
        return self.rule.batch(ids_BL, bits)

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it is a position in."""
        return self.walk.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position. Raises `CheckpointError` if it is one in other data or other batches."""
        self.walk.load_state_dict(state)

    def _cut(self, epoch: int) -> Ids:
        return cut_tokens(len(self.tokens), self.length, self.length, self.seed, epoch)


def span_evaluation(
    tokens: npt.NDArray[Any], rule: SpanRule, sequence_length: int, batch_size: int, max_batches: int | None = None
) -> Iterator[PairBatch]:
    """All of `tokens [N]` in order, or its first `max_batches` batches; the same spans whatever the run's seed.

    The last text is shorter, and a batch of its own. Raises `DataError`, on the call, for fewer than two tokens.
    """
    if len(tokens) < 2:
        raise DataError(f"{len(tokens)} tokens are too few to evaluate on: 2 are needed")
    L, N = rule.text_length(sequence_length), len(tokens)
    whole = np.arange(0, N - L + 1, L)
    groups = [whole[first : first + batch_size] for first in range(0, len(whole), batch_size)]
    lengths = [L] * len(groups)
    if N % L >= 2:
        groups.append(np.asarray([N - N % L]))
        lengths.append(N % L)
    return _span_evaluation(tokens, rule, list(zip(groups, lengths, strict=True))[:max_batches])


def _span_evaluation(tokens: npt.NDArray[Any], rule: SpanRule, groups: list[tuple[Ids, int]]) -> Iterator[PairBatch]:
    for starts, length in groups:
        ids_BL = tokens[starts[:, None] + np.arange(length)].astype(np.int64)
        yield rule.batch(ids_BL, [bits_of(0, 0, int(start) + 1) for start in starts])


def _cut(raw_BR: npt.NDArray[np.uint64], items: int, parts: int) -> Ids:
    """[B, parts]: lengths ≥ 1 that sum to `items`, from `items` − 1 random numbers a row."""
    B = len(raw_BR)
    ends_BP = np.sort(np.argsort(raw_BR, axis=1, kind="stable")[:, : parts - 1], axis=1) + 1
    edges = [np.zeros((B, 1), dtype=np.int64), ends_BP, np.full((B, 1), items, dtype=np.int64)]
    return np.diff(np.concatenate(edges, 1), axis=1)
