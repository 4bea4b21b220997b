"""GShard's own dispatch (arXiv 2006.16668, algorithm 2): tensors [G, S, E, C] and two einsums. A contrast, and slow.

G groups, S tokens of a group, E experts, C places of an expert in a group, K experts per token, M model width.
"""

import torch
from torch import Tensor

from manyhands.errors import ConfigError
from manyhands.kernels.experts import activate
from manyhands.moe import MoELayer, Routing


def dispatch_and_combine(routing: Routing, group: int, places: int) -> tuple[Tensor, Tensor]:
    """[G, S, E, C]: 1 where a token has a place with an expert, and the weight of the pair.

    All first choices are seated before all second ones, earlier tokens before later ones; who finds no place is not
    seated. What the routing itself dropped is not looked at: this counts for itself.
    """
    T, K = routing.expert_ids.shape
    E, G = routing.num_experts, T // group
    wanted_TK = (routing.expert_ids >= 0) & routing.token_mask[:, None]
    dispatch, combine = torch.zeros(2, G, group, E, places)
    taken_GE = torch.zeros(G, E, dtype=torch.int64)
    for k in range(K):
        ids_GS = routing.expert_ids[:, k].view(G, group)
        mask_GSE = torch.nn.functional.one_hot(ids_GS.clamp(min=0), E) * wanted_TK[:, k].view(G, group, 1)
        place_GSE = mask_GSE.cumsum(1) - mask_GSE + taken_GE[:, None]
        taken_GE = taken_GE + mask_GSE.sum(1)
        seated = (mask_GSE > 0) & (place_GSE < places)
        here = torch.nn.functional.one_hot(place_GSE.clamp(max=places - 1), places) * seated[..., None]
        dispatch = dispatch + here
        combine = combine + here * routing.weights[:, k].view(G, group, 1, 1)
    return dispatch, combine


def einsum_layer(layer: MoELayer, x_TM: Tensor, routing: Routing, group: int, places: int) -> Tensor:
    """[T, M]: the routed part of the layer for T tokens, by GSEC,GSM→EGCM, the experts, GSEC,EGCM→GSM.

    Raises `ConfigError` for tokens that do not fill whole groups.
    """
    if len(x_TM) % group:
        raise ConfigError(f"{len(x_TM)} tokens are no whole number of groups of {group}")
    dispatch, combine = dispatch_and_combine(routing, group, places)
    bank = layer.experts.stacked(range(routing.num_experts))
    sent_EGCM = torch.einsum("gsec,gsm->egcm", dispatch, x_TM.view(len(dispatch), group, -1))
    hidden = torch.einsum("egcm,ehm->egch", sent_EGCM, bank.up)
    done_EGCM = torch.einsum("egch,emh->egcm", activate(hidden, bank.activation), bank.down)
    return torch.einsum("gsec,egcm->gsm", combine, done_EGCM).flatten(0, 1)
