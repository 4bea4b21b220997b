"""`manyhands inspect`: a page that loads nothing, JSON, and one line for each mistake."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import manyhands as mh
from manyhands.text import Tokenizer
from manyhands.trace.recording import Phase, Recorder

from ..small_runs import manyhands

TEXT = "the quick brown fox jumps over the lazy dog, and the dog does not mind\n" * 40
TREE = "".join(
    f"# newdoc id = {i}\n"
    + "".join(
        "\t".join([str(n), form, "_", tag, *"______"]) + "\n"
        for n, (form, tag) in enumerate([("the", "DET"), ("quick", "ADJ"), ("<b>dog", "NOUN"), ("mind", "VERB")], 1)
    )
    + "\n"
    for i in range(40)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    tokenizer = Tokenizer.train([TEXT], 300)
    moe = mh.MoEConfig(moe_intermediate_size=16, router={"num_experts": 4, "num_experts_per_tok": 2})
    config = mh.ModelConfig(vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=2, moe=moe)
    for name, seed in (("model", 0), ("other", 1)):
        model = mh.Decoder(config)
        mh.init_weights(model, seed=seed)
        mh.save(model, folder / name, tokenizer)
    (folder / "text.txt").write_text(TEXT)
    (folder / "tree.conllu").write_text(TREE)
    return folder


def test_a_page_that_loads_nothing(folder: Path, tmp_path: Path) -> None:
    data = ("--data", str(folder / "tree.conllu"), "--data", str(folder / "text.txt"))
    arguments = ("inspect", str(folder / "model"), *data, "--against", str(folder / "other"), "--draws", "10")
    done = manyhands(*arguments, "--sequence-length", "16", "--max-tokens", "500", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "part of speech" in done.stdout and "inspect.html" in done.stdout
    page = (tmp_path / "inspect.html").read_text()
    assert not re.search(r"(?:src|href)=\"(?!data:)|url\(|@import|https?://", page)
    assert "<b>dog" not in page, "text is text"
    for said in ("random router", "Beside", "coloured by the expert", "The domain tells"):
        assert said in page
    assert len(page) < 300_000
    again = manyhands(*arguments, "--sequence-length", "16", "--max-tokens", "500", cwd=tmp_path)
    second = (tmp_path / "inspect.html").read_text()
    assert again.returncode == 0 and second.split("<footer>")[0] == page.split("<footer>")[0], (
        "the same seed, the same page"
    )


def test_json_prints_every_figure_and_writes_no_page(folder: Path, tmp_path: Path) -> None:
    done = manyhands(
        *("inspect", str(folder / "model"), "--data", str(folder / "tree.conllu"), "--json", "--draws", "10"),
        cwd=tmp_path,
    )
    assert done.returncode == 0 and not list(tmp_path.iterdir())
    found = json.loads(done.stdout)
    assert found["texts"] == 40 and found["aligned"] > 0.7 and len(found["layers"]) == 2
    figure = found["layers"][0]["syntax"]["bits"]
    assert figure["low"] <= figure["value"] <= figure["high"] and figure["random"] is not None


def test_a_trace_says_that_no_random_router_stands_beside_it(folder: Path, tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 4, (200, 1, 1))
    with Recorder(tmp_path / "t", layers=(0,), num_experts=4, num_experts_per_tok=1, recorded=()) as recorder:
        recorder.add_arrays(
            ids,
            token_ids=np.arange(200) % 9,
            sequence=0,
            position=np.arange(200),
            phase=Phase.DECODE,
            step=np.arange(200),
        )
    done = manyhands(
        "inspect", str(tmp_path / "t"), "--tokenizer", str(folder / "model"), "--draws", "10", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "inspect.html").read_text()
    assert "No random router stands beside these figures" in page and "coloured by the expert" in page
    assert manyhands("inspect", str(tmp_path / "t"), "--json", cwd=tmp_path).returncode == 0
    short = manyhands("inspect", str(tmp_path / "t"), "--max-tokens", "50", cwd=tmp_path)
    assert short.returncode == 0 and "nan" not in short.stdout and "Too few texts" in short.stdout
    refused = manyhands("inspect", str(tmp_path / "t"), "--data", "stdlib", cwd=tmp_path)
    assert refused.returncode == 2 and "--data is for a model" in refused.stderr


def test_mistakes_are_one_line(folder: Path, tmp_path: Path) -> None:
    model, tree = str(folder / "model"), str(folder / "tree.conllu")
    (tmp_path / "mine.html").write_text("my own page")
    for arguments, complaint in (
        ((model,), "give --data TEXT"),
        ((model, "--data", str(tmp_path / "none.conllu")), "cannot be read"),
        ((model, "--data", tree, "--checkpoints"), "not a run with two checkpoints"),
        ((model, "--data", tree, "--tokenizer", model), "--tokenizer is for a trace"),
        ((model, "--data", tree, "--out", str(tmp_path / "mine.html")), "was not made by this program"),
        ((str(tmp_path / "nothing"), "--data", tree), "does not exist"),
    ):
        done = manyhands("inspect", *arguments, "-q", cwd=tmp_path)
        assert done.returncode == 2 and complaint in done.stderr, (arguments, done.stderr)
        assert done.stderr.count("\n") == 1 and not done.stdout
    assert (tmp_path / "mine.html").read_text() == "my own page"
