"""Every field of a `config.json` is understood, known to be harmless, or refused by name."""

import copy
import math
import re
from typing import Any

import pytest

from manyhands.config.load import load_preset
from manyhands.config.shapes import tensor_shapes
from manyhands.errors import ConfigError
from manyhands.families import FAMILIES, UnknownField, canonical, export_config, misfit, nearest, read_config
from manyhands.families.harmless import _NEUTRAL

from .published import PUBLISHED, Json

NAMES = sorted(PUBLISHED)


def values_of(name: str) -> tuple[Json, Json]:
    """A published `config.json`, and the part of it that describes the language model."""
    values = copy.deepcopy(PUBLISHED[name][1])
    return values, values[FAMILIES[name].text_field or ""] if FAMILIES[name].text_field else values


def test_all_families_are_here() -> None:
    decoders = {name for name, family in FAMILIES.items() if "decoder" in family.kinds}
    assert PUBLISHED.keys() == decoders - {"manyhands"}


@pytest.mark.parametrize("name", NAMES)
def test_a_published_model_reads_and_counts(name: str) -> None:
    billions, values = PUBLISHED[name]
    family, config = read_config(values, "config.json")
    assert family.model_type == name
    count = sum(
        math.prod(shape) for n, shape in tensor_shapes(config).items() if not n.endswith("e_score_correction_bias")
    )
    assert count / 1e9 == pytest.approx(billions, rel=0.01)
    again = read_config(export_config(family, config), "config.json")[1]
    assert canonical(again) == canonical(config)


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_field_is_refused_by_name(name: str) -> None:
    values, text = values_of(name)
    text["hyper_connections"] = 4
    with pytest.raises(ConfigError, match=r"config\.json: unknown field 'hyper_connections' may change"):
        read_config(values, "config.json")
    text["hyper_connections"] = None
    read_config(values, "config.json")


@pytest.mark.parametrize("name", NAMES)
def test_a_harmless_field_is_accepted(name: str) -> None:
    values, text = values_of(name)
    expected = read_config(values, "config.json")[1]
    text |= {"use_cache": False, "_name_or_path": "somewhere", "attention_dropout": 0.3, "torch_dtype": "float16"}
    text |= {"num_return_sequences": 2, "id2label": {"0": "x"}, "router_aux_loss_coef": 0.5}
    assert read_config(values, "config.json")[1] == expected


LEFT_BEHIND: Json = {
    "unsloth_version": "2025.9.1", "unsloth_fixed": True, "neftune_noise_alpha": 5, "bos_token": "<s>",
    "_attn_implementation_autoset": True, "_anything": {}, "pad_token": {"content": "<pad>"}, "image_token_id": 7,
    "image_token_index": 7, "auto_map": {"AutoConfig": "x.Y"}, "dtype": "bfloat16", "torch_dtype": None,
    "transformers_version": "5.0.0", "quantization_config": None, "problem_type": None, "task_specific_params": {},
    "label2id": {"x": 0}, "num_labels": 2, "loss_type": "ForCausalLM", "model_max_length": 4096, "max_seq_length": 2048,
    "tokenizer_padding_side": "left", "transformers.js_config": {"kv_cache_dtype": "fp16"}, "classifier_dropout": 0.1,
    "use_flash_attention_2": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}, "summary_type": "mean",
    "pretraining_tp": 2, "bf16": True, "license": "mit",
}  # fmt: skip
"""What tools leave in published files, besides transformers' own fields."""


