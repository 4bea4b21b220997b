"""Every entry of the catalogue: it parses, every figure has a source and a kind, and no count is typed in."""

import re

import pytest

from manyhands.catalog import COMPARED, Entry, Figure, entries, load, names
from manyhands.config import parse
from manyhands.errors import ConfigError

IN_THE_TWO_DOCUMENTS = (
    *("mixtral-8x7b", "mixtral-8x22b", "deepseek-v3", "kimi-k2", "kimi-k2.5", "grok-1", "switch-c", "switch-base-128"),
    *("gshard-2048e-36l", "shazeer-moe-131072-h", "jacobs-1991", "gpt-4", "qwen2.5-max", "gemini-1.5-pro", "claude"),
    *("gemini-2.5-pro", "gemini-3.1-pro", "composer-2", "llama-2-70b", "llama-3.1-405b", "gpt-3-175b", "t5-xxl-1.1"),
)
SOURCE = re.compile(r"https://\S+|arXiv \d{4}\.\d{5}(, .+)?")


@pytest.mark.parametrize("name", names())
def test_an_entry_parses_and_says_where_everything_is_from(name: str) -> None:
    entry = load(name)
    assert entry.id == name
    sources = [*entry.sources, *(figure.source for figure in entry.figures)]
    if entry.storage is not None:
        sources.append(entry.storage.source)
    assert all(SOURCE.fullmatch(source) for source in sources), sources
    if entry.architecture in ("published", "assumed"):
        assert (entry.config is None) != (entry.shape is None)
    else:
        assert entry.config is None and entry.shape is None


@pytest.mark.parametrize("name", names())
def test_no_count_is_typed_in_as_computed(name: str) -> None:
    for figure in load(name).figures:
        assert not (figure.what in COMPARED and figure.kind == "computed"), figure
        compared = figure.what in COMPARED and figure.kind not in ("rumour", "undisclosed")
        assert compared == (figure.tolerance is not None), figure


def test_the_systems_of_the_two_documents_are_there() -> None:
    assert set(IN_THE_TWO_DOCUMENTS) <= set(names())
    assert len(names()) >= 75


def test_undisclosed_systems_have_nothing_to_compute_with() -> None:
    for name in ("gpt-4", "claude", "qwen2.5-max", "gemini-3.1-pro", "composer-2"):
        entry = load(name)
        assert entry.kind == "undisclosed" and entry.config is None and entry.shape is None
    assert {figure.kind for figure in load("gpt-4").figures} == {"rumour"}
    assert load("claude").sparse is None
    assert load("composer-2").based_on == "kimi-k2.5"
    assert [figure.value for figure in load("composer-2").prices] == [0.5, 2.5]


def test_an_architecture_that_two_systems_share_stands_once() -> None:
    assert load("deepseek-r1").same_as == "deepseek-v3"
    assert load("deepseek-r1").config == load("deepseek-v3").config
    assert load("kimi-k2-thinking").storage != load("kimi-k2").storage


def test_a_16_bit_dtype_in_the_configuration_is_the_storage() -> None:
    storage = load("mixtral-8x7b").storage
    assert storage is not None and (storage.format, storage.routed, storage.rest) == ("BF16", 16, 16)
    k25 = load("kimi-k2.5").storage
    assert k25 is not None and (k25.routed, k25.linear) == (4.5, 16)


def test_training_facts() -> None:
    facts = {figure.what: figure for figure in load("deepseek-v3").training}
    assert facts["accelerator_hours"].value == 2_788_000 and facts["accelerator_hours"].device == "H800"
    assert facts["training_cost"].value == 5_576_000 and facts["training_cost"].kind == "computed"
    assert facts["accelerator_hour_price"].kind == "assumed"
    assert load("deepseek-v3").context == 131_072


@pytest.mark.parametrize(
    ("printed", "value", "step"),
    [
        ("46.7B", 46.7e9, 1e8),
        ("~1.8T", 1.8e12, 1e11),
        (">20T", 20e12, 1e12),
        ("137,577.6M", 137_577.6e6, 1e5),
        ("60.8Gi", 60.8 * 2**30, 2**30 / 10),
        ("2048", 2048, 1),
        ("314Z", 3.14e23, 1e21),
    ],
)
def test_a_printed_number_has_a_value_and_a_last_digit(printed: str, value: float, step: float) -> None:
    figure = Figure(what="tokens", printed=printed, kind="published", source="https://example.org")
    assert figure.value == pytest.approx(value, rel=1e-12)
    assert figure.step == pytest.approx(step, rel=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"what": "totl"}, "did you mean 'total'"),
        ({"printed": None}, "undisclosed"),
        ({"kind": "undisclosed"}, "undisclosed"),
        ({"what": "tokens", "tolerance": 0.1}, "not compared"),
        ({"printed": "about 3"}, "printed"),
        ({"kind": "guess"}, "kind"),
        ({"source": ""}, "source"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_wrong_figure_is_refused_in_one_line(change: dict[str, object], message: str) -> None:
    right = {"what": "total", "printed": "7B", "kind": "published", "source": "https://example.org"}
    with pytest.raises(ConfigError, match=message) as error:
        parse(Figure, right | change, "here")
    assert "\n" not in str(error.value)


def test_an_entry_without_an_architecture_must_say_so() -> None:
    values = load("claude").model_dump() | {"architecture": "published"}
    with pytest.raises(ConfigError, match="architecture"):
        parse(Entry, values)


def test_names_in_any_case_and_the_nearest_for_an_unknown_one() -> None:
    assert load("DeepSeek-V3").id == "deepseek-v3"
    with pytest.raises(ConfigError, match="deepseek-v3"):
        load("deepseek-v33")
    with pytest.raises(ConfigError, match="manyhands models"):
        load("xyzzy")


def test_entries_are_all_there_in_order() -> None:
    assert [entry.id for entry in entries()] == names()
