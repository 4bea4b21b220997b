"""A run goes on with the tokens it was prepared with, or not at all."""

import json
import lzma
from pathlib import Path

import numpy as np
import pytest

from manyhands.errors import CheckpointError, DataError
from manyhands.text import Document, PackedBatches
from manyhands.train.data import FILES, compressors, prepare_data

from ..small_runs import small_run, write_text


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    prepare_data(tmp_path / "data", small_run(write_text(tmp_path)), lambda _: None)
    return tmp_path / "data"


def again(directory: Path, said: list[str] | None = None) -> dict[str, str]:
    run = small_run(directory.parent / "text.txt")
    return prepare_data(directory, run, ([] if said is None else said).append).sha256


def test_unchanged_files_are_taken(prepared: Path) -> None:
    said: list[str] = []
    assert again(prepared, said) == json.loads((prepared / "data.json").read_text())["sha256"]
    assert not said


@pytest.mark.parametrize("name", ["train.npy", "valid.npy"])
def test_other_tokens_of_the_same_length_are_refused(prepared: Path, name: str) -> None:
    ids = np.load(prepared / name)
    np.save(prepared / name, ids[::-1].copy())
    with pytest.raises(DataError, match=rf"{name}: not what was prepared for this run"):
        again(prepared)


def test_another_tokenizer_is_refused(prepared: Path) -> None:
    text = (prepared / "tokenizer.json").read_text()
    (prepared / "tokenizer.json").write_text(text.replace("<|endoftext|>", "<|textend|>"))
    with pytest.raises(DataError, match=r"tokenizer\.json: not what was prepared"):
        again(prepared)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_one_line(prepared: Path, name: str) -> None:
    (prepared / name).unlink()
    with pytest.raises(DataError, match=rf"{name}: cannot be read: No such file"):
        again(prepared)


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "3", "null", "{}", '{"compressors": 3}', '{"compressors": {"xz": "much"}}', "[" * 100_000),
        '{"compressors": {"xz": null}}',
        '{"compressors": {}, "sha256": {"train.npy": "0"}}',
        '{"compressors": {}, "sha256": 7}',
        "\udcff",
    ],
)
def test_a_damaged_data_json_is_one_line(prepared: Path, text: str) -> None:
    (prepared / "data.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=r"data\.json: damaged") as caught:
        again(prepared)
    assert "\n" not in str(caught.value)


def test_an_older_run_is_given_digests_once(prepared: Path) -> None:
    document = json.loads((prepared / "data.json").read_text())
    digests = document.pop("sha256")
    (prepared / "data.json").write_text(json.dumps(document))
    said: list[str] = []
    assert again(prepared, said) == digests
    assert len(said) == 1 and "before files were hashed" in said[0]
    assert again(prepared, said) == digests and len(said) == 1


def test_a_position_is_one_in_these_tokens_alone() -> None:
    tokens = np.arange(100, dtype=np.uint16)
    saved = PackedBatches(tokens, 8, 2, 0, sha256="a" * 64).state_dict()
    PackedBatches(tokens, 8, 2, 0, sha256="a" * 64).load_state_dict(saved)
    with pytest.raises(CheckpointError, match="saved with sha256"):
        PackedBatches(tokens, 8, 2, 0, sha256="b" * 64).load_state_dict(saved)
    older = {name: value for name, value in saved.items() if name != "sha256"}
    PackedBatches(tokens, 8, 2, 0, sha256="b" * 64).load_state_dict(older)


def test_compressors_are_those_of_their_strongest_settings() -> None:
    """A dictionary as long as the text, which takes little memory, finds what the largest does."""
    for text in ("x", "".join(f"{i * i} hands\n" for i in range(9000))):
        strongest = len(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
        assert compressors([Document("a", text)])["xz -9e"] == 8 * strongest / len(text)
