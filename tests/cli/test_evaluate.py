"""`manyhands eval`: the figures are those of the tokens that were predicted."""

import json
import math
from pathlib import Path

import pytest

import manyhands as mh
from manyhands.text import Tokenizer, encode_documents, read_documents

from ..small_runs import manyhands

TEXT = "the quick brown fox jumps over the lazy dog, and the dog does not mind\n" * 40


def test_bits_per_byte_of_a_part_counts_the_bytes_predicted(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("quick " + TEXT)
    tokenizer = Tokenizer.train([TEXT], 300)
    model = mh.Decoder(mh.ModelConfig(vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=1))
    mh.init_weights(model, seed=0)
    mh.save(model, tmp_path / "model", tokenizer)
    arguments = ("--sequence-length", "8", "--batch-size", "2", "--max-batches", "1", "--json")
    done = manyhands("eval", str(tmp_path / "model"), "--data", str(tmp_path / "text.txt"), *arguments)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    ids = encode_documents(read_documents([str(tmp_path / "text.txt")], "text"), tokenizer)
    lengths = tokenizer.byte_lengths()[ids]
    assert lengths[0] != lengths[16], "or nothing is tested"
    assert found["tokens"] == 16 and found["bytes"] == lengths[1:17].sum()
    assert found["bits_per_byte"] == pytest.approx(found["loss"] * 16 / math.log(2) / found["bytes"], rel=1e-3)
