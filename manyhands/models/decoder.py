"""The decoder: embedding, blocks, final norm, head.

B batch, S sequence, T = B·S tokens, D model width, V vocabulary, L layers, H heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from manyhands.config import ModelConfig
from manyhands.config.decoder import as_decoder
from manyhands.errors import ConfigError
from manyhands.layers.attention import Attention, Caches, Positions, causal_mask, start_of
from manyhands.layers.cache import AnyCache, Cache, ContiguousLayer, LatentLayer
from manyhands.layers.feed_forward import FeedForward
from manyhands.layers.latent_attention import LatentAttention
from manyhands.layers.linear import Linear
from manyhands.layers.norm import Norm, norm_of
from manyhands.layers.rope import rope_tables
from manyhands.models.described import Described
from manyhands.models.generates import Generates
from manyhands.models.init import fill
from manyhands.models.inputs import check_position_ids, ids_of, mask_of, next_token_loss
from manyhands.moe import MoELayer, Routing
from manyhands.moe.edit import Edit, Edits, check_edits


@dataclass(frozen=True, slots=True)
class Hidden:
    """What the body of the model returns: everything but the logits."""

    states: Tensor
    """[B, S, D] after the final norm, times `output_multiplier`: times the head's weight, plus its bias, they are the
    logits."""
    routings: dict[int, Routing]
    """One `Routing` per sparse layer, by layer number."""
    max_logits: dict[int, Tensor]
    """[H] per layer, when asked for: the largest attention logits (QK-Clip)."""
    cache: AnyCache | None
    hidden_states: tuple[Tensor, ...] | None = None
    """As in `Output`."""


@dataclass(frozen=True, slots=True, repr=False)
class Output:
    """What the model returns."""

    logits: Tensor
    """[B, S, V]"""
    routings: dict[int, Routing]
    cache: AnyCache | None
    loss: Tensor | None = None
    """[] in nats per token, if there were labels. Without balance losses: `balance_objective(out.routings, …)`."""
    hidden_states: tuple[Tensor, ...] | None = None
    """L + 1 of [B, S, D], if asked for: what each block took, and what the final norm gave."""

    def __repr__(self) -> str:
        """Shapes, not numbers."""
        parts = [f"logits={_shape(self.logits)}", f"routings of layers {list(self.routings)}"]
        if self.routings:
            routing = next(iter(self.routings.values()))
            (T, K), E = routing.expert_ids.shape, routing.num_experts
            parts[-1] += f": {K} of {E} experts for each of {T} tokens"
        parts += [] if self.loss is None else [f"loss={_shape(self.loss)}"]
        parts += [] if self.hidden_states is None else [f"{len(self.hidden_states)} hidden_states"]
        parts += [] if self.cache is None else [f"cache={type(self.cache).__name__}"]
        return f"Output({', '.join(parts)})"


def _shape(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}"


pytree.register_dataclass(Hidden)
pytree.register_dataclass(Output)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)); the feed-forward network is dense or a mixture.

    With `output_norms` what is added is normalised too; with a `residual_multiplier` it is scaled.
    """

    def __init__(self, config: ModelConfig, layer: int, implementation: str) -> None:
        super().__init__()
        D = config.hidden_size
        self.input_layernorm = norm_of(config.norm, D, config.rms_norm_eps)
        self.residual_multiplier = config.residual_multiplier
        attention = LatentAttention if config.attention.kind == "mla" else Attention
        self.self_attn: LatentAttention | Attention = attention(config, layer)
        self.post_attention_layernorm = norm_of(config.norm, D, config.rms_norm_eps)
        if config.is_sparse(layer):
            assert config.moe is not None
            self.mlp: nn.Module = MoELayer(config.moe, D, implementation)
        else:
            self.mlp = FeedForward(D, config.intermediate_size, config.hidden_act)
        self.attention_output_norm = self.mlp_output_norm = None
        if config.output_norms:
            self.attention_output_norm = norm_of(config.norm, D, config.rms_norm_eps)
            self.mlp_output_norm = norm_of(config.norm, D, config.rms_norm_eps)

    def forward(
        self,
        x_BSD: Tensor,
        positions: Positions,
        cache: Caches,
        mask_BS: Tensor,
        ids_BS: Tensor,
        keep_outputs: bool,
        edit: Edit | None = None,
    ) -> tuple[Tensor, Routing | None, Tensor | None]:
        """Returns x [B, S, D], the routing of a sparse layer, and the largest attention logits if asked for."""
        attended, largest_H = self.self_attn(self.input_layernorm(x_BSD), positions, cache)
        x_BSD = self._add(x_BSD, attended, self.attention_output_norm)
        normed = self.post_attention_layernorm(x_BSD)
        routing = None
        if isinstance(self.mlp, MoELayer):
            y, routing = self.mlp(normed, mask_BS, ids_BS, keep_outputs, *(() if edit is None else (edit,)))
        else:
            y = self.mlp(normed)
        return self._add(x_BSD, y, self.mlp_output_norm), routing, largest_H

    if TYPE_CHECKING:
        __call__ = forward  # so that calls are typed

    def _add(self, x: Tensor, y: Tensor, norm: Norm | None) -> Tensor:
        """The residual connection."""
        y = y if norm is None else norm(y)
        return x + y if self.residual_multiplier == 1.0 else x + self.residual_multiplier * y


