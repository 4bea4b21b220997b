"""Answers that a grammar forces: JSON of a schema, any JSON object, a regular expression, a Lark grammar.

    grammar = await compiled(served.tokenizer, json_schema={"type": "object", …})
    engine.add(prompt, sampling, constraint=grammar.new())

llguidance does the work: it reads the grammar within limits of its own, and says before each token which may come.
"""

import asyncio
import json
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from torch import Tensor

from manyhands.serve.errors import ApiError
from manyhands.text import Tokenizer

SECONDS = 2.0
"""A grammar may take to be read. Its thread goes on: what is known to take long is refused first (`MOST_JOINED`)."""
MOST_BYTES = 1 << 20
"""Of a schema or a grammar."""
MOST_REGEX = 1 << 16
MOST_DEPTH = 64
"""Of a schema: reading one nests as deep as it does."""
MOST_JOINED = 8
"""Patterns that a text may have to hold to all at once (`allOf`; `&` in Lark): together they grow beyond all limits."""
_JOINED = ("pattern", "patternProperties", "format")
_KEPT = 32
_KEPT_BYTES = 8 << 20
"""Grammars that were read are kept: so many, of so many bytes of text."""
_COMPACT: Any = {"whitespace_flexible": False}  # else a small model writes blanks without end
_LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=20_000,
    max_lexer_states=50_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)
_POOL = ThreadPoolExecutor(2, "manyhands-grammar")
_tokenizers: WeakKeyDictionary[Any, LLTokenizer] = WeakKeyDictionary()
_kept: "OrderedDict[tuple[int, str], Grammar]" = OrderedDict()
_lock = Lock()
"""Of both: grammars are read in threads."""


class Grammar:
    """One that was read, for one tokenizer."""

    def __init__(self, matcher: LLMatcher, tokenizer: Any, text: str) -> None:
        self._matcher, self._tokenizer, self.size = matcher, tokenizer, len(text)

    def is_of(self, tokenizer: Tokenizer) -> bool:
        """Whether it was read for this one."""
        return self._tokenizer is tokenizer.inner

    def new(self) -> "Matching":
        """A constraint at the beginning of an answer."""
        return Matching(self._matcher.deep_copy())


class Matching:
    """Where in its grammar an answer is: the engine's constraint."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def finished(self) -> bool:
        """Whether nothing but an end token could follow. Not where the grammar has met a limit: that is no answer."""
        return bool(self._matcher.is_stopped() and not self._matcher.is_error())

    def allowed(self) -> Tensor:
        """[V of the tokenizer] bool. Nothing, where the grammar has met a limit: the engine then says so."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():  # then the mask is an end token's alone
            return torch.zeros(1, dtype=torch.bool)
        return torch.from_numpy(np.unpackbits(bits, bitorder="little")).bool()

    def accept(self, token_id: int) -> None:
        """It came."""
        self._matcher.consume_token(token_id)


async def compiled(
    tokenizer: Tokenizer,
    *,
    json_schema: Any = None,
    json_object: bool = False,
    regex: str | None = None,
    lark: str | None = None,
    param: str = "response_format",
) -> Grammar:
    """Exactly one of them, read off the event loop. Raises `ApiError` 400, naming `param` and what is wrong."""
    work = partial(
        read, tokenizer, json_schema=json_schema, json_object=json_object, regex=regex, lark=lark, param=param
    )
    try:
        return await asyncio.wait_for(asyncio.get_running_loop().run_in_executor(_POOL, work), SECONDS)
    except TimeoutError:
        raise ApiError(400, f"{param}: too complex: it takes more than {SECONDS:g} s to read", param=param) from None


