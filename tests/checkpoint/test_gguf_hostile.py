"""GGUF files that are wrong in one place each: a typed error naming file and place, soon, in little memory.

The list is that of llama.cpp's `tests/test-gguf.cpp`, and what has been found in readers since.
"""

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from manyhands.checkpoint.model import load, load_model
from manyhands.errors import CheckpointError

from .gguf_bytes import ARRAY, BOOL, STRING, U8, U16, U32, U64, File, Key, Raw, byte_level, file_of
from .gguf_mutations import GQA, MOE, SMALL, fuzz
from .hostile import make, refused

Change = Callable[[File], object]
HUGE = 2**64 - 1


def key(name, kind, value) -> Change:
    """Replace a key, or add one."""

    def change(file: File) -> None:
        file.keys = [k for k in file.keys if k.name != name] + [Key(name, kind, value)]

    return change


def fields(of: str, /, **values) -> Change:
    """Fields of one tensor."""
    return lambda file: [
        setattr(tensor, field, value) for tensor in [file.tensor(of)] for field, value in values.items()
    ]


def whole(**values) -> Change:
    return lambda file: [setattr(file, field, value) for field, value in values.items()]


def array(kind: int, count: int) -> Raw:
    return Raw(struct.pack("<IIQ", ARRAY, kind, count))


