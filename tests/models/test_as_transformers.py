"""Arguments and properties under transformers' names: what they give is what transformers gives."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import manyhands
from manyhands.errors import ConfigError
from manyhands.layers.packed_linear import RecordLinear
from manyhands.models import Decoder
from manyhands.moe import MoELayer
from manyhands.moe.packed import RecordExperts
from manyhands.quant import pack_experts, pack_linear

from .test_against_transformers import IDS, mixtral, our_name
from .tiny_models import ATTENTION, ids, tiny

transformers = pytest.importorskip("transformers")
MASK = torch.ones_like(IDS)
MASK[1, :9] = 0


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Decoder]:
    theirs, config = mixtral()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, t in theirs.state_dict().items():
            t.uniform_(0.5, 1.5, generator=g) if "norm" in name else t.normal_(0.0, t.shape[-1] ** -0.5, generator=g)
    ours = Decoder(config)
    ours.load_state_dict({our_name(name): t.clone() for name, t in theirs.state_dict().items()})
    return theirs.eval(), ours.eval()


GAPS = torch.tensor([[0, 1, 2, 7, 8, 9, 11, *range(13, 30)], list(range(3, 27))])
LABELS = IDS.masked_fill(MASK == 0, -100)
LABELS[1, 9] = -100  # padding would predict it
GIVEN: dict[str, dict[str, torch.Tensor]] = {
    "labels": {"labels": LABELS, "attention_mask": MASK},
    "labels of all": {"labels": IDS},
    "positions with gaps": {"position_ids": GAPS, "attention_mask": torch.ones_like(IDS)},
    "positions of another start": {"position_ids": torch.arange(5, 29)[None]},
}


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("embedded", [False, True])
def test_what_is_given(pair: tuple[Any, Decoder], given: str, embedded: bool) -> None:
    """Logits, loss and every hidden state; the embeddings' gradient of the loss."""
    theirs, ours = pair
    found = []
    for model, table in ((theirs, theirs.model.embed_tokens), (ours, ours.embed_tokens)):
        inputs = {"inputs_embeds": table(IDS).detach().requires_grad_()} if embedded else {"input_ids": IDS}
        out = model(**inputs, **GIVEN[given], output_hidden_states=True)
        gradient = None
        if embedded and out.loss is not None:
            (gradient,) = torch.autograd.grad(out.loss, inputs["inputs_embeds"])
        found.append((out.logits, out.hidden_states, out.loss, gradient))
    (logits, states, loss, gradient), (logits_2, states_2, loss_2, gradient_2) = found
    real = GIVEN[given].get("attention_mask", torch.ones_like(IDS)).bool()
    torch.testing.assert_close(logits_2[real], logits[real], rtol=0, atol=1e-4)
    assert len(states) == len(states_2) == 4
    for one, two in zip(states, states_2, strict=True):
        torch.testing.assert_close(two[real], one[real], rtol=0, atol=1e-4)
    assert (loss is None) == (loss_2 is None)
    if loss is not None and loss_2 is not None:
        torch.testing.assert_close(loss_2, loss, rtol=0, atol=1e-5)
    if gradient is not None and gradient_2 is not None:
        torch.testing.assert_close(gradient_2[real], gradient[real], rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", list(ATTENTION))
def test_the_plain_path_is_the_same_bits(attention: str) -> None:
    model, x = tiny(attention).eval(), ids()
    plain = model(x)
    positions = torch.arange(x.shape[1])[None]
    told = model(None, inputs_embeds=model.embed_tokens(x), position_ids=positions, labels=x, output_hidden_states=True)
    assert torch.equal(told.logits, plain.logits) and plain.loss is None and plain.hidden_states is None
    assert told.hidden_states is not None and torch.equal(told.hidden_states[0], model.embed(x))
    assert torch.equal(model.head(told.hidden_states[-1]), plain.logits)
    expected = F.cross_entropy(plain.logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    assert told.loss is not None and torch.equal(told.loss, expected)


def test_positions_go_on_with_a_cache() -> None:
    model, x = tiny().eval(), ids()
    cache = model.new_cache()
    model(x[:, :5], cache=cache, position_ids=torch.arange(5)[None])
    later = model(x[:, 5:], cache=cache, position_ids=torch.arange(5, 12)[None]).logits
    torch.testing.assert_close(later, model(x).logits[:, 5:], rtol=1e-5, atol=1e-5)


def test_multipliers_are_on_the_side_that_transformers_has_them() -> None:
    """The embedding's before the first state; the logits' behind the last (Granite)."""
    model, x = tiny(embedding_multiplier=3.0, output_multiplier=0.5).eval(), ids()
    out = model(inputs_embeds=model.embed_tokens(x), output_hidden_states=True)
    assert out.hidden_states is not None and torch.equal(out.hidden_states[0], 3.0 * model.embed_tokens(x))
    assert torch.equal(model.head(0.5 * out.hidden_states[-1]), out.logits) and torch.equal(out.logits, model(x).logits)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "one of the two"),
    "both": ({"input_ids": IDS[:, :4], "inputs_embeds": torch.zeros(2, 4, 32)}, "one of the two"),
    "width": ({"inputs_embeds": torch.zeros(2, 4, 16)}, "hidden_size = 32"),
    "labels": ({"input_ids": IDS[:, :4], "labels": IDS[:, :5]}, r"labels is \[2, 5\], not \[2, 4\]"),
    "positions' shape": ({"input_ids": IDS[:, :4], "position_ids": torch.arange(5)[None]}, r"\[2 or 1, 4\]"),
    "fractions": ({"input_ids": IDS[:, :4], "position_ids": torch.arange(4.0)[None]}, "whole numbers"),
    "negative": ({"input_ids": IDS[:, :4], "position_ids": torch.arange(-1, 3)[None]}, "below 0"),
    "packed": ({"input_ids": IDS[:, :4], "position_ids": torch.tensor([[0, 1, 0, 1]])}, "documents"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_fit_is_one_line(wrong: str) -> None:
    given, said = WRONG[wrong]
    given = {name: t % 64 if name in ("input_ids", "labels") else t for name, t in given.items()}
    with pytest.raises(ConfigError, match=said):
        tiny()(**given)
    with pytest.raises(ConfigError, match="chooses by token ids"):
        tiny(router={"select": "hash", "num_experts_per_tok": 1})(inputs_embeds=torch.zeros(1, 2, 32))


def test_a_model_says_what_it_is(pair: tuple[Any, Decoder]) -> None:
    theirs, ours = pair
    for flags in ({}, {"exclude_embeddings": True}, {"only_trainable": True}):
        assert ours.num_parameters(**flags) == theirs.num_parameters(**flags)
    assert ours.dtype == theirs.dtype and ours.device == theirs.device
    text = repr(ours)
    assert "3 mixtures of 8 experts and 2 per token" in text and "num_experts=8, num_experts_per_tok=2" in text
    assert "moe_intermediate_size=16" in text and "num_key_value_heads=1" in text
    tied = tiny(tie_word_embeddings=True)
    assert tied.num_parameters() == sum(p.numel() for p in tied.parameters())
    assert "dense" in repr(tiny(moe=None))


def test_what_is_packed_counts_in_full() -> None:
    """Four-bit records, with padding and scales, are as many parameters as they stand for."""
    model = tiny()
    model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    whole, trained = model.num_parameters(), model.num_parameters(only_trainable=True)
    assert whole - trained == 32 * 32
    for block in model.layers:
        linear = block.self_attn.o_proj
        packed = pack_linear(linear.weight, linear.bias, "int8")
        block.self_attn.o_proj = RecordLinear(packed.layout)
        if isinstance(block.mlp, MoELayer):
            records = pack_experts(block.mlp.experts.weights(), "int4")
            block.mlp.experts = RecordExperts(records.layout, 6)
    assert sum(p.numel() for p in model.parameters()) < whole == model.num_parameters()
    assert model.num_parameters(only_trainable=True) == trained - 3 * 32 * 32 - 2 * 6 * 3 * 16 * 32
    assert "format=int4" in repr(model) and "in_features=32, out_features=32, bias=False, format=int8" in repr(model)


def test_what_comes_out_is_a_line() -> None:
    model, x = tiny(), ids()
    out = model(x, labels=x)
    assert repr(out) == (
        "Output(logits=float32[2, 12, 64], routings of layers [1, 2]: 2 of 6 experts for each of 24 tokens, "
        "loss=float32[])"
    )
    assert repr(out.routings[1]) == "Routing(24 tokens, 2 of 6 experts each)"
    moe = manyhands.MoELayer(manyhands.MoEConfig(router=manyhands.RouterConfig(num_experts=8)), hidden_size=32)
    assert "num_experts=8" in repr(moe) and "hidden_size=32" in repr(moe)


@pytest.mark.parametrize(
    "wrong", [torch.tensor([[0.0, float("-inf")]]), torch.tensor([[1, 2]]), torch.tensor([[-1, 1]])]
)
def test_a_mask_of_another_kind_is_refused(wrong: torch.Tensor) -> None:
    """Added to scores, 0 is a token that is seen; taken for a mask of ones it would be its opposite."""
    with pytest.raises(ConfigError, match=r"the mask holds other numbers than 1, of a token that is read, and 0"):
        tiny()(ids(1, 2), wrong)


def test_a_mask_may_be_of_any_type() -> None:
    model, text, mask = tiny(), ids(1, 4), torch.tensor([[0, 1, 1, 1]])
    wanted = model(text, mask.bool()).logits
    for dtype in (torch.int64, torch.uint8, torch.float32, torch.bfloat16):
        assert torch.equal(model(text, mask.to(dtype)).logits, wanted)
