"""Descriptions from anywhere: each bad config.json or tokenizer file is one line with the file and the field."""

import json
import subprocess
import sys

import pytest

from manyhands.checkpoint.model import load, load_model
from manyhands.checkpoint.source import open_source
from manyhands.config import ModelConfig, parse
from manyhands.families import FAMILIES, export_config

from .hostile import FITTING, INDEX, SINGLE, VALUES, MiB, copy, edit, fifo, link, make, nested, refused


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return make(tmp_path_factory.mktemp("good") / "model")


@pytest.fixture(autouse=True)
def nothing_is_read(monkeypatch):
    monkeypatch.setattr("manyhands.checkpoint.own.our_tensor", None)  # reading would be a TypeError


def yarn(**fields):
    return {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, **fields}


NAN, INF, HUGE = float("nan"), float("inf"), 10**4000
PACKED = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
BAD_FIELDS = [  # of mixtral
    ("num_local_experts", 10**12, "num_local_experts = 1000000000000: .*whole number|num_experts = "),
    ("num_local_experts", 65537, "num_experts = 65537"),
    ("num_local_experts", 65536, "'model.layers.0.block_sparse_moe.gate.weight' has shape"),
    ("num_local_experts", -4, "num_experts = -4"),
    ("num_local_experts", 0, "num_experts = 0"),
    ("num_local_experts", True, "num_local_experts = True: expected a whole number"),
    ("num_local_experts", "4", "num_local_experts = '4': expected a whole number"),
    ("num_local_experts", 4.0, "num_local_experts = 4.0: expected a whole number"),
    ("num_local_experts", [4], r"num_local_experts = \[4\]: expected a whole number"),
    ("num_local_experts", NAN, "num_local_experts = nan: expected a finite number"),
    ("num_local_experts", INF, "num_local_experts = inf: expected a finite number"),
    ("num_local_experts", HUGE, "num_local_experts = 10+…: an integer of 4,001 digits"),
    ("num_local_experts", None, "'num_local_experts' is missing"),
    ("num_local_experts", ..., "'num_local_experts' is missing"),
    ("num_local_experts", nested(900), r"num_local_experts = \[.*: expected a whole number"),
    ("num_experts_per_tok", 5, "num_experts_per_tok = 5 exceeds num_experts = 4"),
    ("num_experts_per_tok", 0, "num_experts_per_tok = 0"),
    ("hidden_size", 17, r"has shape \[280, 16\]; config.json says \[280, 17\]"),
    ("hidden_size", 1 << 24, r"has shape \[280, 16\]; config.json says \[280, 16777216\]"),
    ("hidden_size", (1 << 24) + 1, "hidden_size = 16777217"),
    ("num_hidden_layers", 4096, "tensor 'model.layers.2.self_attn.q_proj.weight' is missing|layers.2"),
    ("num_hidden_layers", 4097, "num_hidden_layers = 4097"),
    ("num_hidden_layers", 0, "num_hidden_layers = 0"),
    ("num_hidden_layers", 1, "layers.1.* is not one of this model's"),
    ("vocab_size", 0, "vocab_size = 0"),
    ("vocab_size", 281, r"embed_tokens.weight' has shape \[280, 16\]; config.json says \[281, 16\]"),
    ("intermediate_size", -1, "intermediate_size = -1"),
    ("head_dim", 0, "head_dim = 0"),
    ("head_dim", -8, "head_dim = -8"),
    ("num_attention_heads", 0, "num_attention_heads = 0: at least 1"),
    ("num_attention_heads", 1 << 40, "num_attention_heads = 1099511627776"),
    ("num_key_value_heads", 3, "num_key_value_heads = 3 does not divide num_attention_heads = 2"),
    ("rms_norm_eps", 1e308, r"rms_norm_eps = 1e\+308: expected a finite number"),
    ("rms_norm_eps", NAN, "rms_norm_eps = nan: expected a finite number"),
    ("rms_norm_eps", -1e-6, "rms_norm_eps = -1e-06"),
    ("rms_norm_eps", "1e-6", "rms_norm_eps = '1e-6': expected a finite number"),
    ("max_position_embeddings", -1, "max_position_embeddings = -1"),
    ("sliding_window", -4, "sliding_window = -4"),
    ("sliding_window", 0, "sliding_window = 0"),
    ("tie_word_embeddings", 1, "tie_word_embeddings = 1: expected true or false"),
    ("hidden_act", "relu", "hidden_act = 'relu': this family is supported with 'silu'"),
    ("hidden_act", {}, "hidden_act = {}: this family is supported with"),
    ("hidden_act", "x" * 10**5, r"hidden_act = 'x+\.\.\."),
    ("rope_parameters", [], r"rope_parameters = \[\]: expected an object"),
    ("rope_parameters", {"rope_type": "su"}, "rope_parameters: rope_type = 'su': supported: 'default'"),
    ("rope_parameters", {"rope_type": ["yarn"]}, r"rope_type = \['yarn'\]: supported"),
    ("rope_parameters", yarn(factor=NAN), "factor = nan: expected a finite number"),
    ("rope_parameters", yarn(factor=-2.0), "factor = -2.0"),
    ("rope_parameters", yarn(factor=0), "factor = 0"),
    ("rope_parameters", yarn(factor="2"), "factor = '2': expected a finite number"),
    ("rope_parameters", yarn(beta_fast=0), "beta_fast = 0"),
    ("rope_parameters", yarn(beta_fast=5e-324), "beta_fast = 5e-324"),
    ("rope_parameters", yarn(original_max_position_embeddings=-64), "original_max_position_embeddings = -64"),
    ("rope_parameters", yarn(factor=None, original_max_position_embeddings=-64), "= -"),
    ("rope_parameters", yarn(unknown=1), "rope_parameters: unknown field 'unknown'"),
    ("rope_parameters", {"rope_type": "default", "rope_theta": 1.0}, "rope_theta = 1.0"),
    ("rope_parameters", {"rope_type": "default", "rope_theta": -INF}, "rope_theta = -inf"),
    ("rope_scaling", {"type": "linear", "factor": 2.0}, "rope_scaling = .*rope_parameters is given too, and says"),
    ("rope_scaling", "linear", "rope_scaling = 'linear': expected an object"),
    ("quantization_config", {"quant_method": "gptq"}, "quantization_config.quant_method = 'gptq' cannot be read"),
    ("quantization_config", {"quant_method": nested(500)}, "quant_method = list cannot be read"),
    ("quantization_config", {}, "quantization_config.quant_method: this field is required"),
    ("quantization_config", [], "quantization_config: expected an object"),
    ("quantization_config", "fp8", "quantization_config: expected an object"),
    ("quantization_config", {"quant_method": "fp8", "weight_block_size": [0, -1]}, "weight_block_size.0 = 0"),
    (
        "quantization_config",
        {"quant_method": "fp8", "weight_block_size": [HUGE, 1]},
        "weight_block_size = 10+…",
    ),
    ("quantization_config", {"quant_method": "fp8", "surprise": 1}, "unknown field 'surprise'"),
    ("quantization_config", {**PACKED, "config_groups": {}}, "config_groups = {}"),
    ("quantization_config", {**PACKED, "config_groups": {"a": {"weights": {"num_bits": 3}}}}, "num_bits = 3"),
    ("model_type", ..., "'model_type' is missing; known: .*mixtral"),
    ("model_type", ["mixtral"], "'model_type' is missing"),
    ("model_type", {"a": 1}, "'model_type' is missing"),
    ("model_type", "mixtrall", "model_type = 'mixtrall' is not a family .* did you mean 'mixtral'"),
    ("model_type", "", "model_type = '' is not a family manyhands knows"),
    ("model_type", "a\nb", r"model_type = 'a\\nb' is not a family"),
    ("model_type", "x" * 10**6, "model_type = 'x+' ?is not a family|model_type = 'x+"),
    ("model_type", "manyhands", "model: this field is required"),
    ("new_trick", 1, "unknown field 'new_trick' may change what the model computes, so it is not ignored"),
    ("a\nb", 1, r"unknown field 'a\\nb'"),
    ("b" * 1000, 1, "a name of 1000 characters"),
]
BAD_OTHERS = [  # of other families
    (
        "qwen3_moe",
        {"mlp_only_layers": [0] * 10**5, "num_hidden_layers": 4096},
        "mlp_only_layers = .*4096 items at most",
    ),
    ("qwen3_moe", {"mlp_only_layers": [10**9]}, "mlp_only_layers.0 = 1000000000"),
    ("qwen3_moe", {"mlp_only_layers": [2]}, "mlp_only_layers names layer 2 of 2"),
    ("qwen3_moe", {"mlp_only_layers": [-1]}, "mlp_only_layers.0 = -1"),
    ("qwen3_moe", {"mlp_only_layers": 10**9}, "mlp_only_layers = 1000000000: expected a list"),
    ("qwen3_moe", {"mlp_only_layers": [0, 1]}, "no layer is sparse"),
    ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step = 0"),
    ("qwen3_moe", {"decoder_sparse_step": 3}, "no layer is sparse: .* decoder_sparse_step = 3"),
    ("qwen3_moe", {"num_experts": 65536, "num_hidden_layers": 4096}, "is missing, which config.json calls for"),
    ("qwen3_moe", {"norm_topk_prob": "true"}, "norm_topk_prob = 'true': expected true or false"),
    ("olmoe", {"hidden_size": 15}, "the rotated head width is 7; it must be even"),
    ("olmoe", {"hidden_size": 1}, "head_dim = 0"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv = 8.0: this family is supported with None"),
    ("deepseek_v3", {"first_k_dense_replace": 3}, "no layer is sparse: first_k_dense_replace = 3"),
    ("deepseek_v3", {"first_k_dense_replace": -1}, "first_k_dense_replace = -1"),
    ("deepseek_v3", {"n_group": 3}, "n_group = 3 does not divide num_experts = 4"),
    ("deepseek_v3", {"n_group": 0}, "n_group = 0"),
    ("deepseek_v3", {"topk_group": 2}, "topk_group = 2 exceeds n_group = 1"),
    ("deepseek_v3", {"kv_lora_rank": 0}, "kv_lora_rank = 0"),
    ("deepseek_v3", {"qk_rope_head_dim": 3}, "rotated head width is 3"),
    ("deepseek_v3", {"routed_scaling_factor": NAN}, "routed_scaling_factor = nan"),
    ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
    ("deepseek_v3", {"num_nextn_predict_layers": "1"}, "num_nextn_predict_layers = '1': expected a whole number"),
    ("deepseek_v3", {"num_nextn_predict_layers": [1]}, r"num_nextn_predict_layers = \[1\]: expected a whole number"),
    ("deepseek_v3", {"num_mtp_layers": NAN, "num_nextn_predict_layers": ...}, "num_mtp_layers = nan: expected"),
    (
        "gpt_oss",
        {"layer_types": ["full_attention"]},
        r"layer_types = \['full_attention'\]: .* 2 entries, one per layer",
    ),
    ("gpt_oss", {"layer_types": [{}, []]}, "layer_types.0 = {}"),
    ("gpt_oss", {"layer_types": ["full_attention", "linear_attention"]}, "layer_types.1 = 'linear_attention'"),
    ("gpt_oss", {"layer_types": "full"}, "layer_types = 'full': expected a list of 2 entries"),
    ("gpt_oss", {"swiglu_limit": 8.0}, "swiglu_limit = 8.0"),
    ("kimi_k25", {"text_config": ...}, "'text_config' is missing or is not an object"),
    ("kimi_k25", {"text_config": [1]}, "'text_config' is missing or is not an object"),
    ("kimi_k25", {"text_config": {"num_hidden_layers": "x"}}, "is missing"),
]
BAD_TEXTS = {
    "empty": (b"", "not valid JSON"),
    "half": (b'{"model_type": "mix', "not valid JSON"),
    "a list": (b"[]", "expected an object, found list"),
    "a number": (b"7", "expected an object, found int"),
    "100,000 deep": (b"[" * 100_000, "not valid JSON"),
    "objects 100,000 deep": (b'{"a":' * 100_000, "not valid JSON"),
    "10^5000": (b'{"vocab_size": 1' + b"0" * 5000 + b"}", "vocab_size = 1000.*…: an integer of 5,001 digits"),
    "Latin-1": ('{"model_type": "é"}'.encode("latin-1"), "not valid JSON"),
    "a byte order mark": (b"\xef\xbb\xbf{}", "not valid JSON"),
    "UTF-16": ("{}".encode("utf-16"), "not valid JSON"),
    "zeros": (bytes(1000), "not valid JSON"),
    "a field twice": (b'{"model_type": "mixtral", "vocab_size": 1, "vocab_size": 2}', "'vocab_size' stands twice"),
    "over a megabyte": (b" " * MiB + b"{}", "bytes is too long for a description"),
    "half a million lists": (
        b'{"a": [' + b"[]," * (MiB // 3 - 10) + b"1]}",
        "more values, or wider letters, than any model needs",
    ),
}
OTHER_FILES = {
    "a directory": (lambda p: (p.unlink(), p.mkdir()), "not a checkpoint|not a regular file"),
    "a pipe": (fifo, "not a checkpoint|not a regular file"),
    "missing": (lambda p: p.unlink(), "not a checkpoint|does not exist"),
    "a link out": (lambda p: link(p, "/etc/hostname"), "a symbolic link out of the checkpoint"),
    "a link to itself": (lambda p: link(p, p.name), "not a checkpoint|cannot be read"),
}


def names(cases):
    return [f"{number}-{str(case[0])[:30]}" for number, case in enumerate(cases)]


@pytest.mark.parametrize(("field", "value", "message"), BAD_FIELDS, ids=names(BAD_FIELDS))
def test_a_bad_field_is_one_line(tmp_path, good, field, value, message):
    directory = copy(good, tmp_path / "model")
    edit(directory / "config.json", **{field: value})
    refused(directory, message)


@pytest.mark.parametrize(("family", "fields", "message"), BAD_OTHERS, ids=names(BAD_OTHERS))
def test_a_bad_field_of_another_family_is_one_line(tmp_path, good, family, fields, message):
    directory = copy(good, tmp_path / "model")
    values = export_config(FAMILIES[family], parse(ModelConfig, VALUES | FITTING[family]))
    (directory / "config.json").write_text(json.dumps(values))
    edit(directory / "config.json", **fields)
    refused(directory, message)


@pytest.mark.parametrize("case", BAD_TEXTS)
def test_a_config_that_is_none_is_one_line(tmp_path, good, case):
    content, message = BAD_TEXTS[case]
    directory = copy(good, tmp_path / "model")
    (directory / "config.json").write_bytes(content)
    refused(directory, f"config.json: .*{message}")


@pytest.mark.parametrize("case", OTHER_FILES)
def test_a_config_that_is_no_file_is_one_line(tmp_path, good, case):
    change, message = OTHER_FILES[case]
    directory = copy(good, tmp_path / "model")
    change(directory / "config.json")
    for loader in (open_source, load_model, load):
        refused(directory, message, loaders=(loader,))


def test_depth_is_never_a_traceback(tmp_path, good):
    """Just below the depth that is no JSON, comparing or showing a value could still be too deep."""
    directory = copy(good, tmp_path / "model")
    text = (directory / "config.json").read_text()
    for depth in (*range(700, 1000, 7), *range(900, 960)):
        for field in ("hidden_act", "layer_types", "num_local_experts", "rope_parameters", "model_type", "surprise"):
            opened, closed = "[" * depth, "]" * depth
            (directory / "config.json").write_text(
                text[: text.rindex("}")] + f', "x": 1, "{field}": {opened}{closed}}}'
            )
            refused(directory, "config.json", loaders=(open_source,))


BROKEN_TOKENIZERS = {
    "not JSON": (b"{", "not a tokenizer.json"),
    "empty": (b"", "not a tokenizer.json"),
    "a list": (b"[]", "not a tokenizer.json"),
    "10^6 deep": (b"[" * 10**6, "not a tokenizer.json"),
    "10^6 deep inside": (b'{"version": "1.0", "normalizer": ' + b'{"a":' * 10**6, "not a tokenizer.json"),
    "no UTF-8": (b'{"version": "\xff"}', "not a tokenizer.json"),
    "numbers for text": (b'{"version": 1, "model": {"type": "BPE", "vocab": {"a": "b"}}}', "not a tokenizer.json"),
    "negative ids": (b'{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}', "not a tokenizer.json"),
    "merges of nothing": (b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["x y"]}}', "not a tokenizer.json"),
    "an id of 2^31": (
        b'{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 2147483648}, "merges": []}}',
        "not a tokenizer.json: token id 2,147,483,648: the largest that is taken is",
    ),
    "a pickle": (b"\x80\x04K\x01.", "not a tokenizer.json"),
}


@pytest.mark.parametrize("case", BROKEN_TOKENIZERS)
def test_a_bad_tokenizer_is_one_line(tmp_path, good, case):
    content, message = BROKEN_TOKENIZERS[case]
    directory = copy(good, tmp_path / "model")
    (directory / "tokenizer.json").write_bytes(content)
    refused(directory, message, loaders=(load,))


OTHER_TOKENIZERS = {
    "a larger vocabulary": ("config.json", None, "the tokenizer has 270 tokens, the model vocab_size = 100"),
    "config a list": ("tokenizer_config.json", b"[]", "tokenizer_config.json: expected an object"),
    "config deep": ("tokenizer_config.json", b"[" * 10**6, "tokenizer_config.json: not valid JSON"),
    "eos a number": ("tokenizer_config.json", b'{"eos_token": 7}', "tokenizer_config.json: eos_token is neither"),
    "template a dict": ("tokenizer_config.json", b'{"chat_template": {}}', "chat_template is neither"),
    "map": ("special_tokens_map.json", b'{"bos_token": [1]}', "special_tokens_map.json: bos_token is neither"),
    "eos id": ("generation_config.json", b'{"eos_token_id": -1}', "generation_config.json: eos_token_id is neither"),
    "template of bytes": ("chat_template.jinja", b"\xff", "chat_template.jinja: not UTF-8 at byte 0"),
}


@pytest.mark.parametrize("case", OTHER_TOKENIZERS)
def test_bad_files_beside_the_tokenizer_are_one_line(tmp_path, good, case):
    file, content, message = OTHER_TOKENIZERS[case]
    directory = tmp_path / "model"
    if content is None:
        make(directory, vocab_size=100)
    else:
        (copy(good, directory) / file).write_bytes(content)
    refused(directory, message, loaders=(load,))


def test_the_command_line_says_it_in_one_line(tmp_path, good):
    """One process for several: the verb, as a person runs it."""
    directories = []
    for number, (name, content) in enumerate(
        {"config.json": b"[" * 10**5, SINGLE: b"7 bytes", INDEX: b'{"weight_map": 1}', "tokenizer.json": b"[]"}.items()
    ):
        directories.append(copy(good, tmp_path / str(number)))
        (directories[-1] / name).write_bytes(content)
    code = (
        "import sys\nfrom manyhands.cli.main import main\n"
        "for directory in sys.argv[1:]:\n"
        "    sys.argv = ['manyhands', 'generate', directory, '--prompt', 'x']\n"
        "    try: main()\n"
        "    except SystemExit as done: print(done.code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *map(str, directories)], capture_output=True, text=True)
    assert done.stdout.split() == ["2"] * 4, done
    lines = done.stderr.splitlines()
    assert len(lines) == 4 and all(
        line.startswith(f"manyhands: {directory}/") for line, directory in zip(lines, directories, strict=True)
    ), lines
