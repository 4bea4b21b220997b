"""How a run lies on the processes that train it together. It changes no result, so a run may go on with another one."""

from typing import Literal

from manyhands.config.base import Strict
from manyhands.config.numbers import Size


class ParallelConfig(Strict):
    """W processes (torchrun's `--nproc-per-node` × `--nnodes`) share a batch; their states are shared out as well."""

    ep: Size = 1
    """Processes that share out one set of experts; the W/ep sets train on different sequences of the batch, as all
    processes do. Must divide W and the number of experts."""
    dispatch: Literal["by_pairs", "by_tokens"] = "by_pairs"
    """How a token reaches experts elsewhere: once for each of its experts, or once for each process that holds some."""
