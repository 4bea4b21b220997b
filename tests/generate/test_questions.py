"""lm-eval's questions become the tokens that its own models make of them."""

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from manyhands.errors import ConfigError, UserError
from manyhands.generate.questions import SEED, Asker, cut, sampling_of
from manyhands.text import Tokenizer
from manyhands.text.tokenizer_files import TokenizerFiles

TEXT = "def f(x):\n    return x + 1\n"

LONG = (TEXT * 3).rstrip()


def with_bos() -> Tokenizer:
    """Bytes, and `<s>` in front, as Llama's."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.add_special_tokens(["<s>", "</s>"])
    bos = inner.token_to_id("<s>")
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return Tokenizer(inner, TokenizerFiles(named_tokens={"bos_token": "<s>", "eos_token": "</s>"}))


def windows_of_lm_eval(ids, prefix, length):
    """`get_rolling_token_windows` with a context of one token, then `make_disjoint_window`, as lm-eval has them."""
    found, predicted = [], min(length, len(ids))
    if ids:
        found.append(([prefix, *ids[: predicted - 1]], ids[:predicted]))
    while predicted < len(ids):
        count = min(len(ids) - predicted, length)
        end = predicted + count
        found.append((ids[end - length - 1 : end - 1], ids[end - count : end]))
        predicted += count
    return [(a[: len(a) - (len(b) - 1)], b) for a, b in found]


def test_spaces_at_the_end_of_a_context_go_to_the_continuation(tokenizer) -> None:
    asker = Asker(tokenizer, 100)
    front, behind = asker.pair("def f(x):  \n ", "return x")
    assert front == tokenizer.encode("def f(x):")
    assert tokenizer.decode(behind) == "  \n return x"
    assert front + behind == tokenizer.encode("def f(x):  \n return x")


def test_a_token_that_spans_both_counts_as_context(tokenizer) -> None:
    merged = next(i for i in range(257, tokenizer.vocab_size) if tokenizer.decode([i]).isalpha())
    text = tokenizer.decode([merged])
    assert tokenizer.encode(text) == [merged] and len(text) > 1
    assert Asker(tokenizer, 100).pair(text[:1], text[1:]) == (tokenizer.encode(text[:1]), [])


@pytest.mark.parametrize("context", ["", "  ", "\n"])
def test_without_a_context_the_end_of_text_is_given(tokenizer, context) -> None:
    front, behind = Asker(tokenizer, 100).pair(context, "return")
    assert front == [tokenizer.eos_token_id]
    assert tokenizer.decode(behind) == context + "return"


def test_the_beginning_of_text_stands_in_front_once() -> None:
    tokenizer = with_bos()
    bos = tokenizer.inner.token_to_id("<s>")
    asker = Asker(tokenizer, 100)
    assert asker.prefix == bos
    assert asker.encode("ab") == [bos, *tokenizer.encode("ab")] == asker.encode("<s>ab")
    assert asker.pair("ab", "cd") == ([bos, *tokenizer.encode("ab")], tokenizer.encode("cd"))
    assert asker.pair("", "cd") == ([bos], tokenizer.encode("cd"))
    assert asker.windows("abcd") == [([bos], tokenizer.encode("abcd"))] == asker.windows("<s>abcd")
    assert asker.prompt("ab", 5) == [bos, *tokenizer.encode("ab")]


def test_no_beginning_of_text_if_it_is_not_wanted(tokenizer) -> None:
    bare = with_bos()
    assert Asker(bare, 100, add_bos=False).encode("ab") == bare.encode("ab")
    assert Asker(tokenizer, 100, add_bos=True).encode("ab") == [tokenizer.eos_token_id, *tokenizer.encode("ab")]


def test_special_tokens_that_are_spelled_out_are_tokens(tokenizer) -> None:
    assert Asker(tokenizer, 100).encode("a<|endoftext|>") == [*tokenizer.encode("a"), tokenizer.eos_token_id]


@pytest.mark.parametrize("length", [1, 2, 3, 7, 50])
def test_long_contexts_are_cut_from_the_left(tokenizer, length) -> None:
    whole = Asker(tokenizer, 1000).pair(LONG, "@")
    assert len(whole[1]) == 1
    front, behind = Asker(tokenizer, length).pair(LONG, "@")
    assert behind == whole[1] and front == whole[0][-length:]


def test_a_continuation_that_does_not_fit_is_refused(tokenizer) -> None:
    with pytest.raises(UserError, match="sees 3 at a time"):
        Asker(tokenizer, 3).pair("a", "@#$%")
    assert len(Asker(tokenizer, 3).pair("abc", "@#$")[0]) == 1


@pytest.mark.parametrize("length", [1, 2, 5, 16, 1000])
@pytest.mark.parametrize("count", [0, 1, 2, 5, 15, 16, 17, 33])
def test_windows_are_those_of_lm_eval(length, count) -> None:
    tokenizer = with_bos()
    asker = Asker(tokenizer, length)
    text = ("abcdefghijklmnopqrstuvwxyz" * 2)[:count]
    assert len(tokenizer.encode(text)) == count, "a byte a token"
    assert asker.windows(text) == windows_of_lm_eval(tokenizer.encode(text), asker.prefix, length)


def test_a_prompt_leaves_room_for_the_answer(tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    assert Asker(tokenizer, 20).prompt(TEXT, 15) == ids[-5:]
    assert Asker(tokenizer, 500).prompt(TEXT, 15) == ids
    assert Asker(tokenizer, 20).prompt("", 15) == [tokenizer.eos_token_id]
    with pytest.raises(UserError, match="max_gen_toks = 20"):
        Asker(tokenizer, 20).prompt(TEXT, 20)


def test_settings_are_greedy_unless_they_say_otherwise() -> None:
    sampling, stops = sampling_of({}, 77)
    assert (sampling.temperature, sampling.max_new_tokens, sampling.stop, stops) == (0.0, 77, (), ())
    assert sampling.seed == SEED
    assert sampling_of({"do_sample": False, "temperature": 0.7}, 9)[0].temperature == 0.0
    assert sampling_of({"temperature": 0.7}, 9)[0].temperature == 0.7
    assert sampling_of({"do_sample": True}, 9)[0].temperature == 1.0
    assert sampling_of({"do_sample": True, "temperature": 0.2, "top_p": 0.9, "top_k": 0}, 9)[0].top_k is None


@pytest.mark.parametrize("name", ["max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"])
def test_the_length_has_four_names(name) -> None:
    assert sampling_of({name: 5}, 99)[0].max_new_tokens == 5
    assert sampling_of({"max_gen_toks": 3, name: 5}, 99)[0].max_new_tokens == (5 if name == "max_gen_toks" else 3)


def test_stops() -> None:
    assert sampling_of({"until": "\n\n"}, 9)[1] == ("\n\n",)
    assert sampling_of({"until": ["a", "", "b"]}, 9)[0].stop == ("a", "b")
    many = [f"stop {i}." for i in range(30)]
    sampling, stops = sampling_of({"until": many}, 9)
    assert len(sampling.stop) == 16 and stops == tuple(many)
    assert cut("one stop 29. two stop 3. three", stops) == "one "


def test_what_would_change_tokens_is_not_dropped_in_silence() -> None:
    assert sampling_of({"num_beams": 1, "use_cache": True, "typical_p": 1.0, "length_penalty": None}, 9)
    for settings in ({"num_beams": 4}, {"typical_p": 0.5}, {"no_repeat_ngram_size": 3}, {"unheard_of": 1}):
        with pytest.raises(UserError, match=next(iter(settings))):
            sampling_of(settings, 9)
    with pytest.raises(ConfigError, match="top_p"):
        sampling_of({"top_p": 7.0}, 9)
    for wrong in ("many", -1, [3]):
        with pytest.raises(ConfigError, match="max_new_tokens"):
            sampling_of({"max_gen_toks": wrong}, 9)
