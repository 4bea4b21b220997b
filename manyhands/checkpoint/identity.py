"""Which model files hold: the SHA-256 of each that says what the model is, or holds its weights."""

import hashlib
from pathlib import Path

from manyhands.checkpoint.manifest import MANIFEST, read_manifest
from manyhands.families.gguf import is_gguf, read_series
from manyhands.files import CONFIG

_STATE = ("optimizer", "rng")
"""How the names of a run's files begin that hold no weights."""


def model_digests(path: Path) -> dict[str, str]:
    """Name -> SHA-256, of a directory or a GGUF file. A manifest, which `find` verified, is taken at its word."""
    if (path / MANIFEST).is_file():
        digests = {name: entry.sha256 for name, entry in read_manifest(path).files.items()}
    else:
        files = [part.path for part in read_series(path)[1]] if is_gguf(path) else path.iterdir()
        digests = {file.name: _digest(file) for file in sorted(files) if _is_model(file.name)}
    return {name: digest for name, digest in digests.items() if _is_model(name)}


def _is_model(name: str) -> bool:
    """A run's checkpoint has its training state beside the model."""
    return name == CONFIG or (name.endswith((".safetensors", ".gguf")) and not name.startswith(_STATE))


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
