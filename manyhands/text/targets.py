"""Rows to token ids, and which of them the model is to learn: what it will write itself, and nothing else.

    text                    every token but the first
    prompt and completion   the completion and the end of text behind it
    messages                the assistant's turns, each with the token that ends it

An assistant's turn is what the template's `{% generation %}` blocks hold (`marks.py`). Without such blocks it is what
the template adds to the conversation before it, which must stay as it was, token for token: templates that change
earlier turns (Qwen3 takes their thoughts away) are refused by the number of the turn, and the last turn alone can be
learnt.

Nothing is learnt from a row by accident: one without a target, one that is all targets, a turn whose end is not learnt
(a model that would never stop) are errors that name the row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from manyhands.errors import CheckpointError, DataError, UserError
from manyhands.text.chat import Message
from manyhands.text.row import ChatRow, PairRow, PreferenceRow, Row, TextRow
from manyhands.text.tokenizer import Tokenizer

Turns = Literal["every", "last"]


@dataclass(frozen=True, slots=True)
class Example:
    """A row in tokens."""

    where: str
    ids: npt.NDArray[np.uint32]
    """[n]"""
    learnt: npt.NDArray[np.bool_]
    """[n]: the targets. Never the first, which nothing predicts."""


class Targets:
    """What of a row is learnt, for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, turns: Turns = "every", append_stop: bool = False) -> None:
        """`turns`: of a conversation, every turn of the assistant, or the last alone. `append_stop` puts the end of
        text behind a last turn that the template leaves open.

        Raises `DataError` if the tokenizer has no end of text.
        """
        if tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no token that ends a text (<|endoftext|>, </s>, …)")
        self.tokenizer, self.turns, self.append_stop = tokenizer, turns, append_stop
        self.end: int = tokenizer.eos_token_id
        self.stops = tokenizer.eos_token_ids

    def examples(self, row: Row) -> list[Example]:
        """`row` in tokens; of a preference the better answer and the worse. Raises what `example` does."""
        if isinstance(row, PreferenceRow):
            return [self.example(row.chosen), self.example(row.rejected)]
        return [self.example(row)]

    def example(self, row: TextRow | ChatRow | PairRow) -> Example:
        """`row` in tokens. Raises `DataError` naming the row, `CheckpointError` for a template that fails."""
        if isinstance(row, TextRow):
            front = self.tokenizer.front_ids
            return _example(row, [*front, *self.tokenizer.encode(row.text), self.end], max(1, len(front)))
        if isinstance(row, PairRow):
            return self._pair(row)
        try:
            return self._chat(row)
        except UserError as error:
            kind = CheckpointError if isinstance(error, CheckpointError) else DataError
            raise kind(f"{row.where}: {error}") from None

    def _pair(self, row: PairRow) -> Example:
        """The completion's tokens are those that come after the prompt's, as when a model goes on from the prompt."""
        prompt = [*self.tokenizer.front_ids, *self.tokenizer.encode(row.prompt)]
        return _example(row, [*prompt, *self.tokenizer.spell(row.completion), self.end], len(prompt))

    def _chat(self, row: ChatRow) -> Example:
        messages = row.messages[: _last(row) + 1] if self.turns == "last" else row.messages
        more: dict[str, Any] = {} if row.tools is None else {"tools": list(row.tools)}
        ids, marked = self.tokenizer.encode_chat(messages, marked=True, **more)
        if marked is not None:
            given = len(messages) - 1 if self.turns == "last" else row.given
            first = self._prefix(messages, given, ids, more) if given else 0
            spans = [(max(start, first), stop) for start, stop in _runs(marked) if stop > first]
        else:
            learnt_turns = range(row.given, len(messages)) if self.turns == "every" else [len(messages) - 1]
            spoken = [number for number in learnt_turns if messages[number]["role"] == "assistant"]
            spans = [self._turn(messages, number, ids, more) for number in spoken]
        if not spans:
            raise DataError("there is no turn of the assistant in it to learn")
        learnt = np.zeros(len(ids) + 1, dtype=np.bool_)
        for (start, stop), (following, _) in zip(spans, [*spans[1:], (len(ids), 0)], strict=True):
            stop = self._stopped(ids, start, stop, following)
            if stop > len(ids):
                ids = [*ids, self.end]
            learnt[start:stop] = True
        learnt = learnt[: len(ids)]
        if learnt[1:].all():
            raise DataError("the template says that the model wrote all of it: nothing would be given")
        learnt[0] = False
        return Example(row.where, np.asarray(ids, dtype=np.uint32), learnt)

    def _turn(self, messages: Sequence[Message], number: int, ids: list[int], more: dict[str, Any]) -> tuple[int, int]:
        """Where message `number` is in `ids`, which are those of all `messages`."""
        first = self._prefix(messages, number, ids, more)
        until = self.tokenizer.encode_chat(messages[: number + 1], **more)[0]
        stop = self._end(until, first, len(until))
        if ids[:stop] != until[:stop]:
            raise DataError(self._changes(number, "it is another when more is said"))
        return first, stop

    def _prefix(self, messages: Sequence[Message], number: int, ids: list[int], more: dict[str, Any]) -> int:
        """How many of `ids` come before message `number`, with what invites the model to write it."""
        if not number:
            raise DataError("the assistant speaks first: there is nothing that it answers")
        before = self.tokenizer.encode_chat(messages[:number], True, **more)[0]
        if ids[: len(before)] != before:
            raise DataError(self._changes(number, "what comes before it is another once it is there"))
        return len(before)

    def _changes(self, number: int, how: str) -> str:
        advice = "" if self.turns == "last" else "; learn the last turn alone (turns = last)"
        return (
            f"the chat template changes what was said, so that message {number + 1}, the assistant's, cannot be told "
            f"from the rest: {how}{advice}, or give a template with {{% generation %}} blocks"
        )

    def _end(self, ids: list[int], start: int, stop: int) -> int:
        """Behind the last token that ends an answer in `ids[start:stop]`; what the template adds is not the model's."""
        return next((at + 1 for at in range(stop - 1, start - 1, -1) if ids[at] in self.stops), stop)

    def _stopped(self, ids: list[int], start: int, stop: int, following: int) -> int:
        """`stop`, so that the token that ends the turn is before it. Raises `DataError` where there is none.

        `following` is where the model writes again: the same turn, unless a special token is between.
        """
        last = self._end(ids, start, stop)
        if ids[last - 1] in self.stops and not self.tokenizer.decode(ids[last:stop]).strip():
            return stop
        if stop < len(ids) and ids[stop] in self.stops:  # the next turn's first token is what ends this one (GLM)
            return stop + 1
        if stop == len(ids) and self.append_stop:
            return stop + 1
        if following < len(ids) and self.tokenizer.special_ids.isdisjoint(ids[stop:following]):
            return stop
        ends = ", ".join(sorted(repr(self.tokenizer.decode([token])) for token in self.stops))
        told = self.tokenizer.decode(ids[max(start, stop - 6) : stop])
        raise DataError(
            f"a turn of the assistant ends with {told[-40:]!r} and no token that ends an answer ({ends}): the model "
            "would never learn to stop; name its end in generation_config.json's eos_token_id, or append_stop"
        )


def _last(row: ChatRow) -> int:
    """The number of the last message of the assistant."""
    for number in range(len(row.messages) - 1, row.given - 1, -1):
        if row.messages[number]["role"] == "assistant":
            return number
    raise DataError("there is no turn of the assistant in it to learn")


def _runs(flags: Sequence[bool]) -> list[tuple[int, int]]:
    """Where `flags` are true without a break."""
    padded = np.diff(np.asarray([False, *flags, False], dtype=np.int8))
    return list(zip(*(np.flatnonzero(padded == step).tolist() for step in (1, -1)), strict=True))


def _example(row: Row, ids: list[int], given: int) -> Example:
    """The first `given` are not learnt."""
    return Example(row.where, np.asarray(ids, dtype=np.uint32), np.arange(len(ids)) >= given)
