"""Kimi's `tiktoken.model` as a `tokenizer.json`: the same ids for every text.

The file has one line per token: its bytes in base64, and its rank, which is its id and the order of merging. How text
is split before stands in Moonshot's `tokenization_kimi.py` (modified MIT licence), as do the 256 special ids behind the
ranks, whose names are in `tokenizer_config.json`.
"""

import base64
import binascii
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers

from manyhands.errors import CheckpointError

_UPPER, _LOWER = (rf"[{kinds}\p{{Lm}}\p{{Lo}}\p{{M}}&&[^\p{{Han}}]]" for kinds in (r"\p{Lu}\p{Lt}", r"\p{Ll}"))
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
KIMI_PIECES = "|".join(
    (
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDING}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDING}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
NUM_SPECIAL = 256


def is_kimi(tokenizer_config: Mapping[str, Any], model_config: Mapping[str, Any]) -> bool:
    """Whether the files beside a `tiktoken.model` say that it is Kimi's."""
    named = str(tokenizer_config.get("auto_map", ""))[:1000] + str(model_config.get("model_type", ""))[:100]
    return tokenizer_config.get("tokenizer_class") == "TikTokenTokenizer" or "kimi" in named


def tokenizer_json(path: Path, data: bytes, tokenizer_config: Mapping[str, Any]) -> bytes:
    """The content of a `tokenizer.json` that gives the ids of tiktoken. `path` begins the message of an error.

    Raises `CheckpointError` for a file that is not a list of ranks from 0 on with all 256 bytes in it.
    """
    ranks = _ranks(path, data)
    letters = _letters()
    vocabulary = {"".join(letters[b] for b in token): rank for token, rank in ranks.items()}
    merges = []
    for token in ranks:  # in the order of their ranks
        splits = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        splits.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [["".join(letters[b] for b in part) for part in pair] for pair in splits]
    split = {"type": "Split", "pattern": {"Regex": KIMI_PIECES}, "behavior": "Isolated", "invert": False}
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _special(path, len(ranks), tokenizer_config),
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, to_bytes]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "ignore_merges": True, "vocab": vocabulary, "merges": merges},
    }
    return json.dumps(whole, ensure_ascii=False).encode()


def _ranks(path: Path, data: bytes) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines()):
        if not line.strip():
            continue
        try:
            encoded, rank = line.split()
            token = base64.b64decode(encoded, validate=True)
            if int(rank) != len(ranks) or not 0 < len(token) <= 256 or token in ranks:
                raise ValueError
        except (ValueError, binascii.Error):
            expected = f"a new token in base64 and its rank {len(ranks)}"
            raise CheckpointError(f"{path}: line {number + 1}: expected {expected}") from None
        ranks[token] = int(rank)
    if missing := [b for b in range(256) if bytes([b]) not in ranks]:
        raise CheckpointError(f"{path}: byte {missing[0]} is no token, so not every text could be encoded")
    return ranks


def _letters() -> list[str]:
    """The letter that stands for each byte in a byte-level vocabulary."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    hidden = (b for b in range(256) if b not in shown)
    letters = {b: chr(b) for b in shown} | {b: chr(256 + n) for n, b in enumerate(hidden)}
    assert set(letters.values()) == set(pre_tokenizers.ByteLevel.alphabet())
    return [letters[b] for b in range(256)]


def _special(path: Path, first: int, tokenizer_config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The special tokens behind the ranks; those that no file names are reserved."""
    given = tokenizer_config.get("added_tokens_decoder") or {}
    if not isinstance(given, dict):
        raise CheckpointError(f"{path.with_name('tokenizer_config.json')}: added_tokens_decoder: expected an object")
    found = []
    for i in range(first, first + NUM_SPECIAL):
        entry = given.get(str(i))
        content = entry.get("content") if isinstance(entry, dict) else None
        flags = {name: isinstance(entry, dict) and entry.get(name) is True for name in _FLAGS}
        special = not isinstance(entry, dict) or entry.get("special") is not False
        name = content if isinstance(content, str) and content else f"<|reserved_token_{i}|>"
        found.append({"id": i, "content": name, **flags, "special": special})
    return found


_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
