"""Losses kept document by document: what is written is read, the best stays, a damaged file is refused in one line."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from manyhands.errors import DataError
from manyhands.trace.documents import DocumentLosses, Documents, Losses, Sums, keep_losses

TEXTS = ["a", "", "größer", "d" * 99]


def sums(*nats: float) -> Sums:
    ends = np.array([3, 4, 9, 20])
    return Sums(ends, np.array(nats, float), np.diff(ends, prepend=1))


def test_documents_are_known_by_their_text(tmp_path: Path) -> None:
    Documents.of(TEXTS).save(tmp_path / "d")
    found = Documents.open(tmp_path / "d")
    assert found.bytes_X.tolist() == [1, 0, 8, 99]
    assert [row.tobytes() for row in found.sha256_X] == [hashlib.sha256(t.encode()).digest()[:16] for t in TEXTS]


def test_sums_come_in_any_cut() -> None:
    """Token by token, all at once: every target's loss is its document's; what is not asked counts nothing."""
    rng = np.random.default_rng(0)
    losses, asked = rng.random(19), rng.random(19) > 0.2
    document = np.array([0] * 2 + [1] + [2] * 5 + [3] * 11)
    for cuts in ([19], [1] * 19, [2, 7, 10]):
        found, at = Sums.of(np.array([3, 4, 9, 20])), 0
        for size in cuts:
            found.add(1 + at, losses[at : at + size], asked[at : at + size])
            at += size
        for x in range(4):
            mine = (document == x) & asked
            assert found.nats_X[x] == pytest.approx(losses[mine].sum(), rel=1e-14) and found.targets_X[x] == mine.sum()


def test_the_best_stays(tmp_path: Path) -> None:
    path, documents = tmp_path / "documents.safetensors", Documents.of(TEXTS)

    def steps() -> tuple[int, int]:
        found = DocumentLosses.open(path)
        return found.last.step, found.best.step

    keep_losses(path, documents, 10, sums(4, 1, 1, 1))
    assert steps() == (10, 10)
    keep_losses(path, documents, 20, sums(1, 1, 1, 1))
    assert steps() == (20, 20)
    keep_losses(path, documents, 30, sums(2, 1, 1, 1))
    assert steps() == (30, 20) and DocumentLosses.open(path).best.nats_X.tolist() == [1, 1, 1, 1]
    keep_losses(path, documents, 40, sums(np.nan, 1, 1, 1))
    keep_losses(path, None, 40, sums(0, 0, 0, 0))
    assert steps() == (30, 20), "what is no number, or of no known document, is not kept"
    keep_losses(path, documents, 15, sums(3, 1, 1, 1))
    assert steps() == (15, 15), "the run went back: the best at 20 is no longer its own"
    keep_losses(path, Documents.of(["other", *TEXTS[1:]]), 50, sums(9, 9, 9, 9))
    assert steps() == (50, 50)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "documents.safetensors"
    of_text = DocumentLosses(Documents.of(TEXTS), np.array([2, 1, 5, 11]), *(Losses(s, np.ones(4)) for s in (9, 3)))
    of_text.save(path)
    good = path.read_bytes()
    assert DocumentLosses.open(path).of_text
    arrays = safetensors.numpy.load(good)
    bad = {
        "shorter": {**arrays, "bytes": arrays["bytes"][:3]},
        "another type": {**arrays, "nats": arrays["nats"].astype(np.float32)},
        "a name more": {**arrays, "more": arrays["bytes"]},
        "no number": {**arrays, "nats": arrays["nats"] * np.nan},
        "negative": {**arrays, "bytes": -arrays["bytes"]},
    }
    for content in [good[:-5], b"", b"\x80\x04pickle", good[:8] + b"[" * 1000 + good[8:]]:
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"documents\.safetensors"):
            DocumentLosses.open(path)
    for values in bad.values():
        path.write_bytes(safetensors.numpy.save(values))
        with pytest.raises(DataError, match=r"documents\.safetensors"):
            DocumentLosses.open(path)
    keep_losses(path, of_text.documents, 12, sums(1, 1, 1, 1))
    assert DocumentLosses.open(path).best.step == 12, "written anew over what could not be read"
