"""Questions of lm-eval as token ids, and its settings as ours. Needs no lm-eval.

The tokens are those of lm-eval's own models (`TemplateLM._encode_pair`, `get_rolling_token_windows`), so that results
can be compared with theirs, and with those over HTTP.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from manyhands.config import SamplingConfig, parse
from manyhands.errors import UserError
from manyhands.generate.defaults import NEUTRAL
from manyhands.text import Tokenizer

SEED = 1234
"""What lm-eval's clients send."""
MOST_STOPS = 16
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""One thing under four names; the first that is given counts, as there."""
_TAKEN = ("top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed")
_MEANINGLESS = ("num_beams", "use_cache", "pad_token_id", "early_stopping", "return_dict_in_generate")
"""Of transformers' `generate`, where they change no token while there is one beam."""


@dataclass(frozen=True, slots=True)
class Asker:
    """Makes token ids of one model's questions."""

    tokenizer: Tokenizer
    max_length: int
    """Tokens the model sees at most."""
    add_bos: bool | None = None
    """Whether the beginning-of-text token stands in front; None: as the tokenizer does it."""

    @property
    def prefix(self) -> int:
        """What is given where nothing is: the beginning-of-text token, else the end-of-text token.

        Raises `UserError` if there is neither.
        """
        t = self.tokenizer
        for name in (t.bos_token, t.eos_token):
            if name is not None and (found := t.inner.token_to_id(name)) is not None:
                return int(found)
        if t.eos_token_id is None:
            raise UserError("the tokenizer names neither a beginning nor an end of text to score the first token from")
        return t.eos_token_id

    def encode(self, text: str) -> list[int]:
        """A context: special tokens that are spelled out are tokens, since chat templates are text here; the
        beginning-of-text token in front if it does not stand there already."""
        ids = self.plain(text)
        if self.add_bos is False:
            return ids
        front = self.tokenizer.front_ids or ([self.prefix] if self.add_bos else [])
        return ids if ids[: len(front)] == front else [*front, *ids]

    def plain(self, text: str) -> list[int]:
        """The same without anything in front."""
        return self.tokenizer.encode(text, parse_special=True)

    def pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """What is given and what is scored, cut from the left to what the model sees.

        Spaces at the end of the context belong to the continuation's first word. A token that spans both counts as
        context. Raises `UserError` for a continuation that the model cannot see whole.
        """
        given = context.rstrip()
        scored = context[len(given) :] + continuation
        if given:
            front = self.encode(given)
            ids = front, self.encode(given + scored)[len(front) :]
        else:
            ids = self._first(self.plain(scored))
        if len(ids[1]) > self.max_length:
            raise UserError(f"a continuation has {len(ids[1])} tokens, and the model sees {self.max_length} at a time")
        return ids[0][-(self.max_length + 1 - len(ids[1])) :], ids[1]

    def _first(self, ids: list[int]) -> tuple[list[int], list[int]]:
        prefix = self.prefix
        return (ids[:1], ids[1:]) if ids[:1] == [prefix] else ([prefix], ids)

    def windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        """A text in pieces, each token scored once, with as much in front of the last piece as the model sees.

        The beginning-of-text token is given, not scored, and stands there once.
        """
        given, ids = self._first(self.plain(text))
        return list(_windows(given[0], ids, self.max_length))

    def prompt(self, context: str, room: int) -> list[int]:
        """What is continued, cut from the left so that `room` tokens can follow. Raises `UserError` if none is left."""
        if room >= self.max_length:
            raise UserError(
                f"max_gen_toks = {room} leaves no room for a question: the model sees {self.max_length} tokens"
            )
        return (self.encode(context) or [self.prefix])[-(self.max_length - room) :]


def _windows(prefix: int, ids: list[int], length: int) -> Iterator[tuple[list[int], list[int]]]:
    if ids:
        yield [prefix], ids[:length]
    for start in range(length, len(ids), length):
        end = min(start + length, len(ids))
        yield ids[max(0, end - length - 1) : start], ids[start:end]


def sampling_of(settings: Mapping[str, Any], max_new_tokens: int) -> tuple[SamplingConfig, tuple[str, ...]]:
    """lm-eval's `generation_kwargs` as ours, and all strings that end an answer.

    `max_new_tokens` is for where they say nothing. Greedy unless `do_sample` or a temperature says otherwise. Raises
    `UserError` for a setting that would change tokens and is not here, `ConfigError` for a value that is not allowed.
    """
    left = dict(settings)
    until = left.pop("until", None) or []
    stops = tuple(s for s in ([until] if isinstance(until, str) else until) if s)
    lengths = [left.pop(name, None) for name in _LENGTHS]
    length = next((value for value in lengths if value is not None), max_new_tokens)
    do_sample, temperature = left.pop("do_sample", None), left.pop("temperature", None)
    if do_sample is False:
        temperature = 0.0
    elif temperature is None:
        temperature = 1.0 if do_sample else 0.0
    taken = {name: left.pop(name) for name in _TAKEN if name in SamplingConfig.model_fields and name in left}
    if taken.get("top_k") in (0, -1):
        taken["top_k"] = None
    for name, value in left.items():
        if value is not None and name not in _MEANINGLESS and value not in NEUTRAL.get(name, ()):
            raise UserError(f"generation_kwargs: {name} = {value!r} is not done here; take it out of the task")
    if left.get("num_beams") not in (None, 1):
        raise UserError(f"generation_kwargs: num_beams = {left['num_beams']!r}: there is no beam search here")
    values = {"seed": SEED, **taken, "temperature": temperature, "max_new_tokens": length}
    return parse(SamplingConfig, {**values, "stop": stops[:MOST_STOPS]}), stops


def cut(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of the stops."""
    for stop in stops:
        text = text.split(stop, 1)[0]
    return text
