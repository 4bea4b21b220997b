"""The validation split: its share, its stability, its edges."""

import random

import pytest

from manyhands.errors import DataError
from manyhands.text import Document, split_documents


def corpus(count: int, seed: int = 0) -> list[Document]:
    """Documents whose sizes span three orders of magnitude."""
    draw = random.Random(seed)
    return [Document(f"d{i}", "é" * int(10 ** draw.uniform(1, 4))) for i in range(count)]


def size(documents: list[Document]) -> int:
    return sum(document.num_bytes for document in documents)


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.3, 0.9])
@pytest.mark.parametrize("seed", [0, 1, -7])
def test_share_is_of_bytes_and_nothing_is_lost(fraction: float, seed: int) -> None:
    documents = corpus(300)
    train, valid = split_documents(documents, fraction, seed)
    assert size(valid) / size(documents) == pytest.approx(fraction, rel=0.051)
    assert sorted([*train, *valid], key=documents.index) == documents
    assert train == sorted(train, key=documents.index)


def test_side_follows_name_and_seed_not_order() -> None:
    documents = corpus(300)
    _, valid = split_documents(documents, 0.1, 0)
    _, shuffled = split_documents(documents[::-1], 0.1, 0)
    assert {d.name for d in valid} == {d.name for d in shuffled}
    _, other = split_documents(documents, 0.1, 1)
    assert {d.name for d in valid} != {d.name for d in other}


def test_adding_documents_moves_few() -> None:
    documents = corpus(300)
    _, before = split_documents(documents, 0.1, 0)
    _, after = split_documents([*documents, Document("new", "x" * 1000)], 0.1, 0)
    assert len({d.name for d in before} & {d.name for d in after}) > 0.8 * len(before)


def test_one_document_is_cut_at_a_line() -> None:
    text = "".join(f"line {i} ü\n" for i in range(1000))
    (head,), (tail,) = split_documents([Document("book", text)], 0.1, 0)
    assert head.text + tail.text == text and head.name == tail.name == "book"
    assert head.text.endswith("\n") and tail.text.startswith("line ")
    assert tail.num_bytes / len(text.encode()) == pytest.approx(0.1, rel=0.02)


def test_one_line_is_cut_between_characters() -> None:
    text = "\U0001f600" * 1000
    (head,), (tail,) = split_documents([Document("line", text)], 0.1, 0)
    assert head.text + tail.text == text
    assert len(tail.text) == 100
    far = "x" * 900 + "\n" + "y" * 10_000  # its only line break is nowhere near
    (_,), (tail,) = split_documents([Document("far", far)], 0.1, 0)
    assert len(tail.text) == pytest.approx(1090, rel=0.01)


def test_few_large_documents_are_not_swallowed_whole() -> None:
    documents = [Document(name, "some line\n" * 1000) for name in "ab"]
    train, valid = split_documents(documents, 0.05, 0)
    assert [d.name for d in train] == ["a", "b"]
    assert size(valid) == pytest.approx(1000, rel=0.05)
    assert size(train) + size(valid) == size(documents)


@pytest.mark.parametrize("documents", [[], [Document("a", "")], [Document("a", "x")], [Document("a", "é")]])
def test_too_little_text(documents: list[Document]) -> None:
    with pytest.raises(DataError, match="too little text"):
        split_documents(documents, 0.5, 0)


def test_the_sample_is_not_one_of_small_documents() -> None:
    """Five in a hundred of 151 documents are seven or eight; filling up with whatever still fits takes twenty."""
    counts = []
    for seed in range(20):
        documents = corpus(151, seed)
        _, valid = split_documents(documents, 0.05, seed)
        assert size(valid) / size(documents) == pytest.approx(0.05, rel=0.051)
        counts.append(len(valid))
    assert 5 <= sum(counts) / len(counts) <= 14, counts


@pytest.mark.parametrize("seed", range(5))
def test_one_text_is_on_one_side_only(seed: int) -> None:
    documents = corpus(200, seed)
    copies = [Document(f"copy of {d.name}", d.text) for d in documents[::3]]
    train, valid = split_documents([*documents, *copies], 0.1, seed)
    assert not {d.text for d in train} & {d.text for d in valid}
    again, _ = split_documents([*copies, *documents][::-1], 0.1, seed)
    assert {d.name for d in again} == {d.name for d in train}


def test_copies_of_the_one_that_is_cut_are_cut_with_it() -> None:
    text = "".join(f"line {i}\n" for i in range(3000))
    train, valid = split_documents([Document(name, text) for name in "abc"], 0.05, 0)
    assert [d.name for d in train] == [d.name for d in valid] == ["a", "b", "c"]
    assert not any(d.text.splitlines()[-1] in head.text for d in valid for head in train)
    assert size(valid) == pytest.approx(0.05 * 3 * len(text), rel=0.05)
