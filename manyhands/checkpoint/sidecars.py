"""What lies beside the weights (tokenizer, generation settings, licences): copied, or named as left behind."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from manyhands.checkpoint.gguf.files import is_gguf
from manyhands.checkpoint.manifest import MANIFEST
from manyhands.checkpoint.receipt import RECEIPT
from manyhands.errors import CheckpointError
from manyhands.families.gguf import read_gguf_header
from manyhands.files import CONFIG, GENERATION, TOKENIZER, write_atomic
from manyhands.text import Tokenizer
from manyhands.text.gguf_tokenizer import read_gguf_tokenizer
from manyhands.text.tokenizer_files import LARGEST, TIKTOKEN, has_tokenizer, read_small

_TOKENIZERS = (
    *LARGEST,
    "*.tiktoken",
    "*.jinja",
    "chat_template.json",
    "tekken.json",
    "vocab.txt",
    "tokenizer.model.v*",
)
_OTHERS = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "*preprocessor_config.json", "processor_config.json")
_OF_THE_MODEL = (CONFIG, MANIFEST, RECEIPT, "*.safetensors", "*.safetensors.index.json")
_LIMIT = 64 << 20  # bytes
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True, slots=True)
class Beside:
    """What became of the files beside a model's weights, by name."""

    copied: list[str]
    """Byte for byte."""
    left: list[str]
    """Not copied: code, other formats of the weights, texts about the original, what cannot be read."""
    unread: str | None = None
    """Why the tokenizer could not be read, though its files were copied."""

    @property
    def line(self) -> str | None:
        """For people; None if there is nothing to say."""
        said = [] if self.unread is None else [f"the tokenizer is copied, not read: {self.unread}"]
        if self.left:
            more = f" and {len(self.left) - 6} more" if len(self.left) > 6 else ""
            said.append(f"left behind: {', '.join(self.left[:6])}{more}")
        return "\n".join(said) or None


def tokenizer_of(path: Path) -> tuple[Tokenizer | None, str | None]:
    """The tokenizer of a checkpoint (a directory, or a GGUF file), or None, and why one that is there cannot be read.

    Raises `CheckpointError` for a damaged `tokenizer.json`.
    """
    if is_gguf(path):
        try:
            return read_tokenizer(path), None
        except CheckpointError as error:
            return None, str(error)
    if not has_tokenizer(path):
        return None, None
    try:
        return Tokenizer.from_directory(path), None
    except CheckpointError as error:
        if (path / TOKENIZER).is_file():
            raise
        return None, str(error)


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a directory or a GGUF file. Raises `CheckpointError` if there is none, or it is damaged."""
    return read_gguf_tokenizer(read_gguf_header(path)) if is_gguf(path) else Tokenizer.from_directory(path)


def copy_tokenizer(path: Path, target: Path) -> None:
    """A `tokenizer.json`, or the files of a tokenizer's directory, into the directory `target`."""
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        shutil.copyfile(file, target / (file.name if path.is_dir() else TOKENIZER))


def write_beside(
    target: Path,
    tokenizer: Tokenizer | None,
    origin: Path | None = None,
    values: Mapping[str, Any] | None = None,
    unread: str | None = None,
) -> Beside:
    """Write a tokenizer, and what else lies in the directory `origin`, into the directory `target`.

    Beside an `origin` that is a file lies what belongs to others.

    `values` is the original's `config.json`, whose token ids go into a `generation_config.json` where there is none.
    Raises `StorageError` if the disk refuses.
    """
    if tokenizer is not None:
        tokenizer.save_directory(target)
    copied, left = _copy(target, tokenizer, origin) if origin is not None and origin.is_dir() else ([], [])
    ids = token_ids(tokenizer, values or {})
    if not (target / GENERATION).exists() and "eos_token_id" in ids:
        write_atomic(target / GENERATION, (json.dumps(ids, indent=2) + "\n").encode())
    return Beside(copied, left, unread)


def token_ids(tokenizer: Tokenizer | None, values: Mapping[str, Any]) -> dict[str, Any]:
    """`bos_token_id`, `eos_token_id` (a number or several), `pad_token_id`, where known.

    From generation_config.json, else from `values` (a `config.json`), else the tokens that the tokenizer names.
    """
    generation: Mapping[str, Any] = {} if tokenizer is None else tokenizer.files.generation
    inner = values.get("text_config")
    found: dict[str, Any] = {}
    for name in _TOKENS:
        for place in (generation, values, inner if isinstance(inner, dict) else {}):
            if name not in found and place.get(name) is not None:
                found[name] = place[name]
    if tokenizer is not None:
        for name in ("bos_token", "pad_token"):
            token_id = tokenizer.inner.token_to_id(tokenizer.files.named_tokens.get(name, ""))
            found |= {f"{name}_id": token_id} if token_id is not None and f"{name}_id" not in found else {}
        if ends := sorted(tokenizer.eos_token_ids):
            found.setdefault("eos_token_id", ends[0] if len(ends) == 1 else ends)
    return found


def _copy(target: Path, tokenizer: Tokenizer | None, origin: Path) -> tuple[list[str], list[str]]:
    """The names of the files that were copied and of those that were not."""
    wanted = _TOKENIZERS + _OTHERS if _is_of(tokenizer, origin) else _OTHERS
    copied: list[str] = []
    left: list[str] = []
    for path in sorted(origin.iterdir()):
        name = path.name
        if name.startswith(".") or any(fnmatch(name, pattern) for pattern in _OF_THE_MODEL):
            continue
        if path.is_dir() and name == "additional_chat_templates" and _is_of(tokenizer, origin):
            for inner in sorted(path.glob("*.jinja")):
                (target / name).mkdir(exist_ok=True)
                (copied if _copy_one(inner, target / name / inner.name) else left).append(f"{name}/{inner.name}")
        elif path.is_file() and any(fnmatch(name, pattern) for pattern in wanted):
            (copied if _copy_one(path, target / name) else left).append(name)
        else:
            left.append(name + "/" if path.is_dir() else name)
    return copied, left


def _copy_one(path: Path, target: Path) -> bool:
    """Whether it is there now; what the tokenizer wrote already stays."""
    if not target.exists():
        try:
            data = read_small(path, _LIMIT)
        except CheckpointError:  # too large, a link out of the checkpoint
            return False
        if data is None:
            return False
        write_atomic(target, data)
    return True


def _is_of(tokenizer: Tokenizer | None, origin: Path) -> bool:
    """Whether the files of a tokenizer in `origin` belong to `tokenizer` (None: nothing else is known)."""
    if tokenizer is None:
        return True
    for name in (TOKENIZER, TIKTOKEN):
        if (origin / name).is_file():
            return tokenizer.files.content.get(name) == (origin / name).read_bytes()
    return False
