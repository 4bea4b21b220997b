"""The encoder-decoder: its sizes, its cache, its padding, its gradients, and what it refuses."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from manyhands.config import EncoderDecoderConfig, RouterConfig
from manyhands.errors import ConfigError
from manyhands.layers.relative_attention import buckets
from manyhands.models import EncoderDecoder, init_weights
from manyhands.moe import Mask, Router
from manyhands.plan.count_kind import count_any, router_flops, sequence_flops

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "head_dim": 8,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_decoder_layers": 2,
}
TOP1 = RouterConfig(num_experts=5, num_experts_per_tok=1)
SWITCH = EncoderDecoderConfig(**SIZES, router=TOP1, num_sparse_encoder_layers=2, num_sparse_decoder_layers=1)
SEPARATE = SWITCH.model_copy(update={"tie_word_embeddings": False, "share_embeddings": False})
T5_V1_1 = EncoderDecoderConfig(**SIZES, hidden_act="geglu_tanh", tie_word_embeddings=False)
ST_MOE = EncoderDecoderConfig(
    **SIZES,
    hidden_act="geglu_tanh",
    router=RouterConfig(num_experts=4, num_experts_per_tok=2),
    num_sparse_encoder_layers=1,
    num_sparse_decoder_layers=1,
    extra_encoder_networks=1,
    extra_decoder_networks=1,
)
EVERY = {"switch": SWITCH, "separate tables": SEPARATE, "t5 1.1": T5_V1_1, "st-moe": ST_MOE}
every = pytest.mark.parametrize("config", EVERY.values(), ids=EVERY)


def made(config: EncoderDecoderConfig, seed: int = 0) -> EncoderDecoder:
    model = EncoderDecoder(config)
    init_weights(model, seed)
    return model.eval()


def ids(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(2, 61, shape, generator=torch.Generator().manual_seed(seed))


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [3, 17] of which the second has 6 positions of padding, and their mask."""
    inputs, mask = ids(3, 17), torch.ones(3, 17, dtype=torch.bool)
    inputs[1, 11:], mask[1, 11:] = 0, False
    return inputs, mask


@every
def test_the_planner_counts_what_is_built(config: EncoderDecoderConfig) -> None:
    counts = count_any(config)
    assert counts.total == sum(p.numel() for p in EncoderDecoder(config).parameters())


@every
def test_step_by_step_is_the_whole(config: EncoderDecoderConfig) -> None:
    model, (inputs, mask), outputs = made(config), padded(), ids(3, 9)
    with torch.no_grad():
        whole = model(inputs, outputs, mask)
        cache = model.new_cache()
        first = model(inputs, outputs[:, :4], mask, cache=cache)
        twin = cache.fork()
        rest = [model(None, outputs[:, t : t + 1], cache=cache) for t in range(4, 9)]
        again = model(None, outputs[:, 4:], cache=twin)
    stepped = torch.cat([first.logits, *(step.logits for step in rest)], 1)
    torch.testing.assert_close(stepped, whole.logits, atol=2e-5, rtol=0)
    torch.testing.assert_close(again.logits, whole.logits[:, 4:], atol=2e-5, rtol=0)
    assert set(whole.routings) == set(config.sparse_layers) == set(first.routings)
    assert set(rest[0].routings) == {layer for layer in config.sparse_layers if layer >= config.num_hidden_layers}


@every
def test_padding_changes_nothing_before_it_or_beside_it(config: EncoderDecoderConfig) -> None:
    model, (inputs, mask), outputs = made(config), padded(), ids(3, 9)
    with torch.no_grad():
        together = model(inputs, outputs, mask).logits
        alone = model(inputs[1:2, :11], outputs[1:2]).logits
        half = torch.ones(3, 9, dtype=torch.bool)
        half[1, 5:] = False
        shorter = model(inputs, outputs, mask, half).logits
    torch.testing.assert_close(together[1:2], alone, atol=2e-5, rtol=0)
    torch.testing.assert_close(shorter[1, :5], together[1, :5], atol=2e-5, rtol=0)
    assert bool(shorter.isfinite().all())


@every
def test_every_parameter_learns_and_recomputing_changes_no_gradient(config: EncoderDecoderConfig) -> None:
    model, (inputs, mask), outputs = made(config).train(), padded(), ids(3, 9)
    found = []
    for recompute in (False, True):
        model.zero_grad()
        hidden = model.hidden(inputs, outputs, mask, recompute=recompute)
        model.head(hidden.states).logsumexp(-1).mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in found[0].items():
        again = found[1][name]
        assert gradient is not None and again is not None and float(gradient.abs().sum()) > 0, name
        torch.testing.assert_close(again, gradient)


