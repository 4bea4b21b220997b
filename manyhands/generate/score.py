"""How probable a model finds continuations that somebody else wrote: multiple choice, perplexity of a text.

What texts have in common at their beginning (few examples, a question with four answers) runs once: the texts are
sorted and dealt to lanes, each with one cache, and a text goes on from where it parts from the one before it.

T tokens, D model width, V vocabulary, N scored positions.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from manyhands.engine.batch import Batch, Row
from manyhands.engine.caches import Caches
from manyhands.engine.refuse import check_causal, context_field
from manyhands.engine.runner import Runner
from manyhands.errors import ManyhandsError, UserError
from manyhands.layers.cache import Cache
from manyhands.layers.cross_entropy import CHUNK_VALUES
from manyhands.models import Decoder

Pair = tuple[Sequence[int], Sequence[int]]
"""Token ids that are given, and those that are scored."""
_MOST_TOKENS = 4096
"""Tokens of one pass: bounds what lies between the layers. Where a pass is cut shows in no number but for rounding."""


@dataclass(frozen=True, slots=True)
class Score:
    """What the model thinks of one continuation."""

    logprob: float
    """Sum over its tokens of log p, in nats; from raw logits, log-softmax in float32. 0 for an empty one."""
    greedy: bool
    """Whether no other token was more probable, anywhere in it."""


@dataclass(slots=True)
class _Text:
    """What runs for all pairs with the same tokens but the last."""

    ids: tuple[int, ...]
    first: int
    """The first position that predicts something scored."""
    asked: list[tuple[int, Sequence[int]]] = field(default_factory=list)
    """The number of each pair, and the targets of the positions from `first` on."""


class Scorer:
    """Scores continuations with one model. Not for several threads.

    With int8 or int4 weights, and with `exact`, a score has the same bits whatever else is scored with it.
    """

    def __init__(self, model: Decoder, *, lanes: int = 8, exact: bool = False) -> None:
        """`lanes` texts run at a time. Raises `UserError` for a model whose experts look at other tokens."""
        check_causal(model.config)
        self.model, self.lanes = model, lanes
        self.runner = Runner(model, exact)

    def score(self, pairs: Sequence[Pair], progress: Callable[[int], None] | None = None) -> list[Score]:
        """A score for each pair, in their order. `progress` is called with the pairs scored so far.

        Raises `UserError` if nothing is given, ids are not in the vocabulary or a pair is longer than the context and
        one (its last token is only predicted), `ManyhandsError` if the logits are not finite.
        """
        scores = [Score(0.0, True)] * len(pairs)
        texts = self._texts(pairs)
        done = len(pairs) - sum(len(text.asked) for text in texts)
        new = self._caches()
        lanes = [_Lane(new(), share) for share in _dealt(texts, self.lanes)]
        while lanes:
            rows = [lane.next_row() for lane in lanes]
            states_TD = self._states(Batch(rows))
            at, scored, predicted = 0, [], []
            for lane, row in zip(lanes, rows, strict=True):
                count = len(row.ids)
                scored.append(states_TD[at + lane.skipped : at + count])
                predicted.append(lane.text)
                at += count
            for number, score in self._judge(torch.cat(scored), predicted):
                scores[number] = score
                done += 1
            for lane in lanes:
                lane.finish()
            lanes = [lane for lane in lanes if lane.waiting]
            if progress is not None:
                progress(done)
        return scores

    def _caches(self) -> Callable[[], Cache]:
        """Makes one for a lane. Those in blocks share their pools: native attention reads no others together."""
        return Caches(len(self.model.layers)).new if self.runner.reads_blocks else self.model.new_cache

    def _texts(self, pairs: Sequence[Pair]) -> list[_Text]:
        """What is to run, sorted: texts that begin alike are neighbours."""
        V, limit = self.model.config.vocab_size, self.model.config.longest_continued
        found: dict[tuple[tuple[int, ...], int], _Text] = {}
        for number, (given, scored) in enumerate(pairs):
            if not scored:
                continue
            if not given:
                raise UserError("a continuation needs at least one token in front of it: the model's first, say")
            ids = (*given, *scored)
            if wrong := [token for token in (min(ids), max(ids)) if not 0 <= token < V]:
                raise UserError(f"a text to score holds token id {wrong[0]}; vocab_size = {V}")
            if len(ids) > limit + 1:
                raise UserError(f"a text to score has {len(ids)} tokens; {context_field(self.model.config)} = {limit}")
            key = ids[:-1], len(given) - 1
            found.setdefault(key, _Text(*key)).asked.append((number, scored))
        return [found[key] for key in sorted(found)]

    def _states(self, batch: Batch) -> Tensor:
        """[T, D] after the final norm."""
        found = []
        for part in batch.parts(_MOST_TOKENS):
            states = self.runner.run(part, states=True).states
            assert states is not None
            found.append(states)
        return torch.cat(found)

    def _judge(self, states_ND: Tensor, texts: list[_Text]) -> Iterator[tuple[int, Score]]:
        """The score of every pair of these texts, whose scored positions follow one another in `states_ND`."""
        rows: list[int] = []
        targets: list[int] = []
        spans: list[tuple[int, list[int]]] = []  # of each pair, where its tokens are among `targets`
        at = 0
        for text in texts:
            count = len(text.ids) - text.first
            mine: list[list[int]] = [[] for _ in text.asked]
            for offset in range(count):
                for places, (_, scored) in zip(mine, text.asked, strict=True):
                    places.append(len(targets))
                    rows.append(at + offset)
                    targets.append(scored[offset])
            spans += [(number, places) for (number, _), places in zip(text.asked, mine, strict=True)]
            at += count
        logprobs, best = self._logprobs(states_ND, rows, targets)
        for number, places in spans:
            yield number, Score(sum(logprobs[p] for p in places), all(logprobs[p] == best[p] for p in places))

    def _logprobs(self, states_ND: Tensor, rows: list[int], targets: list[int]) -> tuple[list[float], list[float]]:
        """log p of each target at its row (rows ascend), and of the most probable token there.

        The logits of all rows never exist at once.
        """
        found: list[float] = []
        best: list[float] = []
        piece = max(1, CHUNK_VALUES // self.model.config.vocab_size)
        for start in range(0, len(states_ND), piece):
            low, high = bisect_left(rows, start), bisect_left(rows, start + piece)
            with torch.inference_mode():
                logits = self.runner.logits(states_ND[start : start + piece]).float()
                if not bool(logits.amax(-1).isfinite().all()):
                    raise ManyhandsError(
                        "the model's logits are NaN or infinite: its weights are damaged or it has diverged"
                    )
                logprobs = logits.log_softmax(-1)
                at = torch.tensor(rows[low:high], device=logits.device) - start
                found += logprobs[at, torch.tensor(targets[low:high], device=logits.device)].tolist()
                best += logprobs.amax(-1)[at].tolist()
        return found, best


class _Lane:
    """Texts one after the other in one cache."""

    def __init__(self, cache: Cache, texts: list[_Text]) -> None:
        self.cache, self.waiting = cache, texts[::-1]
        self.text = self.waiting[-1]
        self.skipped = 0
        """Of the row that runs, the tokens in front of those that predict something scored."""
        self._ids: Sequence[int] = ()

    def next_row(self) -> Row:
        """What is not in the cache of the next text."""
        self.text = self.waiting[-1]
        kept = min(_shared(self._ids, self.text.ids), self.text.first)
        self.cache.truncate(kept)
        self.skipped = self.text.first - kept
        return Row(list(self.text.ids[kept:]), self.cache, draws=False)

    def finish(self) -> None:
        """It has run."""
        self._ids = self.waiting.pop().ids
        if not self.waiting:
            self.cache.truncate(0)


def _dealt(texts: list[_Text], lanes: int) -> list[list[_Text]]:
    """Neighbours stay together; every lane has about as many tokens to run."""
    middles, total = [], 0
    before: Sequence[int] = ()
    for text in texts:
        cost = len(text.ids) - min(_shared(before, text.ids), text.first)
        middles.append(total + cost // 2)
        total += cost
        before = text.ids
    dealt: list[list[_Text]] = [[] for _ in range(lanes)]
    for text, middle in zip(texts, middles, strict=True):
        dealt[middle * lanes // total].append(text)
    return [share for share in dealt if share]


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens that both begin with."""
    for at, (one, other) in enumerate(zip(a, b, strict=False)):
        if one != other:
            return at
    return min(len(a), len(b))
