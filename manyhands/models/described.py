"""What every model says of itself, under the names that transformers has for it.

E experts, K experts per token, L layers.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from manyhands.format import compact
from manyhands.layers.packed_linear import RecordLinear
from manyhands.moe import MoELayer
from manyhands.moe.bank import ExpertBank

if TYPE_CHECKING:
    _Base = nn.Module
else:
    _Base = object


class Described(_Base):
    """For classes of `nn.Module`: where a model is, what it computes in, how large it is, and its line in `repr`."""

    embed_tokens: nn.Embedding

    @property
    def device(self) -> torch.device:
        """Where its embedding is, and with it what it is given."""
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of its embedding: what it computes in, unless a call says otherwise. Routers are float32 in any model."""
        return self.embed_tokens.weight.dtype

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """How many parameters it has, as in transformers: those that are shared once, without buffers.

        A number in a packed record counts as the one parameter that it stands for, though it takes four bits, and
        whether it is in memory or on disk; it is never trainable. Of experts that lie with other processes of a crew
        only those here count.
        """
        left_out: set[int] = set()
        if exclude_embeddings:
            left_out = {id(m.weight) for m in self.modules() if isinstance(m, nn.Embedding)}
        wanted = (p for p in self.parameters() if p.requires_grad or not only_trainable)
        total = sum(p.numel() for p in wanted if id(p) not in left_out)
        if only_trainable:
            return total
        packed = (m for m in self.modules() if isinstance(m, ExpertBank | RecordLinear))
        return total + sum(m.num_packed for m in packed)

    def extra_repr(self) -> str:
        """Parameters, layers, and the mixtures among them."""
        mixtures = [module for module in self.modules() if isinstance(module, MoELayer)]
        config: Any = vars(self)["config"]  # of each kind of model its own
        layers = config.num_hidden_layers + getattr(config, "num_decoder_layers", 0)
        line = f"{compact(self.num_parameters())} parameters, {layers} layers"
        kinds = {(m.router.config.num_experts, m.router.config.num_experts_per_tok) for m in mixtures}
        shapes = ", ".join(f"{E} experts and {K} per token" for E, K in sorted(kinds))
        several = "mixture" if len(mixtures) == 1 else "mixtures"
        return f"{line}, {len(mixtures)} {several} of {shapes}" if mixtures else f"{line}, dense"