def test_bfloat16_is_near_float32() -> None:
    model, (inputs, mask), outputs = made(SWITCH), padded(), ids(3, 9)
    with torch.no_grad():
        exact, rough = (model(inputs, outputs, mask, dtype=dtype) for dtype in (None, torch.bfloat16))
    assert rough.logits.dtype == torch.bfloat16 and rough.routings[1].scores.dtype == torch.float32
    assert float((rough.logits - exact.logits).abs().mean()) < 0.05 * float(exact.logits.abs().mean())


def test_fresh_logits_have_the_scale_of_one_whatever_the_width() -> None:
    for width in (32, 128):
        for tied in (True, False):
            model = made(T5_V1_1.model_copy(update={"hidden_size": width, "tie_word_embeddings": tied}))
            with torch.no_grad():
                logits = model(ids(4, 16), ids(4, 16)).logits
            assert 0.7 < float(logits.std()) < 1.4


def test_buckets_are_transformers() -> None:
    relative = torch.arange(-300, 301)
    reference = pytest.importorskip("transformers.models.t5.modeling_t5").T5Attention._relative_position_bucket
    for both in (True, False):
        for count, far in ((32, 128), (8, 20), (6, 7)):
            ours = buckets(relative, count, far, bidirectional=both)
            assert torch.equal(ours, reference(relative, both, count, far)), (both, count, far)


def test_which_layers_are_sparse() -> None:
    sizes = SIZES | {"num_hidden_layers": 12, "num_decoder_layers": 11, "router": TOP1}
    found = EncoderDecoderConfig(**sizes, num_sparse_encoder_layers=5, num_sparse_decoder_layers=3)
    assert found.sparse_encoder_layers == [1, 3, 5, 7, 9, 11] and found.sparse_decoder_layers == [1, 4, 7, 10]
    assert found.sparse_layers == [1, 3, 5, 7, 9, 11, 13, 16, 19, 22]
    every_one = EncoderDecoderConfig(**sizes, num_sparse_encoder_layers=7, num_sparse_decoder_layers=0)
    assert every_one.sparse_layers == list(range(12))
    assert list(EncoderDecoder(found).sparse_layers()) == found.sparse_layers


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_sparse_encoder_layers": 5}, "exceeds 4 layers"),
        ({"router": None}, "go together"),
        ({"extra_encoder_networks": 1}, "one follows each of the 2 sparse layers"),
        ({"relative_attention_max_distance": 16}, "must exceed half"),
        ({"share_embeddings": False}, "tie_word_embeddings needs share_embeddings"),
        ({"relative_attention_num_buckets": 2}, "relative_attention_num_buckets"),
    ],
)
def test_a_config_that_cannot_be_is_refused(change: dict[str, Any], said: str) -> None:
    values = dict(SWITCH) | change
    with pytest.raises(ConfigError, match=said):
        EncoderDecoderConfig(**values)


def test_a_call_that_cannot_be_is_refused() -> None:
    model, inputs, outputs = made(SWITCH), ids(2, 5), ids(2, 3)
    cache = model.new_cache()
    with pytest.raises(ConfigError, match="no input"):
        model(None, outputs, cache=cache)
    with pytest.raises(ConfigError, match="2 inputs and 1 rows"):
        model(inputs, outputs[:1])
    with pytest.raises(ConfigError, match=r"the mask is \[2, 3\]"):
        model(inputs, outputs, torch.ones(2, 3))
    with pytest.raises(ConfigError, match="no QK-Clip"):
        model.hidden(inputs, outputs, clip_above=100.0)
    with torch.no_grad():
        model(inputs, outputs, cache=cache)
    with pytest.raises(ConfigError, match="holds an input already"):
        model(inputs, outputs, cache=cache)
    with pytest.raises(ConfigError, match="2 encoded inputs, the decoder ids have 1 rows"):
        model(None, outputs[:1], cache=cache)
    with pytest.raises(ConfigError, match="attention_mask: the cache holds"):
        model(None, outputs, torch.ones(2, 5), cache=cache)
    with pytest.raises(ConfigError, match="no router in layer 0"):
        model(inputs, outputs, edit={0: Mask((1,))})


@every
def test_an_input_of_padding_alone_has_right_gradients(config: EncoderDecoderConfig) -> None:
    """Against PyTorch's plain attention in float64, where whole rows of keys are hidden."""
    inputs, mask = padded()
    mask[2], gradients = False, []
    for dtype in (torch.float32, torch.float64):
        model = made(config)
        for part in model.modules():
            if not isinstance(part, Router):
                part.to(dtype)
        with nullcontext() if dtype == torch.float32 else sdpa_kernel(SDPBackend.MATH):
            hidden = model.hidden(inputs, ids(3, 9), mask)
            model.head(hidden.states)[..., ::2].sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, exact in gradients[1].items():
        found = gradients[0][name]
        assert found is not None and exact is not None
        assert float((found - exact).abs().max()) < 1e-4 * float(exact.abs().max()), name


