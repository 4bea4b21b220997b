"""A router score: √softplus(z), between a sigmoid's safety and an unbounded score."""

from .recipe import Edit, Recipe

CHECK = '''
import torch
import torch.nn.functional as F
import manyhands as mh
from manyhands.check.routers import RouterCheck

NAME = "sqrt_softplus"
D, E, K = 32, 8, 2
torch.manual_seed(0)
router = mh.RouterConfig(num_experts=E, num_experts_per_tok=K, score=NAME)
config = mh.MoEConfig(router=router, moe_intermediate_size=16)
layer = mh.MoELayer(config, D).eval()
weights = {name: p.detach().double() for name, p in layer.named_parameters()}


def reference(x):
    """The layer in float64: every expert for every token."""
    z = x.double() @ weights["router.weight"].T
    s = torch.log1p(z.exp()).sqrt()
    kth = s.sort(dim=1, descending=True).values[:, K - 1 : K]
    w = torch.where(s >= kth, s, 0.0)
    w = w / w.sum(1, keepdim=True)
    gate, up = torch.einsum("td,efd->tef", x.double(), weights["experts.gate_up_proj"]).chunk(2, -1)
    out = torch.einsum("tef,edf->ted", F.silu(gate) * up, weights["experts.down_proj"])
    return s, (w[..., None] * out).sum(1)


for T in (1, 16, 17, 5000):
    x = torch.randn(T, D)
    s, y = reference(x)
    for context in (torch.inference_mode, torch.enable_grad):  # as in decoding, and as in training
        with context():
            found, routing = layer(x)
        torch.testing.assert_close(routing.scores.double(), s, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.double(), y, rtol=1e-4, atol=1e-6 * float(y.abs().max()) + 1e-7)

model = mh.Decoder(mh.ModelConfig(vocab_size=50, hidden_size=64, num_hidden_layers=2, moe=config)).eval()
mh.init_weights(model, seed=1)
engine = mh.Engine(model)
request = engine.add([1, 2, 3], mh.SamplingConfig(temperature=0, max_new_tokens=6))
tokens = []
while engine.busy:
    for token in engine.step():
        tokens.append(token.token_id)
        for routing in token.routings.values():
            softplus = torch.log1p(routing.logits.double().exp())
            torch.testing.assert_close(routing.scores.double(), softplus.sqrt(), rtol=1e-5, atol=1e-6)
with torch.inference_mode():
    whole = model(torch.tensor([[1, 2, 3, *tokens]]))
assert tokens == whole.logits[0, 2:-1].argmax(-1).tolist()

rows = [row for found, _ in RouterCheck(f"score {NAME}", "random", 0).rows("auto", "float32") for row in found]
assert len(rows) > 15 and all(row.ok for row in rows), [row for row in rows if not row.ok]
'''

RECIPE = Recipe(
    "Add a router score",
    (
        Edit("manyhands/config/router.py", ', "sqrt_softplus"', after='score: Literal["softmax", "sigmoid"'),
        Edit(
            "manyhands/moe/router.py",
            '    "sqrt_softplus": lambda logits_TE: F.softplus(logits_TE).sqrt(),\n',
            after='    "sigmoid": lambda logits_TE: logits_TE.sigmoid(),\n',
        ),
        Edit(
            "manyhands/check/oracle_routing.py",
            '    "sqrt_softplus": lambda logits: (1.0 + logits.exp()).log().sqrt(),\n',
            after='    "sigmoid": lambda logits: 1.0 / (1.0 + (-logits).exp()),\n',
        ),
    ),
    CHECK,
)