@pytest.mark.parametrize("name", NAMES)
def test_what_fine_tuning_leaves_behind_is_accepted(name: str) -> None:
    values, text = values_of(name)
    expected = read_config(values, "config.json")[1]
    text |= LEFT_BEHIND
    text |= {off: value for off, value in _NEUTRAL.items() if off not in text and name in ("mixtral", "llama")}
    assert read_config(values, "config.json")[1] == expected


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("deepseek", "grok-1", "kimi_k2", "kimi_k25", "llama4")])
@pytest.mark.parametrize("whole", [False, True])
def test_all_that_transformers_writes_is_known(name: str, whole: bool) -> None:
    """Its configuration with every default, generation settings of any version among them, is the same model."""
    from transformers import GenerationConfig, PretrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    values, text = values_of(name)
    expected = canonical(read_config(values, "config.json")[1])
    theirs = CONFIG_MAPPING[name].from_dict(text)
    saved = theirs.to_dict() if whole else theirs.to_diff_dict()
    saved = PretrainedConfig().to_dict() | vars(GenerationConfig()) | saved | {"model_type": name}
    saved |= {field: 1 for field in vars(GenerationConfig()) if saved[field] is None}
    saved["quantization_config"] = None
    assert canonical(read_config(saved, "config.json")[1]) == expected


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_field_is_ignored_by_name(name: str) -> None:
    values, text = values_of(name)
    expected = read_config(values, "config.json")[1]
    text |= {"hyper_connections": 4, "other": [1]}
    with pytest.raises(UnknownField, match=r"unknown field 'other' may change") as caught:
        read_config(values, "config.json", ["hyper_connections"])
    assert caught.value.name == "other"
    assert read_config(values, "config.json", ["hyper_connections", "other"])[1] == expected


@pytest.mark.parametrize(
    ("ignored", "said"),
    [
        ("hyper_conections", "there is no field 'hyper_conections' to ignore; did you mean 'hyper_connections'"),
        ("hidden_size", "hidden_size = 4096: only an unknown field can be ignored"),
        ("quantization_config", "quantization_config = None: only an unknown field can be ignored"),
        ("rope_scaling", "rope_scaling = .*: only an unknown field can be ignored"),
        ("rope_scaling.factor", "factor = 2.0: only an unknown field can be ignored"),
        ("rope_scaling.boost.deeper", "there is no field 'rope_scaling.boost.deeper'"),
    ],
)
def test_what_cannot_be_ignored(ignored: str, said: str) -> None:
    values = values_of("mixtral")[0] | {"hyper_connections": 4, "quantization_config": None}
    values["rope_scaling"] = {"type": "linear", "factor": 2.0, "boost": 3}
    good = ["hyper_connections", "rope_scaling.boost"]
    assert read_config(copy.deepcopy(values), "config.json", good)[1].rope.factor == 2.0
    with pytest.raises(UnknownField, match="rope_scaling: unknown field 'boost'") as caught:
        read_config(copy.deepcopy(values), "config.json", good[:1])
    assert caught.value.name == "rope_scaling.boost"
    with pytest.raises(ConfigError, match=said):
        read_config(values, "config.json", [*good, ignored])


@pytest.mark.parametrize(
    ("field", "value"), [("num_experts_per_token", 4), ("attention_bias", True), ("n_group", True), ("n_group", 2)]
)
def test_a_field_that_only_looks_harmless_is_refused(field: str, value: Any) -> None:
    with pytest.raises(UnknownField, match=f"unknown field '{field}'"):
        read_config(values_of("mixtral")[0] | {field: value}, "config.json")


@pytest.mark.parametrize("name", NAMES)
def test_the_base_of_the_rotation_stands_where_other_programs_look(name: str) -> None:
    family, config = read_config(values_of(name)[0], "config.json")
    written = export_config(family, config)
    written = written[family.text_field] if family.text_field else written
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == config.rope.rope_theta
    if name == "dots1":
        assert written["scoring_func"] == "sigmoid"  # llama.cpp refuses the publisher's word, "noaux_tc"
    if name == "glm4_moe":
        assert written["partial_rotary_factor"] == config.rope.partial_rotary_factor


