"""Soft MoE (arXiv 2308.00951): no token is sent anywhere; experts work on slots, which are weighted means of tokens.

A slot is made of all tokens of a sequence, and a token's output of all slots: nothing is dropped, nothing is balanced,
and a token sees later ones. B sequences, S tokens, E experts, P slots per expert, N = E·P slots, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from manyhands.moe.bank import ExpertBank
from manyhands.moe.router import Router, linear_float32
from manyhands.moe.routing import Routing


def soft(
    router: Router, experts: ExpertBank, x_BSD: Tensor, mask_BS: Tensor | None, keep_outputs: bool
) -> tuple[Tensor, Routing]:
    """y [B, S, D] in x's dtype, and a routing in which every token goes to every expert.

    Its weights [T, E] are what each expert's slots weigh together, in order of the experts; `expert_outputs` [T, E, D],
    where they are kept, are what they say together. Padding is in no slot.
    """
    (B, S, D), E = x_BSD.shape, router.config.num_experts
    P = router.config.slots_per_expert
    assert router.slot_scale is not None
    x = x_BSD.float()
    directions = F.normalize(router.weight, dim=1) * router.slot_scale
    logits_BSN = linear_float32(F.normalize(x, dim=-1).flatten(0, 1), directions).view(B, S, E * P)
    into_BSN = logits_BSN
    if mask_BS is not None:
        into_BSN = logits_BSN.masked_fill(~mask_BS[..., None], torch.finfo(torch.float32).min)
    slots_ND = torch.einsum("bsn,bsd->bnd", into_BSN.softmax(1), x).flatten(0, 1).to(x_BSD.dtype)
    ids_N1 = torch.arange(E, device=x.device).repeat_interleave(P).repeat(B)[:, None]
    ones_N1, blank = torch.ones_like(ids_N1, dtype=torch.float32), ids_N1.new_zeros((), dtype=torch.float32)
    nothing_NE, every_N1 = blank.expand(len(ids_N1), E), torch.ones_like(ids_N1, dtype=torch.bool)
    to_slots = Routing(ids_N1, ones_N1, nothing_NE, nothing_NE, every_N1, every_N1[:, 0])
    said_BND = experts(slots_ND, to_slots).view(B, E * P, D).float()

    combine_BSN = logits_BSN.softmax(-1)
    y_BSD = torch.einsum("bsn,bnd->bsd", combine_BSN, said_BND).to(x_BSD.dtype)
    weights_TE = combine_BSN.view(-1, E, P).sum(-1)
    every_TE = torch.arange(E, device=x.device).expand(B * S, E)
    kept_TE = torch.ones_like(every_TE, dtype=torch.bool)
    logits_TE = logits_BSN.view(-1, E, P).logsumexp(-1)
    mask_T = torch.ones_like(kept_TE[:, 0]) if mask_BS is None else mask_BS.flatten()
    outputs = None
    if keep_outputs:
        shares_BSEP = logits_BSN.view(B, S, E, P).softmax(-1)
        outputs = torch.einsum("bsep,bepd->bsed", shares_BSEP, said_BND.view(B, E, P, D)).flatten(0, 1)
    scale = router.config.routed_scaling_factor
    routing = Routing(every_TE, weights_TE * scale, weights_TE, logits_TE, kept_TE, mask_T, expert_outputs=outputs)
    return y_BSD * scale, routing
