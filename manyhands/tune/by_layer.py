"""A decoder run from its files, one layer in memory at a time.

B sequences, S tokens each, D model width, V vocabulary.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from manyhands import format
from manyhands.checkpoint.assemble import our_tensor, stored_dtype
from manyhands.checkpoint.room import SPARE
from manyhands.checkpoint.source import Source
from manyhands.config import ModelConfig
from manyhands.config.shapes import tensor_shapes
from manyhands.errors import UserError
from manyhands.families.manyhands import MANYHANDS
from manyhands.layers.cross_entropy import cross_entropy
from manyhands.layers.norm import norm_of
from manyhands.models.decoder import Block, find_positions
from manyhands.moe import Routing
from manyhands.plan.host import free_memory

CPU = torch.device("cpu")


class ByLayer:
    """Gives the blocks one after the other, and runs them on states that the caller keeps.

    `weights` is a dtype that the weights are rounded to (None: as they are stored; the router's are float32 in any
    case), `dtype` that of the states.
    """

    def __init__(
        self,
        source: Source,
        length: int,
        *,
        weights: torch.dtype | None = None,
        dtype: torch.dtype = torch.float32,
        implementation: str = "auto",
    ) -> None:
        self.source, self.config = source, source.decoder("running it layer by layer")
        self.weights, self.dtype, self.implementation = weights, dtype, implementation
        self.shapes = tensor_shapes(self.config)
        self.positions = find_positions(self.config, length, length, None, CPU)

    def embed(self, ids_BS: Tensor) -> Tensor:
        """[B, S] -> [B, S, D]. Raises `UserError` for ids that are not in the vocabulary."""
        low, high = int(ids_BS.min()), int(ids_BS.max())
        if low < 0 or high >= self.config.vocab_size:
            wrong = low if low < 0 else high
            raise UserError(f"the sample holds token id {wrong}; the model has vocab_size = {self.config.vocab_size}")
        x = F.embedding(ids_BS, self._tensor("embed_tokens.weight")).to(self.dtype)
        return x * self.config.embedding_multiplier

    def blocks(self) -> Iterator[tuple[int, Block]]:
        """Each with its weights, which are let go when the next one is asked for."""
        for layer in range(self.config.num_hidden_layers):
            prefix = f"layers.{layer}."
            names = [name for name in self.shapes if name.startswith(prefix)]
            yield (
                layer,
                block_of(
                    self.config,
                    layer,
                    {name.removeprefix(prefix): self._tensor(name) for name in names},
                    self.implementation,
                ),
            )
            for name in names:
                for piece in self.source.pieces[name]:
                    self.source.release(piece.theirs)

    def run(
        self, block: Block, x_BSD: Tensor, ids_BS: Tensor, keep_outputs: bool = False
    ) -> tuple[Tensor, Routing | None]:
        """The states behind the block, and the routing of a sparse one."""
        real_BS = torch.ones_like(ids_BS, dtype=torch.bool)
        x_BSD, routing, _ = block(x_BSD, self.positions, None, real_BS, ids_BS, keep_outputs)
        return x_BSD, routing

    def logits(self, x_TD: Tensor) -> Tensor:
        """[T, V] of the last block's states [T, D]."""
        head, bias = self._head()
        return F.linear(self._final(x_TD), head.to(self.dtype), None if bias is None else bias.to(self.dtype))

    def nats(self, x_BSD: Tensor, targets_BS: Tensor) -> float:
        """Mean cross entropy of the last block's states."""
        head, bias = self._head()
        states_TD, targets_T = self._final(x_BSD).flatten(0, 1), targets_BS.flatten()

        def logits(x_TD: Tensor) -> Tensor:
            return F.linear(x_TD, head.to(x_TD.dtype), None if bias is None else bias.to(x_TD.dtype))

        real_T = torch.ones_like(targets_T, dtype=torch.bool)
        return float(cross_entropy(logits, states_TD, targets_T, real_T, self.config.vocab_size))

    def _head(self) -> tuple[Tensor, Tensor | None]:
        tied = self.config.tie_word_embeddings
        head = self._tensor("embed_tokens.weight" if tied else "lm_head.weight")
        return head, self._tensor("lm_head.bias") if self.config.lm_head_bias else None

    def _final(self, x: Tensor) -> Tensor:
        norm = norm_of(self.config.norm, self.config.hidden_size, self.config.rms_norm_eps)
        norm.load_state_dict({n: self._tensor(f"norm.{n}") for n in norm.state_dict()}, assign=True)
        return norm(x) * self.config.output_multiplier

    def _tensor(self, name: str) -> Tensor:
        dtype = torch.float32 if name.endswith(MANYHANDS.saved_float32) else self.weights
        return our_tensor(self.source, name, self.shapes[name], dtype, CPU)


def block_of(config: ModelConfig, layer: int, state: dict[str, Tensor], implementation: str = "auto") -> Block:
    """A block that holds these tensors themselves, in evaluation."""
    with torch.device("meta"):
        block = Block(config, layer, implementation)
    block.load_state_dict(state, assign=True)
    return block.requires_grad_(False).eval()


def check_layer_fits(source: Source, besides: float, states: int, remedy: str) -> None:
    """Refuse to run what memory does not hold: the largest layer as it is stored, `besides` times that much, and the
    states. Raises `UserError`."""
    layers: dict[str, int] = {}
    for name, shape in tensor_shapes(source.config).items():
        if name.startswith("layers."):
            at = name.split(".")[1]
            layers[at] = layers.get(at, 0) + torch.Size(shape).numel() * stored_dtype(source, name).itemsize
    need, free = int(max(layers.values()) * (1 + besides)) + states, free_memory()
    if free is not None and need > free * (1 - SPARE):
        raise UserError(
            f"{source.path}: a layer takes {format.show(need, 'B')} of memory to run, and {format.show(free, 'B')} is "
            f"free; {remedy}"
        )
