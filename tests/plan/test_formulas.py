"""FLOPs, caches, bytes and money against cases computed by hand or printed in papers."""

import pytest

from manyhands.catalog import load
from manyhands.plan import Counts, count_model
from manyhands.plan.cache import cache_bytes_per_token, sequence_bytes
from manyhands.plan.compute import attention_flops, forward_flops, mean_seen, prefill_flops, seen, training_flops
from manyhands.plan.offload import offload_seconds
from manyhands.plan.price import device_hours, price_per_million, utilisation
from manyhands.plan.sizes import Sizes, sizes_of
from manyhands.plan.storage import BF16, FP8, INT4, MXFP4, Storage, weight_bytes
from manyhands.plan.subject import read_subject
from manyhands.plan.traffic import StepBytes, decode_bytes, distinct_experts, distinct_of_load, expert_bytes


def of(name: str) -> tuple[Sizes, Counts]:
    config = load(name).config
    assert config is not None
    return sizes_of(config), count_model(config)


# GFLOP per token: without attention, at 4k, at 32k
FORWARD = {
    "mixtral-8x7b": (25.50, 27.65, 42.68),
    "deepseek-v2": (41.70, 61.84, 202.8),
    "deepseek-v3": (73.25, 93.72, 237.0),
    "kimi-k2.5": (63.37, 73.61, 145.2),
    "gpt-oss-120b": (10.27, 11.51, 19.97),
    "qwen3-30b-a3b": (6.084, 9.305, 31.85),
    "llama-3.1-405b": (807.5, 841.3, 1078),
}


@pytest.mark.parametrize("name", FORWARD)
def test_forward_flops(name: str) -> None:
    sizes, counts = of(name)
    for context, expected in zip((0, 4096, 32768), FORWARD[name], strict=True):
        assert forward_flops(sizes, counts, context) / 1e9 == pytest.approx(expected, rel=5e-4)


def test_training_flops_are_the_published_ones() -> None:
    """arXiv 2505.09343, table 2: GFLOPs per token of training at 4096: 155 (V2), 250 (V3), 2,448 (405B)."""
    for name, expected, tolerance in (("deepseek-v2", 155, 5e-3), ("deepseek-v3", 250, 5e-3)):
        assert training_flops(*of(name), 4096) / 1e9 == pytest.approx(expected, rel=tolerance)
    assert training_flops(*of("llama-3.1-405b"), 4096) / 1e9 == pytest.approx(2473, rel=5e-4)  # 1% above their 2,448


def test_mla_decodes_from_its_latents() -> None:
    """2·61·32768·128·(2·512 + 64) FLOP of attention at 32k for V3; the expanded form has 128·320 instead."""
    sizes, counts = of("deepseek-v3")
    assert attention_flops(sizes, 32768, latent=True) == 2 * 61 * 32768 * 128 * 1088
    assert attention_flops(sizes, 32768) == 2 * 61 * 32768 * 128 * 320
    assert forward_flops(sizes, counts, 32768, latent=True) == pytest.approx(630.0e9, rel=1e-3)


def test_windows() -> None:
    assert (seen(4096, None), seen(4096, 128), seen(64, 128)) == (4096, 128, 64)
    assert mean_seen(4096, None) == 2048 and mean_seen(100, 128) == 50
    exact = sum(min(i, 128) for i in range(4096)) / 4096  # the continuous mean is half a token off
    assert mean_seen(4096, 128) == pytest.approx(exact, abs=0.5)
    sizes, _ = of("gpt-oss-120b")
    assert attention_flops(sizes, 4096) == 2 * 64 * 128 * 18 * (4096 + 128)


def test_prefill_runs_the_head_once() -> None:
    sizes, counts = of("mixtral-8x7b")
    head = counts.active_without_embedding - counts.body
    body = 1000 * (2 * counts.body + attention_flops(sizes, 500))
    assert prefill_flops(sizes, counts, 1000) == pytest.approx(body + 2 * head)


# bytes per token at 16 bits: growing, windowed
CACHES = {
    "deepseek-v3": (70_272, 0),
    "kimi-k2.5": (70_272, 0),
    "deepseek-v2": (69_120, 0),
    "deepseek-v2-lite": (31_104, 0),
    "mixtral-8x7b": (131_072, 0),
    "gpt-oss-120b": (36_864, 36_864),
    "llama-3.1-405b": (516_096, 0),
}


@pytest.mark.parametrize("name", CACHES)
def test_cache_bytes(name: str) -> None:
    assert cache_bytes_per_token(of(name)[0]) == CACHES[name]


def test_a_window_bounds_the_cache() -> None:
    sizes, _ = of("gpt-oss-120b")
    assert sequence_bytes(sizes, 32768) == 36_864 * 32768 + 36_864 * 128
    assert sequence_bytes(sizes, 32768, bits=8) == sequence_bytes(sizes, 32768) / 2


