"""The recurrent language model of Shazeer et al. 2017 (arXiv 1701.06538): embedding, LSTM layers, mixtures, softmax.

The paper's has two LSTM layers and one mixture between them (section 4 and appendix C.1). Around each of the three is a
residual connection; dropout comes before the addition, and before it, for a mixture, a sigmoid.

B batch, S sequence, T = B·S tokens, D model width, V vocabulary.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from manyhands.config import RecurrentConfig
from manyhands.errors import ConfigError
from manyhands.layers.cache.recurrent import RecurrentCache
from manyhands.layers.linear import Linear
from manyhands.layers.lstm import LSTM, State
from manyhands.models.decoder import Hidden, Output
from manyhands.models.described import Described
from manyhands.models.inputs import mask_of
from manyhands.moe import ExpertBank, MoELayer, Router, Routing
from manyhands.moe.edit import Edit, Edits, check_edits


class RecurrentBlock(nn.Module):
    """x + dropout(LSTM(x)); then, where a mixture follows, x + dropout(σ(MoE(x)))."""

    def __init__(self, config: RecurrentConfig, layer: int, implementation: str) -> None:
        super().__init__()
        self.dropout, self.sigmoid_output = config.dropout, config.sigmoid_output
        self.lstm = LSTM(config.hidden_size, config.lstm_bias)
        self.mlp: MoELayer | None = None
        if config.is_sparse(layer):
            assert config.moe is not None
            self.mlp = MoELayer(config.moe, config.hidden_size, implementation)

    def forward(
        self,
        x_BSD: Tensor,
        state: State | None,
        mask_BS: Tensor | None,
        ids_BS: Tensor,
        keep_outputs: bool = False,
        edit: Edit | None = None,
    ) -> tuple[Tensor, State, Routing | None]:
        """Returns x [B, S, D], the state after it, and the routing of a mixture."""
        y, state = self.lstm(x_BSD, state, mask_BS)
        x_BSD = x_BSD + F.dropout(y, self.dropout, self.training)
        if self.mlp is None:
            return x_BSD, state, None
        y, routing = self.mlp(x_BSD, mask_BS, ids_BS, keep_outputs, *(() if edit is None else (edit,)))
        y = y.sigmoid() if self.sigmoid_output else y
        return x_BSD + F.dropout(y, self.dropout, self.training), state, routing

    if TYPE_CHECKING:
        __call__ = forward  # so that calls are typed


class Recurrent(Described, nn.Module):
    """A causal language model whose memory is a state of fixed size. Fresh weights come from torch's global generator;
    `init_weights` takes a seed."""

    def __init__(self, config: RecurrentConfig, experts_implementation: str = "auto") -> None:
        super().__init__()
        if not config.vocab_size:
            raise ConfigError(
                "vocab_size = 0: this model is described without embedding and softmax; it is only counted"
            )
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            RecurrentBlock(config, layer, experts_implementation) for layer in range(config.num_hidden_layers)
        )
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Fresh weights: what goes into a matrix comes out with the same variance. None: torch's global generator."""
        with torch.no_grad():
            _fill(self, generator)

    def sparse_layers(self) -> dict[int, MoELayer]:
        """The mixtures by the number of the LSTM layer that each follows."""
        blocks = ((layer, block) for layer, block in enumerate(self.layers) if isinstance(block, RecurrentBlock))
        return {layer: block.mlp for layer, block in blocks if block.mlp is not None}

    @property
    def head_weight(self) -> Tensor:
        """[V, D]: the output projection, which may be the embedding."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    head_bias: None = None
    """There is none, as there may be in a `Decoder`."""

    def head(self, states: Tensor) -> Tensor:
        """Logits [..., V] of final states [..., D]."""
        if self.lm_head is not None:
            return self.lm_head(states)
        return F.linear(states, self.embed_tokens.weight.to(states.dtype))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: RecurrentCache | None = None,
        dtype: torch.dtype | None = None,
        edit: Edits | None = None,
    ) -> Output:
        """Logits for token ids [B, S]. See `hidden` for the arguments."""
        hidden = self.hidden(input_ids, attention_mask, cache, dtype=dtype, edit=edit)
        return Output(self.head(hidden.states), hidden.routings, hidden.cache)

    if TYPE_CHECKING:
        __call__ = forward  # so that calls are typed

    def hidden(
        self,
        ids_BS: Tensor,
        mask_BS: Tensor | None = None,
        cache: RecurrentCache | None = None,
        *,
        dtype: torch.dtype | None = None,
        recompute: bool = False,
        clip_above: float | None = None,
        keep_outputs: bool = False,
        edit: Edits | None = None,
    ) -> Hidden:
        """Everything but the head, with the arguments of `Decoder.hidden`.

        `mask_BS` is false for padding (any side), which no state reads; `cache` continues from earlier tokens and is
        changed in place. There is no attention, so `clip_above` asks for nothing.

        Raises `ConfigError` for a mask or a cache of another shape, and for an edit that a layer cannot follow.
        """
        edits: Mapping[int, Any] = edit or {}
        if edits:
            check_edits(edits, {layer: mlp.router.config for layer, mlp in self.sparse_layers().items()})
        (B, S), L = ids_BS.shape, len(self.layers)
        mask_BS = mask_of(mask_BS, ids_BS)
        states: list[State | None] = [None] * L if cache is None else list(cache.states)
        if len(states) != L:
            raise ConfigError(f"the cache has {len(states)} layers, the model {L}")
        if any(state is not None and len(state[0]) != B for state in states):
            raise ConfigError(f"the cache is of another batch than these {B} sequences")
        x = F.embedding(ids_BS, self.embed_tokens.weight)
        x = F.dropout(x if dtype is None else x.to(dtype), self.config.dropout, self.training)
        routings: dict[int, Routing] = {}
        for layer, block in enumerate(self.layers):
            arguments = (x, states[layer], mask_BS, ids_BS, keep_outputs, edits.get(layer))
            x, states[layer], routing = (
                checkpoint(block, *arguments, use_reentrant=False) if recompute else block(*arguments)
            )
            if routing is not None:
                routings[layer] = routing
        if cache is not None:
            cache.states, cache.length = states, cache.length + S
        return Hidden(x, routings, {}, cache)

    def new_cache(self) -> RecurrentCache:
        """An empty state for step-by-step decoding."""
        return RecurrentCache(len(self.layers))


def _fill(model: Recurrent, generator: torch.Generator | None) -> None:
    """In the order of `named_modules`. The embedding is N(0, 1), as a tied one N(0, 1/D)."""
    D = model.config.hidden_size
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.weight.normal_(0.0, D**-0.5 if model.lm_head is None else 1.0, generator=generator)
        elif isinstance(module, Linear):
            module.reset_parameters(module.in_features**-0.5, generator)
        elif isinstance(module, LSTM):
            module.reset_parameters(generator)
        elif isinstance(module, Router):
            module.reset_parameters(D**-0.5, generator)
        elif isinstance(module, ExpertBank):
            assert model.config.moe is not None
            module.reset_parameters(D**-0.5, model.config.moe.moe_intermediate_size**-0.5, generator)