NORM, EXPERTS = "blk.0.attn_norm.weight", "blk.0.ffn_down_exps.weight"
WRONG: dict[str, tuple[Change, str]] = {
    "magic": (whole(magic=b"GGUX"), "not a GGUF file"),
    "version 0": (whole(version=0), "version 0"),
    "version 1": (whole(version=1), "version 1"),
    "version of the future": (whole(version=4), "version 4"),
    "big-endian": (whole(version=3 << 24), "big-endian"),
    "-1 tensors": (whole(counts=(-1, 5)), "make sense"),
    "-1 keys": (whole(counts=(1, -1)), "make sense"),
    "2**60 tensors": (whole(counts=(2**60, 5)), "make sense"),
    "one key more than there is": (lambda f: setattr(f, "counts", (len(f.tensors), len(f.keys) + 1)), ""),
    "one tensor more than there is": (lambda f: setattr(f, "counts", (len(f.tensors) + 1, len(f.keys))), ""),
    "an empty key": (lambda f: f.keys.append(Key("", U32, 1)), "no name"),
    "a key of 100 kB": (lambda f: f.keys.append(Key("x" * 100_000, U32, 1)), "bytes long"),
    "a key that is not UTF-8": (lambda f: f.keys.append(Key(b"\xff\xfe", U32, 1)), "UTF-8"),
    "a key with a line break": (lambda f: f.keys.append(Key("a\nb", U32, 1)), "no name"),
    "a key twice": (lambda f: f.keys.append(f.keys[1]), "twice"),
    "a type that is none": (key("x", 0, Raw(struct.pack("<I", 13))), "type 13"),
    "an array of a type that is none": (key("x", 0, array(13, 1)), "type 13"),
    "an array of arrays": (key("x", 0, array(ARRAY, 1)), "array of arrays"),
    "an array of 2**62 bytes": (key("x", 0, array(U8, 2**62)), "truncated"),
    "an array of 2**61 numbers of 8 bytes": (key("x", 0, array(U64, 2**61)), "truncated"),
    "an array of 2**63 strings": (key("x", 0, array(STRING, 2**63)), "truncated"),
    "a string of 2**63 bytes": (key("x", 0, Raw(struct.pack("<IQ", STRING, 2**63))), "bytes long"),
    "a string longer than the file": (key("x", 0, Raw(struct.pack("<IQ", STRING, 1 << 24))), "truncated"),
    "a bool of 2": (key("x", BOOL, 2), "neither 0 nor 1"),
    "a bool of 2 in an array": (key("x", (ARRAY, BOOL), [0, 2]), "neither 0 nor 1"),
    "alignment 0": (key("general.alignment", U32, 0), "power of two"),
    "alignment 33": (key("general.alignment", U32, 33), "power of two"),
    "alignment 2**31": (key("general.alignment", U32, 2**31), "power of two"),
    "alignment as uint16": (key("general.alignment", U16, 32), "uint32"),
    "alignment that was not kept": (key("general.alignment", U32, 4096), ""),
    "a tensor without a name": (fields(NORM, name=""), "no name"),
    "a tensor's name of 64 bytes": (fields(NORM, name="x" * 64), "bytes long"),
    "a tensor twice": (lambda f: f.tensors.append(f.tensors[-1]), "twice"),
    "rank 0": (fields(NORM, dims=[]), "0 dimensions"),
    "rank 5": (fields(NORM, dims=[32, 1, 1, 1, 1]), "5 dimensions"),
    "a dimension of 0": (fields(NORM, dims=[0]), "no sense"),
    "a dimension of -1": (fields(NORM, dims=[-1]), "no sense"),
    "a product over 2**64": (fields(NORM, dims=[2**33, 2**33]), "no sense"),
    "a product of bytes over 2**63": (fields(NORM, dims=[2**47]), "truncated"),
    "a type of data that is none": (fields(NORM, type=99), "type 99"),
    "a type that was removed": (fields(NORM, type=4), "type 4"),
    "a type of integers": (fields(EXPERTS, type=26), "I32"),
    "a type that nobody decodes": (fields(EXPERTS, type=9, data=bytes(32 * 32 * 4 // 32 * 40)), "Q8_1"),
    "rows that are no blocks": (fields(EXPERTS, type=12), "blocks of 256"),
    "an offset that is not aligned": (fields(EXPERTS, offset=7), "begins at 7"),
    "an offset of 2**64 - 1": (fields(EXPERTS, offset=HUGE), "begins at"),
    "an offset that overlaps": (fields(EXPERTS, offset=0), "begins at 0"),
    "bytes after the end": (
        lambda f: setattr(f.tensors[-1], "data", f.tensors[-1].data + bytes(320)),
        "after the last",
    ),
    "too little data": (lambda f: setattr(f.tensors[-1], "data", b""), "truncated"),
    "no architecture": (lambda f: f.keys.remove(f.key("general.architecture")), "general.architecture"),
    "an architecture that is a number": (key("general.architecture", U32, 3), "general.architecture"),
    "an architecture that is not known": (key("general.architecture", STRING, "mamba"), "known: "),
    "no layers": (key("llama.block_count", U32, 0), "block_count"),
    "2**32 - 1 layers": (key("llama.block_count", U32, 2**32 - 1), "block_count"),
    "4000 layers": (key("llama.block_count", U32, 4000), "missing"),
    "10**9 experts": (key("llama.expert_count", U32, 10**9), ""),
    "no heads": (key("llama.attention.head_count", U32, 0), "head_count"),
    "2**31 heads": (key("llama.attention.head_count", U32, 2**31), ""),
    "heads that differ by layer": (key("llama.attention.head_count", (ARRAY, U32), [2, 1]), "every layer"),
    "a width that is a string": (key("llama.embedding_length", STRING, "x"), "expected a number"),
    "an unknown key": (key("llama.boost", U32, 1), "--ignore-field llama.boost"),
    "an unknown rotation": (key("llama.rope.scaling.type", STRING, "longrope"), "rope.scaling.type"),
    "another score": (key("llama.expert_gating_func", U32, 4), "expert_gating_func"),
    "a tensor of another shape": (lambda f: f.tensor(EXPERTS).dims.reverse(), "shape"),
    "a tensor too many": (fields(NORM, name="blk.0.surprise.weight"), ""),
    "a tensor that is missing": (lambda f: f.tensors.remove(f.tensor(NORM)), "missing"),
    "a part of a series": (key("split.count", U16, 3), "expected the name"),
    "a part that is none": (key("split.count", STRING, "x"), "split.count"),
}
WRONG_TOKENIZERS: dict[str, tuple[Change, str]] = {
    "an unknown pre-tokenizer": (key("tokenizer.ggml.pre", STRING, "mine"), "pre"),
    "a pre-tokenizer that is a list": (key("tokenizer.ggml.pre", (ARRAY, STRING), ["qwen2"]), "pre"),
    "no pre-tokenizer": (lambda f: f.keys.remove(f.key("tokenizer.ggml.pre")), "pre"),
    "another kind": (key("tokenizer.ggml.model", STRING, "bert"), "model"),
    "no tokens": (lambda f: f.keys.remove(f.key("tokenizer.ggml.tokens")), "tokens"),
    "tokens that are numbers": (key("tokenizer.ggml.tokens", (ARRAY, U32), [1, 2]), "tokens"),
    "a token twice": (lambda f: f.key("tokenizer.ggml.tokens").value.__setitem__(0, "he"), "twice"),
    "a token of 100 kB": (lambda f: f.key("tokenizer.ggml.tokens").value.__setitem__(0, "y" * 100_000), "longer"),
    "types for some tokens": (lambda f: f.key("tokenizer.ggml.token_type").value.pop(), "one per token"),
    "a merge of what is not there": (key("tokenizer.ggml.merges", (ARRAY, STRING), ["zz y"]), "merges"),
    "a merge without a space": (key("tokenizer.ggml.merges", (ARRAY, STRING), ["he"]), "merges"),
    "an end that is no token": (key("tokenizer.ggml.eos_token_id", U32, 2**31), "eos_token_id"),
    "a whole tokenizer that is none": (key("tokenizer.huggingface.json", STRING, "[" * 100_000), "tokenizer"),
    "more tokens than the model has": (lambda f: _more_tokens(f), "belong together"),
}


def _more_tokens(file: File) -> None:
    file.key("tokenizer.ggml.tokens").value.extend(f"more {n}" for n in range(100))
    file.key("tokenizer.ggml.token_type").value.extend([1] * 100)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("good") / "mixtral", **SMALL, **GQA, moe=MOE)


@pytest.fixture
def file(directory: Path) -> File:
    return file_of(directory, "F32", byte_level())


def test_the_good_one(file: File, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(file.bytes())
    model, tokenizer = load(tmp_path / "model.gguf")
    assert tokenizer.encode("hello<|end|>")[:2] == [257, file.key("tokenizer.ggml.tokens").value.index("l")]
    assert model.family == "mixtral" and tokenizer.decode(tokenizer.encode("hello")) == "hello"


@pytest.mark.parametrize("case", WRONG)
def test_refused(case: str, file: File, tmp_path: Path) -> None:
    change, message = WRONG[case]
    change(file)
    path = tmp_path / "model.gguf"
    path.write_bytes(file.bytes())
    refused(path, message, (load_model, load))


@pytest.mark.parametrize("case", WRONG_TOKENIZERS)
def test_a_wrong_tokenizer_is_refused_and_the_model_is_not(case: str, file: File, tmp_path: Path) -> None:
    change, message = WRONG_TOKENIZERS[case]
    change(file)
    path = tmp_path / "model.gguf"
    path.write_bytes(file.bytes())
    refused(path, message, (load,))
    load_model(path)


def test_every_length(file: File, tmp_path: Path) -> None:
    """Cut anywhere, it is refused: the header at every 7th byte, the data at some."""
    data, path = file.bytes(), tmp_path / "model.gguf"
    head = data.index(b"GGUF") + 4096
    for size in [*range(0, head, 7), *range(head, len(data) - 32, len(data) // 20)]:
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=r"model\.gguf"):
            load_model(path)


def test_what_is_no_file(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe.gguf")
    for name in ("pipe.gguf", "absent.gguf"):
        refused(tmp_path / name, "regular|cannot be read", (load_model, load))


def test_mutations() -> None:
    outcomes = fuzz(150, seed=1)
    assert outcomes["a model"] > 5 and outcomes["CheckpointError"] > 50
