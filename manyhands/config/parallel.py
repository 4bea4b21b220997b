"""How a run lies on the processes that train it together. It changes no result, so a run may go on with another one."""

import re
from typing import Literal, NamedTuple

from manyhands.config.base import Strict
from manyhands.config.numbers import Size
from manyhands.errors import ConfigError


class ParallelConfig(Strict):
    """W processes (torchrun's `--nproc-per-node` × `--nnodes`) share a batch; their states are shared out as well."""

    ep: Size = 1
    """Processes that share out one set of experts; the W/ep sets train on different sequences of the batch, as all
    processes do. Must divide W and the number of experts."""
    dispatch: Literal["by_pairs", "by_tokens"] = "by_pairs"
    """How a token reaches experts elsewhere: once for each of its experts, or once for each process that holds some."""


class Layout(NamedTuple):
    """W = dp·ep processes: dp sets, each of which shares out one set of experts over ep."""

    dp: int
    ep: int

    @property
    def size(self) -> int:
        """W."""
        return self.dp * self.ep

    def __str__(self) -> str:
        return f"{self.dp}x{self.ep}"


def layout_named(text: str) -> Layout:
    """`DPxEP`, as in 2x4. Raises `ConfigError` for anything else."""
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text.strip())
    if found is None:
        raise ConfigError(f"layout {text!r}: expected DPxEP, as 2x4 is 2 sets of processes that share experts over 4")
    return Layout(int(found[1]), int(found[2]))
