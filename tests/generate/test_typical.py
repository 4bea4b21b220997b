"""`doctor --speeds`: models in four formats, run, remembered, shown, estimated from."""

import json

import pytest
import torch

from manyhands.cli.main import app
from manyhands.errors import UserError
from manyhands.generate import speed, typical
from manyhands.generate.speed import storage_of
from manyhands.generate.typical import FORMATS, SHAPES, Shape, random_model, typical_speeds
from manyhands.plan import count_model
from manyhands.plan.recorded import format_kind, recorded_speeds
from manyhands.plan.storage import FP32, weight_bytes

from ..cli.test_bench import HERE

TINY = (Shape(D=128, E=4, K=2, F=64, L=1), Shape(D=128, E=8, K=2, F=64, L=2))


@pytest.fixture
def quick(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(speed, "_WARM_SECONDS", 0.0)
    monkeypatch.setattr(speed, "_ROUND_SECONDS", 0.0)
    monkeypatch.setattr(typical, "PROMPT", 8)
    monkeypatch.setattr("manyhands.plan.remember.measured", lambda again, quiet: HERE)
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setattr(typical.typical_speeds, "__defaults__", (TINY, FORMATS))


def test_doctor_runs_them_and_shows_what_was_reached(quick, capsys):
    app(["doctor", "--speeds", "--json"], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    speeds = recorded_speeds()
    assert len(speeds) == len(TINY) * 4 * 3 and {one.batch for one in speeds} == {1, 16}
    assert [one.format for one in speeds[::3]] == ["32 bits", "16 bits", "8 bits", "4 bits"] * 2
    assert {row["step"] for row in found["speeds"]} >= {
        "decode, 4 bits",
        "decode, together, 32 bits",
        "prefill, 8 bits",
    }
    assert all(row["speeds"] == "2" and row["most"]["value"] > 0 for row in found["speeds"])
    app(["doctor"], standalone_mode=False)
    assert "Speeds that were reached here" in capsys.readouterr().out


def test_a_busy_machine_is_not_run(quick, monkeypatch):
    monkeypatch.setattr("os.getloadavg", lambda: (8.0, 8.0, 8.0))
    with pytest.raises(UserError, match="--speeds: the machine is busy"):
        app(["doctor", "--speeds"], standalone_mode=False)
    assert recorded_speeds() == ()


def test_what_does_not_fit_is_left_out(quick):
    most = 4 * count_model(TINY[0].config).total * 3
    assert len(list(typical_speeds(HERE, most))) == 4 and list(typical_speeds(HERE, most - 1)) == []


KINDS = list(zip(FORMATS, ("32 bits", "16 bits", "8 bits", "4 bits"), strict=True))


@pytest.mark.parametrize(("format", "kind"), KINDS)
def test_the_bits_in_memory_are_those_of_the_format(tmp_path, format, kind):
    model = random_model(TINY[0].config, format, tmp_path / "model")
    storage = storage_of(model)
    assert storage is not None and format_kind(storage, sparse=True) == kind
    held = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert weight_bytes(count_model(TINY[0].config), storage) == held
    assert (held == weight_bytes(count_model(TINY[0].config), FP32)) == (format == "float32")
    logits = model(torch.tensor([[1, 2, 3]])).logits
    assert torch.isfinite(logits).all()


def test_typical_models_are_as_wide_as_those_people_run():
    assert all(1024 <= shape.D <= 2048 and shape.E // shape.K >= 8 for shape in SHAPES)
    assert max(count_model(shape.config).total for shape in SHAPES) < 0.5e9
