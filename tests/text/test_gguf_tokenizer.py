"""Tokenizers from GGUF's metadata: the ids of the tokenizer that they were made from."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from manyhands.errors import CheckpointError
from manyhands.families.gguf import GgufHeader
from manyhands.text import Tokenizer
from manyhands.text.gguf_pre import PRE
from manyhands.text.gguf_tokenizer import read_gguf_tokenizer

TEXTS = [
    "The quick brown fox's 12345 jumps, isn't it?\n\n  Two  spaces\tand a tab  ",
    "def f(x):\n    return x + 1  # größer, naïve, 東京, привет, 🙂\r\n",
    "",
    " ",
    "   leading",
    "<s> spelled out </s>",
    "aaaaaaaaaaaaaaaaaa bbbbbb",
    "\x00\x7f\u2581 \u3000",
]
TRAINED = [*TEXTS, *("the quick brown fox jumps over the lazy dog and does not mind at all " * 3,) * 20]


def header(**keys: Any) -> GgufHeader:
    found = {name if name.startswith("tokenizer.") else f"tokenizer.ggml.{name}": v for name, v in keys.items()}
    return GgufHeader(Path("model.gguf"), found, {})


def of_trained(inner: Any, **more: Any) -> dict[str, Any]:
    """The lists that a converter takes from a `tokenizers.Tokenizer`."""
    vocabulary = inner.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.get)
    model = json.loads(inner.to_str())["model"]
    return {"tokens": tokens, "merges": [" ".join(pair) for pair in model["merges"]], **more}


def trained_bytes(pre: Any) -> Any:
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre
    inner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner.train_from_iterator(
        TRAINED, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    return inner


@pytest.mark.parametrize(
    ("name", "pre"),
    [
        ("gpt-2", pre_tokenizers.ByteLevel(add_prefix_space=False)),
        (
            "smollm",
            pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            ),
        ),
    ],
)
def test_byte_level(name: str, pre: Any) -> None:
    """As the tokenizers library splits by itself for these two."""
    inner = trained_bytes(pre)
    found = read_gguf_tokenizer(header(model="gpt2", pre=name, **of_trained(inner)))
    for text in TEXTS:
        assert found.encode(text) == inner.encode(text).ids
        assert found.decode(found.encode(text)) == text


PIECES = {
    "llama-bpe": ["It", "'S", " ", "123", "45", " größer", " 東京", "!?\n", "  ", " x"],
    "qwen2": ["It", "'S", " ", "1", "2", "3", "4", "5", " größer", " 東京", "!?\n", "  ", " x"],
    "gpt-2": ["It", "'", "S", " 12345", " größer", " 東京", "!?", "\n  ", " x"],
    "refact": ["It", "'", "S", " ", "1", "2", "3", "4", "5", " größer", " 東京", "!?", "\n  ", " x"],
    "deepseek-v3": ["It", "'S", " ", "123", "45", " größer", " ", "東京", "!?\n", "  ", " x"],
    "gpt-4o": ["It'S", " ", "123", "45", " größer", " 東京", "!?\n", "  ", " x"],
    "tekken": ["It", "'S", " ", "1", "2", "3", "4", "5", " größer", " 東京", "!?\n", "  ", " x"],
    "kimi-k2": ["It'S", " ", "123", "45", " größer", " ", "東京", "!?\n", "  ", " x"],
    "deepseek-llm": [
        "It",
        "'",
        "S",
        " ",
        "12345",
        " gr",
        "öß",
        "er",
        " ",
        "東京",
        "!?",
        "\n",
        "  ",
        " x",
    ],  # its [:-~] has letters
    "deepseek-coder": ["It", "'", "S", " ", "1", "2", "3", "4", "5", " größer", " ", "東京", "!?", "\n", "  ", " x"],
}


@pytest.mark.parametrize("name", PIECES)
def test_how_text_is_split(name: str) -> None:
    splits = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in PRE[name]]
    found = pre_tokenizers.Sequence(splits).pre_tokenize_str("It'S 12345 größer 東京!?\n   x")
    assert [piece for piece, _ in found] == PIECES[name]


def merged_by_score(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's BPE: of all neighbours that make a token the best first, the leftmost of equals."""
    pieces = list(text)
    while True:
        pairs = [(-scores[a + b], n) for n, (a, b) in enumerate(pairwise(pieces)) if a + b in scores]
        if not pairs:
            return pieces
        at = min(pairs)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]


