"""Weights and batches that bring about the routing cases a check must cover.

random      everything random; the correction bias is random and negative, which changes no choice in correct code
tied        half of the experts share one logit and half another, exactly, in every dtype: the lower index must win
one_expert  every token chooses the same K experts, all others are empty
empty       some experts are chosen by nobody
padding     random, ragged on both sides, one sequence all padding

B batch, S sequence, T = B·S tokens, D width, E experts.
"""

import torch
from torch import Tensor, nn

from manyhands.config import RouterConfig
from manyhands.layers.relative_attention import RelativeAttention
from manyhands.moe import MoELayer, Router

CASES = ("random", "tied", "one_expert", "empty", "padding")
SHARED = 1.5  # in `one_expert` and `empty`, tokens have this much of one direction, in units of the rest
PUSH = 3.0  # and routers this much of it: p ≈ 0.7 at best, so that gradients do not vanish


def possible(case: str, router: RouterConfig | None) -> bool:
    """Whether a router of this kind can come into the case."""
    if router is None:
        return case in ("random", "padding")
    if router.select == "soft":
        return case in ("random", "padding")
    if case in ("one_expert", "empty"):
        return router.select != "expert_choice" and router.num_experts > router.num_experts_per_tok
    return case != "tied" or router.select != "hash"


def direction(width: int, generator: torch.Generator) -> Tensor:
    """[D] of ±1."""
    return (torch.rand(width, generator=generator) < 0.5).float() * 2.0 - 1.0


def tokens(num: int, width: int, case: str, generator: torch.Generator) -> Tensor:
    """[T, D] of size about 1; in `one_expert` and `empty` most of it is the shared direction."""
    along = direction(width, generator)
    x = torch.randn(num, width, generator=generator)
    return (x + SHARED * along) / (1 + SHARED**2) ** 0.5 if case in ("one_expert", "empty") else x


def token_ids(shape: tuple[int, int], vocab_size: int, case: str, hashed: bool, generator: torch.Generator) -> Tensor:
    """[B, S] int64. Where experts go by token id, one or two ids make one or two experts."""
    kinds = {"one_expert": 1, "empty": 2}.get(case, vocab_size) if hashed else vocab_size
    return torch.randint(min(kinds, vocab_size), shape, generator=generator)


def padding_mask(shape: tuple[int, int]) -> Tensor:
    """[B, S] bool: full, padded on the right, padded on the left, nothing but padding, and again."""
    B, S = shape
    mask = torch.ones(B, S, dtype=torch.bool)
    mask[1::4, S - S // 3 :] = False
    mask[2::4, : S // 4] = False
    mask[3::4] = False
    return mask


@torch.no_grad()
def fill(module: nn.Module, case: str, generator: torch.Generator) -> None:
    """Give every parameter and bias a size at which each of them matters, then arrange the routers for the case."""
    width = next(m.weight.shape[1] for m in module.modules() if isinstance(m, Router)) if _has_router(module) else 1
    along = direction(width, generator)
    parameters = dict(module.named_parameters())
    for name, p in parameters.items():
        p.normal_(generator=generator)
        if name.endswith("norm.weight"):
            p.mul_(0.1).add_(1.0)
        elif name.endswith("bias"):
            p.mul_(0.1)
        elif name.endswith("embed_tokens.weight"):
            p.add_(SHARED * along if case in ("one_expert", "empty") else 0.0)
        else:
            p.mul_(p.shape[-1] ** -0.5)
    for part in module.modules():
        if isinstance(part, RelativeAttention):  # which divides by nothing
            part.q_proj.weight.mul_(part.head_dim**-0.5)
    if "embed_tokens.weight" in parameters and "lm_head.weight" not in parameters:
        # A tied head: keep the logits small, and free of the direction that all embeddings share.
        stacks = "decoder.norm.weight" in parameters  # whose model scales the states itself
        last = "decoder.norm.weight" if stacks else "norm.weight"
        final = parameters.get(last, parameters["embed_tokens.weight"])  # a recurrent model has no norm
        final.mul_((1.0 if stacks else width**-0.5) * (1.0 - 2.0 * (torch.arange(final.shape[-1]) % 2)))
    for part in module.modules():
        if isinstance(part, Router):
            _arrange(part, case, along, generator)
        if isinstance(part, MoELayer) and part.average_outputs is not None:
            part.average_outputs.normal_(generator=generator)


def _has_router(module: nn.Module) -> bool:
    return any(isinstance(m, Router) for m in module.modules())


def _arrange(router: Router, case: str, along: Tensor, generator: torch.Generator) -> None:
    w, c = router.weight, router.config
    E, K, D = c.num_experts, c.num_experts_per_tok, w.shape[1]
    steered = case in ("one_expert", "empty")
    w.mul_(0.3 if steered else 1.5)
    if router.slot_scale is not None:
        router.slot_scale.fill_(3.0)
    if case == "tied":  # one entry per row: the logit is exact however the product is summed
        w.zero_()
        w[torch.arange(E), torch.arange(E) % min(2, D)] = 2.0
    if case == "one_expert":
        w[E - K :] += PUSH * along / D
        w[: E - K] -= PUSH * along / D if c.select == "positive" else 0.0  # they would be above 0
    if case == "empty":
        size = E // c.n_group
        none = size if c.topk_group < c.n_group else max(1, min(E // 4, E - K))
        w[:none] -= PUSH * along / D
    if router.group_weight is not None:
        G, P = c.n_group, c.topk_group
        router.group_weight.mul_(0.3 if steered else 1.5)
        if case == "tied":
            router.group_weight.zero_()
            router.group_weight[torch.arange(G), torch.arange(G) % min(2, D)] = 2.0
        if case == "one_expert":  # of each of the groups that are chosen as many as are
            router.group_weight[G - P :] += PUSH * along / D
            w[E - K :] -= PUSH * along / D
            w.view(G, E // G, D)[G - P :, E // G - K // P :] += PUSH * along / D
        if case == "empty":
            router.group_weight[: G - P] -= PUSH * along / D
    if router.group_noise_weight is not None:
        router.group_noise_weight.mul_(0.3).sub_(PUSH * along / D if steered else 0.0)
    if router.noise_weight is not None:
        router.noise_weight.mul_(0.3).sub_(PUSH * along / D if steered else 0.0)
    if router.l1_steps is not None:
        router.l1_steps.fill_(3.0)
    if (bias := router.e_score_correction_bias) is not None:
        spread = {"tied": 0.0, "one_expert": 0.01, "empty": 0.01}.get(case, 0.1)
        bias.copy_(torch.randn(E, generator=generator) * spread - 1.0)
