"""The tokenizer in a GGUF file's metadata, as a `tokenizer.json`.

    tokenizer.huggingface.json   the publisher's tokenizer.json, whole; taken if it is there
    tokenizer.ggml.model         gpt2: byte-level BPE with merges, and `pre` for how text is split
                                 llama: SentencePiece's BPE; its merges follow from the scores
    tokenizer.ggml.token_type    1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte
    tokenizer.chat_template      the chat template

Source: `src/llama-vocab.cpp` of llama.cpp; merges from scores as in transformers' `SentencePieceExtractor`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from manyhands.config.base import short_repr
from manyhands.errors import CheckpointError
from manyhands.families.gguf import GgufHeader
from manyhands.files import GENERATION, TOKENIZER
from manyhands.strict_json import parse_object
from manyhands.text.gguf_pre import PRE, STARTED, WHOLE_TOKENS_FIRST
from manyhands.text.tokenizer import Tokenizer
from manyhands.text.tokenizer_files import LARGEST, TEMPLATE, TOKENIZER_CONFIG, TokenizerFiles

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)
_SPACE = "▁"
_ENDS = ("eos", "eot", "eom")
_NAMED = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
_HELP = "manyhands convert FILE DIRECTORY --tokenizer DIR takes the publisher's"
_LONGEST = 1024
"""Characters of a token: merges are tried at every place in it."""


def read_gguf_tokenizer(header: GgufHeader) -> Tokenizer:
    """The tokenizer of a GGUF file. Raises `CheckpointError` naming the key, and what would help."""
    files = gguf_tokenizer_files(header)
    return Tokenizer.from_files(files, f"{header.path}: the tokenizer in its metadata")


def gguf_tokenizer_files(header: GgufHeader) -> TokenizerFiles:
    """The same as the files that would lie beside a model. Raises `CheckpointError` naming the key."""
    keys = _Keys(header.path, header.metadata)
    tokens = keys.texts("tokens", [])
    whole = header.metadata.get("tokenizer.huggingface.json")
    if isinstance(whole, str):
        if len(whole) > LARGEST[TOKENIZER]:
            raise keys.wrong("tokenizer.huggingface.json", "too long for a tokenizer")
        parse_object(whole, f"{header.path}: tokenizer.huggingface.json", CheckpointError)
        content = whole.encode()
    else:
        content = json.dumps(_tokenizer_json(keys, tokens), ensure_ascii=False).encode()
    named = {role: tokens[i] for name, role in _NAMED.items() if (i := keys.token_id(name, tokens)) is not None}
    ends = sorted({i for name in _ENDS if (i := keys.token_id(name, tokens)) is not None})
    template = header.metadata.get("tokenizer.chat_template")
    template = template if isinstance(template, str) and template else None
    if template is not None and len(template) > LARGEST[TEMPLATE]:
        raise keys.wrong("tokenizer.chat_template", "too long for a chat template")
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **named}
    generation: dict[str, Any] = {} if not ends else {"eos_token_id": ends[0] if len(ends) == 1 else ends}
    if (bos := keys.token_id("bos", tokens)) is not None:
        generation["bos_token_id"] = bos
    written = {TOKENIZER: content, TOKENIZER_CONFIG: _json(described), GENERATION: _json(generation)}
    if template is not None:
        written[TEMPLATE] = template.encode()
    return TokenizerFiles(written, named, template, frozenset(ends), generation)


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()


def _tokenizer_json(keys: "_Keys", tokens: list[str]) -> dict[str, Any]:
    if not tokens:
        raise keys.wrong("tokens", f"there is no tokenizer in this file; {_HELP}")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise keys.wrong("tokens", f"a token is there twice; {_HELP}")
    if max(map(len, tokens)) > _LONGEST:
        raise keys.wrong("tokens", f"a token is longer than {_LONGEST} characters")
    types = keys.numbers("token_type", len(tokens)) or [_NORMAL] * len(tokens)
    kind = keys.values.get("tokenizer.ggml.model")
    if kind == "gpt2":
        return _byte_level(keys, vocabulary, tokens, types)
    if kind == "llama":
        return _sentencepiece(keys, vocabulary, tokens, types)
    raise keys.wrong("model", f"expected 'gpt2' or 'llama'; {_HELP}")


def _byte_level(keys: "_Keys", vocabulary: dict[str, int], tokens: list[str], types: list[int]) -> dict[str, Any]:
    pre = keys.values.get("tokenizer.ggml.pre")
    if not isinstance(pre, str) or pre not in PRE:
        raise keys.wrong("pre", f"how it splits text is not known; {_HELP}")
    merges = []
    for number, merge in enumerate(keys.texts("merges")):
        at = merge.find(" ", 1)
        left, right = merge[:at], merge[at + 1 :]
        if at < 1 or left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            problem = f"entry {number}, {merge[:40]!r}, is not two tokens that make a third"
            raise CheckpointError(f"{keys.path}: tokenizer.ggml.merges: {problem}")
        merges.append([left, right])
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in PRE[pre]
    ]
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(tokens, types),
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, to_bytes]},
        "post_processor": _start(keys, tokens, usual=pre in STARTED),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "ignore_merges": pre in WHOLE_TOKENS_FIRST,
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def _sentencepiece(keys: "_Keys", vocabulary: dict[str, int], tokens: list[str], types: list[int]) -> dict[str, Any]:
    scores = keys.numbers("scores", len(tokens))
    if scores is None or any(score != score for score in scores):
        raise keys.wrong("scores", f"expected {len(tokens)} numbers")
    merges = []
    for token, score, kind in zip(tokens, scores, types, strict=True):
        if kind in (_CONTROL, _UNKNOWN, _BYTE, _UNUSED):
            continue
        splits = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in vocabulary]
        splits = [pair for pair in splits if pair[1] in vocabulary]
        splits.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        merges += [(score, len(left), len(right), left, right) for left, right in splits]
    merges.sort(key=lambda merge: merge[:3], reverse=True)
    unknown = keys.token_id("unknown", tokens)
    prefix = keys.values.get("tokenizer.ggml.add_space_prefix", True) is not False
    to_spaces = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    from_spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    ahead = [{"type": "Prepend", "prepend": _SPACE}] if prefix else []
    behind = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(tokens, types),
        "normalizer": {"type": "Sequence", "normalizers": [*ahead, from_spaces]},
        "pre_tokenizer": None,
        "post_processor": _start(keys, tokens, usual=True),
        "decoder": {"type": "Sequence", "decoders": [to_spaces, {"type": "ByteFallback"}, {"type": "Fuse"}, *behind]},
        "model": {
            "type": "BPE",
            "unk_token": None if unknown is None else tokens[unknown],
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocabulary,
            "merges": [[left, right] for *_, left, right in merges],
        },
    }


def _added(tokens: list[str], types: list[int]) -> list[dict[str, Any]]:
    """Control tokens, which are special, and user-defined ones, which are matched whole in any text."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": i, "content": token, **flags, "special": kind != _USER}
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (_CONTROL, _USER, _UNKNOWN) and token
    ]