def ids_of(piece: str, tokens: list[str]) -> list[int]:
    if piece in tokens:
        return [tokens.index(piece)]
    return [tokens.index(f"<0x{b:02X}>") for b in piece.encode()]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(prefix: bool) -> None:
    """Merges from scores are the merges that were learned."""
    inner = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    ahead = [normalizers.Prepend("▁")] if prefix else []
    inner.normalizer = normalizers.Sequence([*ahead, normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    inner.train_from_iterator([text for text in TRAINED if "東" not in text], trainer)
    keys = of_trained(inner)
    merged = {"".join(pair.split(" ", 1)): -float(n) for n, pair in enumerate(keys.pop("merges"))}
    types = [2, 3, 3, *[6] * 256, *[1] * (len(keys["tokens"]) - 259)]
    scores = [merged.get(token, -1e6) for token in keys["tokens"]]
    found = read_gguf_tokenizer(
        header(
            model="llama", token_type=types, scores=scores, bos_token_id=1, eos_token_id=2, unknown_token_id=0,
            add_space_prefix=prefix, **keys,
        )
    )  # fmt: skip
    of_token = {token: score for token, score, kind in zip(keys["tokens"], scores, types, strict=True) if kind == 1}
    for text in TEXTS:
        expected = merged_by_score(("▁" if prefix and text else "") + text.replace(" ", "▁"), of_token)
        ids = [i for piece in expected for i in ids_of(piece, keys["tokens"])]
        assert found.encode(text) == ids, text
    assert found.encode("x", add_special_tokens=True)[0] == 1  # SentencePiece's default
    assert found.decode(found.encode("東京 x")) == "東京 x"
    assert found.eos_token_ids == {2} and found.bos_token == "<s>"


def test_what_is_special() -> None:
    inner = trained_bytes(pre_tokenizers.ByteLevel(add_prefix_space=False))
    keys = of_trained(inner)
    count = len(keys["tokens"])
    keys["tokens"] += ["<|im_end|>", "<think>", "<unused>", "<|eot|>"]
    types = [1] * count + [3, 4, 5, 3]
    template = "{{ messages[0].content }}{{ eos_token }}"
    more = {"tokenizer.chat_template": template, "token_type": types, "eos_token_id": count, "eot_token_id": count + 3}
    found = read_gguf_tokenizer(header(model="gpt2", pre="gpt-2", **keys, **more))
    assert found.encode("<|im_end|>", parse_special=True) == [count]
    assert len(found.encode("<|im_end|>")) > 1  # a user's text is text
    assert found.encode("a<think>b", parse_special=True).count(count + 1) == 1
    assert found.eos_token_ids == {count, count + 3}
    assert found.render_chat([{"role": "user", "content": "x"}]) == "x<|im_end|>"
    assert found.front_ids == []


@pytest.mark.parametrize(
    ("pre", "said", "front"), [("llama-bpe", None, 1), ("llama-bpe", False, 0), ("qwen2", True, 1)]
)
def test_what_stands_in_front(pre: str, said: bool | None, front: int) -> None:
    keys = of_trained(trained_bytes(pre_tokenizers.ByteLevel(add_prefix_space=False)))
    more = {} if said is None else {"add_bos_token": said}
    keys["tokens"].append("<bos>")
    found = read_gguf_tokenizer(header(model="gpt2", pre=pre, bos_token_id=len(keys["tokens"]) - 1, **keys, **more))
    assert len(found.front_ids) == front


def test_the_publishers_own_is_taken_first() -> None:
    theirs = Tokenizer.train(TEXTS, 300)
    found = read_gguf_tokenizer(
        header(**{"tokenizer.huggingface.json": theirs.inner.to_str(), "model": "gpt2", "pre": "no such"})
    )
    for text in TEXTS:
        assert found.encode(text) == theirs.encode(text)


def test_it_is_written_and_read_again(tmp_path: Path) -> None:
    keys = of_trained(trained_bytes(pre_tokenizers.ByteLevel(add_prefix_space=False)))
    found = read_gguf_tokenizer(header(model="gpt2", pre="deepseek-v3", eos_token_id=7, **keys))
    found.save_directory(tmp_path)
    again = Tokenizer.from_directory(tmp_path)
    assert again.eos_token_ids == {7}
    for text in TEXTS:
        assert again.encode(text) == found.encode(text)


def test_an_unknown_way_to_split_is_refused() -> None:
    keys = of_trained(trained_bytes(pre_tokenizers.ByteLevel(add_prefix_space=False)))
    with pytest.raises(CheckpointError, match=r"ggml\.pre = 'mine'.*--tokenizer DIR"):
        read_gguf_tokenizer(header(model="gpt2", pre="mine", **keys))
