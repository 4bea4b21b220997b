"""The router: `score → select → weigh`, described by a `RouterConfig`, float32 whatever the model's dtype.

T tokens, D model width, E experts, K experts per token, G groups.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyhands.config import RouterConfig, suggest
from manyhands.config.decoder import INITIALIZER_RANGE
from manyhands.errors import ConfigError
from manyhands.moe.assign import ASSIGNMENTS
from manyhands.moe.capacity import apply_capacity
from manyhands.moe.edit import Edit, Force, Replay, check_edit, masked, reroute
from manyhands.moe.hierarchy import choose_groups, choose_within, joint_scores
from manyhands.moe.routing import Routing, top_k_stable
from manyhands.moe.select import expert_choice, hash_experts, limit_to_groups, positive, sample_second
from manyhands.moe.sparsemixer import sparsemixer

NOISE_EPSILON = 1e-2  # Shazeer et al. 2017: the noise never vanishes
LEAST_LOGIT = -80.0  # below it softplus is 0 in float32, and its root has no gradient
SWITCH_SCALE = 0.1  # Fedus et al. 2021, table 3: a tenth of the usual variance keeps a sparse model stable


class Router(nn.Module):
    """Chooses K of E experts for every token. Returns a `Routing`; keeps no state but its parameters.

    `e_score_correction_bias` [E] (when `config.bias`) steers selection only and is moved by the balance
    controller, never by a gradient; so is `l1_steps` [], how often ReMoE's penalty was raised more than lowered.
    `.to(bfloat16)` leaves everything in here float32. Fresh weights follow `config.init`; see `reset_parameters`.
    """

    weight: nn.Parameter
    e_score_correction_bias: Tensor | None
    l1_steps: Tensor | None

    def __init__(self, config: RouterConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        E = config.num_experts
        rows = E * config.slots_per_expert
        self.weight = nn.Parameter(torch.empty(rows, hidden_size, dtype=torch.float32))
        soft = config.select == "soft"
        self.slot_scale = nn.Parameter(torch.ones(1, dtype=torch.float32)) if soft else None
        self.bias = nn.Parameter(torch.empty(E, dtype=torch.float32)) if config.logit_bias else None
        self.noise_weight = nn.Parameter(torch.empty(E, hidden_size, dtype=torch.float32)) if config.noisy else None
        G = config.n_group if config.select == "hierarchical" else 0
        self.group_weight = nn.Parameter(torch.empty(G, hidden_size, dtype=torch.float32)) if G else None
        noisy = G and config.noisy
        self.group_noise_weight = nn.Parameter(torch.empty(G, hidden_size, dtype=torch.float32)) if noisy else None
        bias = torch.zeros(E, dtype=torch.float32) if config.bias else None
        self.register_buffer("e_score_correction_bias", bias)
        steps = torch.zeros((), dtype=torch.float32) if config.select == "positive" else None
        self.register_buffer("l1_steps", steps)
        self.reset_parameters()

    def reset_parameters(self, std: float = INITIALIZER_RANGE, generator: torch.Generator | None = None) -> None:
        """Fresh weights as `config.init` says; biases and the noise's weights are 0.

        `normal`: N(0, std²), std 0.02 as in GPT-2; `zeros` (Shazeer et al. 2017); `switch`: a normal with
        σ = √(0.1 / hidden_size), cut at 2σ (Fedus et al. 2021).
        """
        with torch.no_grad():
            for weight in (self.weight, self.group_weight):
                if weight is None:
                    continue
                if self.config.init == "zeros":
                    weight.zero_()
                elif self.config.init == "switch":
                    sigma = math.sqrt(SWITCH_SCALE / weight.shape[1])
                    drawn = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)  # whole, if sharded
                    weight.copy_(nn.init.trunc_normal_(drawn, 0.0, sigma, -2 * sigma, 2 * sigma, generator=generator))
                else:
                    weight.normal_(0.0, std, generator=generator)
            biases = self.bias, self.e_score_correction_bias, self.l1_steps
            for zero in (*biases, self.noise_weight, self.group_noise_weight):
                if zero is not None:
                    zero.zero_()
            if self.slot_scale is not None:
                self.slot_scale.fill_(1.0)

    def forward(
        self,
        x_TD: Tensor,
        token_mask_T: Tensor | None = None,
        token_ids_T: Tensor | None = None,
        edit: Edit | None = None,
        sequence_length: int | None = None,
    ) -> Routing:
        """Route tokens [T, D]. `token_mask_T` is false for padding; `token_ids_T` is needed by hash routing;
        `sequence_length` says where sequences begin, for a capacity per sequence (None: all tokens are one).

        `edit` says who goes where in the router's place, or which experts are off; its weights carry gradient.
        """
        config, K = self.config, self.config.num_experts_per_tok
        if config.select == "soft":
            raise ConfigError("select = 'soft' mixes tokens and sends none anywhere: call the layer, not its router")
        if edit is not None:
            check_edit(edit, config)
        if token_mask_T is None:
            token_mask_T = torch.ones(x_TD.shape[0], dtype=torch.bool, device=x_TD.device)
        elif token_mask_T.dtype != torch.bool or token_mask_T.shape != x_TD.shape[:1]:
            found = f"{list(token_mask_T.shape)} {str(token_mask_T.dtype).removeprefix('torch.')}"
            raise ConfigError(f"token_mask is {found}, not [{x_TD.shape[0]}] bool: true for a real token")
        x_TD = x_TD.float()
        if self.training and config.jitter:  # on a copy: the experts must see the token as it is
            x_TD = x_TD * torch.empty_like(x_TD).uniform_(1.0 - config.jitter, 1.0 + config.jitter)
        logits_TE = linear_float32(x_TD, self.weight, self.bias)
        off_E = masked(edit, config.num_experts, x_TD.device)
        if off_E is not None:
            logits_TE = logits_TE.masked_fill(off_E, float("-inf"))

        groups = self._groups(x_TD, token_mask_T)
        noisy_TE, std_TE = self._noise(x_TD, logits_TE, self.noise_weight)
        used_TE = logits_TE if noisy_TE is None else noisy_TE
        used_scores_TE = score(used_TE, config)
        scores_TE = used_scores_TE if noisy_TE is None else score(logits_TE, config)

        if config.select == "hash":
            ids_TK = hash_experts(token_ids_T, config.num_experts)
            weights_TK = torch.full_like(ids_TK, config.routed_scaling_factor, dtype=torch.float32)
            kept_TK = torch.ones_like(ids_TK, dtype=torch.bool)
        elif config.select == "expert_choice":
            ids_TK, kept_TK = expert_choice(scores_TE, token_mask_T, K)
            weights_TK = scores_TE * config.routed_scaling_factor
        elif groups is not None:
            scores_TE = joint_scores(groups, logits_TE)
            ids_TK, weights_TK = choose_within(groups, used_TE, config)
            kept_TK = torch.ones_like(ids_TK, dtype=torch.bool)
        elif config.select == "positive":
            ids_TK, weights_TK = positive(scores_TE)
            weights_TK, kept_TK = weights_TK * config.routed_scaling_factor, ids_TK >= 0
        elif config.select == "sparsemixer":
            ids_TK, weights_TK = sparsemixer(logits_TE, config.mixer_epsilon, self.training)
            weights_TK, kept_TK = weights_TK * config.routed_scaling_factor, torch.ones_like(ids_TK, dtype=torch.bool)
        elif self.training and config.select in ASSIGNMENTS:
            ids_TK = ASSIGNMENTS[config.select](logits_TE, token_mask_T, K)
            weights_TK, kept_TK = weigh(scores_TE, ids_TK, config), torch.ones_like(ids_TK, dtype=torch.bool)
        else:
            choice_TE = logits_TE if config.bias_on == "logit" else used_scores_TE
            ids_TK, given_TK = self.select(choice_TE, *(() if off_E is None else (off_E,))), None
            if edit is None:
                weights_TK = weigh(used_scores_TE, ids_TK, config)
            else:
                ids_TK, weights_TK, given_TK = reroute(edit, ids_TK, used_scores_TE, partial(weigh, config=config))
            if self.training and config.random_second and not isinstance(edit, Routing | Replay | Force):
                ids_TK = sample_second(ids_TK, weights_TK / config.routed_scaling_factor)
            kept_TK = ids_TK >= 0 if given_TK is None else (ids_TK >= 0) & given_TK

        if config.limited(self.training) and getattr(edit, "kept", None) is None:
            factor = config.capacity_factor if self.training else config.eval_capacity_factor
            kept_TK = apply_capacity(ids_TK, weights_TK, kept_TK, token_mask_T, config, factor, sequence_length)
        return Routing(
            ids_TK,
            weights_TK,
            scores_TE,
            logits_TE,
            kept_TK,
            token_mask_T,
            noisy_logits=noisy_TE,
            noise_std=std_TE,
            groups=groups,
        )

    if TYPE_CHECKING:
        __call__ = forward  # so that calls are typed

    def extra_repr(self) -> str:
        """E, K, D, and how it chooses."""
        c = self.config
        sizes = f"num_experts={c.num_experts}, num_experts_per_tok={c.num_experts_per_tok}"
        return f"{sizes}, hidden_size={self.weight.shape[-1]}, score={c.score}, select={c.select}"

    def select(self, scores_TE: Tensor, off_E: Tensor | None = None) -> Tensor:
        """[T, K] expert numbers: top-k of score + bias, within the best groups. No gradient flows through it.

        With `bias_on = "logit"` it is given logits in the scores' place. Never one that is off: a sigmoid's 0 and a
        bias could be more than another's score.
        """
        config = self.config
        choice_TE = scores_TE.detach()
        if self.e_score_correction_bias is not None:
            choice_TE = choice_TE + self.e_score_correction_bias
        if off_E is not None:
            choice_TE = choice_TE.masked_fill(off_E, float("-inf"))
        if config.n_group > 1:
            choice_TE = limit_to_groups(choice_TE, config)
        return top_k_stable(choice_TE, config.num_experts_per_tok)

    def _groups(self, x_TD: Tensor, token_mask_T: Tensor) -> Routing | None:
        """The first level of a hierarchical gate."""
        if self.group_weight is None:
            return None
        logits_TG = linear_float32(x_TD, self.group_weight)
        return choose_groups(
            logits_TG, *self._noise(x_TD, logits_TG, self.group_noise_weight), token_mask_T, self.config
        )

    def _noise(self, x_TD: Tensor, logits_TE: Tensor, weight_ED: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Shazeer's H = logits + N(0,1)·(softplus(x·W_noise) + ε) and the noise's deviation, while training only."""
        if weight_ED is None or not self.training:
            return None, None
        std_TE = F.softplus(linear_float32(x_TD, weight_ED)) + NOISE_EPSILON
        return logits_TE + torch.randn_like(logits_TE) * std_TE, std_TE

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        """Device moves pass through; dtype changes do not: rounding the bias to bf16 merges distinct values."""

        def keep_dtype(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        return self


def linear_float32(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """x·Wᵀ + b [T, E] in float32, also inside somebody's `torch.autocast`."""
    if x_TD.device.type == "meta":  # which autocast does not know
        return F.linear(x_TD, weight_ED, bias_E)
    with torch.autocast(x_TD.device.type, enabled=False):
        return F.linear(x_TD, weight_ED, bias_E)


SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits_TE: logits_TE.softmax(-1),
    "sigmoid": lambda logits_TE: logits_TE.sigmoid(),
    "sqrtsoftplus": lambda logits_TE: F.softplus(logits_TE.clamp(min=LEAST_LOGIT)).sqrt(),
    "relu": lambda logits_TE: logits_TE.relu(),
}
"""Every `RouterConfig.score`. The oracle has a table of its own, `check/oracle_routing.py`."""


def score(logits_TE: Tensor, config: RouterConfig) -> Tensor:
    """[T, E] float32: what the experts are chosen and weighed by. Raises `ConfigError` for a score nobody wrote."""
    if config.score not in SCORES:
        raise ConfigError(f"score = {config.score!r}: there is no such score; " + suggest(config.score, list(SCORES)))
    return SCORES[config.score](logits_TE)


def weigh(scores_TE: Tensor, ids_TK: Tensor, config: RouterConfig) -> Tensor:
    """[T, K] float32: the unbiased scores of the chosen experts, renormalised if asked, scaled."""
    weights_TK = scores_TE.gather(1, ids_TK)
    if config.renormalises:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    return weights_TK * config.routed_scaling_factor
