"""What a model is. Field names follow Hugging Face `config.json` wherever it has one.

Nothing here imports torch. Sizes have generous upper limits, so that a hostile file is refused before anything
is computed or allocated.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from manyhands.config.activation import Activation
from manyhands.config.base import Strict

Size = Annotated[int, Field(strict=True, ge=1, le=1 << 24)]
Count = Annotated[int, Field(strict=True, ge=0, le=1 << 20)]
Rate = Annotated[float, Field(ge=0.0, le=1e6)]
Rotations = Annotated[float, Field(ge=1e-6, le=1e6)]
Multiplier = Annotated[float, Field(gt=0.0, le=1e6)]
INITIALIZER_RANGE = 0.02
"""Standard deviation of a fresh matrix (GPT-2, Radford et al. 2019), where nobody asks for another."""
LayerType = Literal["full_attention", "sliding_attention"]


class RouterConfig(Strict):
    """A router as data: `score → select → weigh`. Every published router is one value of this class.

    score    `softmax` over all experts, or `sigmoid` per expert (DeepSeek-V3).
    select   top-k of score (+ bias), optionally within groups; `expert_choice` lets experts pick tokens
             (arXiv 2202.09368), `hash` is a fixed table from token id to expert (arXiv 2106.04426).
    weigh    the unbiased scores of the chosen experts, divided by their sum if `norm_topk_prob`, times
             `routed_scaling_factor`. With one expert per token the raw gate is kept (Switch, arXiv 2101.03961):
             divided by itself it would be 1 and the router would get no gradient; `norm_top1` divides all the same.
    """

    num_experts: Annotated[int, Field(strict=True, ge=1, le=1 << 16)] = 8
    num_experts_per_tok: Annotated[int, Field(strict=True, ge=1, le=1 << 16)] = 2
    select: Literal["topk", "expert_choice", "hash"] = "topk"
    score: Literal["softmax", "sigmoid"] = "softmax"
    norm_topk_prob: bool = True
    norm_top1: bool = False
    """With num_experts_per_tok = 1, give weight 1 instead of the gate: what transformers' renormalising routers do."""
    logit_bias: bool = False
    """A learned bias on the logits (gpt-oss)."""
    routed_scaling_factor: Annotated[float, Field(gt=0.0, le=1e3)] = 1.0
    bias: bool = False
    """Keep `e_score_correction_bias`, added to the scores for selection only (arXiv 2408.15664)."""
    n_group: Annotated[int, Field(strict=True, ge=1, le=1 << 16)] = 1
    topk_group: Annotated[int, Field(strict=True, ge=1, le=1 << 16)] = 1
    group_score: Literal["top2_sum", "max"] = "top2_sum"
    """How a group is scored: V3 sums its two best biased scores, V2 takes its best score."""
    noisy: bool = False
    """Shazeer's noisy top-k (arXiv 1701.06538): learned Gaussian noise on the logits while training."""
    jitter: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Switch: multiply a copy of the router's input by U(1-jitter, 1+jitter) while training."""
    random_second: bool = False
    """GShard (arXiv 2006.16668): keep the second expert with probability min(1, 2·weight) while training."""
    init: Literal["normal", "zeros", "switch"] = "normal"
    """N(0, initializer_range²); zeros (Shazeer); or truncated normal, σ = √(0.1 / hidden_size) (Switch)."""
    capacity_factor: Annotated[float, Field(gt=0.0, le=1e4)] | None = None
    """Room per expert while training, as a multiple of its fair share T·K/E. None: dropless."""
    eval_capacity_factor: Annotated[float, Field(gt=0.0, le=1e4)] | None = None
    """The same in evaluation. None: dropless in evaluation."""
    min_capacity: Count = 4
    drop_policy: Literal["position", "probability"] = "position"
    """Who stays when an expert is full: the first tokens (first choices before second), or the most probable."""

    @property
    def causal_safe(self) -> bool:
        """Whether a token's routing in evaluation is independent of the tokens beside it."""
        return self.select != "expert_choice" and self.eval_capacity_factor is None

    @model_validator(mode="after")
    def _consistent(self) -> "RouterConfig":
        k, e = self.num_experts_per_tok, self.num_experts
        if k > e:
            raise ValueError(f"num_experts_per_tok = {k} exceeds num_experts = {e}")
        if e % self.n_group:
            raise ValueError(f"n_group = {self.n_group} does not divide num_experts = {e}")
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group = {self.topk_group} exceeds n_group = {self.n_group}")
        if k > self.topk_group * (e // self.n_group):
            raise ValueError(
                f"num_experts_per_tok = {k} exceeds the {self.topk_group * (e // self.n_group)} experts "
                f"of the topk_group = {self.topk_group} chosen groups"
            )
        if self.random_second and k != 2:
            raise ValueError(f"random_second needs num_experts_per_tok = 2, not {k}")
        if self.norm_top1 and (k != 1 or not self.norm_topk_prob):
            raise ValueError("norm_top1 goes with num_experts_per_tok = 1 and norm_topk_prob")
        if self.select != "topk":
            for name in ("bias", "noisy", "random_second"):
                if getattr(self, name):
                    raise ValueError(f"{name} has no meaning with select = {self.select!r}; it goes with 'topk'")
            if self.n_group > 1:
                raise ValueError(f"n_group has no meaning with select = {self.select!r}; it goes with 'topk'")
        if self.select == "expert_choice" and (self.capacity_factor or self.eval_capacity_factor):
            raise ValueError("select = 'expert_choice' is balanced by construction: leave the capacity factors out")
        if self.select == "hash" and k != 1:
            raise ValueError(f"select = 'hash' sends a token to one expert: num_experts_per_tok = 1, not {k}")
        return self


class MoEConfig(Strict):
    """The sparse layers: which layers they are, their router, their experts, the shared experts beside them."""

    router: RouterConfig = RouterConfig()
    moe_intermediate_size: Size = 128
    hidden_act: Activation = "swiglu"
    expert_bias: bool = False
    n_shared_experts: Count = 0
    """Experts every token visits, summed to the routed output; one feed-forward n times as wide (DeepSeekMoE)."""
    shared_expert_intermediate_size: Size | None = None
    """Width of the shared feed-forward, if it is not n_shared_experts · moe_intermediate_size (Qwen2-MoE)."""
    shared_expert_gate: bool = False
    """Multiply the shared output by sigmoid(w·x), as Qwen1.5-MoE does."""
    first_k_dense_replace: Count = 0
    """The first k layers keep a dense feed-forward network (DeepSeek)."""
    decoder_sparse_step: Size = 1
    """Every n-th layer is sparse: layer i is when (i + 1) is a multiple of n (Qwen, Switch)."""
    mlp_only_layers: Annotated[tuple[Count, ...], Field(max_length=4096)] = ()
    """Layers that stay dense whatever the two fields above say (Qwen)."""

    @model_validator(mode="after")
    def _consistent(self) -> "MoEConfig":
        if self.shared_expert_gate and not self.n_shared_experts:
            raise ValueError("shared_expert_gate needs n_shared_experts >= 1")
        if self.shared_expert_intermediate_size is not None and not self.n_shared_experts:
            raise ValueError("shared_expert_intermediate_size needs n_shared_experts >= 1")
        return self

    @property
    def shared_width(self) -> int:
        """Width of the feed-forward every token visits; 0 without one."""
        if not self.n_shared_experts:
            return 0
        return self.shared_expert_intermediate_size or self.n_shared_experts * self.moe_intermediate_size

    def is_sparse(self, layer: int) -> bool:
        """Whether decoder layer `layer` (from 0) is a mixture of experts."""
        regular = layer >= self.first_k_dense_replace and (layer + 1) % self.decoder_sparse_step == 0
        return regular and layer not in self.mlp_only_layers


class RopeConfig(Strict):
    """Rotary position embedding: plain, linear interpolation, YaRN (arXiv 2309.00071), or Llama 3.1's."""

    rope_theta: Annotated[float, Field(gt=1.0, le=1e12)] = 10_000.0
    rope_type: Literal["default", "linear", "yarn", "llama3"] = "default"
    factor: Annotated[float, Field(ge=1.0, le=1e4)] = 1.0
    original_max_position_embeddings: Size | None = None
    beta_fast: Rotations = 32.0
    beta_slow: Rotations = 1.0
    mscale: Rate | None = None
    mscale_all_dim: Rate | None = None
    attention_factor: Rate | None = None
    truncate: bool = True
    """YaRN: round the borders of its ramp to whole dimensions (gpt-oss does not)."""
    low_freq_factor: Rotations = 1.0
    high_freq_factor: Rotations = 4.0
    """llama3: wavelengths over original / low are divided by factor, those under original / high are kept."""
    partial_rotary_factor: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """The share of a head's width that is rotated, from its start (GLM-4.5: half)."""
    interleave: bool = False
    """Rotate neighbouring pairs (DeepSeek's checkpoints) instead of the two halves (Llama)."""

    @model_validator(mode="after")
    def _consistent(self) -> "RopeConfig":
        if self.rope_type in ("yarn", "llama3") and self.original_max_position_embeddings is None:
            raise ValueError(f"rope_type = {self.rope_type!r} needs original_max_position_embeddings")
        if self.rope_type == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("rope_type = 'llama3' needs high_freq_factor > low_freq_factor")
        return self


class AttentionConfig(Strict):
    """Multi-head and grouped-query attention, or multi-head latent attention (MLA, arXiv 2405.04434)."""

    kind: Literal["gqa", "mla"] = "gqa"
    num_attention_heads: Size = 4
    num_key_value_heads: Size | None = None
    """gqa: defaults to num_attention_heads, which is plain multi-head attention."""
    head_dim: Size = 64
    qk_norm: Literal["none", "head", "full", "head_after_rope"] = "none"
    """RMSNorm of queries and keys: per head (Qwen3), over the full projected width (OLMoE), or per head after the
    rotation (Hunyuan)."""
    attention_bias: bool = False
    """Biases on the query, key and value projections."""
    output_bias: bool = False
    sliding_window: Size | None = None
    """A token sees itself and the sliding_window - 1 tokens before it."""
    layer_types: tuple[LayerType, ...] | None = None
    """Which layers have the window, one entry per layer (gpt-oss: every other one). None: all of them."""
    sinks: bool = False
    """A learned logit per head that takes attention and gives no value (gpt-oss)."""
    attn_logit_softcap: Multiplier | None = None
    """Logits become cap·tanh(logits / cap) before the softmax (Grok-1: 30)."""
    attention_multiplier: Multiplier | None = None
    """What queries times keys are multiplied by, if not head_dim^-0.5 (Granite)."""
    q_lora_rank: Size | None = None
    kv_lora_rank: Size = 512
    qk_nope_head_dim: Size = 128
    qk_rope_head_dim: Size = 64
    v_head_dim: Size = 128
    latent_norm_eps: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """mla: epsilon of the two norms inside, if it is not rms_norm_eps (DeepSeek's is always 1e-6)."""

    @property
    def kv_heads(self) -> int:
        """Key/value heads, with the default resolved."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def rope_dim(self) -> int:
        """Width of the rotated part of a head."""
        return self.qk_rope_head_dim if self.kind == "mla" else self.head_dim

    @model_validator(mode="after")
    def _consistent(self) -> "AttentionConfig":
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"num_key_value_heads = {self.kv_heads} does not divide num_attention_heads = "
                f"{self.num_attention_heads}"
            )
        if self.layer_types is not None and self.sliding_window is None and "sliding_attention" in self.layer_types:
            raise ValueError("layer_types has 'sliding_attention', which needs a sliding_window")
        if self.kind == "mla":
            if self.qk_norm != "none":
                raise ValueError("qk_norm cannot be used with kind = 'mla': the keys are never materialised")
            if self.num_key_value_heads not in (None, self.num_attention_heads):
                raise ValueError("num_key_value_heads has no meaning with kind = 'mla'")
            for name in ("sinks", "attn_logit_softcap", "attention_multiplier"):
                if getattr(self, name):
                    raise ValueError(f"{name} has no meaning with kind = 'mla'")
        return self

    def window(self, layer: int) -> int | None:
        """The sliding window of decoder layer `layer` (from 0); None where it sees everything."""
        if self.layer_types is not None and self.layer_types[layer] == "full_attention":
            return None
        return self.sliding_window


class ModelConfig(Strict):
    """A decoder-only language model, dense (`moe` is None) or sparse."""

    vocab_size: Size = 4096
    hidden_size: Size = 256
    num_hidden_layers: Annotated[int, Field(strict=True, ge=1, le=4096)] = 4
    intermediate_size: Size = 1024
    """Width of the dense feed-forward networks."""
    hidden_act: Activation = "swiglu"
    max_position_embeddings: Size = 2048
    rms_norm_eps: Annotated[float, Field(gt=0.0, le=1.0)] = 1e-6
    initializer_range: Annotated[float, Field(gt=0.0, le=10.0)] = INITIALIZER_RANGE
    tie_word_embeddings: bool = False
    output_norms: bool = False
    """Also normalise what attention and feed-forward give, before it is added (Grok-1's four norms)."""
    embedding_multiplier: Multiplier = 1.0
    residual_multiplier: Multiplier = 1.0
    """What each block's contribution is multiplied by before it is added (Granite)."""
    output_multiplier: Multiplier = 1.0
    """What the logits are multiplied by (Grok-1; the inverse of Granite's logits_scaling)."""
    attention: AttentionConfig = AttentionConfig()
    rope: RopeConfig = RopeConfig()
    moe: MoEConfig | None = None

    def is_sparse(self, layer: int) -> bool:
        """Whether decoder layer `layer` (from 0) is a mixture of experts."""
        return self.moe is not None and self.moe.is_sparse(layer)

    @property
    def rope_dim(self) -> int:
        """Width of the rotated part of a head."""
        return int(self.attention.rope_dim * self.rope.partial_rotary_factor)

    @property
    def sparse_layers(self) -> list[int]:
        """The numbers of the sparse layers, from 0."""
        return [layer for layer in range(self.num_hidden_layers) if self.is_sparse(layer)]

    @property
    def dense_layers(self) -> list[int]:
        """The numbers of the layers that are not sparse, from 0."""
        return [layer for layer in range(self.num_hidden_layers) if not self.is_sparse(layer)]

    @property
    def layer_types(self) -> list[str]:
        """`full_attention` or `sliding_attention`, layer by layer."""
        windows = (self.attention.window(layer) for layer in range(self.num_hidden_layers))
        return ["full_attention" if window is None else "sliding_attention" for window in windows]

    @model_validator(mode="after")
    def _consistent(self) -> "ModelConfig":
        if self.moe is not None and not self.sparse_layers:
            raise ValueError(
                f"moe is set but no layer is sparse: first_k_dense_replace = {self.moe.first_k_dense_replace}, "
                f"decoder_sparse_step = {self.moe.decoder_sparse_step}, num_hidden_layers = {self.num_hidden_layers}"
            )
        if self.moe is not None and (beyond := [n for n in self.moe.mlp_only_layers if n >= self.num_hidden_layers]):
            raise ValueError(f"mlp_only_layers names layer {beyond[0]} of {self.num_hidden_layers} (from 0)")
        types = self.attention.layer_types
        if types is not None and len(types) != self.num_hidden_layers:
            raise ValueError(f"layer_types has {len(types)} entries for num_hidden_layers = {self.num_hidden_layers}")
        if not self.rope_dim or self.rope_dim % 2:
            raise ValueError(f"the rotated head width is {self.rope_dim}; it must be even, and not 0")
        return self
