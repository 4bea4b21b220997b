"""Tokenizers learned within a published rule: the rule is the publisher's, and the tokenizer says which it is."""

import json

import pytest
import tokenizers
from tokenizers import pre_tokenizers

from manyhands.config import RunConfig
from manyhands.errors import ConfigError
from manyhands.text import Tokenizer
from manyhands.text.pretokenizers import PRES, RULES, Pre, pre_of, pre_tokenizer

TEXT = "Hello, world!  It's 12345 o'clock.\n\n\tNaïve café; ½ × 3 — 你好 🙂\r\n  if x:\n    return y_1\nwe'LL\n \n  \n"
PUBLISHED: dict[Pre, list[str]] = {  # by hand, from the publishers' patterns
    "llama-bpe": ["It", "'s", " ", "123", "45", " o", "'clock", ".\n\n", "\tNa"],
    "qwen2": ["It", "'s", " ", "1", "2", "3", "4", "5", " o", "'clock", ".\n\n", "\tNa"],
    "gpt-2": ["It", "'s", " 12345", " o", "'", "clock", ".", "\n\n", "\t", "Na"],
}


@pytest.mark.parametrize("pre", PRES)
def test_a_text_is_cut_as_the_publisher_cuts_it(pre: Pre) -> None:
    cut = [piece for piece, _ in pre_tokenizer(pre).pre_tokenize_str("It's 12345 o'clock.\n\n\tNa")]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    assert cut == ["".join(piece for piece, _ in byte_level.pre_tokenize_str(part)) for part in PUBLISHED[pre]]


@pytest.mark.parametrize("pre", [None, *PRES])
def test_what_was_learned_within_a_rule_says_which(pre: Pre | None) -> None:
    tokenizer = Tokenizer.train([TEXT] * 4, 300, pre)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    content = json.loads(tokenizer.inner.to_str())
    assert pre_of(content) == pre
    again = tokenizers.Tokenizer.from_str(tokenizer.inner.to_str())
    assert again.encode(TEXT).ids == tokenizer.encode(TEXT)
    if pre is not None:
        assert content["model"]["ignore_merges"] is RULES[pre].ignore_merges
        content["model"]["ignore_merges"] = not RULES[pre].ignore_merges  # merges otherwise than llama.cpp would
        assert pre_of(content) is None


def test_a_rule_that_is_nearly_a_published_one_is_not_it() -> None:
    content = json.loads(Tokenizer.train([TEXT], 280, "qwen2").inner.to_str())
    split = content["pre_tokenizer"]["pretokenizers"][0]
    split["pattern"]["Regex"] = split["pattern"]["Regex"].replace(r"\p{N}|", r"\p{N}{1,2}|", 1)
    assert pre_of(content) is None


def test_a_tokenizer_that_is_there_has_its_rule_already() -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.pre = 'qwen2' is for a tokenizer that is trained"):
        RunConfig.model_validate({"tokenizer": {"pre": "qwen2"}, "data": {"tokenizer": "there.json"}})
    assert RunConfig.model_validate({"tokenizer": {"pre": "gpt-2"}}).tokenizer.pre == "gpt-2"
