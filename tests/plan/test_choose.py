"""Ten questions that people ask, each answered by `choose` as by hand: the arithmetic stands in the comments."""

import json
from typing import Any

import pytest

from ..small_runs import manyhands

GIB, MIB = 2**30, 2**20


def ask(*arguments: str) -> dict[str, Any]:
    done = manyhands("choose", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def row(answer: dict[str, Any], **wanted: Any) -> dict[str, Any]:
    found = [each for each in answer["offers"] if all(each[key] == value for key, value in wanted.items())]
    assert len(found) == 1, (wanted, [(each["model"], each["format"], each["machine"]) for each in answer["offers"]])
    return found[0]


def test_what_fits_my_16_gb_laptop() -> None:
    """gpt-oss-20b does, as published: 13.8 of 15.03 GB, and at most 23.5 tokens a second.

    24 layers of 32 experts: 2·2880·2880 (gate, up) + 2880·2880 (down) weights, 2·2880 + 2880 biases, at 4.25 bits.
    Attention, in 16 bits: 64 heads and 2·8 of keys and values, 64 wide, with biases, and 64 sinks. Embedding and head:
    201,088 rows. Router: 32 rows and biases. Norms: 2 a layer and one.
    """
    expert = 3 * 2880 * 2880 + 3 * 2880
    routed = 24 * 32 * expert * 4.25 / 8
    attention = 24 * (2880 * 80 * 64 + 80 * 64 + 64 * 64 * 2880 + 2880 + 64) * 2
    table = 201_088 * 2880 * 2
    small = (24 * (32 * 2880 + 32) + 49 * 2880) * 2
    answer = ask("--memory", "16GB", "--rows", "40")
    found = row(answer, model="gpt-oss-20b", layout="memory")
    assert found["as_published"] and found["usable_bytes"] == 16 * GIB - 2 * GIB
    assert found["weights_bytes"] == pytest.approx(routed + attention + 2 * table + small, rel=1e-9)
    # a step reads 4 of 32 experts, one row of the input table, all else once; 12 layers see 4096 positions, 12 a window
    # of 128; a position is 8 heads of 64, keys and values, 2 bytes
    cache = 12 * (4096 + 128) * 2 * 8 * 64 * 2
    step = routed * 4 / 32 + attention + table + 2880 * 2 + small + cache
    assert found["tokens_per_second_each"] == pytest.approx(89.6e9 / step, rel=1e-6)
    assert found["limits"][0]["what"] == "memory bandwidth" and found["first_token_seconds"] is None
    # what does not fit is nowhere among those in memory: Llama 70B in 4.5 bits and more is 40 GB
    in_memory = [each for each in answer["offers"] if each["layout"] == "memory"]
    assert all(each["weights_bytes"] + each["cache_bytes"] < 14 * GIB for each in in_memory)
    lost = {loss["model"]: loss for loss in answer["losses"]}
    assert lost["llama-3.1-70b"]["failed"] == "memory" and lost["llama-3.1-70b"]["times_too_much"] > 40 / 15.1


def test_in_which_format_on_a_card_of_24_gb() -> None:
    """Qwen3-30B-A3B on a 4090: Q6_K (6.5625 bits: 25.0 GB) is over 24,564 MiB less 5 % = 24.47 GB, Q5_K_M is not."""
    answer = ask("qwen3-30b-a3b", "--machine", "rtx 4090", "--layout", "memory")
    assert [each["format"] for each in answer["offers"]] == ["q5_k_m", "q4_k_m"]
    lost = {loss["format"]: loss for loss in answer["losses"]}
    assert set(lost) == {"bf16", "q8_0", "q6_k", "fp8"} and lost["q6_k"]["failed"] == "layout"
    assert 24_564 * MIB * 0.95 < 30.5e9 * 6.5625 / 8
    # Q5_K is 5.5 bits, half of the layers' down projections 6.5625; the cache is 48 layers of 4 heads of 128
    found = answer["offers"][0]
    assert found["weights_bytes"] == pytest.approx(30.5e9 * (5.5 * 5 / 6 + 6.5625 / 6) / 8, rel=0.01)
    assert found["cache_bytes"] == 48 * 2 * 4 * 128 * 2 * 4096


def test_how_many_users_have_32k_each_on_one_card() -> None:
    """Mixtral in 4.5 bits on an H100: 12.

    81,559 MiB less 5 % are 81.24 GB. A sequence keeps 32 layers · 2 · 8 heads · 128 · 2 bytes · 32,768 = 4.295 GB.
    Reading 4096 tokens works on 8192 pairs of 4 · 14,336 numbers and 4 · 4096 for each token, 2 bytes each, and 32
    layers' scores and logits of 8 experts, 4 bytes each.
    """
    answer = ask("mixtral-8x7b", "--machine", "h100", "--format", "int4", "--context", "32k")
    found = row(answer, layout="memory")
    working = (8192 * 4 * 14_336 + 4096 * 4 * 4096) * 2 + 32 * 2 * 4096 * 8 * 4
    assert found["working_bytes"] == working
    room = 81_559 * MIB * 0.95 - found["weights_bytes"] - working
    assert found["weights_bytes"] == pytest.approx(46.7e9 * 4.5 / 8, rel=1e-3)
    assert found["most_users"] == int(room // (32 * 2 * 8 * 128 * 2 * 32_768)) == 12


def test_the_longest_context_on_a_laptop() -> None:
    """Llama 3.1 8B in Q8_0 (8.5 bits) with 16 GiB: what is left after 8.5 GB of weights, in pieces of 131,072 bytes."""
    found = row(ask("llama-3.1-8b", "--memory", "16GB", "--format", "q8_0"), format="q8_0")
    weights = (8_030_261_248 - 65 * 4096) * 8.5 / 8 + 65 * 4096 * 32 / 8
    working = 4096 * (3 * 14_336 + 4 * 4096) * 2
    assert found["weights_bytes"] == pytest.approx(weights) and found["working_bytes"] == working
    assert found["longest_context_tokens"] == (14 * GIB - weights - working) // (32 * 2 * 8 * 128 * 2)


def test_fifty_tokens_a_second_for_a_hundred_users() -> None:
    """DeepSeek-V3 in fp8 at 32k on machines of 8 H200 at 3 USD: two of them, 48 USD an hour.

    100 users of one machine touch 256·(1 - (1 - 8/256)^100) = 245 experts a layer and 2.3 GB of cache each: 860 GB at
    38.4 TB/s are 45 tokens a second. 50 users touch 204 and have half the cache: 59.
    """
    options = ("deepseek-v3", "--machine", "h200x8", "--format", "native", "--users", "100", "--context", "32k")
    options += ("--tokens-per-second", "50", "--price", "3")
    alone = ask(*options)
    assert not alone["offers"] and alone["losses"][0]["failed"] == "speed"
    found = row(ask(*options, "--devices", "16"), copies=2)
    assert (found["devices"], found["users_per_copy"], found["usd_per_hour"]) == (8, 50, 48)
    one = 3 * 7168 * 2048 * (8 + 32 / 128**2) / 8
    fixed = found["weights_bytes"] - 58 * 256 * one - 129_280 * 7168 * 2 + 50 * 7168 * 2
    distinct = 256 * (1 - (1 - 8 / 256) ** 50)
    cache = 50 * 70_272 * 32_768
    step = (58 * distinct * one + fixed + cache) / 38.4e12
    assert found["tokens_per_second_each"] == pytest.approx(1 / step, rel=1e-6) and 58 < 1 / step < 60
    assert found["usd_per_million_tokens"] == pytest.approx(24 / 3600 * step / 50 * 1e6, rel=1e-6)
    # the loss is by as much: 100 users on one machine
    distinct, cache = 256 * (1 - (1 - 8 / 256) ** 100), 100 * 70_272 * 32_768
    slow = (58 * distinct * one + fixed + 50 * 7168 * 2 + cache) / 38.4e12
    assert alone["losses"][0]["times_too_much"] == pytest.approx(50 * slow, rel=1e-6)


def test_the_cheapest_of_three_cards() -> None:
    """gpt-oss-120b (65.2 GB) at 300 tokens a second, of cards for 1.8, 2.5 and 2 USD: the RTX PRO 6000 does it.

    A step reads 4 of 128 experts and all else: about 4.1 GB, so 1,792 GB/s give over 400 tokens a second.
    """
    prices = ("--price", "rtx-pro-6000=1.8", "--price", "h100=2.5", "--price", "MI300X=2")
    machines = ("--machine", "rtx-pro-6000", "--machine", "h100", "--machine", "mi300x")
    answer = ask("gpt-oss-120b", *machines, *prices, "--tokens-per-second", "300")
    assert [each["machine"] for each in answer["offers"]] == ["rtx-pro-6000", "mi300x", "h100"]
    rates = [1.792e12, 5.3e12, 3.35e12]
    steps = [rate / each["tokens_per_second_each"] for rate, each in zip(rates, answer["offers"], strict=True)]
    assert steps[0] == pytest.approx(steps[1]) == pytest.approx(steps[2]) and 3.9e9 < steps[0] < 6e9
    cheap = answer["offers"][0]
    by_hand = 1.8 / 3600 / cheap["tokens_per_second_each"] * 1e6
    assert cheap["usd_per_million_tokens"] == pytest.approx(by_hand)
    # with less to spend than that for a million, nothing is left, and it says what it costs
    poor = ask("gpt-oss-120b", *machines, *prices, "--per-million", str(by_hand * 0.3))
    assert not poor["offers"] and {loss["failed"] for loss in poor["losses"]} == {"price per million"}


def test_experts_in_the_memory_of_the_computer_around_a_card() -> None:
    """gpt-oss-120b on a 4090 in a desktop: 4 of 5 wanted experts are on the card, the host reads the others.

    Of 36 layers · 128 experts (60.9 GB) as many fit on the card as all else leaves of 24.47 GB: s = 0.32, for which
    recorded routing hits 0.859 + (0.939 - 0.859)·(s - 0.3)/0.2. The host reads what is missed at 89.6 GB/s.
    """
    found = row(ask("gpt-oss-120b", "--machine", "rtx-4090"), layout="host")
    routed = 36 * 128 * (3 * 2880 * 2880 + 3 * 2880) * 4.25 / 8
    others = found["weights_bytes"] - routed + found["cache_bytes"] + found["working_bytes"]
    room = 24_564 * MIB * 0.95 - others
    assert found["experts_device_bytes"] == pytest.approx(room) and found["experts_disk_bytes"] == 0
    assert found["experts_host_bytes"] == pytest.approx(routed - room)
    share = room / routed
    hits = 0.859 + 0.08 * (share - 0.3) / 0.2
    assert 0.3 < share < 0.35
    seconds = {each["what"]: each["seconds"] for each in found["limits"]}
    assert seconds["host memory"] == pytest.approx((1 - hits) * routed * 4 / 128 / 89.6e9)
    # without a host there is the disk: the same misses, at 7 GB/s
    disk = row(ask("gpt-oss-120b", "--machine", "rtx-4090", "--host", "none"), layout="disk")
    assert disk["tokens_per_second_each"] == pytest.approx(7e9 / ((1 - hits) * routed * 4 / 128))


def test_experts_on_a_disk_of_2_gb_per_second() -> None:
    """Mixtral in 4.5 bits with 16 GiB: 25.4 GB of experts, of which half fit; two of eight a layer are wanted.

    One token's two experts of eight: half of the experts in memory hit as recorded, and what is missed comes at 2 GB/s.
    """
    found = row(ask("mixtral-8x7b", "--memory", "16GB", "--format", "int4", "--disk", "2GB/s"), layout="disk")
    routed = 32 * 8 * 3 * 4096 * 14_336 * 4.5 / 8
    others = found["weights_bytes"] - routed + found["cache_bytes"] + found["working_bytes"]
    share = (14 * GIB - others) / routed
    hits = 0.859 + 0.08 * (share - 0.3) / 0.2 if share < 0.5 else 0.939 + 0.061 * (share - 0.5) / 0.5
    seconds = {each["what"]: each["seconds"] for each in found["limits"]}
    assert 0.4 < share < 0.6 and seconds["disk"] == pytest.approx((1 - hits) * routed * 2 / 8 / 2e9)
    assert found["estimate_tokens_per_second_each"] is None, "nothing is known to estimate a disk by"


def test_a_first_token_within_a_second() -> None:
    """Llama 70B in fp8, a prompt of 8k: an H100 multiplies in fp8 and does, an A100 in bf16 and does not.

    2 · 68.5e9 FLOP of weights for each of 8192 tokens and the head once; scores and values 80 layers · 64 heads · 256
    · 2 FLOP for each of 4096 positions seen on average, in bf16.
    """
    options = ("llama-3.1-70b", "--machine", "h100", "--machine", "a100", "--format", "fp8", "--tokens-in", "8k")
    answer = ask(*options, "--tokens-out", "256", "--ttft", "1")
    (found,) = answer["offers"]
    (lost,) = answer["losses"]
    assert answer["asked"]["context_tokens"] == 8192 + 256
    body, head = 70_553_706_496 - 2 * 128_256 * 8192, 128_256 * 8192
    weights, scores = 2 * (8192 * body + head), 8192 * 4096 * 80 * 64 * 256 * 2
    assert found["machine"] == "h100"
    assert found["first_token_seconds"] == pytest.approx(weights / 1978.9e12 + scores / 989.4e12, rel=1e-6)
    slow = (weights + scores) / 312e12
    assert lost["machine"] == "a100" and lost["failed"] == "first token"
    assert lost["times_too_much"] == pytest.approx(slow, rel=1e-6) and slow > 3


def test_what_a_million_tokens_cost_with_their_prompts() -> None:
    """Llama 8B in fp8 on an L4 at 0.8 USD, 1024 in and 256 out, 16 users: each answer's share of both.

    Four prompts share a pass of 4096 tokens. fp8 at 250.7 TFLOP/s, attention at 125.3; reading at 300 GB/s.
    """
    options = ("llama-3.1-8b", "--machine", "l4", "--format", "fp8", "--users", "16", "--price", "0.8")
    found = row(ask(*options, "--tokens-in", "1k", "--tokens-out", "256"), format="fp8")
    table = 128_256 * 4096
    body, cache = 8_030_261_248 - 2 * table, 16 * 131_072 * 1280
    scores = 4096 * 512 * 32 * 32 * 256 * 2
    reading = 2 * (4096 * body + 4 * table) / 250.7e12 + scores / 125.3e12
    read = found["weights_bytes"] - table * 2 + 16 * 4096 * 2 + cache
    step = read / 300e9
    assert found["tokens_per_second_each"] == pytest.approx(1 / step, rel=1e-6)
    each = step / 16 + reading / 4 / 256
    # a budget that 16 users keep and one does not leaves the most users what they are
    tight = row(ask(*options, "--tokens-in", "1k", "--tokens-out", "256", "--per-million", "1"), format="fp8")
    assert tight["most_users"] == found["most_users"] > 16 and found["usd_per_million_tokens"] < 1
    assert tight["longest_context_tokens"] == found["longest_context_tokens"]
    assert found["usd_per_million_tokens"] == pytest.approx(0.8 / 3600 * each * 1e6, rel=1e-6)
