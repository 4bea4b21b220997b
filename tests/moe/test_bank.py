"""Where experts' weights come from: banks that the library does not know, in its layer, model and `generate`."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from manyhands.checkpoint.model import save
from manyhands.config import AttentionConfig, ModelConfig, MoEConfig, RouterConfig, SamplingConfig
from manyhands.errors import ConfigError, ManyhandsError
from manyhands.generate.steps import generate
from manyhands.kernels import BACKENDS, Backend, ExpertWeights, backend_names, choose, register
from manyhands.kernels.eager import eager
from manyhands.models import Decoder, init_weights
from manyhands.moe import ExpertBank, Experts, MoELayer
from manyhands.moe.packed import RecordExperts
from manyhands.quant import pack_experts

from ..kernels.dense_oracle import Case, oracle

E, K, D, F = 5, 2, 16, 8
MOE = MoEConfig(router=RouterConfig(num_experts=E, num_experts_per_tok=K), moe_intermediate_size=F)
MODEL = ModelConfig(
    vocab_size=40,
    hidden_size=D,
    num_hidden_layers=2,
    max_position_embeddings=64,
    attention=AttentionConfig(num_attention_heads=2, head_dim=16),
    moe=MOE,
)


class Fetched(ExpertBank):
    """Weights made on demand: what a store or another machine would send."""

    num_experts, hidden_size, activation = E, D, "swiglu"

    def __init__(self, fetch: Callable[[int], ExpertWeights], implementation: str = "auto") -> None:
        super().__init__(implementation)
        self.fetch, self.fetched = fetch, []

    def stacked(self, ids: Sequence[int]) -> ExpertWeights:
        self.fetched.append(list(ids))
        up, down = (torch.cat(parts) for parts in zip(*(self.fetch(e)[:2] for e in ids), strict=True))
        return ExpertWeights(up, down, None, None, self.activation)


class Adapted(ExpertBank):
    """Another bank's weights, frozen, and a low-rank change to `down` of each expert (LoRA, arXiv 2106.09685)."""

    num_experts, hidden_size, activation = E, D, "swiglu"

    def __init__(self, base: ExpertBank, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.empty(E, rank, F))
        self.b = nn.Parameter(torch.empty(E, D, rank))
        self.reset_parameters()

    def reset_parameters(self, std=0.02, residual_std=None, generator=None) -> None:
        with torch.no_grad():
            self.a.normal_(0.0, std, generator=generator)
            self.b.zero_()

    def stacked(self, ids: Sequence[int]) -> ExpertWeights:
        weights = self.base.stacked(ids)
        return weights._replace(down=weights.down + self.b[list(ids)] @ self.a[list(ids)])


def stacked_experts(seed: int = 0) -> Experts:
    experts = Experts(MOE, D)
    experts.reset_parameters(0.3, generator=torch.Generator().manual_seed(seed))
    return experts


def fetched_from(experts: Experts, implementation: str = "auto") -> Fetched:
    weights = experts.weights()
    return Fetched(lambda e: weights.stacked([e]), implementation)


def dense(layer: MoELayer, x: Tensor, weights: ExpertWeights) -> Tensor:
    """The float64 oracle on what the layer's router chose."""
    routing = layer.router(x)
    wide = [None if t is None else t.detach().double() for t in weights[:4]]
    case = Case(x.double(), routing.expert_ids, routing.weights.double(), routing.kept, ExpertWeights(*wide, "swiglu"))
    return oracle(case).detach()


@pytest.mark.parametrize("name", ["auto", "eager", "grouped_mm"])
def test_weights_made_on_demand(name) -> None:
    experts = stacked_experts()
    bank = fetched_from(experts, name)
    layer = MoELayer(MOE, D, experts=bank)
    x = torch.randn(3, 4, D)
    y, routing = layer(x)
    expected = dense(layer, x.flatten(0, 1), experts.weights())
    torch.testing.assert_close(y.flatten(0, 1).double(), expected, atol=1e-5, rtol=1e-5)
    chosen = routing.expert_ids.unique().tolist()
    assert bank.fetched == ([chosen] if name == "grouped_mm" else [[e] for e in chosen])  # each once, no other
    kept = layer(x, keep_outputs=True)[1].expert_outputs
    torch.testing.assert_close((routing.weights[..., None] * kept).sum(1).view_as(y), y, atol=1e-5, rtol=1e-5)


