"""Every kind of router by itself, in one layer, against the oracle.

T tokens, D width, F expert width.
"""

from collections.abc import Iterator
from typing import Literal

import torch

from manyhands.check import cases, losses
from manyhands.check.compare import TOLERANCES, close, exact, gradient_row
from manyhands.check.model import DTYPES, Routings, loss_rows, routing_rows
from manyhands.check.oracle import float64_copy, moe_layer
from manyhands.check.report import Row, Situation
from manyhands.check.subject import gradients
from manyhands.config import MoEConfig, RouterConfig
from manyhands.moe import LoadCounter, MoELayer
from manyhands.moe.assign import ASSIGNMENTS
from manyhands.moe.router import SCORES

RouterRows = tuple[list[Row], Routings]
B, S, D, F, VOCAB = 4, 11, 32, 16, 97  # T = 44: no multiple of a vector width, so that tails are covered

ROUTERS: dict[str, RouterConfig] = {
    "softmax top-2, renormalised (Mixtral)": RouterConfig(),
    "softmax top-4, raw weights (OLMoE)": RouterConfig(num_experts_per_tok=4, norm_topk_prob=False),
    "top-1, jitter, capacity (Switch)": RouterConfig(
        num_experts_per_tok=1, jitter=0.01, init="switch", capacity_factor=1.25, eval_capacity_factor=2.0
    ),
    "noisy top-2 (Shazeer)": RouterConfig(noisy=True, init="zeros"),
    "random second, capacity by group (GShard)": RouterConfig(
        random_second=True,
        routed_scaling_factor=1.5,
        capacity_factor=1.0,
        eval_capacity_factor=1.0,
        min_capacity=1,
        capacity_per="group",
        capacity_group=13,  # S = 11: groups begin within sequences, and the last is smaller
    ),
    "max of groups (DeepSeek-V2)": RouterConfig(
        num_experts=16,
        num_experts_per_tok=3,
        norm_topk_prob=False,
        routed_scaling_factor=16.0,
        n_group=4,
        topk_group=2,
        group_score="max",
    ),
    "sigmoid, bias (loss-free)": RouterConfig(score="sigmoid", bias=True, routed_scaling_factor=2.446),
    "sigmoid, bias, groups (DeepSeek-V3)": RouterConfig(
        num_experts=16,
        num_experts_per_tok=4,
        score="sigmoid",
        bias=True,
        routed_scaling_factor=2.5,
        n_group=4,
        topk_group=2,
    ),
    "sigmoid top-1, weighed input (Llama 4)": RouterConfig(
        score="sigmoid", num_experts_per_tok=1, norm_topk_prob=False
    ),
    "capacity by probability": RouterConfig(
        capacity_factor=0.75, eval_capacity_factor=0.5, min_capacity=1, drop_policy="probability"
    ),
    "all experts": RouterConfig(num_experts=4, num_experts_per_tok=4),
    "one expert": RouterConfig(num_experts=1, num_experts_per_tok=1),
    "hash": RouterConfig(select="hash", num_experts_per_tok=1, routed_scaling_factor=0.5),
    "expert choice": RouterConfig(select="expert_choice", routed_scaling_factor=1.5),
    "top-1, tokens per sequence (Switch in transformers)": RouterConfig(
        num_experts_per_tok=1, init="switch", capacity_tokens=2, capacity_per="sequence"
    ),
    "ReLU (ReMoE)": RouterConfig(
        select="positive", score="relu", num_experts_per_tok=3, norm_topk_prob=False, routed_scaling_factor=1.5
    ),
    "sigmoid, bias on the logits (quantile balancing)": RouterConfig(score="sigmoid", bias=True, bias_on="logit"),
    "balanced assignment (BASE)": RouterConfig(select="base", score="sigmoid", num_experts_per_tok=1),
    "Sinkhorn": RouterConfig(select="sinkhorn", norm_topk_prob=False),
    "soft slots (Soft MoE)": RouterConfig(select="soft", num_experts=4, slots_per_expert=2, routed_scaling_factor=1.5),
    "experts not chosen: their averages (Default MoE)": RouterConfig(norm_topk_prob=False),
    "experts not chosen: their gradient (DenseMixer)": RouterConfig(routed_scaling_factor=1.5),
    "two levels, noisy (Shazeer, appendix B)": RouterConfig(
        num_experts=16, num_experts_per_tok=4, select="hierarchical", n_group=4, topk_group=2, noisy=True
    ),
    "SparseMixer (Phi-3.5-MoE)": RouterConfig(select="sparsemixer", norm_topk_prob=False, mixer_epsilon=0.3),
}
_MET = {router.score for router in ROUTERS.values()}
ROUTERS |= {f"score {name}": RouterConfig.model_validate({"score": name}) for name in SCORES if name not in _MET}
"""One of each published kind, in small, and each score that none of them has; experts alternate between activations
and biases, see `layer_config`."""


