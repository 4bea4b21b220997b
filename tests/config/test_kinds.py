"""Models by kind: without one a decoder; what is not built is refused in one line; a new kind is one class."""

import json
from pathlib import Path
from typing import Any, Literal

import pytest

import manyhands as mh
from manyhands.catalog import entries
from manyhands.config import AnyModelConfig, EncoderDecoderConfig, RecurrentConfig, read_model_config
from manyhands.config.decoder import as_decoder
from manyhands.config.load import dump_run, load_preset, parse_run
from manyhands.config.model import KINDS, register
from manyhands.errors import ConfigError
from manyhands.families import FAMILIES, export_config, read_config
from manyhands.plan.count_kind import count_any
from manyhands.plan.subject import read_subject

T5_SMALL = {
    "vocab_size": 32128,
    "hidden_size": 512,
    "num_hidden_layers": 6,
    "num_decoder_layers": 6,
    "head_dim": 64,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
}
HIERARCHY = {"num_experts": 8, "num_experts_per_tok": 2, "select": "hierarchical", "n_group": 4, "topk_group": 2}
RECURRENT = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "moe": {"router": HIERARCHY, "moe_intermediate_size": 32, "hidden_act": "relu"},
}


def test_a_description_without_a_kind_is_a_decoder() -> None:
    config = read_model_config({"hidden_size": 64})
    assert type(config) is mh.ModelConfig and config == mh.ModelConfig(hidden_size=64)
    assert read_model_config({"kind": "decoder", "hidden_size": 64}) == config


def test_no_file_of_a_decoder_says_its_kind() -> None:
    run = load_preset("quickstart")
    assert "kind" not in run.model.model_dump() and "kind" not in json.loads(run.model.model_dump_json())
    assert "kind" not in FAMILIES["manyhands"].write(mh.ModelConfig())["model"]
    assert "kind" not in repr(mh.ModelConfig()).split("attention=")[0]
    assert parse_run(dump_run(run).replace("model:\n", "model:\n  kind: decoder\n"), "run.yaml") == run


@pytest.mark.parametrize(
    ("values", "kind"),
    [(T5_SMALL, EncoderDecoderConfig), (RECURRENT, RecurrentConfig)],
    ids=["encoder_decoder", "lstm"],
)
def test_other_kinds_are_read_counted_and_written(
    values: dict[str, Any], kind: type[AnyModelConfig], tmp_path: Path
) -> None:
    name = kind.model_fields["kind"].default
    config = read_model_config({"kind": name, **values})
    assert type(config) is kind and read_model_config(config.model_dump()) == config
    (tmp_path / "small.json").write_text(json.dumps({"kind": name, **values}))
    subject = read_subject(str(tmp_path / "small.json"))
    assert subject.counts == count_any(config) and subject.config is None
    assert "parameters" in subject.notes[0] and "memory" in subject.notes[0]
    assert subject.pairs == (config if name == "encoder_decoder" else None)


def test_t5_small_has_the_parameters_it_is_known_for() -> None:
    """60,506,624: `sum(p.numel())` of transformers' T5ForConditionalGeneration from google-t5/t5-small."""
    assert count_any(EncoderDecoderConfig(**T5_SMALL)).total == 60_506_624


def test_the_catalogue_uses_these_classes() -> None:
    kinds = {type(entry.shape) for entry in entries() if entry.kind in ("encoder_decoder", "lstm") and entry.shape}
    assert {EncoderDecoderConfig, RecurrentConfig} <= kinds


@pytest.mark.parametrize("kind", ["encoder-decoder", 7, None, ["decoder"], "x" * 500])
def test_an_unknown_kind_says_what_there_is(kind: Any) -> None:
    with pytest.raises(ConfigError, match="there is no such kind of model; there are: decoder, enc") as caught:
        read_model_config({"kind": kind}, "model.json")
    assert str(caught.value).startswith("model.json: kind = ") and len(str(caught.value)) < 250
    with pytest.raises(ConfigError, match=r"model\.kind = .*: there is no such kind of model; there are: decoder, enc"):
        parse_run(json.dumps({"model": {"kind": kind}}), "run.yaml")


def test_what_is_not_built_is_refused_where_it_would_be_trained_or_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    words = "model.kind = 'toy': manyhands does not build this kind yet; it builds decoder, "
    monkeypatch.setitem(KINDS, "toy", AnyModelConfig)
    with pytest.raises(ConfigError, match=f"^run.yaml: {words}"):
        parse_run(json.dumps({"model": {"kind": "toy"}}), "run.yaml")
    with pytest.raises(ConfigError, match=f"^config.json: {words}"):
        read_config({"model_type": "manyhands", "version": 1, "model": {"kind": "toy"}}, "config.json")


def test_a_run_takes_any_kind_that_is_built() -> None:
    run = parse_run(json.dumps({"model": {"kind": "recurrent", **RECURRENT}}), "run.yaml", ["model.dropout=0.1"])
    assert run.model == RecurrentConfig(**RECURRENT, dropout=0.1) and run.model.sparse_layers == [0]
    assert parse_run(dump_run(run), "run.yaml") == run and "kind: recurrent" in dump_run(run)
    assert parse_run("", "run.yaml", ["model.kind=recurrent"]).model == RecurrentConfig()
    with pytest.raises(ConfigError, match=r"^run: model = .*: moe_after names LSTM layer 7 of 2"):
        parse_run(json.dumps({"model": {"kind": "recurrent", **RECURRENT, "moe_after": [7]}}), "run")
    wrong = {"kind": "recurrent", **RECURRENT, "moe": {"router": {**HIERARCHY, "topk_group": 3}}}
    with pytest.raises(
        ConfigError, match=r"^run: model\.moe\.router = .*topk_group = 3 does not divide num_experts_per"
    ):
        parse_run(json.dumps({"model": wrong}), "run")
    with pytest.raises(ConfigError, match=r"^run: unknown field 'model.hiden_size'; did you mean 'hidden_size'"):
        parse_run(json.dumps({"model": {"kind": "recurrent", "hiden_size": 7}}), "run")
    with pytest.raises(ConfigError, match=r"^run: model.hidden_size = 'x': expected an integer"):
        parse_run(json.dumps({"model": {"kind": "recurrent", "hidden_size": "x"}}), "run")


def test_only_decoders_refuses_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^kind = 'recurrent': packing is for decoders only$"):
        as_decoder(RecurrentConfig(), "packing")
    with pytest.raises(ConfigError, match=r"^this model is of kind = 'recurrent', which mixtral does not describe$"):
        export_config(FAMILIES["mixtral"], RecurrentConfig())


def test_a_third_kind_is_one_class(monkeypatch: pytest.MonkeyPatch) -> None:

    class ToyConfig(AnyModelConfig):
        kind: Literal["toy"] = "toy"
        width: int = 3

    monkeypatch.setitem(KINDS, "toy", ToyConfig)
    assert register(ToyConfig) is ToyConfig
    config = read_model_config({"kind": "toy", "width": 4})
    assert config == ToyConfig(width=4)
    with pytest.raises(ConfigError, match=r"^x\.json: unknown field 'widht'; did you mean 'width'"):
        read_model_config({"kind": "toy", "widht": 4}, "x.json")
    with pytest.raises(
        ConfigError, match=r"^kind = 'toy': manyhands does not build this kind yet; it builds decoder, "
    ):
        mh.Decoder(config)
    with pytest.raises(ConfigError, match=r"^kind = 'toy': manyhands does not count this kind yet$"):
        count_any(config)
