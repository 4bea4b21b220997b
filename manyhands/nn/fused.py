"""All blocks of a decoder for one new token per sequence as one call of the native library: in small models the time
between the calls is more than the time in them.

Fused is what `FusedStep` knows in every part: packed linear layers and experts, multi-head attention to a cache. All
else goes block by block. Between the layers everything is float32, whatever the model's dtype.

B sequences of one token each, D model width, L sparse layers, E experts, K experts per token.
"""

from ctypes import Array, Structure, addressof, c_void_p
from typing import Any

import torch
from torch import Tensor, nn

from manyhands.kernels.native import library, step, views
from manyhands.kernels.native.library import (
    ACTIVATION_CODES,
    CAttention,
    CCache,
    CExperts,
    CLinear,
    CRotation,
    CRouting,
    CRows,
    CStacked,
    CStep,
)
from manyhands.moe import Experts, MoELayer, Routing
from manyhands.moe.layer import FeedForward, Linear
from manyhands.moe.packed import RecordExperts, RecordLinear
from manyhands.nn.attention import Attention, Positions
from manyhands.nn.cache import Cache
from manyhands.nn.norm import RMSNorm

MOST_SEQUENCES = 8
NORM, LINEARS, PLACE, ATTEND, ROUTE, EXPERTS, ADD, ACTIVATE = range(8)


class Unfit(Exception):
    """A part of this model cannot be fused."""


