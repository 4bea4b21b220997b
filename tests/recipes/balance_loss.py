"""A balance loss: the entropy of a token's scores, kept from falling. `check` must compare it."""

from .recipe import Edit, Recipe

CHECK = """
import torch
import manyhands as mh
from manyhands.check import oracle_balance
from manyhands.check.routers import RouterCheck

NAME = "softmax top-2, renormalised (Mixtral)"


def rows():
    return [row for found, _ in RouterCheck(NAME, "random", 0).rows("eager", "float32") for row in found]


found = rows()
assert {"entropy value", "entropy gradient"} <= {row.quantity for row in found}
assert all(row.ok for row in found), [row for row in found if not row.ok]

moe = mh.MoELayer(mh.MoEConfig(), 16)
_, routing = moe(torch.randn(7, 16))
total, terms = mh.balance_objective({0: routing}, mh.BalanceConfig(aux_loss_coef=0, entropy_coef=0.5), 1)
torch.testing.assert_close(total.detach(), 0.5 * terms["entropy"])

# What if the oracle's line is forgotten? Red, and named.
whole = oracle_balance.terms
oracle_balance.terms = lambda *a: {name: value for name, value in whole(*a).items() if name != "entropy"}
assert [row.quantity for row in rows() if not row.ok] == ["entropy value"]
"""

RECIPE = Recipe(
    "Add a balance loss",
    (
        Edit("manyhands/config/run.py", "    entropy_coef: Rate = 0.0\n", after="    z_loss_coef: Rate = 0.0\n"),
        Edit(
            "manyhands/moe/balance.py",
            '''

def entropy_loss(routing: Routing, ranks: Ranks = ALONE) -> Tensor:
    """−mean_t H(p_t), p the scores that sum to 1 per token: rewards routers that are not sure of themselves."""
    p_TE = _normalised(routing.scores)
    return masked_mean((p_TE * p_TE.clamp(min=1e-20).log()).sum(-1), routing.token_mask, ranks)
''',
        ),
        Edit(
            "manyhands/moe/objective.py",
            """    if config.entropy_coef:
        terms["entropy"] = balance.entropy_loss(routing, ranks)
""",
            after="""        terms["z_loss"] = balance.z_loss(routing, ranks=ranks)
""",
        ),
        Edit(
            "manyhands/check/oracle_balance.py",
            """    if config.entropy_coef:
        p = r.scores / r.scores.sum(1, keepdim=True)
        found["entropy"] = _mean((p * p.log()).sum(1), r.mask)
""",
            after="""        found["z_loss"] = _mean(r.logits.exp().sum(1).log() ** 2, r.mask)
""",
        ),
    ),
    CHECK,
)
