"""Mixtures that cannot be read are refused by name, with what they have that no block here computes."""

import pytest

from manyhands.errors import ConfigError
from manyhands.families import FAMILIES, read_config
from manyhands.families.registry import NOT_EXPRESSED


@pytest.mark.parametrize("model_type", NOT_EXPRESSED)
def test_the_reason_is_one_line(model_type: str) -> None:
    assert model_type not in FAMILIES
    model, parts = NOT_EXPRESSED[model_type]
    with pytest.raises(ConfigError) as caught:
        read_config({"model_type": model_type}, "config.json")
    message = str(caught.value)
    assert message == f"config.json: model_type = {model_type!r} ({model}) is not read, for manyhands lacks {parts}"
    assert "\n" not in message


def test_names_are_those_of_transformers() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    assert NOT_EXPRESSED.keys() <= CONFIG_MAPPING_NAMES.keys()
