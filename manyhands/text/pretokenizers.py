"""Where published tokenizers may not merge: llama.cpp's names for them, and the exact rules behind the names.

A file format that has no room for the rule itself (GGUF) has these names, so that a vocabulary learned within one of
them can be read everywhere. `pieces.py` has the rule of this project's own.

Source: the `tokenizer.json` of Llama 3, Qwen2 and GPT-2; `llm_tokenizer_bpe` in llama.cpp's `src/llama-vocab.cpp`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import tokenizers
from tokenizers import pre_tokenizers

from manyhands import strict_json
from manyhands.text.gguf_pre import LLAMA3, QWEN2
from manyhands.text.pieces import PIECES

Pre = Literal["llama-bpe", "qwen2", "gpt-2"]
PRES: tuple[Pre, ...] = get_args(Pre)


@dataclass(frozen=True, slots=True)
class Rule:
    """One published rule."""

    pattern: str | None
    """The pieces; None: GPT-2's, which `tokenizers` has built in."""
    ignore_merges: bool = False
    """A piece that is a token is that token, whatever its merges say."""


RULES: Mapping[Pre, Rule] = {
    "llama-bpe": Rule(LLAMA3[0], ignore_merges=True),
    "qwen2": Rule(QWEN2[0]),
    "gpt-2": Rule(None),
}


def pre_tokenizer(pre: Pre | None) -> Any:
    """A byte-level pre-tokenizer of the library `tokenizers`; None: this project's own rule."""
    pattern = PIECES if pre is None else RULES[pre].pattern
    if pattern is None:
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def pre_of(tokenizer_json: Mapping[str, Any]) -> Pre | None:
    """llama.cpp's name for the rule of a parsed `tokenizer.json`, if it is exactly one of `PRES`."""
    found, model = tokenizer_json.get("pre_tokenizer"), tokenizer_json.get("model") or {}
    for pre, rule in RULES.items():
        if bool(model.get("ignore_merges")) == rule.ignore_merges and _plain(found) == _plain(_json(pre)):
            return pre
    return None


def _json(pre: Pre) -> Any:
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = pre_tokenizer(pre)
    return strict_json.loads(inner.to_str())["pre_tokenizer"]


def _plain(value: Any) -> Any:
    """Without what changes offsets only."""
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items() if name != "trim_offsets"}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value
