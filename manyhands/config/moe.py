"""The sparse layers of a model."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from manyhands.config.activation import Activation
from manyhands.config.base import Strict
from manyhands.config.numbers import Count, Size
from manyhands.config.router import RouterConfig

PLACES = ("first_k_dense_replace", "decoder_sparse_step", "mlp_only_layers")
"""The fields of `MoEConfig` that say which layers of a decoder are sparse. Other kinds of models say it themselves."""


class MoEConfig(Strict):
    """The sparse layers: which layers they are, their router, their experts, and the shared experts."""

    router: RouterConfig = RouterConfig()
    input_jitter: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Multiply what router and all experts see by U(1-input_jitter, 1+input_jitter) while training (Phi-3.5-MoE)."""
    unchosen: Literal["nothing", "average", "gradient"] = "nothing"
    """What experts do that a token did not choose. `average`: the running mean of their outputs stands in for them
    (Default MoE, arXiv 2504.12463). `gradient`: while training all experts run, and the router learns what the others
    would have said (DenseMixer); the output stays that of the chosen."""
    average_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """How much of that running mean stays after each optimiser step."""
    weigh: Literal["output", "input"] = "output"
    """What a token's weight multiplies: what its expert says, or what its one expert reads (Llama 4)."""
    moe_intermediate_size: Size = 128
    """Width of an expert."""
    hidden_act: Activation = "swiglu"
    expert_bias: bool = False
    """Biases on the experts' projections (gpt-oss)."""
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
        r = self.router
        if self.unchosen != "nothing" and (r.select != "topk" or r.noisy or r.random_second):
            raise ValueError(f"unchosen = {self.unchosen!r} goes with select = 'topk', without noisy and random_second")
        if self.unchosen == "average" and r.renormalises:
            raise ValueError("unchosen = 'average' weighs all experts: router.norm_topk_prob = false")
        single = r.most_experts_per_tok == 1 and r.select != "soft" and self.unchosen == "nothing"
        if self.weigh == "input" and not single:
            raise ValueError("weigh = 'input' is for one expert per token: router.num_experts_per_tok = 1")
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
