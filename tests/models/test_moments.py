"""What a trace, a mode or a transform makes is its own: nothing of it is left for an ordinary call."""

import copy
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from manyhands.config import RopeConfig
from manyhands.errors import ConfigError
from manyhands.layers.cache import Cache
from manyhands.layers.rope import inverse_frequencies
from manyhands.models import Decoder, Output

from ..runtime.test_program import CASES, packed_model

IDS = torch.arange(10)[None]


def model_of(**fields) -> Decoder:
    """Each test has a rotation of its own, which nothing kept yet."""
    return packed_model({**CASES["qwen3"], **fields}, "plain")


def exported(model: Decoder) -> None:
    try:
        torch.export.export(model, (IDS,))
    except Exception as error:
        assert str(error)


def faked(model: Decoder) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        copy.deepcopy(model)(torch.zeros(1, 4, dtype=torch.long))


def on_meta(model: Decoder) -> None:
    copy.deepcopy(model).to("meta")(IDS.to("meta"))


def traced(model: Decoder) -> None:
    try:
        torch.jit.trace(lambda i: model(i).logits, (IDS,), check_trace=False)
    except Exception as error:
        assert str(error)


def in_inference(model: Decoder) -> None:
    with torch.inference_mode():
        model(IDS)


def functional(model: Decoder) -> None:
    torch.func.functionalize(lambda i: model(i).logits)(IDS)


def differentiated(model: Decoder) -> None:
    weights = {k: v.detach() for k, v in model.named_parameters()}
    torch.func.grad(lambda w: torch.func.functional_call(model, w, (IDS,)).logits.sum())(weights)


MOMENTS = [exported, faked, on_meta, traced, in_inference, functional, differentiated]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("moment", MOMENTS, ids=lambda f: f.__name__)
def test_afterwards_everything_is_as_before(moment, gradients: bool) -> None:
    theta = 9000.0 + 2 * MOMENTS.index(moment) + gradients
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    model = model_of(rope={"rope_theta": theta, **yarn})
    with torch.set_grad_enabled(gradients):
        moment(model)
    frequencies, _ = inverse_frequencies(RopeConfig(rope_theta=theta), 16, torch.device("cpu"))
    assert type(frequencies) is torch.Tensor and not frequencies.is_inference()
    found = model(IDS)
    expected = model_of(rope={"rope_theta": theta + 0.0, **yarn})(IDS)
    assert torch.equal(found.logits, expected.logits)
    found.logits.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@torch.no_grad()
def test_a_mode_that_counts_sees_every_product() -> None:
    """Past the dispatcher a counter would count nothing, a tracer would keep a constant."""
    model = model_of()
    with FlopCounterMode(display=False) as few:
        model(IDS[:, :1])
    with FlopCounterMode(display=False) as many, torch.enable_grad():
        model(IDS[:, :1])
    assert few.get_total_flops() == many.get_total_flops() > 0


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_a_jit_trace_without_gradients_is_no_constant() -> None:
    model = model_of().requires_grad_(False)
    traced = torch.jit.trace(lambda i: model(i).logits, (IDS,), check_trace=False)
    torch.testing.assert_close(traced(IDS.flip(1)), model(IDS.flip(1)).logits, atol=1e-5, rtol=1e-5)


def test_a_model_is_exported() -> None:
    model = model_of()
    program = torch.export.export(model, (IDS,))
    found = program.module()(IDS.flip(1)).logits
    torch.testing.assert_close(found, model(IDS.flip(1)).logits, atol=1e-5, rtol=1e-5)


def test_on_meta_and_through_pickle() -> None:
    model = model_of()
    out = copy.deepcopy(model).to("meta")(IDS.to("meta"))
    assert out.logits.shape == (1, 10, 50) and out.logits.device.type == "meta"
    again = pickle.loads(pickle.dumps(model))  # noqa: S301 - our own bytes
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    leaves, spec = pytree.tree_flatten(model(IDS))
    assert all(isinstance(leaf, torch.Tensor) or leaf is None for leaf in leaves)
    assert type(pytree.tree_unflatten(leaves, spec)) is Output


@torch.no_grad()
def test_a_cache_for_others_is_refused() -> None:
    model = model_of()
    cache = model.new_cache()
    model(IDS.repeat(2, 1), cache=cache)
    with pytest.raises(ConfigError, match="holds 2 sequences, not 1"):
        model(IDS[:, :1], cache=cache)
    assert cache.length == 10
    cache.truncate(0)
    torch.testing.assert_close(model(IDS, cache=cache).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match="the cache has 2 layers, the model 3"):
        model(IDS[:, :1], cache=Cache(2))
    with pytest.raises(ConfigError, match=r"the mask is \[1, 4\], the ids are \[1, 10\]"):
        model(IDS, torch.ones(1, 4))


@pytest.mark.parametrize(
    "mask", [torch.ones(1, 5), torch.ones(1, 4, dtype=torch.bool), torch.ones(5, dtype=torch.bool)]
)
def test_a_token_mask_is_looked_at_at_once(mask: torch.Tensor) -> None:
    layer = model_of().layers[1].mlp
    with pytest.raises(ConfigError, match="token_mask is"):
        layer(torch.randn(1, 5, 32), mask)
