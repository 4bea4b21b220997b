"""Token files: what is written is what is read, and damage is noticed."""

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Inner
from tokenizers import models

from manyhands.errors import DataError, StorageError
from manyhands.text import Document, TokenFile, TokenInfo, Tokenizer, encode_documents, write_tokens
from manyhands.text import token_file as token_file_module

TOKENIZER = Tokenizer.train(["some words and words"], 280)
DOCUMENTS = [Document("a", "some words\n"), Document("b", "<|endoftext|> ü"), Document("c", "words")]


def test_documents_come_back_each_with_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = write_tokens(tmp_path / "t.npy", DOCUMENTS, TOKENIZER)
    file = TokenFile.open(tmp_path / "t.npy", TOKENIZER.vocab_size)
    ids = file.ids.tolist()
    assert file.info == info == TokenInfo(num_tokens=len(ids), num_bytes=11 + 16 + 5, num_documents=3)
    assert ids == [i for d in DOCUMENTS for i in [*TOKENIZER.encode(d.text), 0]]
    assert ids.count(0) == 3
    assert TOKENIZER.byte_lengths()[ids].sum() == info.num_bytes
    assert file.ids.dtype == np.uint16 and isinstance(file.ids, np.memmap)
    monkeypatch.setattr(token_file_module, "_CHUNK_CHARACTERS", 3)
    write_tokens(tmp_path / "chunks.npy", DOCUMENTS, TOKENIZER)
    assert TokenFile.open(tmp_path / "chunks.npy", 280).ids.tolist() == ids
    assert len(list(tmp_path.iterdir())) == 4  # no temporary file is left


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)])
def test_ids_are_as_wide_as_the_vocabulary(tmp_path: Path, vocab_size: int, dtype: type) -> None:
    inner = Inner(models.BPE({"a": 0, "</s>": 1, "b": vocab_size - 1}, []))
    write_tokens(tmp_path / "t.npy", [Document("x", "abba")], Tokenizer(inner))
    ids = TokenFile.open(tmp_path / "t.npy", vocab_size).ids
    assert ids.dtype == dtype
    assert ids.tolist() == [0, vocab_size - 1, vocab_size - 1, 0, 1]
    with pytest.raises(DataError, match=f"token id {vocab_size - 1} does not fit"):
        TokenFile.open(tmp_path / "t.npy", vocab_size - 1)


def test_a_tokenizer_without_an_end_of_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="endoftext"):
        write_tokens(tmp_path / "t.npy", DOCUMENTS, Tokenizer(Inner(models.BPE({"a": 0}, []))))
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.npy"
    before = write_tokens(path, DOCUMENTS, TOKENIZER)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(StorageError, match="No space left"):
        write_tokens(path, DOCUMENTS[:1], TOKENIZER)
    assert TokenFile.open(path, 280).info == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["t.npy", "t.npy.json"]


def test_damage_is_noticed(tmp_path: Path) -> None:
    path, sidecar = tmp_path / "t.npy", tmp_path / "t.npy.json"
    with pytest.raises(DataError, match=r"t\.npy: cannot be read"):
        TokenFile.open(path, 280)
    write_tokens(path, DOCUMENTS, TOKENIZER)
    good = path.read_bytes(), sidecar.read_bytes()
    for ids, info in (
        (b"", good[1]),
        (b"nonsense", good[1]),
        (good[0][:-6], good[1]),
        (good[0], b"{}"),
        (good[0], b"[]"),
        (good[0], b"nonsense"),
        (good[0], good[1].replace(b'_tokens": ', b'_tokens": 1')),
    ):
        path.write_bytes(ids)
        sidecar.write_bytes(info)
        with pytest.raises(DataError, match=r"t\.npy(\.json)?: ") as caught:
            TokenFile.open(path, 280)
        assert "\n" not in str(caught.value)


def test_other_arrays_and_pickles_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.npy"
    write_tokens(path, DOCUMENTS, TOKENIZER)
    for array in (np.zeros(5), np.zeros((2, 3), np.uint16), np.zeros(5, np.int64), np.array([{}], dtype=object)):
        np.save(path, array, allow_pickle=True)
        with pytest.raises(DataError, match="not a token file"):
            TokenFile.open(path, 280)


def test_progress_is_told_by_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manyhands.text.token_file._CHUNK_CHARACTERS", 10)
    documents = [Document(f"d{i}", "abcd") for i in range(7)]
    tokenizer, told = Tokenizer.train(["abcd" * 9], 260), list[int]()
    ids = encode_documents(documents, tokenizer, told.append)
    assert told == [12, 24, 28] and (ids == encode_documents(documents, tokenizer)).all()
