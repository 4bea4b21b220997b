"""The encoder-decoder: T5 (arXiv 1910.10683), Switch (2101.03961), ST-MoE (2202.08906).

    model = EncoderDecoder(config)
    out = model(ids_BS, decoder_ids_BT)                        # out.logits [B, T, V]
    cache = model.new_cache()
    model(ids_BS, start_B1, cache=cache)                       # the input is encoded once …
    model(None, next_B1, cache=cache)                          # … and every step sees it in the cache

Layers are numbered through: the encoder's from 0, the decoder's after them. B batch, S positions of the input, T of the
output, L in a cache and now, D model width, V vocabulary, H heads.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from manyhands.config import EncoderDecoderConfig
from manyhands.config.encoder_decoder import as_encoder_decoder
from manyhands.errors import ConfigError
from manyhands.layers.cache import EncoderDecoderCache, LayerCache
from manyhands.layers.feed_forward import FeedForward
from manyhands.layers.linear import Linear
from manyhands.layers.norm import RMSNorm
from manyhands.layers.relative_attention import RelativeAttention, RelativeBias, hide
from manyhands.models.decoder import Hidden, Output
from manyhands.models.described import Described
from manyhands.models.init_encoder_decoder import fill
from manyhands.models.inputs import mask_of
from manyhands.moe import MoELayer, Routing
from manyhands.moe.edit import Edit, Edits, check_edits

Memory = tuple[Tensor, Tensor]
"""Keys and values [B, H, S, d] of the encoded input, for one layer's cross attention."""


