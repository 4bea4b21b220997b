"""`bench`: every backend that is asked for, with its share of the roof."""

import json

import pytest
import typer.testing

from manyhands.checkpoint.model import save
from manyhands.cli.main import app
from manyhands.config import AttentionConfig, ModelConfig, MoEConfig, RouterConfig
from manyhands.errors import ConfigError
from manyhands.generate import speed
from manyhands.generate.speed import read_per_token
from manyhands.kernels import native
from manyhands.models import Decoder, init_weights
from manyhands.plan.here import Here, machine_key
from manyhands.plan.machine import Machine
from manyhands.plan.recorded import recorded_points, recorded_speeds

MACHINE = Machine(
    name="here",
    title="this machine",
    kind="cpu",
    memory=64e9,
    bandwidth=1e9,
    rates={"fp32": 1e11},
    source="made up",
)
HERE = Here(
    key=machine_key(),
    measured="2026-01-01T00:00:00+00:00",
    machine=MACHINE,
    processor=MACHINE,
    cpu="a processor",
    cores=2,
    threads=1,
    features=(),
)


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("manyhands.plan.remember.measured", lambda quiet: HERE)
    config = ModelConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        max_position_embeddings=64,
        attention=AttentionConfig(num_attention_heads=2, head_dim=16),
        moe=MoEConfig(router=RouterConfig(num_experts=4, num_experts_per_tok=2), moe_intermediate_size=16),
    )
    decoder = Decoder(config)
    init_weights(decoder, seed=0)
    save(decoder, tmp_path / "model", family="mixtral")
    return decoder, tmp_path / "model"


def test_every_backend_is_measured(model):
    decoder, path = model
    arguments = ["bench", str(path), "--prompt", "8", "--new", "4", "--json"]
    done = typer.testing.CliRunner().invoke(
        app, [*arguments, "--backend", "eager", "--backend", "grouped_mm"], catch_exceptions=False
    )
    found = json.loads(done.stdout)
    assert [row["backend"] for row in found["backends"]] == ["eager", "grouped_mm"]
    for row in found["backends"]:
        assert "mlp of layers 0–1 called as modules" in row["program"] or not native.available()
        assert row["prefill"] > 0 and row["share_of_roof"] == pytest.approx(
            row["decode"] * found["bytes_per_token"] / 1e9
        )
    experts = 2 * 4 * 3 * 16 * 32  # layers, experts, matrices; half of the experts are read
    others = sum(p.numel() for name, p in decoder.named_parameters() if ".experts." not in name) - 64 * 32
    assert found["bytes_per_token"] == read_per_token(decoder) == 4 * (experts // 2 + others)


def test_what_does_not_fit_is_one_line(model):
    with pytest.raises(ConfigError, match="--prompt 60 and --new 5 do not fit max_position_embeddings = 64"):
        app(["bench", str(model[1]), "--prompt", "60", "--new", "5"], standalone_mode=False)


def test_the_defaults_fit_a_short_model_and_the_first_row_is_warm(model, monkeypatch, capsys):
    """64 positions, 256 + 32 asked for by default. Whatever is slow at the beginning is over before the first row."""
    calls = []
    monkeypatch.setattr(speed, "_WARM_SECONDS", 0.02)
    monkeypatch.setattr(speed, "_ROUND_SECONDS", 0.0)
    real = speed.generate
    monkeypatch.setattr(
        speed, "generate", lambda model, ids, sampling: calls.append(ids.shape[1]) or real(model, ids, sampling)
    )
    warm = speed.warm_up
    counted = []
    monkeypatch.setattr(speed, "warm_up", lambda *args: (warm(*args), counted.append(len(calls))))
    app(["bench", str(model[1]), "--backend", "eager", "--json"], standalone_mode=False)
    assert set(calls) == {48} and counted[0] >= 2 and len(calls) == counted[0] + 4


@pytest.mark.parametrize("given", [["--prompt", "60"], ["--new", "50"], ["--prompt", "62"]])
def test_one_given_length_leaves_room_for_the_other(model, monkeypatch, given):
    monkeypatch.setattr(speed, "_WARM_SECONDS", 0.0)
    monkeypatch.setattr(speed, "_ROUND_SECONDS", 0.0)
    app(["bench", str(model[1]), "--backend", "eager", "--json", *given], standalone_mode=False)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(speed, "_WARM_SECONDS", 0.0)
    monkeypatch.setattr(speed, "_ROUND_SECONDS", 0.0)
    monkeypatch.setattr("os.getloadavg", lambda: (0.5, 0.5, 0.5))


def test_speeds_of_an_idle_machine_are_remembered(model, quick, capsys):
    """Prefill, one sequence, and sixteen: with what each step reads, and what its bound follows from."""
    decoder, path = model
    app(
        ["bench", str(path), "--prompt", "8", "--new", "4", "--batch", "16", "--backend", "auto"], standalone_mode=False
    )
    assert "remembered for the estimates" in capsys.readouterr().out
    found = recorded_speeds()
    assert [(one.model, one.format, one.work, one.batch) for one in found] == [
        ("model", "32 bits", "prefill", 1),
        ("model", "32 bits", "decode", 1),
        ("model", "32 bits", "decode", 16),
    ]
    cached = 2 * 2 * 32 * 4 * (8 + 2)  # layers, keys and values, width, bytes, positions
    assert found[1].bytes == pytest.approx(read_per_token(decoder) + 4 * 32 + cached, rel=1e-9)
    assert found[2].bytes > found[1].bytes and all(one.layers == 2 and one.rate == "fp32" for one in found)
    assert len(recorded_points(HERE)) == 3


@pytest.mark.parametrize(
    ("given", "load", "why"),
    [
        (["--backend", "auto"], 1.6, "the machine is busy: load average 1.6 on 2 cores"),
        (["--backend", "auto", "--forget"], 0.0, None),
        (["--backend", "eager"], 0.0, None),
    ],
)
def test_speeds_that_would_mislead_are_not(model, quick, monkeypatch, capsys, given, load, why):
    monkeypatch.setattr("os.getloadavg", lambda: (load, load, load))
    app(["bench", str(model[1]), "--prompt", "8", "--new", "4", *given], standalone_mode=False)
    printed = capsys.readouterr().out
    assert (f"not remembered: {why}" in printed) if why else "remembered" not in printed
    assert recorded_speeds() == ()
    if load:
        app(
            ["bench", str(model[1]), "--prompt", "8", "--new", "4", *given, "--remember", "--json"],
            standalone_mode=False,
        )
        assert json.loads(capsys.readouterr().out)["remembered"] is True and len(recorded_speeds()) == 2