def test_where_experts_are_full_a_cache_is_not_the_whole_and_later_tokens_change_nothing() -> None:
    """A fixed room in each sequence: what a call brings is counted afresh, as transformers does."""
    router = TOP1.model_copy(update={"capacity_tokens": 1, "capacity_per": "sequence"})
    model, (inputs, mask), outputs = made(SWITCH.model_copy(update={"router": router})), padded(), ids(3, 9)
    assert router.prefix_causal and not router.causal_safe
    with torch.no_grad():
        whole = model(inputs, outputs, mask)
        shorter = model(inputs, outputs[:, :6], mask)
        cache = model.new_cache()
        steps = [
            model(None if t else inputs, outputs[:, t : t + 1], None if t else mask, cache=cache) for t in range(9)
        ]
    assert not bool(whole.routings[5].kept.all()) and all(bool(step.routings[5].kept.all()) for step in steps)
    assert float((torch.cat([step.logits for step in steps], 1) - whole.logits).abs().max()) > 0.1
    torch.testing.assert_close(shorter.logits, whole.logits[:, :6], atol=2e-5, rtol=0)


def test_padding_in_front_takes_no_room() -> None:
    """In transformers it does, and changes what real tokens say."""
    router = TOP1.model_copy(update={"capacity_tokens": 2, "capacity_per": "sequence"})
    model, inputs, outputs = made(SWITCH.model_copy(update={"router": router})), ids(2, 9), ids(2, 4)
    front = torch.cat((torch.zeros(2, 5, dtype=torch.long), inputs), 1)
    with torch.no_grad():
        padded_logits = model(front, outputs, front != 0).logits
        torch.testing.assert_close(padded_logits, model(inputs, outputs).logits, atol=2e-5, rtol=0)


def test_fresh_weights_have_the_scale_of_what_goes_in() -> None:
    sizes = SIZES | {"hidden_size": 96, "intermediate_size": 160, "head_dim": 16, "initializer_factor": 0.5}
    config = EncoderDecoderConfig(**sizes, router=TOP1, num_sparse_encoder_layers=2, num_sparse_decoder_layers=1)
    weights = dict(made(config).named_parameters())
    D, H, d, F = 96, 4, 16, 160
    for name, variance in {
        "embed_tokens.weight": 1.0,
        "encoder.layers.0.self_attn.q_proj.weight": 1 / D / d,
        "decoder.layers.1.cross_attn.k_proj.weight": 1 / D,
        "decoder.layers.1.self_attn.o_proj.weight": 1 / (H * d),
        "encoder.layers.0.mlp.up_proj.weight": 1 / D,
        "encoder.layers.1.mlp.experts.up_proj": 1 / D,
        "encoder.layers.1.mlp.experts.down_proj": 1 / F,
        "encoder.layers.1.mlp.router.weight": 1 / D,
    }.items():
        assert float(weights[name].detach().std()) == pytest.approx(0.5 * variance**0.5, rel=0.1), name
    again, other = made(config), made(config, seed=1)
    assert all(torch.equal(p, weights[name]) for name, p in again.named_parameters())
    assert not torch.equal(other.embed_tokens.weight, weights["embed_tokens.weight"])


def test_what_is_counted_is_what_there_is_where_more_are_sparse_than_were_asked_for() -> None:
    sizes = SIZES | {"num_hidden_layers": 12, "router": TOP1}
    five = EncoderDecoderConfig(**sizes, num_sparse_encoder_layers=5, num_sparse_decoder_layers=1)
    six = EncoderDecoderConfig(**sizes, num_sparse_encoder_layers=6, num_sparse_decoder_layers=1)
    assert count_any(five) == count_any(six) and sequence_flops(five, 32, 8) == sequence_flops(six, 32, 8)
    assert count_any(five).total == sum(p.numel() for p in EncoderDecoder(five).parameters())
    assert router_flops(five, 32, 8) == router_flops(six, 32, 8)


def test_without_decoder_ids_it_says_what_is_missing() -> None:
    config = EncoderDecoderConfig(
        vocab_size=16, hidden_size=8, num_hidden_layers=1, num_decoder_layers=1, intermediate_size=8,
        num_attention_heads=2, head_dim=4,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="decoder_input_ids"):
        EncoderDecoder(config)(torch.ones(1, 3, dtype=torch.int64))