def find_positions(
    config: ModelConfig,
    num_queries: int,
    length: int,
    real_BL: Tensor | None,
    device: torch.device,
    clip_above: float | None = None,
    position_BS: Tensor | None = None,
) -> Positions:
    """Where the last `num_queries` of `length` positions are. `real_BL` None: there is no padding.

    `position_BS` are the numbers they are turned by; None: real tokens are counted.
    Raises `ConfigError` where what is cached of the others is no longer right (LongRoPE).
    """
    S, L = num_queries, length
    whole_B1 = _length(config, S, L, real_BL, device)
    position_BS = _number(S, L, real_BL, device) if position_BS is None else position_BS
    rope = rope_tables(config.rope, config.rope_dim, position_BS, whole_B1)
    return _look(config, rope, S, L, real_BL, clip_above, _temperature(config, _number(S, L, real_BL, device)))


def find_rows(
    config: ModelConfig,
    counts: Sequence[int],
    lengths: Sequence[int],
    real: Sequence[Tensor | None],
    device: torch.device,
    clip_above: float | None = None,
) -> Positions:
    """Where the last `counts` tokens of sequences of these `lengths` are, one sequence behind the other.

    `real` says for each which of its positions are no padding, [1, length]; None: all.
    """
    every = list(zip(counts, lengths, real, strict=True))
    position_1T = torch.cat([_number(S, L, real_1L, device) for S, L, real_1L in every], 1)
    whole_11 = [_length(config, S, L, real_1L, device) for S, L, real_1L in every]
    found = [n_11.expand(1, S) for n_11, S in zip(whole_11, counts, strict=True) if n_11 is not None]
    whole_1T = torch.cat(found, 1) if found else None
    cos, sin = rope_tables(config.rope, config.rope_dim, position_1T, whole_1T)
    rows, start = [], 0
    for S, L, real_1L in every:
        tokens = slice(start, start + S)
        rows.append((tokens, _look(config, (cos[:, :, tokens], sin[:, :, tokens]), S, L, real_1L, clip_above)))
        start += S
    return Positions((cos, sin), None, causal=False, rows=tuple(rows), temperature=_temperature(config, position_1T))


def _number(S: int, L: int, real_BL: Tensor | None, device: torch.device) -> Tensor:
    """[B, S] int64: the positions of the last S of L tokens; padding takes none."""
    if real_BL is None:
        return torch.arange(L - S, L, device=device)[None]
    return (real_BL.long().cumsum(1) - 1).clamp(min=0)[:, L - S :]