class FusedStep:
    """The calls, prepared once for a cache. Weights that are replaced later, not changed in place, are not seen."""

    def __init__(self, model: Any, B: int) -> None:
        """Raises `Unfit`."""
        config = model.config
        self.B = B
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

    def run(self, x_B1D: Tensor, positions: Positions, cache: Cache, mask_B: Tensor) -> tuple[Tensor, list[Routing]]:
        """[B, 1, D] after the embedding -> [B, 1, D] after the final norm, and the routing of each sparse layer."""
        D = x_B1D.shape[-1]
        self._tensors["x", D].copy_(x_B1D[:, 0])
        for table, now in zip((self._cos, self._sin), positions.rope, strict=True):
            table.copy_(now[:, 0, 0])
        for i, (place, held, attention, sliding) in enumerate(self._attentions):
            layer = cache.layers[i]
            buffers = layer.grow(1)
            if buffers is not self._seen[i]:
                step.point_to(held, *buffers)
                self._seen[i] = buffers
            self._calls[place].n[1] = layer.length - 1
            attention.length = layer.length
            step.look_through(attention, positions.mask_of(sliding))
        library.call("mh_steps", self._calls, len(self._calls), views.run(-1, 0))
        states = self._tensors["states", D].to(x_B1D.dtype, copy=True)[:, None]
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

    def _keep(self, tensor: Tensor) -> None:
        """Its memory, which the parameter itself would give up for other memory in `model.to(…)`."""
        self._held.append(tensor.detach())

    def _call(self, kind: int, *arguments: Structure | Array[Any] | int | None, n: tuple[int, int] = (0, 0),
              factor: float = 1.0) -> None:  # fmt: skip
        self._held.extend(arguments)
        places = [a if a is None or isinstance(a, int) else addressof(a) for a in arguments]
        self._steps.append(CStep(kind, (c_void_p * 6)(*places), n, factor))

    def _norm(self, norm: nn.Module, source: str, to: str) -> None:
        if type(norm) is not RMSNorm or not _plain(norm.weight):
            raise Unfit
        self._keep(norm.weight)
        D = norm.weight.shape[0]
        self._call(NORM, norm.prepared(), self._buffer(source, D), self._buffer(to, D))

    def _linears(self, source: str, layers: dict[str, nn.Module | None]) -> None:
        """`layers` by the name of the buffer they write."""
        structs, outputs, width = [], [], 0
        for name, layer in layers.items():
            if layer is None or (struct := self._linear(layer)) is None:
                raise Unfit
            structs.append(struct)
            outputs.append(self._pointer(name, struct.weight.outputs))
            width = struct.weight.inputs
        self._held.extend(structs)
        pointers, to = (c_void_p * len(structs))(*map(addressof, structs)), (c_void_p * len(structs))(*outputs)
        self._call(LINEARS, pointers, self._buffer(source, width), to, n=(len(structs), 0))

    def _linear(self, layer: nn.Module) -> CLinear | None:
        """A record, or plain weights."""
        if type(layer) is RecordLinear and layer.native and layer.record.device.type == "cpu":
            self._keep(layer.record)
            return layer.prepared()  # type: ignore[no-any-return]
        if type(layer) is not Linear or not _plain(layer.weight) or layer.in_features % 16:
            return None
        bias = None if layer.bias is None else layer.bias.detach().float().contiguous()
        self._keep(layer.weight)
        self._held.append(bias)
        return views.plain_linear(layer.weight, bias)

    def _add(self, D: int, factor: float, gate: CRows | None = None, to: str = "x", source: str = "y") -> None:
        self._call(ADD, self._buffer(to, D), self._buffer(source, D), gate, factor=factor)

    def _block(self, block: Any, sparse: int | None) -> None:
        D = block.input_layernorm.weight.shape[0]
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
        if type(attention) is not Attention or attention.config.head_dim % 16:
            raise Unfit
        a, d = attention.config, attention.config.head_dim
        H, G = a.num_attention_heads, a.kv_heads
        self._linears("normed", {"q": attention.q_proj, "k": attention.k_proj, "v": attention.v_proj})
        norms = [attention.q_norm, attention.k_norm]
        if not all(n is None or _plain(n.weight) for n in norms):
            raise Unfit
        for norm in norms:
            if norm is not None:
                self._keep(norm.weight)
        tables = (self._cos.data_ptr(), self._sin.data_ptr(), 2 * self._cos.shape[1], self.B)
        structs = [step.NO_NORM if n is None else n.prepared() for n in norms]
        rotation = CRotation(*tables, attention.interleave, *structs, step.NORMS[a.qk_norm])
        sinks = None if attention.sinks is None else attention.sinks.detach().float().contiguous()
        self._held.append(sinks)
        cache, placed, heads = CCache(), self._pointer("placed", H * d), self._pointer("heads", H * d)
        how = CAttention(self.B, 1, H, 0, None, 0, 0, None if sinks is None else sinks.data_ptr(), attention.scale,
                         a.attn_logit_softcap or 0.0)  # fmt: skip
        self._attentions.append((len(self._steps), cache, how, attention.sliding))
        projected = self._buffer("q", H * d), self._buffer("k", G * d), self._buffer("v", G * d)
        self._call(PLACE, *projected, rotation, cache, placed, n=(self.B, 0))
        self._call(ATTEND, how, placed, cache, heads)
        self._linears("heads", {"y": attention.o_proj})

    def _feed_forward(self, mlp: nn.Module, to: str) -> None:
        if type(mlp) is not FeedForward or (struct := self._linear(mlp.up_proj)) is None:
            raise Unfit
        up_proj, F = mlp.up_proj, struct.weight.outputs
        if F % 16:
            raise Unfit
        gated = mlp.gate_proj is not None
        self._linears("normed", {"gate": mlp.gate_proj, "up": up_proj} if gated else {"gate": up_proj})
        up, kind = self._buffer("up", F) if gated else None, ACTIVATION_CODES[mlp.activation]
        self._call(ACTIVATE, self._buffer("gate", F), up, self._buffer("act", F), n=(kind, 0))
        self._linears("act", {to: mlp.down_proj})

    def _mixture(self, mlp: nn.Module, number: int, D: int) -> None:
        if type(mlp) is not MoELayer or not mlp.router.takes_few(D):
            raise Unfit
        packed, stacked = self._experts(mlp.experts)
        logits, scores, weights = (t[number].data_ptr() for t in self._routed)
        ids, kept = self._ids[number], self._kept[number]
        normed, y = self._buffer("normed", D), self._buffer("y", D)
        for tensor in mlp.router.state_dict().values():
            self._keep(tensor)
        self._call(ROUTE, mlp.router.prepared(), normed, logits, scores, ids.data_ptr(), weights)
        routing = CRouting(ids.data_ptr(), weights, kept.data_ptr(), *ids.shape)
        self._call(EXPERTS, packed, stacked, routing, normed, y)
        if mlp.shared_experts is not None:
            self._feed_forward(mlp.shared_experts, "shared")
            gate = None
            if mlp.shared_expert_gate is not None:
                self._linears("normed", {"shared_gate": mlp.shared_expert_gate})
                gate = self._buffer("shared_gate", 1)
            self._add(D, 1.0, gate, to="y", source="shared")

    def _experts(self, experts: nn.Module) -> tuple[CExperts | None, CStacked | None]:
        """Records, or stacked weights."""
        if type(experts) is RecordExperts and experts.native:
            self._keep(experts.records)
            return views.experts(experts.records, experts.layout), None
        if type(experts) is Experts and experts.implementation in ("auto", "native"):
            weights = experts.weights()
            if _plain(weights.up) and _plain(weights.down) and weights.up.dtype == weights.down.dtype:
                stacked, alive = views.stacked(weights, weights.up.dtype)
                self._held.append(alive)
                return None, stacked
        raise Unfit


def _plain(weight: Tensor) -> bool:
    return weight.dtype in views.DTYPES and weight.device.type == "cpu" and weight.is_contiguous()


def fused_step(model: Any, B: int) -> FusedStep | None:
    """The calls for `model`, or None where a part does not fit or somebody listens to one (forward hooks)."""
    if any(m._forward_hooks or m._forward_pre_hooks for m in model.layers.modules()) or model.norm._forward_hooks:
        return None
    try:
        return FusedStep(model, B)
    except Unfit:
        return None
