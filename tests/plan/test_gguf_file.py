"""A plan for a GGUF file: the count of its model, and the bytes that stand in the file."""

from pathlib import Path

import pytest

from manyhands.errors import ManyhandsError
from manyhands.plan.storage import weight_bytes
from manyhands.plan.subject import read_subject
from tests.checkpoint.gguf_bytes import U32, Key, byte_level, file_of
from tests.checkpoint.gguf_mutations import GQA, MLA, MOE, SMALL, V3
from tests.checkpoint.hostile import make


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_its_count_and_its_bytes(family: str, tmp_path: Path) -> None:
    shape = {**GQA, "moe": MOE} if family == "mixtral" else {**MLA, "moe": V3}
    directory = make(tmp_path / "hf", family=family, **SMALL, **shape)
    file = file_of(directory, "Q8_0", byte_level())
    path = tmp_path / "model.gguf"
    path.write_bytes(file.bytes())
    found, theirs = read_subject(str(path)), read_subject(str(directory))
    assert found.counts == theirs.counts
    assert found.native is not None and found.file_bytes == path.stat().st_size
    buffers = sum(len(t.data) for t in file.tensors if "exp_probs_b" in str(t.name))
    assert weight_bytes(found.counts, found.native) == pytest.approx(sum(len(t.data) for t in file.tensors) - buffers)


def test_a_file_that_is_wrong_is_one_line(tmp_path: Path) -> None:
    directory = make(tmp_path / "hf", **SMALL, **GQA, moe=MOE)
    file = file_of(directory)
    file.keys.append(Key("llama.boost", U32, 1))
    (tmp_path / "model.gguf").write_bytes(file.bytes())
    with pytest.raises(ManyhandsError, match=r"model\.gguf: unknown key 'llama\.boost'"):
        read_subject(str(tmp_path / "model.gguf"))
