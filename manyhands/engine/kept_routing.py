"""Who went where, kept with the blocks of the cache: so that it is there also for tokens that nobody runs again.

Expert ids and weights of every position in the blocks, whoever asked for them or not. L sparse layers, P positions of a
block, T tokens, E experts, K experts per token.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from manyhands.config import ModelConfig
from manyhands.engine.blocks import BLOCK_SIZE, Table
from manyhands.moe import Routing


class KeptRouting:
    """Grows with the blocks in use, as the pools of the cache do."""

    def __init__(self, config: ModelConfig, most: int, at_once: bool = False) -> None:
        """Of `most` blocks at most; `at_once`: the memory of all of them when the first is used."""
        assert config.moe is not None
        router = config.moe.router
        self.layers, self.num_experts = list(config.sparse_layers), router.num_experts
        self._shape = BLOCK_SIZE, len(self.layers), router.most_experts_per_tok
        self._most, self._least = most, most if at_once else 0
        self._kind = np.uint8 if router.num_experts < 256 else np.uint16  # the largest number: no expert
        self.release()

    def release(self) -> None:
        """Give the memory back: no block holds anything any more."""
        self._ids, self._weights = (np.empty((0, *self._shape), kind) for kind in (self._kind, np.float32))

    @property
    def nbytes(self) -> int:
        """Of the memory."""
        return self._ids.nbytes + self._weights.nbytes

    def write(self, rows: Sequence[tuple[Table, int, int]], ids_LTK: Tensor, weights_LTK: Tensor) -> None:
        """Of a pass: per row its table, the position of its first token and how many it had, one behind the other."""
        self._hold(1 + max(max(table.ids) for table, _, _ in rows))
        at = [
            table.ids[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE
            for table, first, count in rows
            for p in range(first, first + count)
        ]
        ids, weights = (t.detach().cpu().numpy().swapaxes(0, 1) for t in (ids_LTK, weights_LTK))
        self._ids.reshape(-1, *self._shape[1:])[at] = ids  # −1 becomes the largest number
        self._weights.reshape(-1, *self._shape[1:])[at] = weights

    def read(self, table: Table, length: int) -> dict[int, Routing]:
        """Of the first `length` positions of a table, per sparse layer. Scores and logits are NaN: nobody kept them."""
        blocks = table.ids[: table.blocks.needed(length)]
        ids = self._ids[blocks].reshape(-1, *self._shape[1:])[:length].astype(np.int64)
        ids[ids == np.iinfo(self._kind).max] = -1
        ids_LTK = torch.from_numpy(ids.swapaxes(0, 1).copy())
        weights = self._weights[blocks].reshape(-1, *self._shape[1:])[:length]
        weights_LTK = torch.from_numpy(weights.swapaxes(0, 1).copy())
        unknown_TE, real_T = torch.full((1, 1), torch.nan).expand(length, self.num_experts), torch.ones(length).bool()
        return {
            layer: Routing(ids_TK, weights_TK, unknown_TE, unknown_TE, ids_TK >= 0, real_T)
            for layer, ids_TK, weights_TK in zip(self.layers, ids_LTK, weights_LTK, strict=True)
        }

    def _hold(self, blocks: int) -> None:
        room = len(self._ids)
        if blocks <= room:
            return
        now = max(blocks, self._least, min(2 * room, self._most))
        old = self._ids, self._weights
        self._ids, self._weights = (np.empty((now, *t.shape[1:]), t.dtype) for t in old)
        self._ids[:room], self._weights[:room] = old


def routing_bytes_per_token(config: ModelConfig) -> int:
    """What it takes of one position."""
    if config.moe is None:
        return 0
    router = config.moe.router
    return len(config.sparse_layers) * router.most_experts_per_tok * ((1 if router.num_experts < 256 else 2) + 4)
