"""All blocks of a decoder for one new token per sequence as one call of the native library: in small models the time
between the calls is more than the time in them.

Fused is what `FusedStep` knows in every part: packed linear layers and experts, multi-head attention to a cache. All
else goes block by block. Between the layers everything is float32, whatever the model's dtype.

B sequences of one token each, D model width, L sparse layers, E experts, K experts per token.
"""

from collections.abc import Mapping, Sequence
from ctypes import Array, Structure, addressof, c_void_p
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from manyhands.config.activation import GATED
from manyhands.kernels.covered import ATTENTION, MIXTURE, MODEL, ROPE
from manyhands.kernels.moment import held
from manyhands.kernels.native import library, step, views
from manyhands.kernels.native.library import (
    ACTIVATION_CODES,
    CAttention,
    CCache,
    CExperts,
    CLinear,
    CNorm,
    CRotation,
    CRouting,
    CRows,
    CStacked,
    CStep,
)
from manyhands.layers.attention import Attention, Positions
from manyhands.layers.cache import Cache, ContiguousLayer
from manyhands.layers.feed_forward import FeedForward
from manyhands.layers.linear import Linear
from manyhands.layers.norm import RMSNorm
from manyhands.layers.packed_linear import RecordLinear
from manyhands.models.snapshot import Snapshot
from manyhands.moe import Experts, MoELayer, Router, Routing
from manyhands.moe.packed import RecordExperts

NORM, LINEARS, ROPE_AND_CACHE, ATTEND, ROUTE, EXPERTS, ADD, ACTIVATE = range(8)


class Unfit(Exception):
    """A part of this model cannot be fused."""


