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
from manyhands.parallel.ranks import Alone, Ranks
from manyhands.system import installed_memory
from manyhands.text.tokenizer import smallest_vocabulary
from manyhands.train.optim import build_optimizers
from manyhands.train.rows import check_rows
from manyhands.train.seq2seq import check_spans
from manyhands.train.state import count_parameters, count_trained, pick_device
from manyhands.train.together import check_together
from manyhands.train.trackers import not_installed
from manyhands.train.trainable import freeze

_BYTES_TRAINED = 12  # weight, gradient, and one moment at least, in float32
_BYTES_FROZEN = 4


def check_ready(run: RunConfig, ranks: Ranks | None = None) -> None:
    """Raises `ConfigError` for what this machine, this installation or these `ranks` (None: one process) cannot do,
    naming the field."""
    ranks = ranks or Alone()
    _check_shares(run, ranks.size)
    if run.train.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device = 'cuda': PyTorch finds no CUDA device here; use cpu, or auto")
    check_name(run.train.experts_implementation)
    for tracker in run.train.trackers:
        if importlib.util.find_spec(tracker) is None:
            raise not_installed(tracker)
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
    _check_memory(trained if run.saves_changes else count_parameters(model)[0], trained, run.train.device, ranks)


def _check_shares(run: RunConfig, processes: int) -> None:
    """Batch and experts can be shared out over the processes, and the rest trained by them as by one."""
    if run.parallel.ep > 1 and processes % run.parallel.ep:
        raise ConfigError(
            f"parallel.ep = {run.parallel.ep} does not divide the {processes} processes of this job; "
            "set parallel.ep to a number that does"
        )
    batch, micro = run.train.batch_size, run.train.micro_batch_size
    if batch % processes:
        raise ConfigError(
            f"train.batch_size = {batch} cannot be shared out over {processes} processes: "
            f"make it a multiple of {processes}"
        )
    check_together(run, processes)
    each = batch // processes
    if micro is not None and micro < each and each % micro:
        raise ConfigError(
            f"train.micro_batch_size = {micro} does not divide the {each} sequences that each of {processes} processes "
            f"has of train.batch_size = {batch}"
        )


def _check_memory(parameters: int, trained: int, device: str, ranks: Ranks) -> None:
    chosen = pick_device(device)
    if chosen.type == "cuda":
        have, many = torch.cuda.get_device_properties(chosen).total_memory, ranks.size
        where = "the GPU has" if many == 1 else f"{many} GPUs like this one have"
    else:
        have, many = installed_memory(), ranks.size // ranks.local_size
        where = "this machine has" if many == 1 else f"{many} machines like this one have"
    have *= many
    need = (parameters - trained) * _BYTES_FROZEN + trained * _BYTES_TRAINED
    if need > have:
        raise ConfigError(
            f"the model has {parameters / 1e9:,.1f} billion parameters, which need {need / 1e9:,.0f} GB and more to "
            f"train; {where} {have / 1e9:,.0f} GB: make model smaller"
        )
