"""Models by their name on the Hugging Face hub, where `huggingface_hub` is installed and there is a network.

OWNER/NAME is a repository, OWNER/NAME@REVISION one state of it, OWNER/NAME:TYPE its model in GGUF of that type, as
llama.cpp has it (`:Q4_K_M`). The address of its page is taken for its name.
"""

import logging
import re
from pathlib import Path

from manyhands.errors import CheckpointError
from manyhands.files import did_you_mean
from manyhands.text.hub_error import why

_log = logging.getLogger(__name__)
_PART = r"[A-Za-z0-9][\w.-]{0,95}"
_NAME = re.compile(
    r"(?:(?:https?:/{1,2})?(?:huggingface\.co|hf\.co)/)?"
    rf"(?P<repository>{_PART}/{_PART})(?::(?P<kind>[\w.-]{{1,40}}))?(?:@(?P<revision>[\w./-]{{1,100}}))?"
)
_FILES = [
    "*.json",
    "*.safetensors",
    "*.jinja",
    "tokenizer.model",
    "*.tiktoken",
    "tiktoken.model",
    "LICENSE",
    "NOTICE",
]
"""Descriptions, weights, templates: no code and no pickle is ever fetched."""


def is_hub_name(text: str) -> bool:
    """Whether `text` reads as a name on the hub, as the head of this file has them."""
    return _NAME.fullmatch(text) is not None


def download(name: str) -> Path:
    """The local snapshot of a name on the hub, or its GGUF file; what is in the cache is not fetched again.

    Raises `CheckpointError` in one line if the library is missing, the network is, the model, or its GGUF file.
    """
    parts = _NAME.fullmatch(name)
    assert parts is not None
    repository, kind = parts["repository"], parts["kind"]
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        remedy = 'to load it from the Hugging Face hub: pip install "manyhands[hub]"'
        raise CheckpointError(f"{name}: no such directory{did_you_mean(name)}; {remedy}") from None
    files = _FILES if kind is None else _gguf_files(kind)
    try:
        found = snapshot_download(
            repository, revision=parts["revision"], allow_patterns=files, ignore_patterns=["*mmproj*"]
        )
    except Exception as error:  # the library raises its own, the network's and the file system's errors here
        reason = why(error, f"https://huggingface.co/{repository}")
        raise CheckpointError(
            f"{name}: no such directory{did_you_mean(name)}, and not to be had from the Hugging Face hub: {reason}"
        ) from None
    _log.debug("%s: in the hub's cache, %s", name, found)
    return Path(found) if kind is None else _gguf_of(Path(found), name, kind)


def _gguf_files(kind: str) -> list[str]:
    spelled = sorted({kind, kind.lower(), kind.upper()})
    begins = ("", "*[-._/]")  # BF16 is not F16
    return [f"{begin}{one}{end}" for one in spelled for begin in begins for end in (".gguf", "-*-of-*.gguf")]


def _gguf_of(snapshot: Path, name: str, kind: str) -> Path:
    """The one model of that type, or the first file of its series."""
    ending = re.compile(rf"(.*[-._])?{re.escape(kind)}(-0*1-of-\d+)?\.gguf", re.IGNORECASE)
    found = sorted(
        path for path in snapshot.rglob("*.gguf") if "mmproj" not in path.name and ending.fullmatch(path.name)
    )
    if not found:
        raise CheckpointError(f"{name}: there is no GGUF file of the type {kind} in it; its page lists its files")
    if len(found) > 1:
        there = ", ".join(str(path.relative_to(snapshot)) for path in found[:3])
        raise CheckpointError(f"{name}: {len(found)} models of that type ({there}); fetch one with `hf download`")
    return found[0]
