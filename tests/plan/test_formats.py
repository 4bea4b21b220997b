"""Formats by the names that people use: bits from the block types, sizes beside files that are public."""

import pytest

from manyhands.catalog import load
from manyhands.errors import ConfigError
from manyhands.plan import count_model
from manyhands.plan.formats import NAMED, SPELLINGS, block_bits
from manyhands.plan.machine import machine_named
from manyhands.plan.storage import INT4, INT8, MXFP4, STORAGES, storage_named, weight_bytes


def test_bits_by_hand() -> None:
    """Q4_K: 144 bytes for 256 weights; half of the layers keep their down projection in Q6_K, 210 bytes for 256."""
    found = NAMED["q4_k_m"]
    assert block_bits("Q4_K") == 144 * 8 / 256 == 4.5 and block_bits("Q6_K") == 6.5625
    assert found.bits("routed experts") == found.bits("dense feed-forward") == (4.5 + 4.5 + (4.5 + 6.5625) / 2) / 3
    assert (found.bits("attention"), found.bits("embedding"), found.bits("head")) == (4.5, 4.5, 6.5625)
    assert found.bits("router") == 32
    assert NAMED["awq"].linear == NAMED["gptq"].linear == 4 + 20 / 128 and NAMED["awq"].embedding == 16
    assert NAMED["nvfp4"].linear == block_bits("NVFP4") == 4.5 and MXFP4.routed == block_bits("MXFP4")
    assert (NAMED["q8_0"].routed, NAMED["q4_0"].routed) == (INT8.routed, INT4.routed)


def test_more_bits_are_more_bits() -> None:
    order = ["q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k", "q8_0"]
    routed = [NAMED[name].routed for name in order]
    assert routed == sorted(routed) and len(set(routed)) == len(routed)


def test_names() -> None:
    assert storage_named("Q4_K_M", None) is NAMED["q4_k_m"] and storage_named("fp16", None).name == "bf16"
    assert all(target in STORAGES | NAMED for target in SPELLINGS.values())
    assert not set(SPELLINGS) & set(STORAGES | NAMED) and not set(STORAGES) & set(NAMED)
    with pytest.raises(ConfigError, match="did you mean 'q4_k_m'"):
        storage_named("q4_km", None)


def test_four_bits_multiply_at_the_rate_of_four_bits_where_there_is_one() -> None:
    wanted = NAMED["nvfp4"].rate
    assert machine_named("b200").rate(wanted) == ("fp4", 9000e12)
    assert machine_named("h100").rate(wanted) == ("fp8", 1978.9e12)
    assert machine_named("a100").rate(wanted) == ("bf16", 312e12)


# GB of the files in https://huggingface.co/mradermacher/Qwen3-30B-A3B-abliterated-GGUF, as its page lists them.
QWEN3_30B_A3B = {
    "q2_k": 11.4,
    "q3_k_s": 13.4,
    "q3_k_m": 14.8,
    "q3_k_l": 16.0,
    "iq4_xs": 16.7,
    "q4_k_s": 17.6,
    "q4_k_m": 18.7,
    "q5_k_s": 21.2,
    "q5_k_m": 21.8,
    "q6_k": 25.2,
    "q8_0": 32.6,
}


@pytest.mark.parametrize(("name", "size"), QWEN3_30B_A3B.items())
def test_sizes_of_public_files(name: str, size: float) -> None:
    """Within 1.5 %: which layers take more bits is a rule over whole layers, and llama.cpp knows more exceptions."""
    config = load("qwen3-30b-a3b").config
    assert config is not None
    assert weight_bytes(count_model(config), NAMED[name]) / 1e9 == pytest.approx(size, rel=0.015)
