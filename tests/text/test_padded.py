"""A called tokenizer: the rectangle and the mask that transformers gives, and what a model makes of them."""

from typing import Any

import numpy as np
import pytest
import torch

from manyhands.errors import CheckpointError, DataError
from manyhands.text import Tokenizer
from manyhands.text.tokenizer_files import TokenizerFiles

from ..engine.conftest import build
from .test_tokenizer_directory import KINDS, config, write

TEXTS = ["the hands", "", "many hands make light work <think> of it", "a"]
ASKED: dict[str, dict[str, Any]] = {
    "nothing": {},
    "longest": {"padding": True},
    "left": {"padding": "longest", "padding_side": "left"},
    "to a length": {"padding": "max_length", "max_length": 60},
    "cut": {"truncation": True, "max_length": 5},
    "cut and filled": {"truncation": True, "max_length": 9, "padding": "max_length"},
    "without <s>": {"padding": True, "add_special_tokens": False, "truncation": True, "max_length": 3},
    "a length alone": {"max_length": 4},
}


@pytest.fixture(scope="module", params=[(kind, side) for kind in KINDS for side in ("left", "right")])
def pair(request, tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    kind, side = request.param
    named = config(bos_token="<s>", eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side=side)
    folder = write(tmp_path_factory.mktemp("files") / "model", KINDS[kind](), tokenizer_config=named)
    return Tokenizer.from_directory(folder), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("asked", ASKED)
def test_it_is_that_of_transformers(pair, asked):
    ours, theirs = pair
    there = theirs(TEXTS, **ASKED[asked])
    assert ours(TEXTS, **ASKED[asked]) == {name: there[name] for name in ("input_ids", "attention_mask")}
    one = theirs(TEXTS[2], **ASKED[asked])
    assert ours(TEXTS[2], **ASKED[asked])["input_ids"] == one["input_ids"]
    assert ours.pad_token_id == theirs.pad_token_id
    spelled = theirs("a<|im_end|>b")["input_ids"]
    assert ours("a<|im_end|>b", split_special_tokens=False)["input_ids"] == spelled != ours("a<|im_end|>b")["input_ids"]


def test_tensors(pair):
    ours, theirs = pair
    here, there = (t(TEXTS, padding=True, return_tensors="pt") for t in (ours, theirs))
    for name in ("input_ids", "attention_mask"):
        assert here[name].dtype == there[name].dtype and torch.equal(here[name], there[name])
    array = ours("a b", return_tensors="np")["input_ids"]
    assert array.dtype == np.int64 and array.shape == (1, len(ours("a b")["input_ids"]))


@pytest.fixture(scope="module")
def own() -> Tokenizer:
    return Tokenizer.train(["def f(x):\n    return x + 1\n" * 9], 258)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_model_takes_it_and_sees_no_padding(own, side):
    """Each text's logits are those of the text alone."""
    model = build()
    texts = ["return x", "def", "def f(x + 1)"]
    batch = own(texts, padding=True, padding_side=side, return_tensors="pt")
    together = model(**batch).logits
    for row, text in enumerate(texts):
        alone = model(**own(text, return_tensors="pt")).logits[0]
        torch.testing.assert_close(together[row][batch["attention_mask"][row].bool()], alone, rtol=1e-5, atol=1e-5)


WRONG = {
    "ragged": ({"return_tensors": "pt"}, "padding=True"),
    "tensors": ({"return_tensors": "tf"}, "'pt'"),
    "padding": ({"padding": "most"}, "padding = 'most'"),
    "no length": ({"padding": "max_length"}, "needs max_length"),
    "nothing to cut to": ({"truncation": True}, "truncation needs max_length"),
    "idle": ({"padding": True, "max_length": 2}, "does nothing"),
    "side": ({"padding": True, "padding_side": "top"}, "'left' or 'right'"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_not_there_is_one_line(own, wrong):
    asked, said = WRONG[wrong]
    with pytest.raises(DataError, match=said):
        own(TEXTS, **asked)


def test_nothing_to_pad_with(tmp_path):
    inner = KINDS["sentencepiece"]()
    with pytest.raises(CheckpointError, match="padding_side"):
        Tokenizer.from_directory(write(tmp_path / "m", inner, tokenizer_config=config(padding_side="up")))
    tokenizer = Tokenizer(inner, TokenizerFiles())
    tokenizer.eos_token_id = None
    with pytest.raises(DataError, match="neither a pad_token"):
        tokenizer(["a", "a b c"], padding=True)


def test_back_to_texts(pair) -> None:
    """Of lists, arrays and tensors, as transformers does it."""
    ours, theirs = pair
    ids = ours(TEXTS[:1] + TEXTS[2:], padding=True, split_special_tokens=False)["input_ids"]
    for skip in (False, True):
        expected = [theirs.decode(row, skip_special_tokens=skip, clean_up_tokenization_spaces=False) for row in ids]
        for rows in (ids, np.asarray(ids), torch.tensor(ids)):
            assert ours.batch_decode(rows, skip_special_tokens=skip) == expected
