"""Errors name the field, the value, what is allowed and the nearest name, wherever that stands."""

from collections.abc import Callable

import pytest

from manyhands.config import BalanceConfig, ModelConfig, RouterConfig, RunConfig, parse, read_model_config
from manyhands.config.load import load_preset
from manyhands.config.nearest import OTHER_NAMES, paths_of
from manyhands.config.walk import places
from manyhands.errors import ConfigError


def refusal(make: Callable[[], object]) -> str:
    with pytest.raises(ConfigError) as caught:
        make()
    message = str(caught.value)
    assert "\n" not in message and "input should" not in message.lower() and "pydantic" not in message
    return message


OVERRIDES = {
    "num_experts=16": "unknown field 'num_experts'; did you mean 'model.moe.router.num_experts'?",
    "model.num_experts=16": "did you mean 'model.moe.router.num_experts'?",
    "model.moe.num_experts=16": "did you mean 'model.moe.router.num_experts'?",
    "moe.router.num_experts=4": "unknown field 'moe'; did you mean 'model.moe'?",
    "train.lr=1": "unknown field 'train.lr'; did you mean 'optim.lr'?",
    "learning_rate=1": "did you mean 'optim.lr'?",
    "moe_top_k=2": "did you mean 'model.moe.router.num_experts_per_tok'?",
    "seed=1": "did you mean 'data.seed' or 'train.seed'?",
    "hidden_siz=1": "did you mean 'model.hidden_size'?",
    "num_decoder_layers=1": "did you mean 'model.num_decoder_layers' (kind: encoder_decoder)?",
    "r=4": "did you mean 'tune.r' (method: lora, molora, perft)?",
    "model.moe.zebra=1": "unknown field 'model.moe.zebra'; allowed: average_decay, ",
    "model.hidden_size=4.5": "model.hidden_size = 4.5: expected an integer",
    "model.hidden_size=0": "model.hidden_size = 0: must be at least 1",
    "model.hidden_size=99999999999": "must be at most 16,777,216",
    "optim.lr=fast": "optim.lr = 'fast': expected a number",
    "optim.lr=0": "optim.lr = 0: must be above 0",
    "data.valid_fraction=1": "data.valid_fraction = 1: must be below 1",
    "optim.lr=.nan": "optim.lr = nan: expected a finite number",
    "train.recompute=perhaps": "train.recompute = 'perhaps': expected true or false",
    "data.text_field=3": "data.text_field = 3: expected text",
    "data.sources=book.txt": "data.sources = 'book.txt': expected a list, like ['book.txt']",
    "start=''": "start = '': must not be empty",
    "trainable=[]": "trainable = []: needs 1 item at least",
    "optim.betas=[0.9, 0.9, 0.9]": "takes 2 items at most",
    "model=7": "model = 7: expected a section, which has fields of its own",
    "model.moe.router.score=sigmod": "did you mean 'sigmoid'? allowed: 'softmax', 'sigmoid', 'sqrtsoftplus', 'relu'",
    "tune.r=4": "tune.method: which of 'full', 'lora', 'esft', 'molora', 'mov', 'perft' is it?",
    "history=[{step: 1, set: {optim.lr: x}}]": "tiny: history, from step 1 on: optim.lr = 'x': expected a number",
}


@pytest.mark.parametrize("override", OVERRIDES)
def test_on_the_command_line(override: str) -> None:
    message = refusal(lambda: load_preset("tiny", [override]))
    assert message.startswith("preset tiny: ") and OVERRIDES[override] in message


def test_a_section_looks_in_its_own_kind_first() -> None:
    assert "did you mean 'model.router.num_experts'?" in refusal(
        lambda: load_preset("switch-tiny", ["model.num_experts=2"])
    )
    wrong = refusal(lambda: load_preset("switch-tiny", ["model.moe.num_experts=2"]))
    assert "unknown field 'model.moe' with kind: encoder_decoder; allowed: " in wrong, "never the name that was given"


PYTHON = {
    "ModelConfig: unknown field 'num_experts'; did you mean 'moe.router.num_experts'?": lambda: ModelConfig(
        num_experts=16
    ),
    "ModelConfig: unknown field 'moe.num_experts'; did you mean 'moe.router.num_experts'?": lambda: (
        ModelConfig.model_validate({"moe": {"num_experts": 16}})
    ),
    "RunConfig: unknown field 'num_experts'; did you mean 'model.moe.router.num_experts'?": lambda: RunConfig(
        num_experts=16
    ),
    "RouterConfig: num_experts = '8': expected an integer": lambda: RouterConfig(num_experts="8"),
    "BalanceConfig: unknown field 'aux_loss'; did you mean 'aux_loss_coef'?": lambda: BalanceConfig(aux_loss=1),
    "file: unknown field 'score'; did you mean 'moe.router.score'?": lambda: read_model_config({"score": 1}, "file"),
    "RunConfig: expected a section, which has fields of its own": lambda: RunConfig.model_validate(7),
    "unknown field 'lr'; did you mean 'optim.lr'?": lambda: parse(RunConfig, {"lr": 1}),
}


@pytest.mark.parametrize("said", PYTHON)
def test_from_python(said: str) -> None:
    assert refusal(PYTHON[said]) == said


def test_every_field_is_found_by_its_name_alone() -> None:
    """Those of one kind of model, or one method, only where no other field is called so."""
    general = {place.leaf for place in places(RunConfig) if not place.only}
    for place in places(RunConfig):
        if not place.only or place.leaf not in general:
            assert any(repr(place.path) in found for found in paths_of(RunConfig, place.leaf)), place.path


def test_other_names_are_other_frameworks_and_lead_somewhere() -> None:
    leaves = {place.leaf for place in places(RunConfig)}
    assert set(OTHER_NAMES.values()) <= leaves
    assert not {name for name in OTHER_NAMES if any(p.leaf == name and not p.only for p in places(RunConfig))}
