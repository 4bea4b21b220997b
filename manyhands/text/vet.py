"""A `tokenizer.json` from anywhere, looked through before the tokenizers library runs it.

That library aborts the process when memory runs out and panics in a regular expression, so what it is given must be
bounded first: a normaliser may make a text longer by so much, a post-processor add so many ids. A regular expression
that repeats what repeats is tried in a process with limits (`pattern_worker.py`). Published tokenizers stay far below
every bound. It costs one `json.loads`.
"""

import base64
import gc
import importlib.util
import json
import re
import re._parser as sre  # type: ignore[import-not-found]
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from manyhands import strict_json
from manyhands.text.pieces import PIECES

MAX_STEPS = 256
"""Normalisers, pre-tokenizers, decoders and post-processors together."""
MAX_GROWTH = 64
"""Characters that one may become. (NFKC makes up to 18 of one.)"""
MAX_ADDED_IDS = 256
"""Ids that a post-processor puts around a text."""
MAX_ID = 1 << 24
MAX_PATTERN = 16 << 10
_MAX_TEXT = 1 << 10
_MAX_CHARSMAP = 8 << 20
_QUANTIFIER = re.compile(r"[*+?]|\{(\d*,?\d*)\}")


def vet(data: bytes) -> None:
    """Raises `ValueError` with the reason in a few words."""
    collecting = gc.isenabled()
    gc.disable()  # it would look through a million fresh merges again and again, which takes half of the time
    try:
        content = strict_json.loads(data)
    finally:
        if collecting:
            gc.enable()
    if not isinstance(content, dict):
        raise ValueError(f"expected an object, found {type(content).__name__}")
    parts = [content.get(name) for name in ("normalizer", "pre_tokenizer", "decoder", "post_processor")]
    model = content.get("model")
    parts.append({k: v for k, v in model.items() if k not in ("vocab", "merges")} if isinstance(model, dict) else None)
    if sum(1 for _ in _objects(parts)) > MAX_STEPS * 4:
        raise ValueError(f"it has more than {MAX_STEPS} steps")
    doubtful: list[str] = []
    for part in parts:
        for step in _objects(part):
            doubtful += _step(step)
    for name in ("normalizer", "decoder"):
        _growth(name, [step for step in _objects(content.get(name)) if step.get("type") in ("Replace", "Prepend")])
    _post_processor(content.get("post_processor"))
    _ids(content, model)
    if doubtful:
        _try(doubtful)


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """Every object inside, from the outside in, in order."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            yield one
            waiting.extend(reversed(list(one.values())))
        elif isinstance(one, list):
            waiting.extend(reversed([item for item in one if isinstance(item, dict | list)]))


def _step(step: dict[str, Any]) -> list[str]:
    """Checks one, and returns its patterns that must be tried."""
    doubtful = []
    for name, value in step.items():
        if name == "precompiled_charsmap":
            _charsmap(value)
        elif name == "Regex" and isinstance(value, str):
            doubtful += [value] if value != PIECES and _repeats_what_repeats(value) else []
        elif isinstance(value, str) and len(value) > MAX_PATTERN:
            raise ValueError(f"{step.get('type', 'a step')}: {name} is {len(value):,} characters long")
        elif name in ("content", "prepend") and isinstance(value, str) and len(value) > _MAX_TEXT:
            raise ValueError(f"{step.get('type')}: {name} is {len(value):,} characters long")
    return doubtful


def _try(patterns: list[str]) -> None:
    """In a process of their own; some 0.1 s."""
    specs = [importlib.util.find_spec(name) for name in ("tokenizers", "huggingface_hub")]
    homes = {str(Path(spec.origin).parent.parent) for spec in specs if spec is not None and spec.origin is not None}
    worker = str(Path(__file__).with_name("pattern_worker.py"))
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-B", worker, *homes],
            input=json.dumps(patterns).encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={},
            timeout=30,
        )
        code = done.returncode
    except subprocess.TimeoutExpired:
        code = -1
    if code:
        raise ValueError(f"a pattern needs too long or too much memory: {patterns[0][:60]}")


def _repeats_what_repeats(pattern: str) -> bool:
    """Oniguruma tries all ways to part a text among repetitions that repeat: their number doubles with its length."""
    if len(pattern) > MAX_PATTERN:
        raise ValueError(f"a pattern is {len(pattern):,} characters long")
    inside = [False]  # for each open group, whether something in it has a choice
    closed = False  # whether a group with a choice ended just here
    at = 0
    while at < len(pattern):
        character = pattern[at]
        found = _QUANTIFIER.match(pattern, at)
        if found is not None:
            most = found[1].rpartition(",")[2] if found[1] else ""
            again = found[0] != "?" and (not most or len(most) > 9 or int(most) > 1)
            if closed and again:
                return True
            inside[-1] |= closed or not most or len(most) > 2
            at, closed = found.end(), False
            continue
        if closed:
            inside[-1], closed = True, False
        if character == "\\":
            at += 2
        elif character == "[":
            at = _class_end(pattern, at)
        elif character == "(":
            inside.append(False)
            at += 1 + (pattern[at + 1 : at + 2] == "?")
        elif character == ")":
            closed = inside.pop() if len(inside) > 1 else False
            at += 1
        else:
            inside[-1] |= character == "|"
            at += 1
    return False


def _class_end(pattern: str, at: int) -> int:
    """Behind the character class that begins at `at`; they nest."""
    depth = 0
    while at < len(pattern):
        if pattern[at] == "\\":
            at += 1
        elif pattern[at] == "[":
            depth += 1
            at += pattern[at + 1 : at + 2] == "^"
            at += pattern[at + 1 : at + 2] == "]"
        elif pattern[at] == "]":
            depth -= 1
            if not depth:
                return at + 1
        at += 1
    return at


def _growth(name: str, steps: list[dict[str, Any]]) -> None:
    """How long one character can become: from the last step to the first, what each character weighs before it."""
    weight: dict[str, float] = defaultdict(lambda: 1.0)
    other = 1.0
    for step in reversed(steps):
        text = step.get("content", step.get("prepend"))
        pattern = step.get("pattern")
        if not isinstance(text, str):
            continue
        becomes = sum(weight.get(character, other) for character in text)
        if step.get("type") == "Prepend":  # once, and what is prepended may grow in later steps
            other = max(other, becomes / _MAX_TEXT)
        elif isinstance(pattern, dict) and isinstance(pattern.get("String"), str) and pattern["String"]:
            for character in pattern["String"]:
                before = weight.get(character, other)
                weight[character] = max(before, becomes / len(pattern["String"]))
        elif becomes:
            each = becomes / least if (least := _least(pattern)) else becomes + 1
            other = max(other, each)
            weight = defaultdict(float, {c: max(w, each) for c, w in weight.items()})
        if max([other, *weight.values()]) > MAX_GROWTH:
            raise ValueError(f"its {name} makes more than {MAX_GROWTH} characters of one")


def _least(pattern: Any) -> int:
    """The fewest characters that a regular expression matches, as far as Python understands it."""
    try:
        return int(sre.parse(pattern["Regex"]).getwidth()[0])
    except Exception:
        return 0


def _charsmap(value: Any) -> None:
    """SentencePiece's table: 4 bytes of length, a trie, and the texts that it maps to, each ended by a zero."""
    if value is None:
        return
    if not isinstance(value, str) or len(value) > _MAX_CHARSMAP:
        raise ValueError("precompiled_charsmap is too long, or not text")
    table = base64.b64decode(value, validate=False)
    texts = table[4 + int.from_bytes(table[:4], "little") :]
    if max(map(len, texts.split(b"\0"))) > 4 * MAX_GROWTH:
        raise ValueError(f"precompiled_charsmap makes more than {MAX_GROWTH} characters of one")