def read(
    tokenizer: Tokenizer,
    *,
    json_schema: Any = None,
    json_object: bool = False,
    regex: str | None = None,
    lark: str | None = None,
    param: str = "response_format",
) -> Grammar:
    """The same at once."""
    text = _text(json_schema, json_object, regex, lark, param)
    key = id(tokenizer.inner), text
    with _lock:
        found = _kept.get(key)
    if found is None or not found.is_of(tokenizer):
        matcher = LLMatcher(_of(tokenizer), text, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise ApiError(400, f"{param}: {_line(matcher.get_error())}", param=param)
        found = Grammar(matcher, tokenizer.inner, text)
    with _lock:
        _kept[key] = found
        _kept.move_to_end(key)
        while len(_kept) > _KEPT or sum(grammar.size for grammar in _kept.values()) > _KEPT_BYTES:
            _kept.popitem(last=False)
    return found


def _text(json_schema: Any, json_object: bool, regex: str | None, lark: str | None, param: str) -> str:
    """As llguidance reads it."""
    if regex is not None:
        _bounded(regex, MOST_REGEX, param)
        return str(LLMatcher.grammar_from_regex(regex))
    if lark is not None:
        _bounded(lark, MOST_BYTES, param)
        if lark.count("&") > MOST_JOINED:
            raise ApiError(400, f"{param}: more than {MOST_JOINED} & in a grammar", param=param)
        return str(LLMatcher.grammar_from_lark(lark))
    schema = {"type": "object"} if json_object else json_schema
    if schema is True:
        schema = {}
    if not isinstance(schema, Mapping):
        raise ApiError(400, f"{param}: a JSON schema is an object", param=param)
    if "x-guidance" in schema:  # would have llguidance overlook keywords, or allow endless blanks
        raise ApiError(400, f"{param}: x-guidance is not served", param=param)
    if not shallow(schema):
        raise ApiError(400, f"{param}: the schema nests deeper than {MOST_DEPTH} levels", param=param)
    if (joined := _joined(schema)) > MOST_JOINED:
        what = f"allOf beside {joined} of {', '.join(_JOINED)}; at most {MOST_JOINED}"
        raise ApiError(400, f"{param}: {what}", param=param)
    try:
        written = json.dumps(schema, ensure_ascii=False, allow_nan=False)
        _bounded(written, MOST_BYTES, param)
        return str(LLMatcher.grammar_from_json_schema(written, defaults=_COMPACT))
    except ValueError as error:
        raise ApiError(400, f"{param}: {_line(str(error))}", param=param) from None


def _bounded(text: str, most: int, param: str) -> None:
    if len(text.encode("utf-8", "surrogatepass")) > most:
        raise ApiError(400, f"{param}: longer than {most >> 10} KiB", param=param)
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise ApiError(400, f"{param}: half a surrogate pair is no text", param=param)


def shallow(schema: Any) -> bool:
    """Whether it nests no deeper than `MOST_DEPTH`; without recursion."""
    level = [schema]
    for _ in range(MOST_DEPTH):
        level = [
            inner
            for value in level
            for inner in (value.values() if isinstance(value, Mapping) else value)
            if isinstance(inner, Mapping | list)
        ]
        if not level:
            return True
    return False


def _joined(schema: Any) -> int:
    """Patterns of a schema that has an `allOf` anywhere; 0 without. It nests no deeper than may be."""
    found, has_all, left = 0, False, [schema]
    while left:
        value = left.pop()
        if isinstance(value, Mapping):
            has_all |= "allOf" in value
            found += sum(key in value for key in _JOINED)
            left += value.values()
        elif isinstance(value, list):
            left += value
    return found if has_all else 0


def _of(tokenizer: Tokenizer) -> LLTokenizer:
    """The tokenizer as llguidance has it, made once."""
    inner = tokenizer.inner
    with _lock:
        if (found := _tokenizers.get(inner)) is None:
            ends = sorted(tokenizer.eos_token_ids) or [tokenizer.vocab_size - 1]
            found = _tokenizers[inner] = LLTokenizer(inner.to_str(), n_vocab=tokenizer.vocab_size, eos_token=ends)
    return found


def _line(text: str) -> str:
    return " ".join(text.split())[:300]