OTHER_MATHS: list[tuple[str, str, Any]] = [
    ("mixtral", "hidden_act", "relu"),
    ("mixtral", "rope_scaling", {"type": "longrope", "factor": 2.0}),
    ("mixtral", "rope_scaling", {"type": "linear", "factor": 2.0, "attention_boost": 3}),
    ("mixtral", "num_experts_per_tok", "two"),
    ("mixtral", "hidden_size", True),
    ("mixtral", "rms_norm_eps", float("nan")),
    ("qwen3_moe", "mlp_only_layers", 3),
    ("olmoe", "clip_qkv", 8.0),
    ("deepseek", "scoring_func", "sigmoid"),
    ("deepseek", "moe_layer_freq", 2),
    ("deepseek_v2", "norm_topk_prob", True),
    ("deepseek_v2", "topk_method", "noaux_tc"),
    ("deepseek_v3", "scoring_func", "softmax"),
    ("deepseek_v3", "topk_method", "greedy"),
    ("deepseek_v3", "num_key_value_heads", 8),
    ("kimi_k25", "scoring_func", "softmax"),
    ("gpt_oss", "swiglu_limit", 10.0),
    ("gpt_oss", "layer_types", ["full_attention"]),
    ("grok-1", "hidden_act", "silu"),
    ("phimoe", "num_experts_per_tok", 3),
    ("phimoe", "original_max_position_embeddings", 2048),
    ("phimoe", "rope_scaling", {"type": "yarn", "factor": 2.0, "short_mscale": 1.0, "long_mscale": 1.0}),
    ("phimoe", "rope_scaling", {"type": "longrope", "short_factor": [1.0] * 64, "long_factor": [1.0] * 64}),
    ("phimoe", "tie_word_embeddings", True),
    ("llama", "mlp_bias", True),
    ("granitemoe", "logits_scaling", 0.0),
    ("ernie4_5_moe", "use_bias", True),
    ("ernie4_5_moe", "moe_gate", "top2"),
    ("minimax_m2", "attn_type_list", [0] * 62),
    ("minimax_m2", "shared_intermediate_size", 512),
    ("hunyuan_v1_moe", "use_cla", True),
    ("hunyuan_v1_moe", "moe_topk", [8] * 31 + [4]),
    ("hunyuan_v1_moe", "rope_scaling", {"type": "dynamic", "factor": 2.0}),
]


@pytest.mark.parametrize(("name", "field", "value"), OTHER_MATHS)
def test_a_value_that_means_another_model_is_refused(name: str, field: str, value: Any) -> None:
    values, text = values_of(name)
    text[field] = value
    with pytest.raises(ConfigError, match=rf"config\.json: .*{field.removeprefix('rope_scaling')}"):
        read_config(values, "config.json")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"])
def test_a_missing_field_is_named(name: str, field: str) -> None:
    values, text = values_of(name)
    del text[field]
    with pytest.raises(ConfigError, match=f"'{field}' is missing"):
        read_config(values, "config.json")


@pytest.mark.parametrize("model_type", ["jamba", "mixtrall", "", "grok_1"])
def test_an_unknown_family_lists_the_known(model_type: str) -> None:
    with pytest.raises(ConfigError, match="is not a family manyhands knows") as caught:
        read_config({"model_type": model_type}, "config.json")
    for name in FAMILIES:
        assert name in str(caught.value)


@pytest.mark.parametrize("values", [{}, {"model_type": None}, {"model_type": 3}, [], "mixtral", None])
def test_no_family_at_all(values: Any) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: "):
        read_config(values, "config.json")


@pytest.mark.parametrize("inner", [None, 3, [], "text"])
def test_a_text_config_that_is_none(inner: Any) -> None:
    with pytest.raises(ConfigError, match="'text_config' is missing or is not an object"):
        read_config({"model_type": "kimi_k25", "text_config": inner}, "config.json")


@pytest.mark.parametrize("preset", ["quickstart", "tiny"])
@pytest.mark.parametrize(
    "changed",
    [
        ["model.moe.router.score=softmax"],
        ["model.moe.router.score=softmax", "model.moe.router.bias=false"],
        ["model.moe.router.score=softmax", "model.moe.router.bias=false", "model.moe.first_k_dense_replace=0"],
        ["model.attention.qk_norm=full"],
        ["model.moe.router.bias=false"],
        ["model.attention.qk_norm=none", "model.moe.router.score=softmax", "model.moe.n_shared_experts=0"],
    ],
)
def test_what_the_error_says_would_fit_does(preset: str, changed: list[str]) -> None:
    with pytest.raises(ConfigError, match="no family holds this model exactly") as caught:
        nearest(load_preset(preset, changed).model)
    ways = re.findall(r"(\w+) with ((?:\S+=\S+(?: and )?)+)(?=; |\. |$)", str(caught.value))
    assert ways
    for family, fields in ways:
        asked = [f"model.{field}" for field in fields.split(" and ")]
        assert misfit(FAMILIES[family], load_preset(preset, changed + asked).model) is None, (family, asked)
