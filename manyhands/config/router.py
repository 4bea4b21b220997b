"""A router as data."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from manyhands.config.base import Strict
from manyhands.config.numbers import Count, Size

UNLIMITED = {
    "expert_choice": "is balanced by construction",
    "base": "is balanced by construction",
    "sinkhorn": "is balanced by construction",
    "positive": "gives tokens different numbers of experts",
    "soft": "sends no token anywhere",
}
"""Selections that know no capacity, and why."""
MIXES_TOKENS = (
    "router.select = 'soft' mixes all tokens of a sequence, later ones too: no language model can be made of it here; "
    "it is for mh.MoELayer in a model of yours"
)


class RouterConfig(Strict):
    """A router as data: `score → select → weigh`. Every published router is one value of this class.

    score    `softmax` over all experts, `sigmoid` per expert (DeepSeek-V3), `sqrtsoftplus` (V4), or `relu` (ReMoE).
    select   top-k of score (+ bias), optionally within groups; `expert_choice` lets experts pick tokens
             (arXiv 2202.09368), `hash` is a fixed table from token id to expert (arXiv 2106.04426). `positive` takes
             every expert whose score is above 0 (ReMoE, arXiv 2412.14711), `sparsemixer` samples near the best
             (arXiv 2409.12136). `base` (arXiv 2103.16716) and `sinkhorn` (Megatron) share the tokens out evenly while
             training, and are top-k in evaluation. `hierarchical` chooses `topk_group` of `n_group` groups by a gate of
             their own, then as many experts in each by a second gate: a weight is the product of the two (Shazeer et
             al. 2017, arXiv 1701.06538, appendix B). `soft` (arXiv 2308.00951) mixes tokens into slots; no language
             model takes it.
    weigh    the unbiased scores of the chosen experts, divided by their sum if `norm_topk_prob`, times
             `routed_scaling_factor`. With one expert per token the raw gate is kept (Switch, arXiv 2101.03961):
             divided by itself it would be 1 and the router would get no gradient; `norm_top1` divides all the same.
    """

    num_experts: Annotated[int, Field(strict=True, ge=1, le=1 << 17)] = 8
    """At most 65,536; with `select: hierarchical` 131,072."""
    num_experts_per_tok: Annotated[int, Field(strict=True, ge=1, le=1 << 16)] = 2
    """With select = 'positive': how many a token shall have on average."""
    select: Literal[
        "topk", "expert_choice", "hash", "base", "sinkhorn", "positive", "sparsemixer", "hierarchical", "soft"
    ] = "topk"
    score: Literal["softmax", "sigmoid", "sqrtsoftplus", "relu"] = "softmax"
    """What is made of the logits: over all experts together, or of each by itself."""
    norm_topk_prob: bool = True
    """Divide the chosen experts' weights by their sum."""
    norm_top1: bool = False
    """With num_experts_per_tok = 1, give weight 1 instead of the gate: what transformers' renormalising routers do."""
    logit_bias: bool = False
    """A learned bias on the logits (gpt-oss)."""
    routed_scaling_factor: Annotated[float, Field(gt=0.0, le=1e3)] = 1.0
    """What the weights are multiplied by in the end (DeepSeek-V3: 2.5)."""
    bias: bool = False
    """Keep `e_score_correction_bias`, added to the scores for selection only (arXiv 2408.15664)."""
    bias_on: Literal["score", "logit"] = "score"
    """What that bias is added to, and the best of: V3's scores, or the logits (Megatron's quantile balancing)."""
    n_group: Annotated[int, Field(strict=True, ge=1, le=1 << 16)] = 1
    """Groups of neighbouring experts (DeepSeek-V3: one per node); 1: none."""
    topk_group: Annotated[int, Field(strict=True, ge=1, le=1 << 16)] = 1
    """From how many groups a token may choose."""
    group_score: Literal["top2_sum", "max"] = "top2_sum"
    """How a group is scored: V3 sums its two best biased scores, V2 takes its best score."""
    noisy: bool = False
    """Shazeer's noisy top-k (arXiv 1701.06538): learned Gaussian noise on the logits while training."""
    jitter: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Switch: multiply a copy of the router's input by U(1-jitter, 1+jitter) while training."""
    slots_per_expert: Size = 1
    """Soft MoE: how many mixtures of tokens each expert works on."""
    mixer_epsilon: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.01
    """SparseMixer: experts take part whose logit lies within 2·epsilon, relatively, of the best (Phi-3.5-MoE: 0.01)."""
    random_second: bool = False
    """GShard (arXiv 2006.16668): keep the second expert with probability min(1, 2·weight) while training."""
    init: Literal["normal", "zeros", "switch"] = "normal"
    """N(0, initializer_range²); zeros (Shazeer); or truncated normal, σ = √(0.1 / hidden_size) (Switch)."""
    capacity_factor: Annotated[float, Field(gt=0.0, le=1e4)] | None = None
    """Room per expert while training, as a multiple of its fair share T·K/E. None: dropless."""
    eval_capacity_factor: Annotated[float, Field(gt=0.0, le=1e4)] | None = None
    """The same in evaluation. None: dropless in evaluation."""
    capacity_tokens: Size | None = None
    """Room per expert in tokens, in training and evaluation, in the place of the factors (Switch in transformers)."""
    capacity_per: Literal["batch", "sequence", "group"] = "batch"
    """Among which tokens an expert's room is shared: all of the batch, each sequence, or groups of `capacity_group`."""
    capacity_group: Size | None = None
    """Tokens per group, sequence after sequence; the last may be smaller (GShard; 1,024 in Mesh TensorFlow)."""
    min_capacity: Count = 4
    """The least room of an expert, in tokens, where its capacity is a factor."""
    drop_policy: Literal["position", "probability"] = "position"
    """What an expert that is full keeps: the first tokens (first choices before second), or the most probable."""

    @property
    def causal_safe(self) -> bool:
        """Whether a token's routing in evaluation is independent of the other tokens."""
        return self.select not in ("expert_choice", "soft") and not self.limited(training=False)

    def limited(self, training: bool) -> bool:
        """Whether an expert has room for only so many tokens, while training or in evaluation."""
        factor = self.capacity_factor if training else self.eval_capacity_factor
        return self.capacity_tokens is not None or factor is not None

    @property
    def prefix_causal(self) -> bool:
        """Whether a token's routing in evaluation is independent of later tokens and of the other sequences.

        So is a fixed room in each sequence, first come first served, with one expert per token. Still decoding must
        count the earlier tokens: each by itself would find an empty expert. With two experts a later token's first
        choice goes before an earlier one's second, and a factor gives a longer sequence more room.
        """
        if self.causal_safe:
            return True
        queued = self.drop_policy == "position" and self.num_experts_per_tok == 1 and self.select != "expert_choice"
        return queued and self.capacity_per == "sequence" and self.capacity_tokens is not None

    @property
    def most_experts_per_tok(self) -> int:
        """Columns of a routing's `expert_ids`: K, or E where a token may have any number of experts."""
        any_number = self.select in ("expert_choice", "positive", "soft")
        return self.num_experts if any_number else self.num_experts_per_tok

    @property
    def renormalises(self) -> bool:
        """Whether the weights of a token's experts are divided by their sum."""
        return self.norm_topk_prob and (self.num_experts_per_tok > 1 or self.norm_top1)

    @model_validator(mode="after")
    def _consistent(self) -> "RouterConfig":
        k, e = self.num_experts_per_tok, self.num_experts
        if e > 1 << 16 and self.select != "hierarchical":
            raise ValueError(f"num_experts = {e} exceeds {1 << 16}, the most without select = 'hierarchical'")
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
        if self.select == "hierarchical":
            self._check_hierarchy()
        elif self.select != "topk":
            for name in ("bias", "noisy", "random_second"):
                if getattr(self, name):
                    raise ValueError(f"{name} has no meaning with select = {self.select!r}; it goes with 'topk'")
            if self.n_group > 1:
                raise ValueError(f"n_group has no meaning with select = {self.select!r}; it goes with 'topk'")
        if self.capacity_tokens is not None and (self.capacity_factor or self.eval_capacity_factor):
            raise ValueError("capacity_tokens says the room; leave capacity_factor and eval_capacity_factor out")
        if (self.capacity_per == "group") != (self.capacity_group is not None):
            raise ValueError(
                f"capacity_group = {self.capacity_group} with capacity_per = {self.capacity_per!r}: "
                "groups of tokens have capacity_per = 'group' and a capacity_group"
            )
        if self.select == "hash" and k != 1:
            raise ValueError(f"select = 'hash' sends a token to one expert: num_experts_per_tok = 1, not {k}")
        return self

    @model_validator(mode="after")
    def _published(self) -> "RouterConfig":
        """What goes together in the routers that are more than the best K scores."""
        k = self.num_experts_per_tok
        if (self.score == "relu") != (self.select == "positive"):
            raise ValueError(
                f"score = {self.score!r} with select = {self.select!r}: 'relu' and 'positive' (ReMoE) go together"
            )
        if self.bias_on == "logit" and (not self.bias or self.n_group > 1 or self.noisy):
            raise ValueError("bias_on = 'logit' needs bias = true, and does not go with n_group or noisy")
        if self.select in UNLIMITED and (self.limited(True) or self.limited(False)):
            raise ValueError(f"select = {self.select!r} {UNLIMITED[self.select]}: leave the capacity out")
        if self.select == "sparsemixer" and (k != 2 or self.score != "softmax"):
            raise ValueError("select = 'sparsemixer' is for num_experts_per_tok = 2 and score = 'softmax'")
        if self.select in ("sparsemixer", "positive") and self.norm_topk_prob:
            raise ValueError(f"select = {self.select!r} does not renormalise its weights: norm_topk_prob = false")
        if self.slots_per_expert > 1 and self.select != "soft":
            raise ValueError(f"slots_per_expert has no meaning with select = {self.select!r}; it goes with 'soft'")
        if self.select == "soft" and (self.score != "softmax" or self.jitter or self.logit_bias):
            raise ValueError("select = 'soft' is two softmaxes of normalised products: no other score, jitter or bias")
        if self.select == "base" and k != 1:
            raise ValueError(f"select = 'base' assigns each token to one expert: num_experts_per_tok = 1, not {k}")
        return self

    def _check_hierarchy(self) -> None:
        k, groups = self.num_experts_per_tok, self.topk_group
        if self.n_group < 2 or self.n_group == self.num_experts:
            raise ValueError(f"select = 'hierarchical' needs 2 to num_experts / 2 groups: n_group is {self.n_group}")
        if k % groups:
            raise ValueError(
                f"select = 'hierarchical': topk_group = {groups} does not divide num_experts_per_tok = {k}"
            )
        for name in ("score", "norm_topk_prob", "norm_top1", "logit_bias", "bias", "random_second", "group_score"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"select = 'hierarchical' is two softmaxes over what was chosen: leave {name} out")

    def idle_gate_weights(self, hidden_size: int) -> int:
        """Weights of the router that do not decide about a token: of a hierarchy's second level only those of its own
        groups do."""
        if self.select != "hierarchical":
            return 0
        rows = self.num_experts - self.num_experts // self.n_group * self.topk_group
        return rows * hidden_size * (2 if self.noisy else 1)