def _post_processor(value: Any) -> None:
    added = 0
    for step in _objects(value):
        if step.get("type") != "TemplateProcessing":
            continue
        special = step.get("special_tokens")
        tokens = special if isinstance(special, dict) else {}
        lengths = {
            name: len(token["ids"]) if isinstance(token, dict) and isinstance(token.get("ids"), list) else 0
            for name, token in tokens.items()
        }
        for which in ("single", "pair"):
            items = step.get(which)
            for item in items if isinstance(items, list) else []:
                named = item.get("SpecialToken") if isinstance(item, dict) else None
                token = named.get("id") if isinstance(named, dict) else None
                added += lengths.get(token, 1) if isinstance(token, str) else 1
        added += max(lengths.values(), default=0)
    if added > MAX_ADDED_IDS:
        raise ValueError(f"its post_processor adds {added:,} ids; {MAX_ADDED_IDS} are enough")


def _ids(content: dict[str, Any], model: Any) -> None:
    vocab = model.get("vocab") if isinstance(model, dict) else None
    largest = max((i for i in vocab.values() if isinstance(i, int)), default=0) if isinstance(vocab, dict) else 0
    added = content.get("added_tokens")
    for token in added if isinstance(added, list) else []:
        if isinstance(token, dict) and isinstance(token.get("id"), int):
            largest = max(largest, token["id"])
    if largest > MAX_ID:
        raise ValueError(f"token id {largest:,}: the largest that is taken is {MAX_ID:,}")
