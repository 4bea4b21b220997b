"""Which model, and whose token numbers, a trace is of: hashes that are cheap and stay the same."""

import hashlib
import json
from typing import Any

from manyhands.checkpoint.manifest import MANIFEST, read_manifest
from manyhands.checkpoint.model import LoadedModel
from manyhands.config import BuiltConfig
from manyhands.errors import ManyhandsError, UserError
from manyhands.files import CONFIG, TOKENIZER
from manyhands.models import AnyModel
from manyhands.text import Tokenizer


def routed(config: BuiltConfig) -> dict[str, Any]:
    """Fields of `Recorder`: the sparse layers, E, and K places per token. Where experts choose, a token may have all E.

    Raises `UserError` for a model without a sparse layer.
    """
    if config.moe is None or not config.sparse_layers:
        raise UserError("a trace records which expert each token goes to, and this model has no sparse layer")
    router = config.moe.router
    places = {"num_experts": router.num_experts, "num_experts_per_tok": router.most_experts_per_tok}
    return {"layers": config.sparse_layers, **places}


def fingerprint(model: AnyModel) -> str | None:
    """SHA-256 that names the files a model came from; None for one that came from none, or whose files have gone.

    Where a manifest lists them: of the hashes of its config and weights, so of every byte. Else of `config.json` and
    the names, dtypes and shapes of its tensors: another training of the same model has the same.
    """
    origin = model.origin if isinstance(model, LoadedModel) else None
    if origin is None:
        return None
    try:
        if (origin.directory / MANIFEST).is_file():
            files = read_manifest(origin.directory).files
            told: object = {n: e.sha256 for n, e in files.items() if n == CONFIG or n.endswith(".safetensors")}
        else:
            stored = origin.open_files().stored
            told = [origin.values, {name: [one.header.dtype, *one.header.shape] for name, one in stored.items()}]
    except (ManyhandsError, OSError):
        return None
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def tokenizer_sha256(tokenizer: Tokenizer) -> str:
    """SHA-256 of its `tokenizer.json`, as it was read or as it would be written."""
    content = tokenizer.files.content.get(TOKENIZER)
    return hashlib.sha256(tokenizer.inner.to_str(pretty=True).encode() if content is None else content).hexdigest()