def _temperature(config: ModelConfig, position_BS: Tensor) -> Tensor | None:
    """[B, 1, S, 1]: what the queries of layers without rotation are multiplied by."""
    a = config.attention
    if a.floor_scale is None:
        return None
    long_BS = ((position_BS + 1) // a.floor_scale).float()
    return (1.0 + a.attn_scale * long_BS.log1p())[:, None, :, None]


def _length(config: ModelConfig, S: int, L: int, real_BL: Tensor | None, device: torch.device) -> Tensor | None:
    """[B or 1, 1] int64: how many tokens each sequence has in all, for the rotations that depend on it; else None.

    Raises `ConfigError` if the last S take one past the original length: the earlier were turned as in a short one.
    """
    if config.rope.rope_type != "longrope":
        return None
    if real_BL is None:
        real_BL = torch.ones(1, L, dtype=torch.bool, device=device)
    whole_B1, before_B1 = (real_BL[:, :n].sum(1, keepdim=True) for n in (L, L - S))
    original = config.rope.original_max_position_embeddings
    assert original is not None
    if S < L and bool(((before_B1 > 0) & (before_B1 <= original) & (whole_B1 > original)).any()):
        raise ConfigError(
            f"the cache holds tokens that LongRoPE turned as in a sequence of at most {original} tokens, and this one "
            "becomes longer: run all of it at once, with a new cache"
        )
    return whole_B1


def _look(
    config: ModelConfig,
    rope: tuple[Tensor, Tensor],
    S: int,
    L: int,
    real_BL: Tensor | None,
    clip_above: float | None = None,
    temperature: Tensor | None = None,
) -> Positions:
    """Where the last S of L tokens may look."""
    plain = real_BL is None
    if real_BL is None:
        real_BL = torch.ones(1, L, dtype=torch.bool, device=rope[0].device)
    a, types = config.attention, set(config.layer_types)
    window = a.sliding_window if "sliding_attention" in types else None
    chunk = a.attention_chunk_size if "chunked_attention" in types else None
    return Positions(
        rope,
        causal_mask(real_BL, S, None, plain),
        causal=S == L,
        sliding_mask=None if window is None else causal_mask(real_BL, S, window, plain),
        chunked_mask=None if chunk is None else causal_mask(real_BL, S, None, plain, chunk),
        temperature=temperature,
        clip_above=clip_above,
        real_BS=None if plain else real_BL[:, L - S :],
        start_B=start_of(real_BL, plain),
    )


class Decoder(Described, Generates, nn.Module):
    """A causal language model. Fresh weights come from torch's global generator; `init_weights` takes a seed."""

    def __init__(self, config: ModelConfig, experts_implementation: str = "auto") -> None:
        super().__init__()
        self.config = config = as_decoder(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, layer, experts_implementation) for layer in range(config.num_hidden_layers)
        )
        self.norm = norm_of(config.norm, config.hidden_size, config.rms_norm_eps)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Fresh weights, scaled as the config and the depth say: `init.fill`. None: torch's global generator."""
        fill(self, generator)

    def sparse_layers(self) -> dict[int, MoELayer]:
        """The mixture-of-experts layers by layer number."""
        blocks = ((layer, block.mlp) for layer, block in enumerate(self.layers) if isinstance(block, Block))
        return {layer: mlp for layer, mlp in blocks if isinstance(mlp, MoELayer)}

    @property
    def head_weight(self) -> Tensor:
        """[V, D]: the output projection, which may be the embedding. A packed one has no such tensor: use `head`."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    @property
    def head_bias(self) -> Tensor | None:
        """[V]: what is added to the logits, if anything is. Not that of a packed head, as `head_weight`."""
        return None if self.lm_head is None else self.lm_head.bias

    def head(self, states: Tensor) -> Tensor:
        """Logits [..., V] of final states [..., D]."""
        if self.lm_head is not None:
            return self.lm_head(states)
        return F.linear(states, self.embed_tokens.weight.to(states.dtype))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        dtype: torch.dtype | None = None,
        edit: Edits | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> Output:
        """Logits for token ids [B, S]. See `hidden` for the arguments.

        `labels` [B, S] are the ids again, −100 where nothing is to be learned: `loss` is that of each next token. They
        and the other arguments by name mean what they mean in transformers; so the first token behind padding counts,
        though padding predicts it, unless its label is −100.
        """
        hidden = self.hidden(
            input_ids,
            attention_mask,
            cache,
            dtype=dtype,
            edit=edit,
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            output_hidden_states=output_hidden_states,
        )
        logits = self.head(hidden.states)
        loss = None if labels is None else next_token_loss(logits, labels)
        return Output(logits, hidden.routings, hidden.cache, loss, hidden.hidden_states)

    if TYPE_CHECKING:
        __call__ = forward  # so that calls are typed

    def hidden(
        self,
        ids_BS: Tensor | None,
        mask_BS: Tensor | None = None,
        cache: Cache | None = None,
        *,
        dtype: torch.dtype | None = None,
        recompute: bool = False,
        clip_above: float | None = None,
        keep_outputs: bool = False,
        edit: Edits | None = None,
        documents: Sequence[int] | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> Hidden:
        """Everything but the head.

        `mask_BS` is false for padding (any side); `cache` continues from earlier tokens and is extended in place;
        `dtype` is the compute dtype (default: that of the weights); `recompute` trades time for memory in the
        backward pass; `clip_above` asks for the attention logits of QK-Clip; `keep_outputs` keeps the experts'
        outputs in the routings; `edit` gives layers a routing to follow, or changes it (`manyhands.moe.edit`): a replay
        has a row for each of the B·S tokens of this call.

        `documents` packs: B = 1, and the S tokens are those of texts of these lengths, one behind the other. Each has
        positions of its own and sees nothing of the others, as if it were alone; there is no padding and no cache.

        `inputs_embeds` [B, S, D] stand in the place of ids: what the embedding says, before `embedding_multiplier`.
        `position_ids` [B or 1, S] are what tokens are turned by, and nothing else (default: real tokens counted from
        0). `output_hidden_states` keeps what each block took and what the final norm gave.

        Raises `ConfigError` for an edit of a layer without router, or that the layer cannot follow; for `documents`
        that are not so, or with a router that gives each sequence as a whole its share; for embeddings or positions
        that do not fit (`models/inputs.py`).
        """
        self._check(edit)
        ids_BS = ids_of(self.config, ids_BS, inputs_embeds)
        S = ids_BS.shape[1]
        if documents is not None:
            self._check_documents(ids_BS, documents, mask_BS is None and cache is None)
        real_BL = mask_BS = mask_of(mask_BS, ids_BS)
        if position_ids is not None:
            if documents is not None:
                raise ConfigError("documents have positions of their own: give them without position_ids")
            position_ids = check_position_ids(self.config, position_ids, ids_BS, mask_BS is None and cache is None)
        if cache is not None:
            if len(cache.layers) != len(self.layers):
                raise ConfigError(f"the cache has {len(cache.layers)} layers, the model {len(self.layers)}")
            real_BL = cache.extend(ids_BS, mask_BS)
        length = S if cache is None else cache.length
        if documents is None:
            positions = find_positions(self.config, S, length, real_BL, ids_BS.device, clip_above, position_ids)
        else:
            none = [None] * len(documents)
            positions = find_rows(self.config, documents, documents, none, ids_BS.device, clip_above)
        real_BS = torch.ones_like(ids_BS, dtype=torch.bool) if mask_BS is None else mask_BS
        x = self.embed(ids_BS, dtype) if inputs_embeds is None else self._embedded(inputs_embeds, dtype)
        layers: Sequence[Caches] = [None] * len(self.layers) if cache is None else cache.layers
        taken: list[Tensor] | None = [] if output_hidden_states else None
        x, routings, largest = self._blocks(
            x, positions, layers, real_BS, ids_BS, recompute, keep_outputs, edit, taken=taken
        )
        states = self.norm(x)
        return self._hidden(states, routings, largest, cache, None if taken is None else (*taken, states))

    def hidden_rows(
        self, ids_1T: Tensor, counts: Sequence[int], caches: Sequence[Cache], edit: Edits | None = None
    ) -> Hidden:
        """Everything but the head, for several sequences of different lengths at once, without padding.

        `ids_1T` are their next tokens, one sequence behind the other, `counts` of each; each has a cache of its own,
        of one row, extended in place. States are [1, T, D], routings those of the T tokens.
        """
        self._check(edit)
        if any(len(cache.layers) != len(self.layers) for cache in caches):
            raise ConfigError(f"a cache has not the model's {len(self.layers)} layers")
        real = [
            cache.extend(ids, None) for cache, ids in zip(caches, torch.split(ids_1T, list(counts), 1), strict=True)
        ]
        positions = find_rows(self.config, counts, [cache.length for cache in caches], real, ids_1T.device)
        real_1T, x = torch.ones_like(ids_1T, dtype=torch.bool), self.embed(ids_1T)
        layers = [[cache.layers[layer] for cache in caches] for layer in range(len(self.layers))]
        x, routings, largest = self._blocks(x, positions, layers, real_1T, ids_1T, edit=edit)
        return self._hidden(self.norm(x), routings, largest, None)

    def resumed(self, x_BSD: Tensor, first: int, ids_BS: Tensor, edit: Edits | None = None) -> Hidden:
        """What `hidden` makes of ids without padding and cache, from block `first` on, which takes x [B, S, D].

        The routings are those of these blocks. Raises `ConfigError` for an edit that a layer cannot follow.
        """
        self._check(edit)
        S = ids_BS.shape[1]
        positions = find_positions(self.config, S, S, None, ids_BS.device)
        caches: Sequence[Caches] = [None] * len(self.layers)
        real_BS = torch.ones_like(ids_BS, dtype=torch.bool)
        x, routings, largest = self._blocks(x_BSD, positions, caches, real_BS, ids_BS, edit=edit, first=first)
        return self._hidden(self.norm(x), routings, largest, None)

    def embed(self, ids_BS: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Token ids [B, S] -> what the first block takes [B, S, D], in `dtype` (default: that of the weights)."""
        return self._embedded(F.embedding(ids_BS, self.embed_tokens.weight), dtype)

    def _embedded(self, x: Tensor, dtype: torch.dtype | None) -> Tensor:
        x = x if dtype is None else x.to(dtype)
        return x if self.config.embedding_multiplier == 1.0 else x * self.config.embedding_multiplier

    def _blocks(
        self,
        x: Tensor,
        positions: Positions,
        caches: Sequence[Caches],
        real_BS: Tensor,
        ids_BS: Tensor,
        recompute: bool = False,
        keep_outputs: bool = False,
        edit: Edits | None = None,
        first: int = 0,
        taken: list[Tensor] | None = None,
    ) -> tuple[Tensor, dict[int, Routing], dict[int, Tensor]]:
        """What block `first` takes (0: the embedded tokens) through all blocks, each with its cache or caches.

        What each takes is put into `taken`, if there is such a list.
        """
        routings: dict[int, Routing] = {}
        largest: dict[int, Tensor] = {}
        for layer, block in enumerate(self.layers):
            if layer < first:
                continue
            if taken is not None:
                taken.append(x)
            edited = () if edit is None or layer not in edit else (edit[layer],)  # a block somebody wrote may know none
            arguments = (x, positions, caches[layer], real_BS, ids_BS, keep_outputs, *edited)
            x, routing, largest_H = (
                checkpoint(block, *arguments, use_reentrant=False) if recompute else block(*arguments)
            )
            if routing is not None:
                routings[layer] = routing
            if largest_H is not None:
                largest[layer] = largest_H
        return x, routings, largest

    def _check(self, edit: Edits | None) -> None:
        """Before any cache is extended."""
        if edit:
            check_edits(edit, {layer: mlp.router.config for layer, mlp in self.sparse_layers().items()})

    def _check_documents(self, ids_BS: Tensor, documents: Sequence[int], alone: bool) -> None:
        if not alone or len(ids_BS) != 1 or min(documents, default=0) < 1 or sum(documents) != ids_BS.shape[1]:
            raise ConfigError(
                f"documents: {len(documents)} of {sum(documents)} tokens in all, for ids {list(ids_BS.shape)}; they "
                "are for ids [1, S] of S tokens in all, each has one at least, and there is neither mask nor cache"
            )
        for layer, mlp in self.sparse_layers().items():
            router = mlp.router.config
            if router.select == "soft" or (router.limited(self.training) and router.capacity_per == "sequence"):
                raise ConfigError(
                    f"layer {layer}: its router shares out each sequence as a whole, so that packed documents would "
                    "have to do with each other: run each as a row of its own"
                )

    def _hidden(
        self,
        states: Tensor,
        routings: dict[int, Routing],
        largest: dict[int, Tensor],
        cache: Cache | None,
        hidden_states: tuple[Tensor, ...] | None = None,
    ) -> Hidden:
        if self.config.output_multiplier != 1.0:  # here, so that every use of the head has it
            states = states * self.config.output_multiplier
        return Hidden(states, routings, largest, cache, hidden_states)

    def new_cache(self) -> Cache:
        """An empty cache for step-by-step decoding."""
        kind = LatentLayer if self.config.attention.kind == "mla" else ContiguousLayer
        return Cache(self.config.num_hidden_layers, kind)
