"""The check of encoder-decoders passes what is right and finds what is planted."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from manyhands.catalog import load
from manyhands.check.encoder_decoder import EncoderDecoderCheck
from manyhands.check.report import Row
from manyhands.check.shrink_encoder_decoder import shrink_encoder_decoder
from manyhands.config import EncoderDecoderConfig, RouterConfig
from manyhands.config.load import load_preset
from manyhands.layers import relative_attention
from manyhands.layers.cache import ContiguousLayer
from manyhands.models import EncoderDecoder, encoder_decoder

NAMES = ("t5-base", "t5-xxl-1.1", "switch-base-128", "switch-c", "st-moe-32b")


def small(name: str) -> EncoderDecoderConfig:
    shape = load(name).shape
    assert isinstance(shape, EncoderDecoderConfig)
    return shrink_encoder_decoder(shape)


def failures(config: EncoderDecoderConfig, case: str = "random", dtype: str = "float32") -> list[Row]:
    return [row for rows, _ in EncoderDecoderCheck(config, case, 0).rows("eager", dtype) for row in rows if not row.ok]


@pytest.mark.parametrize("name", NAMES)
def test_published_kinds_in_small(name: str) -> None:
    shape, config = load(name).shape, small(name)
    assert isinstance(shape, EncoderDecoderConfig)
    assert (config.num_hidden_layers, config.num_decoder_layers) == (2, 2)
    for side in ("encoder", "decoder"):
        kept, full = (getattr(c, f"sparse_{side}_layers") for c in (config, shape))
        assert bool(kept) == bool(full) and (len(kept) == 2) == (len(full) == shape.num_hidden_layers)
        assert bool(getattr(config, f"extra_{side}_networks")) == bool(getattr(shape, f"extra_{side}_networks"))
    assert (config.num_attention_heads * config.head_dim == config.hidden_size) == (
        shape.num_attention_heads * shape.head_dim == shape.hidden_size
    )
    assert not failures(config, "padding") and not failures(config, "padding", "bfloat16")


def test_room_for_two_tokens_of_a_sequence() -> None:
    router = RouterConfig(num_experts=5, num_experts_per_tok=1, capacity_tokens=2, capacity_per="sequence")
    config = small("switch-base-128").model_copy(update={"router": router})
    check = EncoderDecoderCheck(config, "padding", 0)
    assert not check.decodes
    rows = [row for rows, _ in check.rows("eager", "float32") for row in rows]
    assert all(row.ok for row in rows) and not any("decoding" in row.quantity for row in rows)
    ample = router.model_copy(update={"capacity_tokens": 64})
    assert EncoderDecoderCheck(config.model_copy(update={"router": ample}), "random", 0).decodes


def test_an_importance_that_cannot_change() -> None:
    """Of one expert that has all tokens CV² is E − 1, whatever its weights: the gradient is rounding alone."""
    config = load_preset("switch-tiny", []).model
    assert isinstance(config, EncoderDecoderConfig)
    assert not failures(shrink_encoder_decoder(config), "one_expert")


def _mirrored(patch: pytest.MonkeyPatch) -> None:
    right = relative_attention.buckets
    patch.setattr(relative_attention, "buckets", lambda relative, *a, **k: right(-relative, *a, **k))


def _too_far(patch: pytest.MonkeyPatch) -> None:
    right = relative_attention.buckets
    patch.setattr(relative_attention, "buckets", lambda relative, n, far, **k: right(relative, n, far + 1, **k))


def _divided(patch: pytest.MonkeyPatch) -> None:
    right = relative_attention.RelativeAttention.forward

    def forward(self: Any, x: Any, k: Any, v: Any, bias: Any) -> Any:
        return right(self, x, k * self.head_dim**-0.5, v, bias)

    patch.setattr(relative_attention.RelativeAttention, "forward", forward)


def _unscaled(patch: pytest.MonkeyPatch) -> None:
    right = EncoderDecoder.head
    patch.setattr(EncoderDecoder, "head", lambda self, states: right(self, states * self.config.hidden_size**0.5))


def _seen_padding(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(encoder_decoder, "hide", lambda bias, hidden: bias)


def _forgetful(patch: pytest.MonkeyPatch) -> None:
    right = ContiguousLayer.append

    def append(self: ContiguousLayer, *new: torch.Tensor) -> Any:
        return [t.roll(1, -2) for t in right(self, *new)]

    patch.setattr(ContiguousLayer, "append", append)


@pytest.mark.parametrize(
    ("plant", "case", "found"),
    [
        (_mirrored, "random", "logits"),
        (_too_far, "random", "logits"),
        (_divided, "random", "logits"),
        (_unscaled, "random", "logits"),
        (_seen_padding, "padding", "logits"),
        (_forgetful, "random", "decoding: logits"),
    ],
    ids=["mirrored", "far", "divided", "unscaled", "padding", "cache"],
)
def test_a_planted_fault_is_found(
    plant: Callable[[pytest.MonkeyPatch], None], case: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small("t5-base")
    assert not failures(config, case)
    plant(monkeypatch)
    assert found in {row.quantity for row in failures(config, case)}
