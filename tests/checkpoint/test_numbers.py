"""Models of numbers as directories, and their counts."""

import pytest
import torch

import manyhands as mh
from manyhands.config.load import load_run
from manyhands.plan.count_kind import count_any
from manyhands.plan.subject import read_subject


def fitted() -> list[mh.LocalExperts | mh.HierarchicalExperts]:
    x = torch.linspace(-1, 3, 40)[:, None]
    flat = mh.LocalExperts(mh.LocalExpertsConfig(num_inputs=1, num_outputs=2, num_experts=3))
    tree = mh.HierarchicalExperts(mh.HierarchicalExpertsConfig(num_inputs=1, num_outputs=2, branching=(2, 3)))
    flat.fit(x, torch.cat((x, x.abs()), 1), epochs=3)
    tree.fit(x, torch.cat((x, x.abs()), 1), epochs=3)
    return [flat, tree]


@pytest.mark.parametrize("which", [0, 1])
def test_a_round_trip_and_the_count(which: int, tmp_path) -> None:
    model = fitted()[which]
    mh.save_experts(model, tmp_path / "model")
    again = mh.load_experts(tmp_path / "model")
    assert type(again) is type(model) and again.config == model.config
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]) and value.dtype == again.state_dict()[name].dtype
    x = torch.randn(5, 1)
    assert torch.equal(model.predict(x), again.predict(x))
    counted = read_subject(str(tmp_path / "model")).counts
    assert counted == count_any(model.config)
    assert counted.total == sum(p.numel() for p in model.parameters()) == sum(counted.by_component.values())


def test_what_stands_there_stays(tmp_path) -> None:
    model = fitted()[0]
    mh.save_experts(model, tmp_path / "model")
    with pytest.raises(mh.UserError):
        mh.save_experts(model, tmp_path / "model")
    mh.save_experts(model, tmp_path / "model", overwrite=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(mh.UserError):
        mh.save_experts(model, tmp_path / "other", overwrite=True)


def test_what_is_damaged_or_something_else_is_refused(tmp_path) -> None:
    directory = tmp_path / "model"
    mh.save_experts(fitted()[0], directory)
    weights = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(weights[:-1] + b"\0")
    with pytest.raises(mh.CheckpointError, match=r"model\.safetensors"):
        mh.load_experts(directory)
    with pytest.raises(mh.CheckpointError, match="does not exist"):
        mh.load_experts(tmp_path / "nothing")


def test_weights_of_another_shape_are_named(tmp_path) -> None:
    model = fitted()[0]
    model.config = model.config.model_copy(update={"num_experts": 4})
    mh.save_experts(model, tmp_path / "model")
    with pytest.raises(mh.CheckpointError, match=r"experts is \[3, 2, 2\], where its config.json asks for \[4, 2, 2\]"):
        mh.load_experts(tmp_path / "model")


def test_a_language_model_is_sent_elsewhere(tmp_path) -> None:
    model = fitted()[0]
    model.config = mh.ModelConfig()
    mh.save_experts(model, tmp_path / "model")
    with pytest.raises(mh.CheckpointError, match=r"kind = 'decoder' is no model of numbers; use mh\.load"):
        mh.load_experts(tmp_path / "model")


def test_loading_as_a_language_model_is_sent_here(tmp_path) -> None:
    mh.save_experts(fitted()[0], tmp_path / "model")
    with pytest.raises(mh.ManyhandsError, match=r"load_experts"):
        mh.load_model(tmp_path / "model")


def test_a_run_cannot_train_one(tmp_path) -> None:
    (tmp_path / "run.yaml").write_text("model: {kind: mixture_1991, num_inputs: 2, num_outputs: 1}")
    with pytest.raises(mh.ConfigError, match=r"model\.kind = 'mixture_1991': it maps numbers to numbers"):
        load_run(tmp_path / "run.yaml")
