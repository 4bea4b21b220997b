"""Clients of the engine: prompts in step, conversation, evaluation, what the experts did. Start with `steps.py`.

The room's name is a function's as well: `manyhands.generate(model, tokenizer, prompts, sampling)` is `complete`.
"""

import sys
from collections.abc import Sequence
from types import ModuleType

from manyhands.config import SamplingConfig
from manyhands.engine.answer import Completion
from manyhands.engine.engine import Prompt
from manyhands.engine.prefix import Prefix
from manyhands.engine.request import FinishReason
from manyhands.engine.sampling import sample
from manyhands.engine.stream import TextStream
from manyhands.generate.conversation import Conversation
from manyhands.generate.evaluate import Evaluation, evaluate
from manyhands.generate.show_routing import routing_line
from manyhands.generate.steps import Step, complete, generate
from manyhands.models import Decoder
from manyhands.text import Tokenizer

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


class _Room(ModuleType):
    """Python sets `manyhands.generate` to this module on its first import; so the module must be what people call."""

    def __call__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig | Sequence[SamplingConfig] | None = None,
        *,
        exact: bool = False,
    ) -> list[Completion]:
        return complete(model, tokenizer, prompts, sampling, exact=exact)


sys.modules[__name__].__class__ = _Room