class FusedStep:
    """The calls, prepared once for a cache, and good for as long as `current`.

    They read the weights where they lie, so that a change in place is seen; what is a copy is made again in each step.
    """

    @torch.inference_mode(False)  # a cache may be continued outside of the mode it was begun in
    def __init__(self, model: Any, B: int, apart: bool = False) -> None:
        """`apart`: each of the B sequences has a cache of its own. Raises `Unfit`."""
        config = model.config
        if not MODEL.covers(config) or not ROPE.covers(config.rope):
            raise Unfit
        if config.moe is not None and not MIXTURE.covers(config.moe):
            raise Unfit
        self._config, self._layers, self._last = config, model.layers, model.norm
        self._snapshot = Snapshot((model.layers, model.norm))
        if self._snapshot.heard:
            raise Unfit
        self.B = B
        self._caches = [slice(b, b + 1) for b in range(B)] if apart else [slice(0, B)]
        self._copies: list[Tensor] = []
        self._sources: list[Tensor] = []
        self._held: list[Any] = []  # what the calls point to must live as long
        self._rows: dict[tuple[str, int], CRows] = {}
        self._tensors: dict[tuple[str, int], Tensor] = {}
        self._steps: list[CStep] = []
        self._attentions: list[tuple[int, CCache, CAttention, bool]] = []
        self._sparse = list(config.sparse_layers)
        if self._sparse:
            E, K = config.moe.router.num_experts, config.moe.router.num_experts_per_tok
            layers = len(self._sparse)
            self._routed = [torch.empty(layers, B, n) for n in (E, E, K)]  # logits, scores, weights
            self._ids = torch.empty(layers, B, K, dtype=torch.int64)
            self._kept = torch.ones(layers, B, K, dtype=torch.bool)
        self._cos, self._sin = (torch.empty(B, config.rope_dim // 2) for _ in range(2))
        self._buffer("x", config.hidden_size)
        for layer, block in enumerate(model.layers):
            self._block(block, self._sparse.index(layer) if layer in self._sparse else None)
        self._norm(model.norm, "x", "states")
        self._calls: Array[CStep] = (CStep * len(self._steps))(*self._steps)
        self._seen: list[Any] = [None] * len(self._attentions)

    def current(self, model: Any) -> bool:
        """Whether the model is still what the calls were made from, and nobody began to listen."""
        return (
            model.config is self._config
            and model.layers is self._layers
            and model.norm is self._last
            and self._snapshot.holds()
        )

    def run(
        self, x: Tensor, positions: Positions, caches: Sequence[Cache], mask_B: Tensor
    ) -> tuple[Tensor, list[Routing]]:
        """[B, 1, D] after the embedding -> the same after the final norm, and the routing of each sparse layer.

        [1, B, D] for sequences with a cache each.
        """
        D = x.shape[-1]
        self._tensors["x", D].copy_(x.view(self.B, D))
        for table, now in zip((self._cos, self._sin), positions.rope, strict=True):
            table.copy_(now.flatten(0, 2))
        rows = [row for _, row in positions.rows] or [positions]
        for i, (place, struct, attention, sliding) in enumerate(self._attentions):
            number, which = divmod(i, len(self._caches))
            layer = caches[which].layers[number]
            assert isinstance(layer, ContiguousLayer)
            buffers = tuple(layer.grow(1))
            if self._seen[i] is None or not all(map(is_, buffers, self._seen[i])):
                step.bind_cache(struct, *buffers)
                self._seen[i] = buffers
            self._calls[place].n[1] = layer.length - 1
            attention.length = layer.length
            step.set_mask(attention, rows[which].mask_of(sliding))
        if self._copies:
            torch._foreach_copy_(self._copies, self._sources)
        library.call("mh_steps", self._calls, len(self._calls), views.run(-1, 0))
        states = self._tensors["states", D].to(x.dtype, copy=True).view(x.shape)
        if not self._sparse:
            return states, []
        parts = [t.clone().unbind(0) for t in (self._ids, *self._routed)]
        kept = self._kept.unbind(0)
        return states, [
            Routing(ids, weights, scores, logits, k, mask_B)
            for ids, logits, scores, weights, k in zip(*parts, kept, strict=True)
        ]

    # ---- Building. Names are of buffers, [B, width] float32; a layer uses what the layer before it used. ----

    def _buffer(self, name: str, width: int) -> CRows:
        if (name, width) not in self._rows:
            self._tensors[name, width] = torch.empty(self.B, width)
            self._rows[name, width] = views.rows(self._tensors[name, width])
        return self._rows[name, width]

    def _pointer(self, name: str, width: int) -> int:
        self._buffer(name, width)
        return self._tensors[name, width].data_ptr()

    def _float32(self, tensor: Tensor | None, width: int) -> int | None:
        """Where `tensor` [width] lies as float32: itself, or a copy that every step makes again."""
        if tensor is None:
            return None
        if not views.plain(tensor, 1) or tensor.shape[0] != width:
            raise Unfit
        source = tensor.detach()
        if source.dtype != torch.float32:
            self._sources.append(source)
            self._copies.append(source.float())
            source = self._copies[-1]
        return source.data_ptr()

    def _call(self, kind: int, *arguments: Structure | Array[Any] | int | None, n: tuple[int, int] = (0, 0),
              factor: float = 1.0) -> None:  # fmt: skip
        self._held.extend(arguments)
        places = [a if a is None or isinstance(a, int) else addressof(a) for a in arguments]
        self._steps.append(CStep(kind, (c_void_p * 6)(*places), n, factor))

    def _norm(self, norm: nn.Module, source: str, to: str) -> None:
        struct, D = self._norm_of(norm), self._config.hidden_size
        if struct.width != D:
            raise Unfit
        self._call(NORM, struct, self._buffer(source, D), self._buffer(to, D))

    def _norm_of(self, norm: nn.Module) -> CNorm:
        if type(norm) is not RMSNorm or (struct := norm.for_native()) is None:
            raise Unfit
        return struct

    def _linears(self, source: str, width: int, layers: Mapping[str, tuple[nn.Module | None, int]]) -> None:
        """Layers and their widths by the name of the buffer they write."""
        structs, outputs = [], []
        for name, (layer, outs) in layers.items():
            struct = self._linear(layer, width)
            if struct.weight.outputs != outs:
                raise Unfit
            structs.append(struct)
            outputs.append(self._pointer(name, outs))
        self._held.extend(structs)
        pointers, to = (c_void_p * len(structs))(*map(addressof, structs)), (c_void_p * len(structs))(*outputs)
        self._call(LINEARS, pointers, self._buffer(source, width), to, n=(len(structs), 0))

    def _linear(self, layer: nn.Module | None, width: int) -> CLinear:
        """A record, or plain weights."""
        if type(layer) is RecordLinear and (record := layer.for_native(width)) is not None:
            return record
        if type(layer) is not Linear or layer.for_native(width) is None:
            raise Unfit
        struct = views.plain_linear(layer.weight, None)
        struct.bias = self._float32(layer.bias, struct.weight.outputs)
        return struct

    def _add(self, D: int, factor: float, gate: CRows | None = None, to: str = "x", source: str = "y") -> None:
        self._call(ADD, self._buffer(to, D), self._buffer(source, D), gate, factor=factor)

    def _block(self, block: Any, sparse: int | None) -> None:
        D = self._config.hidden_size
        self._norm(block.input_layernorm, "x", "normed")
        self._attention(block.self_attn)
        if block.attention_output_norm is not None:
            self._norm(block.attention_output_norm, "y", "y")
        self._add(D, block.residual_multiplier)
        self._norm(block.post_attention_layernorm, "x", "normed")
        if sparse is None:
            self._feed_forward(block.mlp, "y")
        else:
            self._mixture(block.mlp, sparse, D)
        if block.mlp_output_norm is not None:
            self._norm(block.mlp_output_norm, "y", "y")
        self._add(D, block.residual_multiplier)

    def _attention(self, attention: nn.Module) -> None:
        if type(attention) is not Attention or not held(attention, "sinks") or not ATTENTION.covers(attention.config):
            raise Unfit
        a, d, D = attention.config, attention.config.head_dim, self._config.hidden_size
        H, G = a.num_attention_heads, a.kv_heads
        if d % 16 or (attention.q_norm is None) != (a.qk_norm == "none"):
            raise Unfit
        projections = {"q": (attention.q_proj, H * d), "k": (attention.k_proj, G * d), "v": (attention.v_proj, G * d)}
        self._linears("normed", D, projections)
        norms = [attention.q_norm, attention.k_norm]
        structs = [step.NO_NORM if n is None else self._norm_of(n) for n in norms]
        sinks = self._float32(attention.sinks, H)
        for name in ("placed", "heads"):
            self._buffer(name, H * d)
        for part in self._caches:
            B, pairs = part.stop - part.start, self._cos.shape[1]
            cos, sin, placed, heads = (
                t[part].data_ptr()
                for t in (self._cos, self._sin, self._tensors["placed", H * d], self._tensors["heads", H * d])
            )
            rotation = CRotation(cos, sin, 2 * pairs, B, attention.interleave, *structs, step.NORMS[a.qk_norm])
            how = CAttention(B, 1, H, 0, None, 0, 0, sinks, attention.scale, a.attn_logit_softcap or 0.0)
            cache = CCache()
            self._attentions.append((len(self._steps), cache, how, attention.sliding))
            projected = [views.rows(self._tensors[name, n * d][part]) for name, n in (("q", H), ("k", G), ("v", G))]
            self._call(ROPE_AND_CACHE, *projected, rotation, cache, placed, n=(B, 0))
            self._call(ATTEND, how, placed, cache, heads)
        self._linears("heads", H * d, {"y": (attention.o_proj, D)})

    def _feed_forward(self, mlp: nn.Module, to: str) -> None:
        if type(mlp) is not FeedForward or mlp.activation not in ACTIVATION_CODES:
            raise Unfit
        D = self._config.hidden_size
        up_proj, F = mlp.up_proj, self._linear(mlp.up_proj, D).weight.outputs
        if F % 16:
            raise Unfit
        gated = mlp.gate_proj is not None
        if gated != (mlp.activation in GATED):
            raise Unfit
        layers = {"gate": (mlp.gate_proj, F), "up": (up_proj, F)} if gated else {"gate": (up_proj, F)}
        self._linears("normed", D, layers)
        up, kind = self._buffer("up", F) if gated else None, ACTIVATION_CODES[mlp.activation]
        self._call(ACTIVATE, self._buffer("gate", F), up, self._buffer("act", F), n=(kind, 0))
        self._linears("act", F, {to: (mlp.down_proj, D)})

    def _mixture(self, mlp: nn.Module, number: int, D: int) -> None:
        if type(mlp) is not MoELayer or type(mlp.router) is not Router or not mlp.router.takes_few(D):
            raise Unfit
        E, K = self._routed[0].shape[-1], self._ids.shape[-1]
        if (mlp.router.config.num_experts, mlp.router.config.num_experts_per_tok) != (E, K):
            raise Unfit
        packed, stacked = self._experts(mlp.experts, E, D)
        logits, scores, weights = (t[number].data_ptr() for t in self._routed)
        ids, kept = self._ids[number], self._kept[number]
        normed, y = self._buffer("normed", D), self._buffer("y", D)
        self._call(ROUTE, mlp.router.for_native(), normed, logits, scores, ids.data_ptr(), weights)
        routing = CRouting(ids.data_ptr(), weights, kept.data_ptr(), *ids.shape)
        self._call(EXPERTS, packed, stacked, routing, normed, y)
        if mlp.shared_experts is not None:
            self._feed_forward(mlp.shared_experts, "shared")
            gate = None
            if mlp.shared_expert_gate is not None:
                self._linears("normed", D, {"shared_gate": (mlp.shared_expert_gate, 1)})
                gate = self._buffer("shared_gate", 1)
            self._add(D, 1.0, gate, to="y", source="shared")

    def _experts(self, experts: nn.Module, E: int, D: int) -> tuple[CExperts | None, CStacked | None]:
        """Records, or stacked weights."""
        if type(experts) is RecordExperts and experts.native:
            records, layout = experts.records, experts.layout
            if not views.plain(records, 2, (torch.uint8,)) or records.shape != (E, layout.record_bytes):
                raise Unfit
            return views.experts(records, layout), None
        if type(experts) is Experts and experts.implementation in ("auto", "native") and held(experts, *experts.names):
            weights = experts.weights()
            up, down, up_bias, down_bias, activation = weights
            plain = views.plain(up, 3) and views.plain(down, 3) and up.dtype == down.dtype
            if not plain or activation not in ACTIVATION_CODES:
                raise Unfit
            F = down.shape[2]
            rows = 2 * F if activation in GATED else F
            if up.shape != (E, rows, D) or down.shape != (E, D, F):
                raise Unfit
            stacked, _ = views.stacked(weights._replace(up_bias=None, down_bias=None), up.dtype)
            stacked.up_bias = self._float32(None if up_bias is None else up_bias.view(-1), E * rows)
            stacked.down_bias = self._float32(None if down_bias is None else down_bias.view(-1), E * D)
            return None, stacked
        raise Unfit


def fused_step(model: Any, B: int, apart: bool = False) -> FusedStep | None:
    """The calls for `model`, or None where a part does not fit or somebody listens to one (forward hooks)."""
    try:
        return FusedStep(model, B, apart)
    except Unfit:
        return None
