"""A tuning on several processes is that of one: what is trained, after three steps, for each method."""

from pathlib import Path
from typing import Any

import pytest
import torch

from manyhands.config import RunConfig
from manyhands.config.load import dump_run, parse_run
from manyhands.config.tune import EsftTuning, LoraTuning, MoloraTuning, PerftTuning, TuneConfig
from manyhands.errors import ConfigError
from manyhands.models.tuned import trained_state
from manyhands.parallel.group import Group, mesh_of
from manyhands.parallel.ranks import Alone, Ranks
from manyhands.parallel.shards import whole
from manyhands.train.data import prepare_data
from manyhands.train.fresh import fresh_state
from manyhands.train.start import Start, with_model
from manyhands.train.step import train_step
from manyhands.train.task import LanguageModelling
from manyhands.tune.settings import settings
from tests.gloo import on_processes

METHODS: dict[str, TuneConfig] = {
    "lora": LoraTuning(r=4, targets=("attention", "routed", "dense")),
    "esft": EsftTuning(experts={1: (1, 4), 2: (0,)}),
    "esft, all that is no expert": EsftTuning(experts={1: (3,)}, non_expert_modules=True),
    "perft": PerftTuning(top_k=1),
    "molora": MoloraTuning(top_k=2),
}
STEPS = 3


@pytest.fixture(scope="module")
def data(base: Path, other_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared once for all."""
    folder = tmp_path_factory.mktemp("data")
    prepare_data(folder, described("lora", base, other_text, 1), lambda line: None, Start.open(str(base)).tokenizer)
    return folder


def described(name: str, base: Path, text: Path, ep: int) -> RunConfig:
    start = Start.open(str(base))
    sections = {"data": {"sources": [str(text)]}, "train": {"batch_size": 4, "dtype": "float32"}}
    more = {"optim": {"eps": 1e-6}, "parallel": {"ep": ep}}
    return with_model(settings(str(base), start.config, METHODS[name], sections={**sections, **more}), start.config)


def _train(text: str, folder: str, ranks: Ranks) -> dict[str, Any]:
    run: RunConfig = parse_run(text, "the run")
    assert run.start is not None
    task, start = LanguageModelling(), Start.open(run.start, run.puts_beside)
    data = prepare_data(Path(folder), run, lambda line: None)
    state = fresh_state(run, data, task, ranks, start, mesh_of(ranks, run.parallel.ep))
    losses = []
    for step in range(STEPS):
        batch = next(state.batches)
        result = train_step(
            state.model, state.optimizers, state.guard, batch, run, step + 1, 0.01, torch.float32, task, ranks
        )
        losses += [result.loss, result.grad_norm]
    trained = {name: whole(tensor).numpy() for name, tensor in trained_state(state.model).items()}
    return {"losses": losses, "trained": trained}


def _of_rank(ranks: Group, text: str, folder: str) -> dict[str, Any]:
    return _train(text, folder, ranks)


@pytest.mark.parametrize(("name", "ep"), [*((name, 1) for name in METHODS), ("lora", 2)])
def test_two_processes_are_one(name: str, ep: int, base: Path, other_text: Path, data: Path) -> None:
    text = dump_run(described(name, base, other_text, ep))
    one = _train(dump_run(described(name, base, other_text, 1)), str(data), Alone())
    for found in on_processes(2, _of_rank, text, str(data)):
        assert found["losses"] == pytest.approx(one["losses"], rel=1e-5)
        assert found["trained"].keys() == one["trained"].keys()
        for key, value in one["trained"].items():
            far = abs(found["trained"][key] - value).max() / max(abs(value).max(), 1e-12)
            assert far <= 1e-4, (key, far)  # AdamW divides by gradients that are rounding noise where they are small


def _refused(ranks: Group, text: str, folder: str) -> str:
    with pytest.raises(ConfigError) as error:
        _train(text, folder, ranks)
    return str(error.value)


@pytest.mark.parametrize("name", ["esft", "perft"])
def test_what_cannot_share_out_its_experts_says_so(name: str, base: Path, other_text: Path, data: Path) -> None:
    text = dump_run(described(name, base, other_text, 2))
    for said in on_processes(2, _refused, text, str(data)):
        assert said.startswith("parallel.ep: ") and said.endswith("cannot lie on several processes")
