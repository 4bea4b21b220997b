"""What a server records: one trace for one model, one for each of several, and each time one is loaded."""

import asyncio
from pathlib import Path

import pytest

import manyhands as mh
from manyhands.config import SamplingConfig
from manyhands.serve.load import Settings, entries
from manyhands.text import Tokenizer
from manyhands.trace.recording import Trace

from ..engine.conftest import build


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "m"
    mh.save(build(), path, Tokenizer.train(["def f(x):\n    return x + 1\n"] * 5, 300))
    return path


async def ask(service) -> int:
    submission = await service.submit([5, 6, 7], SamplingConfig(max_new_tokens=4, ignore_eos=True))
    return len([token async for token in submission])


@pytest.mark.parametrize("each", [False, True])
def test_where_traces_go(tmp_path: Path, checkpoint: Path, each: bool) -> None:
    settings = Settings(trace=tmp_path / "t", trace_each=each)
    for _ in range(2 if each else 1):
        (entry,) = entries({"my/model": checkpoint}, settings)
        served = entry.load()
        assert asyncio.run(ask(served.service)) == 4
        served.service.close(0.5)
    made = sorted((tmp_path / "t").glob("*")) if each else [tmp_path / "t"]
    assert [path.name for path in made] == (["my_model", "my_model-1"] if each else ["t"])
    for path in made:
        trace = Trace.open(path)
        assert trace.complete and len(trace) == 3 + 3 and trace.manifest.model and trace.manifest.record_bytes
    assert len({Trace.open(path).manifest.model for path in made}) == 1  # the same files, the same fingerprint
