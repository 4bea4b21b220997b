"""FLOPs of encoder-decoders: per pair of sequences, as Switch's paper has them in its table 9."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from manyhands.config import EncoderDecoderConfig, RouterConfig
from manyhands.models.encoder_decoder import EncoderDecoder
from manyhands.plan.count_kind import router_flops, sequence_flops
from manyhands.plan.report.pairs import LENGTHS
from manyhands.plan.subject import read_subject
from manyhands.text import SpanRule

from ..small_runs import manyhands

SMALL: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_decoder_layers": 3,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "head_dim": 5,
}


@pytest.mark.parametrize(("name", "published"), [("t5-base", 124e9), ("t5-large", 425e9), ("switch-c", 890e9)])
def test_the_published_figures(name: str, published: float) -> None:
    """The paper does not print its formula: 2 to 6 % more than it has, for each of them."""
    done = manyhands("plan", name)
    assert done.returncode == 0, done.stderr
    config = read_subject(name).pairs
    assert config is not None
    flops = sequence_flops(config, 512, 114)
    assert 1.02 < flops / published < 1.06
    [line] = [" ".join(line.split()) for line in done.stdout.splitlines() if "512 in, 114 out" in line]
    assert line.startswith(f"512 in, 114 out {flops / 1e9:.1f} GFLOP")


def test_two_of_them_side_by_side() -> None:
    done = manyhands("plan", "switch-base-128", "--versus", "t5-base")
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "without routers 130.5 GFLOP 130.5 GFLOP 1x" in lines and any("with routers 131.2" in line for line in lines)


def test_every_product_counted_one_by_one() -> None:
    """2·n·m·k for each product of matrices in both stacks; a decoder's token sees half of the outputs on average."""
    S, T, D, F, V, W = 6, 4, 8, 12, 50, 10
    attention, feed_forward, norm = 4 * 2 * D * W, 2 * 2 * D * F, 2 * D  # of one token
    encoder = S * (2 * (attention + feed_forward + 2 * norm) + norm) + 2 * 2 * 2 * S * S * W
    # the keys and values of the cross attention count for each token that is written, as every weight of the decoder
    written = 3 * (2 * attention + feed_forward + 3 * norm) + norm + 2 * D * V
    seen = 3 * 2 * 2 * (T * T // 2 + T * S) * W
    assert sequence_flops(EncoderDecoderConfig(**SMALL), S, T) == encoder + T * written + seen


def test_the_built_model_multiplies_as_much() -> None:
    """PyTorch's count of its matrix products, which leaves norms and the fused attention out."""
    config, S, T = EncoderDecoderConfig(**SMALL), 6, 4
    D, W = config.hidden_size, config.num_attention_heads * config.head_dim
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        EncoderDecoder(config)(torch.zeros(1, S, dtype=torch.int64), torch.zeros(1, T, dtype=torch.int64))
    norms = 2 * D * (S * (2 * 2 + 1) + T * (3 * 3 + 1))
    attention = 2 * 2 * W * (2 * S * S + 3 * (T * T // 2 + T * S))
    # of the cross attention, keys and values are made once for each token that is read, not for each that is written
    read_once = 3 * 2 * 2 * D * W * (S - T)
    assert counter.get_total_flops() == sequence_flops(config, S, T) - norms - attention + read_once


def test_routers_are_counted_apart() -> None:
    router = RouterConfig(num_experts=16, num_experts_per_tok=1)
    sparse = EncoderDecoderConfig(**SMALL, router=router, num_sparse_encoder_layers=1, num_sparse_decoder_layers=3)
    dense = EncoderDecoderConfig(**SMALL)
    assert sequence_flops(sparse, 6, 4) == sequence_flops(dense, 6, 4)
    assert router_flops(sparse, 6, 4) == 2 * 8 * 16 * (6 * 1 + 4 * 3) and router_flops(dense, 6, 4) == 0


def test_the_lengths_are_those_of_span_corruption() -> None:
    rule = SpanRule(range(200), 1)
    assert [rule.lengths(rule.text_length(read)) for read, _ in LENGTHS] == list(LENGTHS)
