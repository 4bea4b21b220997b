"""A router that computes in bfloat16, to show why ours does not. Nothing but an experiment makes one.

T tokens, D model width, E experts, K experts per token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from manyhands.config import RouterConfig
from manyhands.errors import ConfigError
from manyhands.models import AnyModel
from manyhands.moe import Router, Routing
from manyhands.moe.edit import Edit
from manyhands.moe.router import score, weigh

_COVERED = frozenset({"num_experts", "num_experts_per_tok", "score", "norm_topk_prob", "norm_top1", "init"})


class RoundedRouter(Router):
    """The router of `router`'s weights, which stay float32: input, logits, scores and weights are bfloat16.

    What Switch calls bfloat16 training rounds all of the model; this rounds the router alone. Plain top-k only: raises
    `ConfigError` for another field of `RouterConfig` that is not its default.
    """

    def __init__(self, router: Router) -> None:
        config, plain = router.config, RouterConfig()
        for name in set(RouterConfig.model_fields) - _COVERED:
            if getattr(config, name) != getattr(plain, name):
                raise ConfigError(f"{name} = {getattr(config, name)!r}: the bfloat16 router is for plain top-k alone")
        super().__init__(config, router.weight.shape[1])
        self.weight = router.weight  # the same parameter: its optimiser goes on

    def forward(
        self,
        x_TD: Tensor,
        token_mask_T: Tensor | None = None,
        token_ids_T: Tensor | None = None,
        edit: Edit | None = None,
        sequence_length: int | None = None,
    ) -> Routing:
        """Route tokens [T, D]; what is returned is float32 that bfloat16 holds."""
        if edit is not None:
            raise ConfigError("the bfloat16 router follows no edit")
        if token_mask_T is None:
            token_mask_T = torch.ones(x_TD.shape[0], dtype=torch.bool, device=x_TD.device)
        logits_TE = F.linear(x_TD.bfloat16(), self.weight.bfloat16())
        scores_TE = score(logits_TE, self.config)
        ids_TK = self.select(scores_TE)
        weights_TK = weigh(scores_TE, ids_TK, self.config)
        kept_TK = torch.ones_like(ids_TK, dtype=torch.bool)
        return Routing(ids_TK, weights_TK.float(), scores_TE.float(), logits_TE.float(), kept_TK, token_mask_T)


def round_routers(model: AnyModel) -> None:
    """Every router of `model` computes in bfloat16 from here on. Twice is once."""
    for mlp in model.sparse_layers().values():
        if not isinstance(mlp.router, RoundedRouter):
            mlp.router = RoundedRouter(mlp.router)