def layer_config(name: str) -> MoEConfig:
    """The layer a router is checked in. The activation, biases and shared experts change from one to the next."""
    number = list(ROUTERS).index(name)
    kinds: dict[str, Literal["average", "gradient"]] = {"their averages": "average", "their gradient": "gradient"}
    return MoEConfig(
        router=ROUTERS[name],
        unchosen=next((kind for words, kind in kinds.items() if words in name), "nothing"),
        moe_intermediate_size=F,
        hidden_act=("swiglu", "geglu", "gelu", "relu", "swiglu_oai", "geglu_tanh")[number % 6],
        expert_bias=number % 3 == 1,
        weigh="input" if "weighed input" in name else "output",
        n_shared_experts=number % 2,
        shared_expert_gate=number % 4 == 1,
    )


class RouterCheck:
    """One layer with the router `name` in one case; `rows` compares it in every backend, dtype and mode."""

    def __init__(self, name: str, case: str, seed: int, shape: tuple[int, int] = (B, S)) -> None:
        self.name, self.case, self.seed, self.shape = name, case, seed, shape
        self.config = layer_config(name)
        generator = torch.Generator().manual_seed(seed)
        self.layer = MoELayer(self.config, D)
        cases.fill(self.layer, case, torch.Generator().manual_seed(seed + 1))
        along_first = torch.Generator().manual_seed(seed + 1)  # the same direction as `fill`
        x = cases.tokens(shape[0] * shape[1], D, case, along_first)
        self.x = x.bfloat16().float()  # the same input in every dtype
        self.probe = torch.randn(len(self.x), D, generator=generator).bfloat16().float()
        self.ids = cases.token_ids(shape, VOCAB, case, self.config.router.select == "hash", generator).flatten()
        padded = cases.padding_mask(shape) if case == "padding" else torch.ones(shape, dtype=torch.bool)
        self.mask = padded.flatten()

    def rows(self, backend: str, dtype: str) -> Iterator[RouterRows]:
        """The rows of training, and of evaluation where that differs."""
        r = self.config.router
        self.layer.experts.implementation = backend
        differs = r.noisy or r.jitter or r.random_second or r.capacity_factor != r.eval_capacity_factor
        differs = differs or r.select in (*ASSIGNMENTS, "sparsemixer") or self.config.unchosen == "gradient"
        size = "" if self.shape == (B, S) else f", {len(self.x)} tokens"
        for mode in ("train", "eval") if differs else ("train",):
            yield self._compare(Situation(self.name, self.case, backend, dtype, mode + size))

    def _compare(self, at: Situation) -> tuple[list[Row], Routings]:
        router, training = self.config.router, at.mode.startswith("train")
        layer = self.layer.train(training)
        layer.zero_grad(set_to_none=True)
        x = self.x.clone().to(DTYPES[at.dtype]).requires_grad_()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            batch = x.view(*self.shape, D), self.mask.view(self.shape), self.ids.view(self.shape)
            y, routing = layer(*batch)
            y = y.flatten(0, 1)
            torch.manual_seed(self.seed)
            _, with_outputs = layer(*batch, keep_outputs=True)
        parameters = dict(layer.named_parameters())
        tested = losses.tested_terms({0: with_outputs}, {0: layer.router}, router, self.shape[0])
        tested_gradients = {name: losses.gradients(tested, name, parameters) for name in tested}
        (y * self.probe.to(y.dtype) * self.mask[:, None]).sum().backward()  # type: ignore[no-untyped-call]
        counter = LoadCounter.empty(router.num_experts)
        counter.add(routing)

        p = float64_copy(layer)
        x64 = self.x.double().requires_grad_()
        expected, oracle = moe_layer(
            p,
            "",
            x64,
            self.config,
            training=training,
            mask_T=self.mask,
            ids_T=self.ids,
            generator=torch.Generator().manual_seed(self.seed),
            tested=routing,
            slack=TOLERANCES[at.dtype].slack,
            sequence_length=self.shape[1],
        )
        oracle_terms = losses.oracle_terms({0: oracle}, router, self.shape[0])
        rows = [close(at, "output", {"y": y[self.mask]}, {"y": expected[self.mask]})]
        act = self.config.hidden_act
        of_losses = (
            at,
            tested,
            tested_gradients,
            oracle_terms,
            {name: p[name] for name in parameters},
            "",
            act,
            router,
        )
        rows += loss_rows(*of_losses, divisor=losses.divisor({0: oracle}, router))
        rows += routing_rows(at, [{0: routing}], [{0: oracle}], "router.")
        rows.append(exact(at, "expert counts", {"expert_counts": counter.counts}, {"expert_counts": oracle.counts()}))
        rows.append(exact(at, "dropped pairs", {"dropped": counter.dropped}, {"dropped": oracle.dropped()}))
        (expected * self.probe.double() * self.mask[:, None]).sum().backward()  # type: ignore[no-untyped-call]
        found = gradients(layer) | {"x": x.grad}
        right = {name: p[name].grad for name in parameters} | {"x": x64.grad}
        rows.append(gradient_row(at, found, right, self.config.hidden_act))
        return rows, ([{0: routing}], [{0: oracle}])
