"""GGUF files byte by byte, right and wrong: the `gguf` package would refuse to write the wrong ones."""

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests.families.to_gguf import ARCH, keys_of, tensors_of

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_CODES = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B", U64: "Q", I64: "q", F64: "d"}


@dataclass
class Key:
    """One entry of the metadata. `kind` of an array is (ARRAY, kind of its entries)."""

    name: str | bytes
    kind: Any
    value: Any


@dataclass
class Tensor:
    """One entry of the table, and its bytes. `dims` are in the file's order, the innermost first."""

    name: str | bytes
    dims: list[int]
    type: int
    data: bytes
    offset: int | None = None
    """None: where it belongs."""


@dataclass
class File:
    """A file before it is bytes; everything in it may be wrong."""

    keys: list[Key] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    magic: bytes = b"GGUF"
    version: int = 3
    counts: tuple[int, int] | None = None
    alignment: int = 32

    def key(self, name: str) -> Key:
        return next(key for key in self.keys if key.name == name)

    def tensor(self, name: str) -> Tensor:
        return next(tensor for tensor in self.tensors if tensor.name == name)

    def bytes(self) -> bytes:
        n_tensors, n_keys = self.counts or (len(self.tensors), len(self.keys))
        out = [self.magic, struct.pack("<IQQ", self.version, n_tensors & (2**64 - 1), n_keys & (2**64 - 1))]
        for key in self.keys:
            out += [text(key.name), entry(key.kind, key.value)]
        at, data = 0, []
        for tensor in self.tensors:
            out += [text(tensor.name), struct.pack("<I", len(tensor.dims))]
            out += [struct.pack("<Q", n & (2**64 - 1)) for n in tensor.dims]
            out.append(struct.pack("<IQ", tensor.type, at if tensor.offset is None else tensor.offset))
            padded = tensor.data + bytes(-len(tensor.data) % self.alignment)
            data.append(padded)
            at += len(padded)
        head = b"".join(out)
        return head + bytes(-len(head) % self.alignment) + b"".join(data)


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def entry(kind: Any, value: Any) -> bytes:
    if isinstance(value, Raw):
        return value.data
    if isinstance(kind, tuple):
        inner = kind[1]
        return struct.pack("<IIQ", ARRAY, inner, len(value)) + b"".join(one(inner, v) for v in value)
    return struct.pack("<I", kind) + one(kind, value)


@dataclass
class Raw:
    """Type and value as they are to stand in the file."""

    data: bytes


def one(kind: int, value: Any) -> bytes:
    if kind == STRING:
        return text(value)
    code = _CODES[kind]
    return struct.pack("<" + code, value if code in "fd" else int(value))


def key_of(name: str, value: Any) -> Key:
    if isinstance(value, bool):
        return Key(name, BOOL, value)
    if isinstance(value, int):
        return Key(name, U32, value)
    if isinstance(value, float):
        return Key(name, F32, value)
    if isinstance(value, str):
        return Key(name, STRING, value)
    inner = STRING if isinstance(value[0], str) else F32 if isinstance(value[0], float) else I32
    return Key(name, (ARRAY, inner), list(value))


def file_of(directory: Path, kind: str = "F32", tokenizer: Iterable[tuple[str, Any]] = ()) -> File:
    """A published family's directory as a `File`."""
    values = json.loads((directory / "config.json").read_text())
    arch = ARCH[values["model_type"]]
    file = File([key_of("general.architecture", arch)])
    file.keys += [key_of(f"{arch}.{name}", value) for name, value in keys_of(values).items()]
    file.keys += [key_of(name, value) for name, value in tokenizer]
    number = gguf.GGMLQuantizationType[kind]
    block = gguf.GGML_QUANT_SIZES[number][0]
    for name, x in tensors_of(directory, values).items():
        data = x.float().contiguous().numpy()
        plain = kind == "F32" or data.ndim < 2 or "ffn_gate_inp" in name or data.shape[-1] % block
        raw = data if plain else np.asarray(gguf.quants.quantize(data, number))
        file.tensors.append(Tensor(name, list(reversed(data.shape)), 0 if plain else int(number), raw.tobytes()))
    return file


def byte_letters() -> list[str]:
    """The 256 letters of a byte-level vocabulary."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in shown] + [chr(256 + n) for n in range(256 - len(shown))]


def byte_level(pre: str = "qwen2") -> list[tuple[str, Any]]:
    """A small byte-level tokenizer's keys: 256 letters, two merges, two control tokens."""
    tokens = [*byte_letters(), "he", "hel", "<|end|>", "<|start|>"]
    types = [1] * 258 + [3, 3]
    g = "tokenizer.ggml."
    return [
        (f"{g}model", "gpt2"), (f"{g}pre", pre), (f"{g}tokens", tokens), (f"{g}token_type", types),
        (f"{g}merges", ["h e", "he l"]), (f"{g}eos_token_id", 258), (f"{g}bos_token_id", 259),
        (f"{g}add_bos_token", False),
    ]  # fmt: skip


def sentencepiece() -> list[tuple[str, Any]]:
    """A small SentencePiece tokenizer's keys: bytes, letters, a few pieces with scores."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *"helowrd", "he", "ll", "hell", "▁w"]
    types = [2, 3, 3, *[6] * 256, *[1] * 12]
    scores = [0.0] * 259 + [-1.0 - n for n in range(8)] + [-20.0, -21.0, -19.0, -22.0]
    g = "tokenizer.ggml."
    return [
        (f"{g}model", "llama"), (f"{g}tokens", tokens), (f"{g}scores", scores), (f"{g}token_type", types),
        (f"{g}bos_token_id", 1), (f"{g}eos_token_id", 2), (f"{g}unknown_token_id", 0),
    ]  # fmt: skip
