"""Every preset trains; there is one for each kind of router that a language model can have."""

from pathlib import Path
from typing import get_args

import pytest

from manyhands.config import RouterConfig
from manyhands.config.load import load_preset, preset_about, preset_names
from manyhands.train.loop import train

from ..small_runs import write_text

QUICK = ["train.max_steps=3", "train.batch_size=4", "train.sequence_length=32", "model.hidden_size=32"]
MORE = {"switch-tiny": ["model.vocab_size=300", "spans.sentinels=20"], "quickstart": ["train.max_seconds=null"]}
QUIET = ["train.dtype=float32", "model.vocab_size=300"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"), 200)


@pytest.mark.parametrize("name", preset_names())
def test_it_trains(name: str, text: Path, tmp_path: Path) -> None:
    run = load_preset(name, [*QUICK, *QUIET, *MORE.get(name, []), f"data.sources=['{text}']"])
    summary = train(tmp_path / "run", run, quiet=True)
    assert summary.steps == 3 and 0 < summary.valid_loss < 100


def test_there_is_one_for_each_kind_of_router() -> None:
    runs = [load_preset(name) for name in preset_names()]
    routers = [run.model.moe.router for run in runs if run.model.moe is not None]
    assert {r.select for r in routers} == set(get_args(RouterConfig.model_fields["select"].annotation)) - {"soft"}
    assert {r.score for r in routers} >= {"softmax", "sigmoid", "relu"}
    for name in ("noisy", "bias", "logit_bias", "random_second", "renormalises"):
        assert {bool(getattr(r, name)) for r in routers} == {True, False}, name
    assert {r.group_score for r in routers if r.n_group > 1} == {"max", "top2_sum"}
    assert any(r.capacity_factor for r in routers)
    assert {run.model.moe.unchosen for run in runs if run.model.moe} == {"nothing", "average", "gradient"}
    assert any(run.balance.simbal_coef for run in runs) and any(run.balance.bias_update == "quantile" for run in runs)


def test_each_says_what_it_is_for() -> None:
    for name in preset_names():
        about = preset_about(name)
        assert 20 < len(about) < 400 and about.endswith((".", ".md")), name
