"""A field that is left out means what the reference takes it to mean, or is refused as missing by its name."""

import copy
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from manyhands.errors import ConfigError
from manyhands.families import FAMILIES, canonical, read_config
from manyhands.families.fit import differ

from .published import PUBLISHED, Json
from .references import CASES

WITHOUT_CLASS = {"deepseek", "grok-1"}  # nothing to compare with
CLASS_OF = {"kimi_k2": "deepseek_v3", "kimi_k25": "deepseek_v3"}
SOURCES = [n for n in PUBLISHED if n not in WITHOUT_CLASS] + [f"{case} (small)" for case in CASES]
ELSEWHERE = {
    "attention_multiplier": 0.3, "attn_logit_softcap": 20.0, "embedding_multiplier": 2.0, "first_k_dense_replace": 2,
    "head_dim": 32, "logits_scaling": 3.0, "max_attn_value": 20.0, "max_window_layers": 1, "moe_layer_start_index": 1,
    "decoder_sparse_step": 2, "n_group": 2, "partial_rotary_factor": 0.5, "qkv_bias": True, "residual_multiplier": 0.4,
    "rope_interleave": False, "rotary_dim": 8, "routed_scaling_factor": 1.7, "scoring_func": "sigmoid",
    "shared_expert_intermediate_size": 24, "sliding_window": 9, "swiglu_limit": 5.0, "use_qk_norm": True,
    "use_sliding_window": True, "mlp_only_layers": [1], "norm_topk_prob": False, "attention_bias": True,
    "mlp_bias": True, "use_bias": True, "clip_qkv": 3.0, "n_shared_experts": 3, "topk_method": "greedy",
}  # fmt: skip
"""Fields that some family's reader knows, with a value that changes the model there."""
ROPE = ("rope_parameters", "rope_scaling")


def class_of(model_type: str) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[CLASS_OF.get(model_type, model_type)]


def fields_of(source: str) -> Json:
    """A language model's `config.json`: as published, or a small one with every field, none at its default."""
    if source.endswith(" (small)"):
        fields = CASES[source.removesuffix(" (small)")][1]
        fields = {k: v for k, v in fields.items() if k != "attn_implementation"}
        made: Json = class_of(source.split(",")[0].split(" ")[0])(**copy.deepcopy(fields)).to_dict()
        return made
    values = copy.deepcopy(PUBLISHED[source][1])
    text = FAMILIES[source].text_field
    return values[text] if text else values


def without_one(fields: Json) -> list[tuple[str, Json]]:
    """Every field left out in turn, those of the rotation too."""
    found = [(name, {k: v for k, v in fields.items() if k != name}) for name in fields if name != "model_type"]
    for rope in ROPE:
        inner = fields.get(rope) or {}
        found += [(f"{rope}.{n}", fields | {rope: {k: v for k, v in inner.items() if k != n}}) for n in inner]
    return [(name, copy.deepcopy(rest)) for name, rest in found]


@pytest.mark.parametrize("source", SOURCES)
def test_a_field_left_out(source: str) -> None:
    checked = 0
    for name, rest in without_one(fields_of(source)):
        try:
            ours = canonical(read_config(copy.deepcopy(rest), "config.json")[1])
        except ConfigError as error:
            leaf = name.split(".")[-1].replace("num_local_experts", "_experts")  # Qwen3's has two names
            assert leaf in str(error) or "head width" in str(error), f"{name}: {error}"
            continue
        if (rest.get("rope_scaling") or {}).get("alpha") and name == "rope_scaling.factor":
            continue  # transformers demands Hunyuan's factor, and does not use it beside an alpha
        whole = class_of(rest["model_type"]).from_dict(rest).to_dict()
        whole.pop("quantization_config", None)
        theirs = canonical(read_config(whole, "as transformers has it")[1])
        assert not differ(ours, theirs), f"without {name}: {differ(ours, theirs)}"
        checked += 1
    assert checked > 10


@pytest.mark.parametrize("model_type", [n for n in PUBLISHED if n not in WITHOUT_CLASS])
@pytest.mark.parametrize("field", ELSEWHERE)
def test_a_field_that_only_other_families_have(model_type: str, field: str) -> None:
    """What changes the model here must stand in the reference's own code; otherwise it is refused, or ignored."""
    fields = fields_of(model_type)
    before = canonical(read_config(copy.deepcopy(fields), "config.json")[1]) if model_type != "kimi_k25" else None
    if before is None:
        return  # its language model is kimi_k2's
    try:
        after = canonical(read_config(fields | {field: ELSEWHERE[field]}, "config.json")[1])
    except ConfigError:
        return
    if after == before:
        return
    cls = class_of(model_type)
    package = Path(inspect.getfile(cls)).parent
    code = "".join(p.read_text() for p in package.glob("*ing_*.py")) + "".join(
        p.read_text() for p in package.glob("configuration_*.py")
    )
    assert re.search(rf"\b{field}\b", code), f"{model_type}: its reference does not know {field}"


@pytest.mark.parametrize("model_type", sorted(PUBLISHED))
@pytest.mark.parametrize("inside", [False, True])
def test_a_part_of_the_head_is_rotated_only_where_the_reference_can(model_type: str, inside: bool) -> None:
    values = copy.deepcopy(PUBLISHED[model_type][1])
    text = values[FAMILIES[model_type].text_field or ""] if FAMILIES[model_type].text_field else values
    text.pop("rope_scaling", None), text.pop("rotary_dim", None)
    text |= {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}} if inside else {}
    text |= {} if inside else {"partial_rotary_factor": 0.25}
    if model_type in ("glm4_moe", "minimax_m2"):
        assert read_config(values, "config.json")[1].rope.partial_rotary_factor == 0.25
    else:
        with pytest.raises(ConfigError, match=r"partial_rotary_factor = 0\.25: this family rotates the whole head"):
            read_config(values, "config.json")


def test_hunyuan_as_transformers_saves_it() -> None:
    fields = fields_of("hunyuan_v1_moe")
    saved = class_of("hunyuan_v1_moe").from_dict(copy.deepcopy(fields)).to_dict()
    assert saved["rope_parameters"]["rope_type"] == saved["rope_parameters"]["type"] == "dynamic"
    config = read_config(saved, "config.json")[1]
    assert config == read_config(fields, "config.json")[1]
    d = config.attention.head_dim
    assert config.rope.rope_theta == 10_000.0 * 1000.0 ** (d / (d - 2)) and config.rope.rope_type == "default"


def test_whole_floats_are_whole_numbers() -> None:
    fields = fields_of("deepseek_v3")
    before = read_config(copy.deepcopy(fields), "config.json")[1]
    fields["rope_scaling"]["original_max_position_embeddings"] = 4096.0
    assert read_config(copy.deepcopy(fields), "config.json")[1] == before
    fields["rope_scaling"]["original_max_position_embeddings"] = 4096.5
    with pytest.raises(ConfigError, match="expected a whole number"):
        read_config(fields, "config.json")
