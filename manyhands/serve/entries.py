"""The log-probabilities of an answer, in the forms of `/v1/completions` and of chat.

    entries = Entries(tokenizer, ends)
    for token in answer: legacy(entries.push(token))

An entry comes when all of its token's text is certain. What a stop string cuts off is cut off here too.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from manyhands.text import Tokenizer


@dataclass(frozen=True, slots=True)
class Entry:
    """One token."""

    token_id: int
    logprob: float | None
    """None for the first token of a prompt."""
    top: tuple[tuple[int, float], ...]
    text: str
    """What it adds to the text: the texts of all entries are the text."""
    start: int
    """Characters in front of it."""
    ends: bool = False
    """A token that ended the answer, and is not shown."""
    cut: bool = False


class Entries:
    """Of one answer."""

    def __init__(self, tokenizer: Tokenizer, ends: frozenset[int], start: int = 0) -> None:
        """`ends` are not shown. `start`: characters in front of the answer, an echoed prompt's."""
        self._decoder, self._ends = tokenizer.stream_decoder(), ends
        self._at = self._certain = start
        self._held: list[Entry] = []

    def push(
        self, token_id: int, logprob: float | None, top: tuple[tuple[int, float], ...], text: str, last: bool
    ) -> list[Entry]:
        """Those that became certain with a token, whose `text` is what the answer grew by."""
        ends = token_id in self._ends
        piece = "" if ends else self._decoder.push(token_id)
        self._held.append(Entry(token_id, logprob, top, piece, self._at, ends))
        self._at += len(piece)
        self._certain += len(text)
        ready = [e for e in self._held if e.start + len(e.text) <= self._certain]
        self._held = self._held[len(ready) :]
        if last:
            for entry in self._held:
                if entry.start < self._certain:
                    ready.append(replace(entry, text=entry.text[: self._certain - entry.start], cut=True))
        return ready


def of_prompt(tokenizer: Tokenizer, ids: Sequence[int], found: Sequence[Any], hidden: int) -> list[Entry]:
    """Entries of a prompt: `found` is its `prompt_logprobs`. The first `hidden` tokens are not in its text."""
    decoder, at = tokenizer.stream_decoder(), 0
    entries: list[Entry] = []
    for number, (token_id, said) in enumerate(zip(ids, found, strict=True)):
        text = "" if number < hidden else decoder.push(token_id)
        logprob, top = (None, ()) if said is None else (said.logprob, said.top)
        entries.append(Entry(token_id, logprob, top, text, at))
        at += len(text)
    return entries


def legacy(tokenizer: Tokenizer, entries: Iterable[Entry]) -> dict[str, Any]:
    """The `logprobs` object of a completion's choice: four lists, a token in each place."""
    found: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for entry in entries:
        found["tokens"].append(entry.text)
        found["token_logprobs"].append(_number(entry.logprob))
        found["top_logprobs"].append(None if entry.logprob is None else _by_text(tokenizer, entry))
        found["text_offset"].append(entry.start)
    return found


def chat(tokenizer: Tokenizer, entries: Iterable[Entry]) -> list[dict[str, Any]]:
    """The `logprobs.content` of a chat's choice."""
    found: list[dict[str, Any]] = []
    for entry in entries:
        if entry.ends:
            continue
        own = _said(tokenizer, entry.token_id, entry.logprob)
        if entry.cut:
            own |= {"token": entry.text, "bytes": list(entry.text.encode())}
        found.append({**own, "top_logprobs": [_said(tokenizer, token, value) for token, value in entry.top]})
    return found


def _by_text(tokenizer: Tokenizer, entry: Entry) -> dict[str, float | None]:
    """The best tokens and the chosen one by their text; of two with one text, the lesser by its number."""
    found: dict[str, float | None] = {}
    for token, value in (*entry.top, (entry.token_id, entry.logprob)):
        if token == entry.token_id and any(t == token for t, _ in entry.top) and len(found) == len(entry.top):
            break  # it was among the best
        name = token_text(tokenizer, token)
        found[f"token_id:{token}" if name in found else name] = _number(value)
    return found


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """A token's text; its bytes in hexadecimal, as OpenAI shows them, where they are a part of a character."""
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _said(tokenizer: Tokenizer, token_id: int, logprob: float | None) -> dict[str, Any]:
    data = tokenizer.token_bytes(token_id)
    return {"token": data.decode("utf-8", "replace"), "logprob": _number(logprob), "bytes": list(data)}


def _number(value: float | None) -> float | None:
    """JSON has no infinity."""
    return value if value is None or math.isfinite(value) else -9999.0
