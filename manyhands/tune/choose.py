"""ESFT's experts from a trace that is there already, in the place of reading the data again."""

from pathlib import Path

from manyhands.config import BuiltConfig
from manyhands.config.tune import EsftTuning
from manyhands.errors import DataError
from manyhands.trace.recording import Trace
from manyhands.trace.relevance import THRESHOLDS, most_relevant, relevance


def chosen_from(path: Path, how: EsftTuning, model: BuiltConfig) -> EsftTuning:
    """`how` with the experts that the trace in directory `path` finds relevant.

    Raises `DataError` for a trace of another model, as far as its layers and experts show, or that is damaged.
    """
    trace = Trace.open(path)
    E = model.moe.router.num_experts if model.moe else 0
    if list(trace.manifest.layers) != list(model.sparse_layers) or trace.manifest.num_experts != E:
        raise DataError(
            f"{path}: a trace of {trace.manifest.num_experts} experts in layers {list(trace.manifest.layers)}; this "
            f"model has {E} in {list(model.sparse_layers)}"
        )
    threshold = THRESHOLDS[how.by] if how.threshold is None else how.threshold
    found = relevance(trace, how.by)
    experts = {layer: most_relevant(relevance_E, threshold) for layer, relevance_E in found.items()}
    return how.model_copy(update={"experts": experts})
