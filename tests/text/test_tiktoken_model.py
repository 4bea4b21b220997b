"""Kimi's tiktoken.model becomes a tokenizer that gives the ids tiktoken gives."""

import base64
import itertools
import json
import random
import re
from pathlib import Path

import pytest

from manyhands.errors import CheckpointError
from manyhands.text import Tokenizer
from manyhands.text.tiktoken_model import KIMI_PIECES, _letters
from manyhands.text.tokenizer_files import has_tokenizer

TEXT = [
    Path(re.__file__).read_text(),
    "谢谢你，我很好。你好吗? Привет, мир! naïve ǅ 12345 don't we'LL I'D\r\n\n   x\t y  \n" * 20,
]


@pytest.fixture(scope="module")
def ranks() -> list[bytes]:
    """A vocabulary learned here, by rank: the 256 bytes, then the merges in their order."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    inner = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(KIMI_PIECES), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    inner.train_from_iterator(TEXT, trainer)
    back = {letter: b for b, letter in enumerate(_letters())}
    by_id = sorted(inner.get_vocab().items(), key=lambda item: item[1])
    return [bytes(back[letter] for letter in token) for token, _ in by_id]


def write(directory: Path, ranks: list[bytes]) -> Path:
    directory.mkdir()
    lines = [base64.b64encode(token) + f" {rank}\n".encode() for rank, token in enumerate(ranks)]
    (directory / "tiktoken.model").write_bytes(b"".join(lines))
    n = len(ranks)
    named = {str(n): {"content": "[BOS]", "special": True}, str(n + 1): {"content": "[EOS]", "special": True}}
    named[str(n + 2)] = {"content": "<|im_end|>", "special": True}
    described = {"tokenizer_class": "TikTokenTokenizer", "added_tokens_decoder": named, "eos_token": "[EOS]"}
    (directory / "tokenizer_config.json").write_text(json.dumps(described))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": n + 2}))
    return directory


def merged(ranks: dict[bytes, int], piece: bytes) -> list[int]:
    """Tiktoken's rule: the leftmost pair of the lowest rank is merged, until there is none."""
    if piece in ranks:
        return [ranks[piece]]
    parts = [bytes([b]) for b in piece]
    while True:
        pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]
        if not pairs:
            return [ranks[part] for part in parts]
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def texts() -> list[str]:
    rng = random.Random(0)
    alphabet = "aeE'sStTdD \t\r\n0189.,!?-éßſǅ漢字谢你。，😀́אبп"
    some = ["".join(rng.choices(alphabet, k=rng.randrange(1, 40))) for _ in range(300)]
    return [*some, *(" " * n + "x" * n + "\n" * n for n in range(40)), TEXT[0][:3000], TEXT[1]]


def test_the_ids_of_tiktoken(ranks: list[bytes], tmp_path: Path) -> None:
    import tokenizers
    from tokenizers import pre_tokenizers

    directory = write(tmp_path / "kimi", ranks)
    assert has_tokenizer(directory)
    tokenizer = Tokenizer.from_directory(directory)
    n = len(ranks)
    assert tokenizer.vocab_size == n + 256
    assert tokenizer.eos_token_ids == {n + 1, n + 2}
    assert tokenizer.encode("a<|im_end|>", parse_special=True)[-1] == n + 2
    by_bytes = {token: rank for rank, token in enumerate(ranks)}
    split = pre_tokenizers.Split(tokenizers.Regex(KIMI_PIECES), "isolated")
    for text in texts():
        expected = [i for piece, _ in split.pre_tokenize_str(text) for i in merged(by_bytes, piece.encode())]
        assert tokenizer.encode(text) == expected, text
        assert tokenizer.decode(expected) == text
    saved = tmp_path / "saved"
    saved.mkdir()
    tokenizer.save_directory(saved)
    for name in ("tiktoken.model", "tokenizer_config.json", "generation_config.json"):
        assert (saved / name).read_bytes() == (directory / name).read_bytes()
    assert Tokenizer.from_directory(saved).encode(TEXT[1]) == tokenizer.encode(TEXT[1])


def test_where_tiktoken_itself_is_installed(ranks: list[bytes], tmp_path: Path) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    by_bytes = {token: rank for rank, token in enumerate(ranks)}
    theirs = tiktoken.Encoding("kimi", pat_str=KIMI_PIECES, mergeable_ranks=by_bytes, special_tokens={})
    ours = Tokenizer.from_directory(write(tmp_path / "kimi", ranks))
    for text in texts():
        assert ours.encode(text) == theirs.encode_ordinary(text), text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"YQ== 0\nYg== 0\n", "line 2: expected a new token in base64 and its rank 1"),
        (b"YQ== 0\n!!!! 1\n", "line 2"),
        (b"YQ== 0\nYQ== 1\n", "line 2"),
        (b"YQ== 0\n", "byte 0 is no token"),
        (b"", "byte 0 is no token"),
        (b"\x00\xff", "line 1"),
    ],
)
def test_a_damaged_file_is_one_line(data: bytes, message: str, tmp_path: Path) -> None:
    directory = write(tmp_path / "kimi", [b"a"])
    (directory / "tiktoken.model").write_bytes(data)
    with pytest.raises(CheckpointError, match=f"tiktoken.model: {message}"):
        Tokenizer.from_directory(directory)


def test_other_tokenizers_are_named(tmp_path: Path) -> None:
    directory = write(tmp_path / "other", [b"a"])
    (directory / "tokenizer_config.json").write_text("{}")
    assert not has_tokenizer(directory)
    with pytest.raises(CheckpointError, match=r"known for Kimi only; put a tokenizer\.json beside it"):
        Tokenizer.from_directory(directory)
    (directory / "tiktoken.model").rename(directory / "tokenizer.model")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model is not read: transformers makes a tokenizer\.json"):
        Tokenizer.from_directory(directory)
