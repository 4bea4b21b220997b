"""A chat model's answer as it writes it, parted into what it thought and what it said.

Reasoning models write both into one text, between special tokens: gpt-oss in channels, `<|channel|>analysis<|message|>…
<|end|><|start|>assistant<|channel|>final<|message|>…`, others in `<think>…</think>`. Templates want them as fields of a
message, and people want to read the answer. Which of the two a model writes stands in its template.
"""

import re
from typing import Any, Literal

from manyhands import strict_json

Style = Literal["channels", "think", "plain"]

_CHANNEL, _MESSAGE = "<|channel|>", "<|message|>"
_ENDS = ("<|end|>", "<|return|>", "<|call|>", "<|start|>", _CHANNEL)
_NAME = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"to=([^\s<]+)")
_OPEN, _CLOSE = "<think>", "</think>"


def style_of(template: str) -> Style:
    """How the model of this chat template parts its answers."""
    if _CHANNEL in template and _MESSAGE in template:
        return "channels"
    return "think" if _CLOSE in template else "plain"


class Answer:
    """One answer, piece by piece: `push` what comes, then `finish`. The pieces are (thought, text), without markers."""

    def __init__(self, template: str, prompt_end: str = "") -> None:
        """`prompt_end` is the end of the prompt's text, where some templates open the thinking already."""
        self.style = style_of(template)
        self._fields = "reasoning_content" in template
        self._raw: list[str] = []
        self._held = ""
        self._opened = prompt_end.rstrip().endswith(_OPEN)
        self._where = "thought" if self.style == "think" and self._opened else "start"
        self._parts: list[tuple[str, str, str]] = []
        """(channel, recipient, text)"""
        self._header = ""

    def push(self, text: str) -> list[tuple[bool, str]]:
        """What is certain to be thought or said."""
        self._raw.append(text)
        if self.style == "plain":
            return [(False, text)] if text else []
        self._held += text
        pieces: list[tuple[bool, str]] = []
        while (piece := self._think() if self.style == "think" else self._channels()) is not None:
            if piece[1]:
                pieces.append(piece)
        return pieces

    def finish(self) -> list[tuple[bool, str]]:
        """What was held back, when nothing more comes."""
        held, self._held = self._held, ""
        if not held or self._where == "header":
            return []
        thought = self._where == "thought" or (self._where == "body" and self._is_thought())
        return [(thought, self._keep(held))]

    def message(self) -> dict[str, Any]:
        """The model's turn, as its template takes it."""
        raw = "".join(self._raw)
        if self.style == "channels" and (self._parts or _CHANNEL in raw):
            return self._channel_message()
        if self.style == "think" and self._fields and (self._opened or raw.lstrip().startswith(_OPEN)):
            thought, closed, said = raw.partition(_CLOSE)
            thought = thought.lstrip().removeprefix(_OPEN).strip("\n")
            return {"role": "assistant", "content": said.lstrip("\n") if closed else "", "reasoning_content": thought}
        return {"role": "assistant", "content": raw}

    def _channel_message(self) -> dict[str, Any]:
        said = "".join(text for name, to, text in self._parts if not to and name != "analysis")
        thought = "".join(text for name, to, text in self._parts if not to and name == "analysis")
        calls: dict[str, str] = {}
        for _, to, text in self._parts:
            if to:
                calls[to] = calls.get(to, "") + text
        message: dict[str, Any] = {"role": "assistant", "content": said}
        if (
            calls
        ):  # thoughts before a call are read again; those before a last word never, and some templates mix them up
            called = [{"name": to.removeprefix("functions."), "arguments": _json(text)} for to, text in calls.items()]
            message["tool_calls"] = [{"type": "function", "function": call} for call in called]
            if thought:  # a call has a thought or a word in front, not both
                message["thinking"] = thought
                del message["content"]
        return message

    def _keep(self, text: str) -> str:
        if self.style == "channels":
            name, to = self._channel()
            self._parts.append((name, to, text))
        return text

    def _channel(self) -> tuple[str, str]:
        name, to = _NAME.search(self._header), _RECIPIENT.search(self._header)
        return name[1] if name else "final", to[1] if to else ""

    def _is_thought(self) -> bool:
        name, to = self._channel()
        return self.style == "channels" and (name == "analysis" or bool(to))

    def _channels(self) -> tuple[bool, str] | None:
        """The next piece of what is held, or None where more must come first."""
        if self._where == "start":
            if not self._held.strip() or _may_become(self._held.lstrip(), (_CHANNEL, "to=", *_ENDS)):
                return None
            begins = self._held.lstrip().startswith((_CHANNEL, "to=", *_ENDS))
            self._where = "header" if begins else "body"
        if self._where == "header":
            header, found, rest = self._held.partition(_MESSAGE)
            if not found:
                return None
            self._header, self._held, self._where = header, rest, "body"
        ended = [self._held.find(end) for end in _ENDS if end in self._held]
        if not ended:
            return self._safe(self._is_thought(), _ENDS)
        at = min(ended)
        text, self._held, self._where = self._held[:at], self._held[at:], "header"
        return self._is_thought(), self._keep(text)

    def _think(self) -> tuple[bool, str] | None:
        if self._where == "start":
            begin = self._held.lstrip()
            if not begin or _may_become(begin, (_OPEN,)):
                return None
            self._where = "thought" if begin.startswith(_OPEN) else "said"
            if self._where == "thought":
                self._held = begin.removeprefix(_OPEN)
        if self._where == "thought":
            if _CLOSE not in self._held:
                return self._safe(True, (_CLOSE,))
            text, _, self._held = self._held.partition(_CLOSE)
            self._where = "gap"
            return True, text
        if self._where == "gap":
            self._held = self._held.lstrip("\n")
            if not self._held:
                return None
            self._where = "said"
        text, self._held = self._held, ""
        return (False, text) if text else None

    def _safe(self, thought: bool, markers: tuple[str, ...]) -> tuple[bool, str] | None:
        """What is held but for an end that may begin a marker."""
        longest = min(len(self._held), max(map(len, markers)) - 1)
        cut = next((n for n in range(longest, 0, -1) if _may_become(self._held[-n:], markers)), 0)
        text, self._held = self._held[: len(self._held) - cut], self._held[len(self._held) - cut :]
        return (thought, self._keep(text)) if text else None


def _may_become(text: str, markers: tuple[str, ...]) -> bool:
    return any(len(text) < len(marker) and marker.startswith(text) for marker in markers)


def _json(text: str) -> Any:
    try:
        return strict_json.loads(text)
    except ValueError:
        return text
