"""Generation and evaluation: sampling, the engine, text as it comes, what the experts did. Start with `engine.py`."""

from manyhands.config import SamplingConfig
from manyhands.engine.sampling import sample
from manyhands.engine.stream import TextStream
from manyhands.generate.conversation import Conversation
from manyhands.generate.engine import Completion, FinishReason, Step, complete, generate
from manyhands.generate.evaluate import Evaluation, evaluate
from manyhands.generate.prefix import Prefix
from manyhands.generate.show_routing import routing_line

__all__ = [
    "Completion",
    "Conversation",
    "Evaluation",
    "FinishReason",
    "Prefix",
    "SamplingConfig",
    "Step",
    "TextStream",
    "complete",
    "evaluate",
    "generate",
    "routing_line",
    "sample",
]
