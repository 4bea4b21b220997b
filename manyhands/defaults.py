"""Defaults that help texts state too: importing them costs nothing."""

from typing import Literal

TEMPERATURE = 0.8
"""Of `SamplingConfig`, chat and generate, where the model's publisher gives none."""
EVAL_LENGTH = 1024
"""Positions of an evaluated sequence at most, where no run says what the model was trained with."""
BENCH_PROMPT, BENCH_NEW = 256, 32
"""Tokens that `bench` reads and decodes, where the model has room for them."""
PLAN_CONTEXT = 4096
"""Positions that a plan is made for."""
TOKENS_PER_DEVICE = 4096
"""With `plan --scale`."""
GROUP_SIZE: Literal[32] = 32
"""Inputs that share a scale in int4 records."""
MAX_SHARD_SIZE = 5_000_000_000
"""Bytes per file of weights, as transformers has long written them."""