class Block(nn.Module):
    """x + f(norm(x)), one after the other: self-attention, in a decoder cross attention, the feed-forward network.

    The network is dense or a mixture; where the config has extra networks, a dense one follows each mixture (ST-MoE).
    """

    def __init__(self, config: EncoderDecoderConfig, implementation: str, *, decoder: bool, sparse: bool) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        extra = sparse and bool(config.extra_decoder_networks if decoder else config.extra_encoder_networks)
        self.input_layernorm = RMSNorm(D, eps)
        self.self_attn = RelativeAttention(config)
        self.cross_attention_layernorm = RMSNorm(D, eps) if decoder else None
        self.cross_attn = RelativeAttention(config) if decoder else None
        self.post_attention_layernorm = RMSNorm(D, eps)
        if sparse:
            assert config.moe is not None
            self.mlp: nn.Module = MoELayer(config.moe, D, implementation)
        else:
            self.mlp = FeedForward(D, config.intermediate_size, config.hidden_act)
        self.extra_layernorm = RMSNorm(D, eps) if extra else None
        self.extra_mlp = FeedForward(D, config.intermediate_size, config.hidden_act) if extra else None

    def forward(
        self,
        x_BSD: Tensor,
        bias: Tensor,
        cache: LayerCache | None,
        memory: Memory | None,
        memory_bias: Tensor | None,
        mask_BS: Tensor,
        ids_BS: Tensor,
        keep_outputs: bool,
        edit: Edit | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """Returns x [B, S, D], and the routing of a sparse layer. The biases are those of the two attentions."""
        normed = self.input_layernorm(x_BSD)
        k, v = self.self_attn.keys_values(normed)
        if cache is not None:
            k, v = cache.append(k, v)
        x_BSD = x_BSD + self.self_attn(normed, k, v, bias)
        if self.cross_attn is not None:
            assert self.cross_attention_layernorm is not None and memory is not None
            x_BSD = x_BSD + self.cross_attn(self.cross_attention_layernorm(x_BSD), *memory, memory_bias)
        normed, routing = self.post_attention_layernorm(x_BSD), None
        if isinstance(self.mlp, MoELayer):
            y, routing = self.mlp(normed, mask_BS, ids_BS, keep_outputs, *(() if edit is None else (edit,)))
        else:
            y = self.mlp(normed)
        x_BSD = x_BSD + y
        if self.extra_mlp is not None:
            assert self.extra_layernorm is not None
            x_BSD = x_BSD + self.extra_mlp(self.extra_layernorm(x_BSD))
        return x_BSD, routing

    if TYPE_CHECKING:
        __call__ = forward  # so that calls are typed


class Stack(nn.Module):
    """The layers of the encoder or of the decoder, their one table of relative positions, and the norm after them."""

    def __init__(self, config: EncoderDecoderConfig, implementation: str, *, decoder: bool) -> None:
        super().__init__()
        count = config.num_decoder_layers if decoder else config.num_hidden_layers
        sparse = config.sparse_decoder_layers if decoder else config.sparse_encoder_layers
        self.first = config.num_hidden_layers if decoder else 0
        """The number of the first layer."""
        self.embed_tokens = (
            nn.Embedding(config.vocab_size, config.hidden_size) if decoder and not config.share_embeddings else None
        )
        self.relative_attention_bias = RelativeBias(config, bidirectional=not decoder)
        self.layers = nn.ModuleList(
            Block(config, implementation, decoder=decoder, sparse=layer in sparse) for layer in range(count)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        ids_BS: Tensor,
        real_BS: Tensor | None,
        real_BL: Tensor | None,
        length: int,
        cache: EncoderDecoderCache | None,
        memories: list[Memory] | None,
        memory_mask: Tensor | None,
        recompute: bool,
        keep_outputs: bool,
        edit: Edits | None,
    ) -> tuple[Tensor, dict[int, Routing]]:
        """x [B, S, D] through all layers and the norm, and the routings by layer number."""
        bias = self.relative_attention_bias(x.shape[1], length, real_BL, x.dtype)
        memory_bias = None
        if memory_mask is not None:
            hidden = ~memory_mask[:, None, None]
            memory_bias = hide(torch.zeros_like(hidden, dtype=x.dtype), hidden)
        mask_BS = torch.ones_like(ids_BS, dtype=torch.bool) if real_BS is None else real_BS
        routings: dict[int, Routing] = {}
        for i, block in enumerate(self.layers):
            memory = None if memories is None else memories[i]
            edited = None if edit is None else edit.get(self.first + i)
            own = None if cache is None else cache.layers[i]
            arguments = (x, bias, own, memory, memory_bias, mask_BS, ids_BS, keep_outputs, edited)
            x, routing = checkpoint(block, *arguments, use_reentrant=False) if recompute else block(*arguments)
            if routing is not None:
                routings[self.first + i] = routing
        return self.norm(x), routings

    if TYPE_CHECKING:
        __call__ = forward  # so that calls are typed


class EncoderDecoder(Described, nn.Module):
    """A sequence-to-sequence model. Fresh weights come from torch's global generator; `init_weights` takes a seed."""

    def __init__(self, config: EncoderDecoderConfig, experts_implementation: str = "auto") -> None:
        super().__init__()
        self.config = config = as_encoder_decoder(config)
        D, V = config.hidden_size, config.vocab_size
        self.embed_tokens = nn.Embedding(V, D)
        self.encoder = Stack(config, experts_implementation, decoder=False)
        self.decoder = Stack(config, experts_implementation, decoder=True)
        self.lm_head = None if config.tie_word_embeddings else Linear(D, V, bias=False)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Fresh weights, scaled by the width of what a matrix takes in. None: torch's global generator."""
        fill(self, generator)

    def sparse_layers(self) -> dict[int, MoELayer]:
        """The mixture-of-experts layers by layer number."""
        stacks = (self.encoder, self.decoder)
        blocks = ((stack.first + i, block.mlp) for stack in stacks for i, block in enumerate(stack.layers))
        return {layer: mlp for layer, mlp in blocks if isinstance(mlp, MoELayer)}

    @property
    def head_weight(self) -> Tensor:
        """[V, D]: the output projection, which may be the embedding."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def head(self, states: Tensor) -> Tensor:
        """Logits [..., V] of final states [..., D]."""
        if self.lm_head is not None:
            return self.lm_head(states)
        return F.linear(states, self.embed_tokens.weight.to(states.dtype))

    def forward(
        self,
        input_ids: Tensor | None,
        decoder_input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        cache: EncoderDecoderCache | None = None,
        dtype: torch.dtype | None = None,
        edit: Edits | None = None,
    ) -> Output:
        """Logits [B, T, V] for the decoder's tokens. See `hidden` for the arguments.

        Raises `ConfigError` without `decoder_input_ids`, and as `hidden` does.
        """
        if decoder_input_ids is None:
            raise ConfigError("an encoder-decoder predicts its decoder's next tokens: pass decoder_input_ids too")
        hidden = self.hidden(
            input_ids, decoder_input_ids, attention_mask, decoder_attention_mask, cache, dtype=dtype, edit=edit
        )
        return Output(self.head(hidden.states), hidden.routings, hidden.cache)

    if TYPE_CHECKING:
        __call__ = forward  # so that calls are typed

    def hidden(
        self,
        ids_BS: Tensor | None,
        decoder_ids_BT: Tensor,
        mask_BS: Tensor | None = None,
        decoder_mask_BT: Tensor | None = None,
        cache: EncoderDecoderCache | None = None,
        *,
        dtype: torch.dtype | None = None,
        recompute: bool = False,
        clip_above: float | None = None,
        keep_outputs: bool = False,
        edit: Edits | None = None,
    ) -> Hidden:
        """Everything but the head.

        `ids_BS` is the input, `decoder_ids_BT` what the decoder has said so far: in training the targets moved right by
        one, behind a start token. The masks are false for padding. `cache` keeps the encoded input and the decoder's
        tokens: its first call has `ids_BS`, the later ones None and only the next tokens. The other arguments are
        those of `Decoder.hidden`; without `ids_BS` an edit of an encoder layer has nothing to change.

        The states are times hidden_size^-0.5 where the head is the embedding: times its weight they are the logits.

        Raises `ConfigError` for `clip_above` (attention here has no 1/√d for QK-Clip to bound), for a cache that
        already holds an input when there is one more, or none when there is none, and as `Decoder.hidden` does.
        """
        if clip_above is not None:
            raise ConfigError("optim.qk_clip: an encoder-decoder has no QK-Clip; set it to null")
        if edit:
            check_edits(edit, {layer: mlp.router.config for layer, mlp in self.sparse_layers().items()})
        decoder_mask_BT = mask_of(decoder_mask_BT, decoder_ids_BT)
        routings: dict[int, Routing] = {}
        if cache is not None and len(cache.layers) != len(self.decoder.layers):
            raise ConfigError(f"the cache has {len(cache.layers)} layers, the decoder {len(self.decoder.layers)}")
        held = None if cache is None else cache.memory
        if (held is None) == (ids_BS is None):
            raise ConfigError(
                "there is no input: give its ids, or a cache that holds it"
                if held is None
                else "the cache holds an input already: give None and it, or another cache (model.new_cache())"
            )
        if ids_BS is not None:
            mask_BS = mask_of(mask_BS, ids_BS)
            if len(ids_BS) != len(decoder_ids_BT):
                raise ConfigError(f"there are {len(ids_BS)} inputs and {len(decoder_ids_BT)} rows of decoder ids")
            memory, routings = self.encode(
                ids_BS, mask_BS, dtype=dtype, recompute=recompute, keep_outputs=keep_outputs, edit=edit
            )
            memories = self.memories(memory)
            if cache is not None:
                cache.memory, cache.memory_mask_BL = memories, mask_BS
        else:
            assert cache is not None and held is not None
            if mask_BS is not None:
                raise ConfigError("attention_mask: the cache holds the input with its mask already")
            memories, mask_BS = held, cache.memory_mask_BL
        real_BL = decoder_mask_BT if cache is None else cache.extend(decoder_ids_BT, decoder_mask_BT)
        length = decoder_ids_BT.shape[1] if cache is None else cache.length
        table = self.decoder.embed_tokens or self.embed_tokens
        x = _look_up(table, decoder_ids_BT, dtype)
        states, decoder_routings = self.decoder(
            x,
            decoder_ids_BT,
            decoder_mask_BT,
            real_BL,
            length,
            cache,
            memories,
            mask_BS,
            recompute,
            keep_outputs,
            edit,
        )
        if self.lm_head is None:
            states = states * self.config.hidden_size**-0.5
        return Hidden(states, routings | decoder_routings, {}, cache)

    def encode(
        self,
        ids_BS: Tensor,
        mask_BS: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
        recompute: bool = False,
        keep_outputs: bool = False,
        edit: Edits | None = None,
    ) -> tuple[Tensor, dict[int, Routing]]:
        """The encoder's states [B, S, D] after its norm, and its routings."""
        mask_BS = mask_of(mask_BS, ids_BS)
        x, S = _look_up(self.embed_tokens, ids_BS, dtype), ids_BS.shape[1]
        return self.encoder(x, ids_BS, mask_BS, mask_BS, S, None, None, None, recompute, keep_outputs, edit)

    def memories(self, states_BSD: Tensor) -> list[Memory]:
        """What each decoder layer's cross attention sees of the encoder's states."""
        return [block.cross_attn.keys_values(states_BSD) for block in self.decoder.layers]  # type: ignore[union-attr, operator]

    def new_cache(self) -> EncoderDecoderCache:
        """An empty cache for step-by-step decoding."""
        return EncoderDecoderCache(self.config.num_decoder_layers)


def _look_up(table: nn.Embedding, ids: Tensor, dtype: torch.dtype | None) -> Tensor:
    x = F.embedding(ids, table.weight)
    return x if dtype is None else x.to(dtype)
