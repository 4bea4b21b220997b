"""A tokenizer as GGUF's keys: the tokens, their kinds, the merges, and the rule between pieces by its name.

GGUF has no room for a regular expression: llama.cpp knows rules by name (`text/pretokenizers.py`), and only a tokenizer
whose rule is exactly one of them is written. `tokenizer.huggingface.json` holds the whole file besides, for readers
that take it (this program does; llama.cpp does not).
"""

from collections.abc import Mapping
from typing import Any

from manyhands import strict_json
from manyhands.errors import CheckpointError
from manyhands.text import Tokenizer
from manyhands.text.pretokenizers import PRES, pre_of

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_WAY_OUT = "a file that takes token ids only can be had with --without-vocabulary"


def vocabulary(
    tokenizer: Tokenizer | None, vocab_size: int, ids: Mapping[str, Any], unread: str | None = None
) -> dict[str, Any]:
    """The keys `tokenizer.*` for a model with `vocab_size` rows in its embedding.

    `ids` are `bos_token_id`, `eos_token_id` (one or several) and `pad_token_id`, where known. `unread` is why there is
    no tokenizer though files of one are there.

    Raises `CheckpointError` naming what GGUF cannot say.
    """
    if tokenizer is None:
        reason = unread or "the checkpoint has no tokenizer"
        raise CheckpointError(f"no vocabulary can be written: {reason}; {_WAY_OUT}")
    text = tokenizer.inner.to_str()
    content = strict_json.loads(text)
    _check_byte_level(content)
    pre = pre_of(content)
    if pre is None:
        raise CheckpointError(
            f"no vocabulary can be written: where this tokenizer may not merge is none of the rules that GGUF has "
            f"a name for ({', '.join(PRES)}); train with tokenizer.pre=… for one that is; {_WAY_OUT}"
        )
    tokens, kinds = _tokens(tokenizer, vocab_size)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    bos, ends = ids.get("bos_token_id"), ids.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.add_bos_token": bos is not None and tokenizer.front_ids == [bos],
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.huggingface.json": text,
    }
    if bos is not None:
        keys["tokenizer.ggml.bos_token_id"] = bos
    if ends:
        keys["tokenizer.ggml.eos_token_id"] = ends[0]
    if len(ends) > 1:
        keys["tokenizer.ggml.eot_token_id"] = ends[1]
    if ids.get("pad_token_id") is not None:
        keys["tokenizer.ggml.padding_token_id"] = ids["pad_token_id"]
    if tokenizer.chat_template:
        keys["tokenizer.chat_template"] = tokenizer.chat_template
    if tokenizer.front_ids and not keys["tokenizer.ggml.add_bos_token"]:
        raise CheckpointError(
            f"no vocabulary can be written: this tokenizer puts {tokenizer.front_ids[:8]} in front of a text, which is "
            f"not its bos_token_id = {bos}, the one token that GGUF can put there; {_WAY_OUT}"
        )
    return keys


def _check_byte_level(content: Mapping[str, Any]) -> None:
    model = content.get("model") or {}
    problem = None
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        kind = "SentencePiece BPE" if model.get("byte_fallback") else model.get("type")
        problem = f"it is {kind!r}, and only byte-level BPE is written"
    elif (normalizer := content.get("normalizer")) not in (None, {"type": "NFC"}):  # llama.cpp does not apply NFC
        problem = f"its normalizer {str(normalizer)[:60]} is not in GGUF"
    elif model.get("dropout") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        problem = "its BPE has options that GGUF has not"
    if problem:
        raise CheckpointError(f"no vocabulary can be written: of this tokenizer, {problem}; {_WAY_OUT}")


def _tokens(tokenizer: Tokenizer, vocab_size: int) -> tuple[list[str], list[int]]:
    """Every row of the embedding: its token and kind; a row without a token is an unused one."""
    if tokenizer.vocab_size > vocab_size:
        raise CheckpointError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model {vocab_size}")
    added = tokenizer.inner.get_added_tokens_decoder()
    tokens, kinds = [], []
    for token_id in range(vocab_size):
        token = tokenizer.inner.id_to_token(token_id)
        if token is None:
            tokens.append(f"[PAD{token_id}]")
            kinds.append(_UNUSED)
        elif token_id in added:
            tokens.append(token)
            kinds.append(_CONTROL if added[token_id].special else _USER_DEFINED)
        else:
            tokens.append(token)
            kinds.append(_NORMAL)
    return tokens, kinds
