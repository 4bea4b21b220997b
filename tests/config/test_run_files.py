"""Runs from YAML, presets and overrides; what is written is read back equal; no torch on the way."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from manyhands.config import RunConfig
from manyhands.config import load as loading
from manyhands.config.load import dump_run, load_preset, load_run, parse_run, preset_names
from manyhands.errors import ConfigError

TEXT = """
model:
  hidden_size: 64
  moe: {router: {num_experts: 4, num_experts_per_tok: 1}}
optim: {lr: 1.0e-3}
"""


def refusal(text: str, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_run(text, "run.yaml", overrides)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    return message


def test_sections_and_defaults() -> None:
    run = parse_run(TEXT, "run.yaml")
    assert run.model.moe is not None and run.model.moe.router.num_experts == 4
    assert run.model.hidden_size == 64 and run.optim.lr == 1e-3 and run.train == RunConfig().train
    assert parse_run("", "empty") == RunConfig()


def test_overrides_win_and_are_yaml() -> None:
    overrides = (
        "model.hidden_size=128",
        "model.moe.router.num_experts=16",
        "optim.lr=3e-4",
        "data.sources=[a.txt, b.md]",
        "train.max_seconds=null",
        "model.tie_word_embeddings=true",
        "data.tokenizer=x=y",
    )
    run = parse_run(TEXT, "run.yaml", overrides)
    assert run.model.hidden_size == 128 and run.model.moe.router.num_experts == 16
    assert run.model.moe.router.num_experts_per_tok == 1, "its neighbours stay"
    assert run.optim.lr == 3e-4 and run.data.sources == ("a.txt", "b.md") and run.train.max_seconds is None
    assert run.model.tie_word_embeddings is True and run.data.tokenizer == "x=y"


def test_overrides_make_sections_and_the_last_wins() -> None:
    run = parse_run("model:\n", "x", ("model.moe.n_shared_experts=1", "train.seed=1", "train.seed=2"))
    assert run.model.moe.n_shared_experts == 1 and run.train.seed == 2


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.hidden_size", "not of the form section.key=value"),
        ("=3", "not of the form section.key=value"),
        ("model.hidden_siz=3", "did you mean 'hidden_size'?"),
        ("modle.hidden_size=3", "unknown field 'modle'; did you mean 'model'?"),
        ("model.hidden_size.x=3", "'hidden_size' is a value, not a section"),
        ("model.hidden_size=-3", "model.hidden_size = -3"),
        ("model.hidden_size=[", "not a YAML value"),
        ("model.hidden_size=2024-13-45", "not a YAML value"),
        ("model.hidden_size=" + "[" * 600, "not a YAML value"),
        ("data.sources=!!python/object:os.system {}", "not a YAML value"),
    ],
)
def test_bad_overrides(override: str, words: str) -> None:
    assert words in refusal(TEXT, (override,))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: {hidden_size: 8", "not valid YAML"),
        ("- model", "expected sections (data, model, …), found list"),
        ("just words", "found str"),
        ("model: 7", "model = 7"),
        ("train: {trackers: [tensorbord]}", "train.trackers.0 = 'tensorbord'"),
        ("train: {batch_size: 6, micro_batch_size: 4}", "train.micro_batch_size = 4 does not divide"),
        ("train: {sequence_length: 4096}", "exceeds model.max_position_embeddings = 2048"),
        ("balance: {load_coef: 0.1}", "needs a noisy router"),
        ("optim: {lr: .nan}", "optim.lr = nan"),
        ("train: {max_seconds: .inf}", "train.max_seconds = inf"),
        ("data: {seed: 2024-13-45}", "not valid YAML: month must be in 1..12"),
        ("model: {hidden_size: " + "9" * 5000 + "}", "not valid YAML"),
        ("model: {hidden_size: 0x" + "f" * 5000 + "}", "an integer of 20000 bits"),
        ("[" * 600, "not valid YAML"),
        ("x" * ((1 << 20) + 1), "too long"),
        ("model: !!python/name:os.system", "not valid YAML"),
        ("1: 2", "names of fields are text"),
    ],
)
def test_bad_files(text: str, words: str) -> None:
    message = refusal(text)
    assert words in message and message.startswith("run.yaml: ")


def test_an_alias_bomb_is_refused_at_once() -> None:
    """Nine levels of nine aliases are 387 million words when written out."""
    lines = ["data:", "  sources:", "  - &a0 [x,x,x,x,x,x,x,x,x]"]
    lines += [f"  - &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    lines += ["model: *a8"]
    started = time.monotonic()
    assert "run.yaml: " in refusal("\n".join(lines))
    assert time.monotonic() - started < 1.0


def test_round_trip(tmp_path: Path) -> None:
    text = TEXT + "train: {trackers: [wandb]}\n"
    run = parse_run(text, "x", ("model.rope.rope_type=yarn", "model.rope.original_max_position_embeddings=64"))
    path = tmp_path / "run.yaml"
    path.write_text(dump_run(run), encoding="utf-8")
    assert load_run(path) == run and dump_run(load_run(path)) == dump_run(run)


@pytest.mark.parametrize("make", [lambda p: p, lambda p: p / "absent.yaml"])
def test_unreadable_files(make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_run(make(tmp_path))


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00model")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_run(tmp_path / "run.yaml")


def test_every_preset_parses_and_round_trips() -> None:
    names = preset_names()
    for name in names:
        run = load_preset(name)
        assert parse_run(dump_run(run), name) == run
    assert load_preset(names[0], ("train.seed=77",)).train.seed == 77


def test_preset_names_come_from_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny.yaml").write_text(TEXT)
    (tmp_path / "notes.txt").write_text("not a preset")
    monkeypatch.setattr(loading, "_PRESETS", tmp_path)
    assert preset_names() == ["tiny"] and load_preset("tiny").model.hidden_size == 64
    with pytest.raises(ConfigError, match="unknown preset 'tny'; did you mean 'tiny'"):
        load_preset("tny")


def test_importing_config_imports_no_torch() -> None:
    code = (
        "import sys, manyhands.errors, manyhands.config, manyhands.config.load;"
        "print([m for m in ('torch', 'numpy', 'safetensors', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