def _start(keys: "_Keys", tokens: list[str], *, usual: bool) -> dict[str, Any] | None:
    """What puts `<s>` in front of a text."""
    bos = keys.token_id("bos", tokens)
    wanted = keys.values.get("tokenizer.ggml.add_bos_token", usual)
    if bos is None or wanted is not True:
        return None
    name = tokens[bos]
    special, text = ({"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}})
    return {
        "type": "TemplateProcessing",
        "single": [special, text],
        "pair": [special, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {name: {"id": name, "ids": [bos], "tokens": [name]}},
    }


class _Keys:
    """The keys of the tokenizer. Raises `CheckpointError` naming one."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path, self.values = path, values

    def wrong(self, name: str, right: str) -> CheckpointError:
        key = name if name.startswith("tokenizer.") else f"tokenizer.ggml.{name}"
        value = self.values.get(key)
        shown = f" = {short_repr(value)}" if isinstance(value, str | int | float) else ""
        return CheckpointError(f"{self.path}: {key}{shown}: {right}")

    def texts(self, name: str, default: list[str] | None = None) -> list[str]:
        value = self.values.get(f"tokenizer.ggml.{name}", default)
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            raise self.wrong(name, "expected a list of strings")
        return value

    def numbers(self, name: str, count: int) -> list[Any] | None:
        value = self.values.get(f"tokenizer.ggml.{name}")
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != count or not all(isinstance(v, int | float) for v in value):
            raise self.wrong(name, f"expected {count} numbers, one per token")
        return value

    def token_id(self, name: str, tokens: list[str]) -> int | None:
        """One of the special ids; None if there is none."""
        value = self.values.get(f"tokenizer.ggml.{name}_token_id")
        if value is None or value in (-1, 0xFFFFFFFF):
            return None
        if type(value) is not int or not 0 <= value < len(tokens):
            raise self.wrong(f"{name}_token_id", f"expected the id of one of the {len(tokens)} tokens")
        return value