def test_distinct_experts() -> None:
    assert distinct_experts(256, 8, 8) == pytest.approx(57.42, abs=0.01)
    assert distinct_experts(256, 8, 1) == pytest.approx(8)
    assert distinct_experts(256, 8, 64) / 256 == pytest.approx(0.87, abs=0.005)
    assert distinct_experts(256, 8, 128) / 256 == pytest.approx(0.98, abs=0.005)
    assert distinct_of_load([1 / 256] * 256, 8, 8) == pytest.approx(distinct_experts(256, 8, 8))
    assert distinct_of_load([0.5, 0.5, 0.0, 0.0], 2, 8) == 2, (
        "a collapsed router touches two experts, however many tokens"
    )


def test_weight_bytes() -> None:
    """26 GB Mixtral at 4.5 bits; V3 1.34 TB in bf16 and 673 GB as published; K2.5 2.05 TB and 594 GB; 405B 812 GB."""
    for name, storage, expected in (
        ("mixtral-8x7b", INT4, 26.27),
        ("deepseek-v3", BF16, 1342.05),
        ("deepseek-v3", FP8, 673.2),
        ("kimi-k2.5", BF16, 2052.8),
        ("kimi-k2.5", Storage("int4", 4.5, 16, 16, 16), 594.2),
        ("gpt-oss-120b", MXFP4, 65.2),
        ("llama-3.1-405b", BF16, 811.7),
    ):
        assert weight_bytes(of(name)[1], storage) / 1e9 == pytest.approx(expected, rel=2e-3)


def test_the_catalogues_native_formats_reach_the_planner() -> None:
    for name, gigabytes in (("deepseek-v3", 673.2), ("kimi-k2.5", 594.2), ("gpt-oss-120b", 65.2)):
        subject = read_subject(name)
        assert subject.native is not None
        assert weight_bytes(subject.counts, subject.native) / 1e9 == pytest.approx(gigabytes, rel=2e-3)


def test_bytes_of_a_step() -> None:
    """Qwen3-30B-A3B at 4.5 bits: experts of 2.7 MB, 1.02 GB of them per token."""
    sizes, counts = of("qwen3-30b-a3b")
    assert expert_bytes(sizes, counts, INT4) == 3 * 2048 * 768 * 4.5 / 8
    step = decode_bytes(sizes, counts, INT4, context=0)
    assert step.experts == pytest.approx(48 * 8 * 3 * 2048 * 768 * 4.5 / 8)
    router_and_norms = counts.by_component["router"] + counts.by_component["norms"]
    rest = counts.by_component["attention"] + counts.by_component["head"]
    row = 2048 * 4.5 / 8
    assert step.fixed == pytest.approx(rest * 4.5 / 8 + router_and_norms * 2 + row)
    assert step.cache == 0
    batch = decode_bytes(sizes, counts, INT4, batch=64, context=1000)
    assert batch.cache == 64 * 98_304 * 1000
    assert batch.experts / step.experts == pytest.approx(distinct_experts(128, 8, 64) / 8)


def test_a_tied_table_is_read_as_the_head() -> None:
    sizes, counts = of("granite-3-3b-a800m")
    step = decode_bytes(sizes, counts, BF16)
    everything_but_experts = counts.total - counts.by_component["routed experts"]
    assert step.fixed == pytest.approx(2 * (everything_but_experts + 1536))


# Serial roof at 60 GB/s of memory, 6 GB/s of disk, for experts of 4.5 bits: GB routed, GB else; tokens/s by hit rate
SERIAL = {
    "olmoe": ((0.45, 0.28), (12, 22, 39, 53)),
    "qwen3-30b-a3b": ((1.02, 0.84), (5.4, 9.3, 16, 22)),
    "mixtral-8x7b": ((6.34, 0.91), (0.93, 1.7, 3.2, 4.6)),
    "deepseek-v3": ((11.5, 9.3), (0.48, 0.83, 1.5, 1.9)),
}


@pytest.mark.parametrize("name", SERIAL)
def test_offloading_in_turn(name: str) -> None:
    (experts, fixed), speeds = SERIAL[name]
    step = StepBytes(tokens=1, distinct=8, experts=experts * 1e9, fixed=fixed * 1e9, cache=0)
    for hit, expected in zip((0, 0.5, 0.8, 0.9), speeds, strict=True):
        assert 1 / offload_seconds(step, hit, 60e9, 6e9) == pytest.approx(expected, rel=0.05)


def test_offloading_overlapped() -> None:
    step = StepBytes(tokens=1, distinct=8, experts=6e9, fixed=6e9, cache=0)
    assert offload_seconds(step, 0.5, 60e9, 6e9, overlap=True) == pytest.approx(0.5)
    assert offload_seconds(step, 1.0, 60e9, 6e9, overlap=True) == pytest.approx(0.2)
    assert offload_seconds(step, 1.0, 60e9, 6e9) == pytest.approx(0.2), "with everything in memory they are the same"


def test_money() -> None:
    assert price_per_million(3.6, 1000) == pytest.approx(1.0)
    assert device_hours(3.6e18, 1e15, 0.5) == pytest.approx(2)
    assert utilisation(3.6e18, 1e15, 2) == pytest.approx(0.5)
    flops = training_flops(*of("deepseek-v3"), 4096) * 14.8e12
    assert utilisation(flops, 989.4e12, 2.664e6) == pytest.approx(0.39, abs=0.005)