def test_who_supports_a_bank_is_said_by_backends() -> None:
    experts = stacked_experts()
    bank, x = fetched_from(experts), torch.randn(4, D)
    routing = MoELayer(MOE, D).router(x)
    assert not BACKENDS["native"].supports(x, bank) and choose(x, bank) == "eager"
    if "native" in backend_names():
        with pytest.raises(ConfigError, match="Fetched makes them when asked: use 'eager' or 'auto'"):
            bank(x, routing, "native")
    with pytest.raises(ConfigError, match="did you mean 'eager'"):
        bank(x, routing, "eagre")
    with pytest.raises(ConfigError, match="the bank holds 5 of width 16, where the layer has 5 of width 32"):
        MoELayer(MOE, 32, experts=bank)


@pytest.mark.parametrize("packed", [False, True])
def test_an_adapter_is_trained(packed) -> None:
    experts = stacked_experts()
    base: ExpertBank = experts
    if packed:
        records = pack_experts(experts.weights(), "int8")
        base = RecordExperts(records.layout, E)
        base.records = records.records
    bank = Adapted(base)
    layer = MoELayer(MOE, D, experts=bank)
    x = torch.randn(40, D)
    before = layer(x)[0].detach()
    torch.testing.assert_close(before.double(), dense(layer, x, base.stacked(range(E))), atol=1e-5, rtol=1e-5)
    layer(x)[0].square().sum().backward()
    assert bank.b.grad is not None and bool((bank.b.grad.flatten(1).abs().amax(1) > 0).all())
    assert all(p.grad is None for p in base.parameters()) and layer.router.weight.grad is not None
    with torch.no_grad():
        bank.b -= 0.01 * bank.b.grad
    after = layer(x)[0].detach()
    assert after.square().sum() < before.square().sum()
    torch.testing.assert_close(after.double(), dense(layer, x, bank.stacked(range(E))), atol=1e-5, rtol=1e-5)


def decoder() -> Decoder:
    model = Decoder(MODEL).eval()
    init_weights(model, seed=0)
    return model


def answer(model: Decoder) -> list[list[int | None]]:
    greedy = SamplingConfig(max_new_tokens=5, temperature=0.0)
    return [step.token_ids for step in generate(model, torch.arange(6)[None], greedy)]


@pytest.mark.parametrize("adapted", [False, True])
def test_a_decoder_with_banks_generates_the_same(adapted, tmp_path) -> None:
    plain, model = decoder(), decoder()
    for block in model.layers:
        block.mlp.experts = Adapted(block.mlp.experts) if adapted else fetched_from(block.mlp.experts)
    ids = torch.arange(12)[None]
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, atol=1e-5, rtol=1e-5)
    assert answer(model) == answer(plain)
    if not adapted:
        assert all(block.mlp.experts.fetched for block in model.layers)
    else:
        model.train()
        model(ids).logits.square().sum().backward()
        assert all(bool(block.mlp.experts.b.grad.any()) for block in model.layers)
    with pytest.raises(ManyhandsError, match=r"experts\.gate_up_proj is not in the model"):
        save(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_an_adapter_keeps_its_state() -> None:
    bank, other = Adapted(stacked_experts()), Adapted(stacked_experts(1))
    assert set(bank.state_dict()) == {"a", "b", "base.gate_up_proj", "base.down_proj"}
    other.load_state_dict(bank.state_dict())
    x = torch.randn(6, D)
    routing = MoELayer(MOE, D).router(x)
    assert torch.equal(bank(x, routing), other(x, routing))


def test_one_unpacks_one_expert_at_a_time(monkeypatch) -> None:
    records = pack_experts(stacked_experts().weights(), "bf16")
    bank = RecordExperts(records.layout, E, "eager")
    bank.records = records.records
    asked, real = [], RecordExperts.stacked
    monkeypatch.setattr(RecordExperts, "stacked", lambda self, ids: (asked.append(list(ids)), real(self, ids))[1])
    x = torch.randn(3, D)
    routing = MoELayer(MOE, D).router(x)
    bank(x, routing)
    assert asked == [[e] for e in routing.expert_ids.unique().tolist()]


def test_a_backend_of_ones_own(monkeypatch) -> None:
    calls = []

    def counted(x, ids, weights, kept, experts):
        calls.append(type(experts).__name__)
        return eager(x, ids, weights, kept, experts)

    with pytest.raises(ConfigError, match="one of this name already"):
        register(Backend("eager", lambda x, experts: True, eager))
    monkeypatch.setitem(BACKENDS, "counted", BACKENDS["eager"])
    monkeypatch.delitem(BACKENDS, "counted")  # undone at the end, whatever is registered in between
    register(Backend("counted", lambda x, experts: True, counted))
    experts, x = stacked_experts(), torch.randn(4, D)
    layer = MoELayer(MOE, D, "counted", experts=None)
    layer(x)
    bank = fetched_from(experts, "counted")
    MoELayer(MOE, D, experts=bank)(x)
    assert calls == ["Experts", "Fetched"] and choose(x, experts.weights()) != "counted"
