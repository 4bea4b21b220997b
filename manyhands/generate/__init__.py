"""Generation and evaluation: sampling, the engine, text as it comes, what the experts did. Start with `engine.py`."""

from manyhands.generate.engine import Completion, FinishReason, Step, complete, generate
from manyhands.generate.evaluate import Evaluation, evaluate
from manyhands.generate.sampling import SamplingConfig, sample
from manyhands.generate.show_routing import routing_line
from manyhands.generate.stream import TextStream

__all__ = [
    "Completion",
    "Evaluation",
    "FinishReason",
    "SamplingConfig",
    "Step",
    "TextStream",
    "complete",
    "evaluate",
    "generate",
    "routing_line",
    "sample",
]
