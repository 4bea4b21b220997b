"""What can be known of a run before any work is done: whatever is wrong here would else be found after tokenising."""

import importlib.util
import os

import torch

from manyhands.config import RunConfig
from manyhands.config.tune import EsftTuning
from manyhands.errors import ConfigError
from manyhands.kernels import check_name
from manyhands.models import build
from manyhands.models.tuned import adapt
from manyhands.text.tokenizer import smallest_vocabulary
from manyhands.train.optim import build_optimizers
from manyhands.train.rows import check_rows
from manyhands.train.seq2seq import check_spans
from manyhands.train.state import count_parameters, count_trained, pick_device
from manyhands.train.trainable import freeze

_BYTES_TRAINED = 12  # weight, gradient, and one moment at least, in float32
_BYTES_FROZEN = 4


def check_ready(run: RunConfig) -> None:
    """Raises `ConfigError` for what this machine or this installation cannot do, naming the field."""
    if run.train.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device = 'cuda': PyTorch finds no CUDA device here; use cpu, or auto")
    check_name(run.train.experts_implementation)
    for tracker in run.train.trackers:
        if importlib.util.find_spec(tracker) is None:
            raise ConfigError(f"train.trackers: {tracker} is not installed; run: pip install {tracker}")
    sentinels = run.spans.sentinels if run.model.kind == "encoder_decoder" else 0
    least = smallest_vocabulary(sentinels)
    if run.data.tokenizer is None and run.start is None and run.model.vocab_size < least:
        raise ConfigError(
            f"model.vocab_size = {run.model.vocab_size}: a byte-level vocabulary needs {least} tokens at least"
            + (f", with spans.sentinels = {sentinels}" if sentinels else "")
        )
    check_spans(run)
    if run.rows is not None:
        check_rows(run)
    if run.data.tokenizer is not None and not os.path.exists(os.path.expanduser(run.data.tokenizer)):
        raise ConfigError(f"data.tokenizer = {run.data.tokenizer!r}: there is no such file")
    with torch.device("meta"):
        model = build(run.model, run.train.experts_implementation)
    if isinstance(run.tune, EsftTuning) and run.tune.experts is None:  # chosen when the data has been read
        model.requires_grad_(False)
    elif run.tune is not None and run.saves_changes:
        adapt(model, run.tune)
    else:
        freeze(model, run.trainable)
    if count_trained(model):
        build_optimizers(model, run.optim)
    trained = count_trained(model)  # beside them what is frozen stays the file, and its loader looks whether it fits
    _check_memory(trained if run.saves_changes else count_parameters(model)[0], trained, run.train.device)


def _check_memory(parameters: int, trained: int, device: str) -> None:
    chosen = pick_device(device)
    if chosen.type == "cuda":
        have, where = torch.cuda.get_device_properties(chosen).total_memory, "the GPU"
    else:
        have, where = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this machine"
    need = (parameters - trained) * _BYTES_FROZEN + trained * _BYTES_TRAINED
    if need > have:
        raise ConfigError(
            f"the model has {parameters / 1e9:,.1f} billion parameters, which need {need / 1e9:,.0f} GB and more to "
            f"train; {where} has {have / 1e9:,.0f} GB: make model smaller"
        )
