"""Sampling as the publisher has it, unless told otherwise, and said in one line."""

import pytest

from manyhands.errors import CheckpointError, ConfigError
from manyhands.generate.defaults import sampling_from

QWEN = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.0, "eos_token_id": 3}


def values(published, **asked):
    sampling, line = sampling_from(published, asked, max_new_tokens=7)
    assert sampling.max_new_tokens == 7
    return sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, line


def test_defaults():
    assert values({}) == values({"eos_token_id": [1]}) == (0.8, None, 1.0, 0.0, None)
    line = "sampling: temperature 0.6, top_k 20, top_p 0.95 from generation_config.json"
    assert values(QWEN) == (0.6, 20, 0.95, 0.0, line)
    *found, line = values(QWEN, temperature=0.0, min_p=0.1)
    assert found == [0.0, 20, 0.95, 0.1]
    assert line == "sampling: top_k 20, top_p 0.95 from generation_config.json; greedy as asked"
    assert values({"do_sample": False, "temperature": 0.6})[0] == 0
    assert values({"top_k": 0, "temperature": 1})[:2] == (1.0, None)
    assert values({"repetition_penalty": 1.05, "num_beams": 1})[4] == (
        "sampling: not done here: repetition_penalty 1.05 of generation_config.json"
    )


@pytest.mark.parametrize("wrong", [{"temperature": "hot"}, {"top_p": 7}, {"top_k": -1}, {"min_p": [1]}])
def test_a_file_that_is_wrong_is_named(wrong):
    with pytest.raises(CheckpointError, match=f"generation_config.json: .*{next(iter(wrong))}"):
        values(wrong)
    with pytest.raises(ConfigError):
        values({}, **wrong)
