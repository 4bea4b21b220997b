"""A model of the catalogue with fields changed on the command line."""

import pytest

from manyhands.catalog import load, names
from manyhands.config import ModelConfig
from manyhands.errors import ConfigError
from manyhands.plan.changed import changed
from manyhands.plan.subject import read_subject

from ..small_runs import manyhands


def test_nothing_changed_is_the_same() -> None:
    """Every decoder of the catalogue survives being written down and read."""
    configs = [config for name in names() if isinstance(config := load(name).config, ModelConfig)]
    assert len(configs) > 20 and all(changed(config, [], "x") == config for config in configs)


def test_twice_the_experts() -> None:
    """Mixtral with 16 experts: 32 layers of 8 more experts of 3 matrices, 4,096 x 14,336, and 8 more router rows."""
    before, after = read_subject("mixtral-8x7b"), read_subject("mixtral-8x7b", ["num_experts=16"])
    assert after.counts.total - before.counts.total == 32 * 8 * (3 * 4096 * 14336 + 4096)
    assert after.counts.active - before.counts.active == 32 * 8 * 4096, "as many experts work for a token"
    assert after.native == before.native and not after.prices and after.name == "Mixtral 8x7B, changed"
    assert read_subject("mixtral-8x7b", ["model.moe.router.num_experts=16"]).counts == after.counts
    assert after.origin == "catalogue entry mixtral-8x7b with num_experts=16"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("num_expert=16", "unknown field 'num_expert'; did you mean 'num_experts'"),
        ("num_experts", "not of the form field=value"),
        ("=3", "not of the form field=value"),
        ("num_experts=many", "num_experts"),
        ("num_experts=[", "not a YAML value"),
        ("num_experts=1", "top_k|experts"),
    ],
)
def test_what_cannot_be_changed(change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_subject("mixtral-8x7b", [change])


def test_from_the_command_line() -> None:
    done = manyhands("plan", "mixtral-8x7b", "num_experts=16", "--versus", "mixtral-8x7b")
    assert done.returncode == 0 and "Mixtral 8x7B, changed" in done.stdout
    done = manyhands("plan", "gemini-2.5-pro", "num_experts=16")
    assert done.returncode == 2 and "num_experts=16" in done.stderr
