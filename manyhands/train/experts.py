"""ESFT's choice when a run begins: the model reads some of what it will be trained on, and its router says who works.

E experts.
"""

from typing import Any

import torch

from manyhands.config import RunConfig
from manyhands.config.tune import EsftTuning
from manyhands.errors import ConfigError
from manyhands.parallel.ranks import Ranks, sum_of
from manyhands.trace.relevance import THRESHOLDS, most_relevant, shares
from manyhands.train.start import Start
from manyhands.train.state import pick_device
from manyhands.train.task import Forward, Task


def as_chosen(run: RunConfig, before: RunConfig) -> RunConfig:
    """`run` with the experts that the run it continues has chosen, where it says nothing else of them."""
    mine, theirs = run.tune, before.tune
    if not (isinstance(mine, EsftTuning) and isinstance(theirs, EsftTuning)) or mine.experts is not None:
        return run
    return run.model_copy(update={"tune": mine.model_copy(update={"experts": theirs.experts})})


@torch.no_grad()
def choose_experts(run: RunConfig, start: Start, data: Any, task: Task, ranks: Ranks) -> RunConfig:
    """`run` with `tune.experts`, from the first `sample_tokens` of its training data, a batch more at most.

    Raises `ConfigError` for a model without experts.
    """
    how = run.tune
    assert isinstance(how, EsftTuning)
    if not run.model.sparse_layers:
        raise ConfigError("tune.method = 'esft' trains some of the experts, and this model has none")
    dtype: torch.dtype = getattr(torch, run.train.dtype)
    kept = torch.float32 if dtype == torch.float32 else None
    model = start.model(run.train.experts_implementation, kept, pick_device(run.train.device))
    E = model.config.moe.router.num_experts if model.config.moe else 0
    sums = {layer: [0.0] * E for layer in run.model.sparse_layers}
    batches, tokens = task.batches(data, run, ranks), 0.0
    while tokens < how.sample_tokens:
        for micro in task.split(next(batches), run.train.micro_batch_size):
            routings = task.loss(model, micro, Forward(dtype)).routings
            [read] = sum_of([float(task.count(micro).tokens)], ranks)
            tokens += read
            for layer, routing in routings.items():
                real_TK = (routing.expert_ids >= 0) & routing.token_mask[:, None]
                weights_TK = routing.weights.double() if how.by == "gate" else torch.ones_like(routing.weights).double()
                ids_N, weights_N = routing.expert_ids[real_TK], weights_TK[real_TK]
                found = torch.bincount(ids_N, weights_N, minlength=E).tolist()
                sums[layer] = [a + b for a, b in zip(sums[layer], sum_of(found, ranks), strict=True)]
    threshold = THRESHOLDS[how.by] if how.threshold is None else how.threshold
    experts = {layer: most_relevant(shares(sums_E, f"layer {layer}"), threshold) for layer, sums_E in sums.items()}
    return run.model_copy(update={"tune": how.model_copy(update={"experts": experts})})
