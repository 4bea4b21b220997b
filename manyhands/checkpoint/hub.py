"""Models by their name on the Hugging Face hub, where `huggingface_hub` is installed and there is a network."""

import logging
import re
from pathlib import Path

from manyhands.errors import CheckpointError

_log = logging.getLogger(__name__)
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(@[\w./-]{1,100})?")
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
    """Whether `text` reads as OWNER/NAME, or OWNER/NAME@REVISION."""
    return _NAME.fullmatch(text) is not None


def download(name: str) -> Path:
    """The local snapshot of OWNER/NAME[@REVISION]; what is in the cache is not fetched again.

    Raises `CheckpointError` in one line if the library is missing, the network is, or the model.
    """
    repository, _, revision = name.partition("@")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f'{name}: no such directory; to load it from the Hugging Face hub: pip install "manyhands[hub]"'
        ) from None
    try:
        found = Path(snapshot_download(repository, revision=revision or None, allow_patterns=_FILES))
    except Exception as error:  # the library raises its own, the network's and the file system's errors here
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(
            f"{name}: no such directory, and not to be had from the Hugging Face hub: {type(error).__name__}: {reason}"
        ) from None
    _log.debug("%s: in the hub's cache, %s", name, found)
    return found
