"""Conversion between families: what is moved, what is refused, what the receipt says."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from manyhands.checkpoint.convert import RECEIPT, convert
from manyhands.checkpoint.model import load_model, save
from manyhands.config import ModelConfig
from manyhands.errors import CheckFailed, CheckpointError, ConfigError
from manyhands.families import nearest
from manyhands.models import Decoder, init_weights

MIXTRAL = {
    "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 8, "max_position_embeddings": 32,
    "attention": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8},
    "moe": {"router": {"num_experts": 4, "num_experts_per_tok": 2}, "moe_intermediate_size": 8},
}  # fmt: skip


def build(**changes) -> Decoder:
    model = Decoder(ModelConfig(**MIXTRAL | {"initializer_range": 0.5} | changes))
    init_weights(model, seed=1)
    return model.eval()


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    path = tmp_path_factory.mktemp("mixtral") / "model"
    save(build(), path, family="mixtral")
    return path


def test_there_and_back_is_bit_equal(mixtral, tmp_path):
    convert(mixtral, tmp_path / "ours", to="manyhands")
    convert(tmp_path / "ours", tmp_path / "theirs", to="mixtral", max_shard_size=4000)
    before = load_file(mixtral / "model.safetensors")
    after = {}
    for shard in sorted((tmp_path / "theirs").glob("*.safetensors")):
        after |= load_file(shard)
    index = json.loads((tmp_path / "theirs" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in after.values())
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert load_model(tmp_path / "theirs").config == load_model(mixtral).config


def test_the_receipt_accounts_for_every_tensor(mixtral, tmp_path):
    seen = []
    receipt = convert(mixtral, tmp_path / "a", to="manyhands", progress=lambda *p: seen.append(p))
    assert json.loads((tmp_path / "a" / RECEIPT).read_text()) == receipt
    stored = load_file(mixtral / "model.safetensors")
    assert receipt["source_tensors"].keys() == stored.keys()
    written = load_file(tmp_path / "a" / "model.safetensors")
    assert receipt["target_tensors"].keys() == written.keys()
    for name, tensor in stored.items():
        fate = receipt["source_tensors"][name]
        assert fate["sha256"] == hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
        assert fate["how"] == "moved, bit for bit" and fate["became"] and fate["file"] == "model.safetensors"
    for name, tensor in written.items():
        entry = receipt["target_tensors"][name]
        assert entry["sha256"] == hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
        assert entry["from"]
    source, target = receipt["source"]["files"], receipt["target"]["files"]
    assert source["model.safetensors"]["size"] == (mixtral / "model.safetensors").stat().st_size
    assert {"config.json", "model.safetensors"} <= target.keys()
    agreement = receipt["agreement"]
    assert agreement["same_experts"] == 1.0 and agreement["largest_logit_difference"] < 1e-5
    assert agreement["logits_std"] > 0.1
    assert [done for _, done, _ in seen] == list(range(1, len(written) + 1)) and seen[-1][2] == len(written)


def test_another_dtype_is_said_so(mixtral, tmp_path):
    receipt = convert(mixtral, tmp_path / "half", dtype=torch.bfloat16)
    assert {fate["how"] for fate in receipt["source_tensors"].values()} == {"converted"}
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    half, full = load_file(tmp_path / "half" / "model.safetensors"), load_file(mixtral / "model.safetensors")
    assert all(torch.equal(half[n], full[n].bfloat16()) for n in full)
    assert receipt["agreement"]["same_experts"] > 0.8


def test_a_family_that_cannot_say_it_is_refused_before_anything_is_written(mixtral, tmp_path):
    with pytest.raises(ConfigError, match=r"does not fit olmoe: .*qk_norm = none here, full there"):
        convert(mixtral, tmp_path / "x", to="olmoe")
    with pytest.raises(ConfigError, match=r"--to: model_type = 'mixtrall' .* did you mean 'mixtral'"):
        convert(mixtral, tmp_path / "x", to="mixtrall")
    assert not list(tmp_path.iterdir())


def test_a_tensor_too_many_or_too_few_is_refused_before_anything_is_written(mixtral, tmp_path):
    for change, message in (
        (lambda t: t.update(extra=torch.ones(1)), "'extra' is not one of this model's"),
        (lambda t: t.pop("model.norm.weight"), r"'model\.norm\.weight' is missing"),
    ):
        broken = tmp_path / "broken"
        broken.mkdir(exist_ok=True)
        tensors = load_file(mixtral / "model.safetensors")
        change(tensors)
        save_file(tensors, broken / "model.safetensors")
        (broken / "config.json").write_bytes((mixtral / "config.json").read_bytes())
        with pytest.raises(CheckpointError, match=message):
            convert(broken, tmp_path / "x")
    assert [p.name for p in tmp_path.iterdir()] == ["broken"]


def test_what_the_model_does_not_compute_with_is_kept_or_left_out_by_request(tmp_path):
    attention = {
        "kind": "mla", "num_attention_heads": 2, "q_lora_rank": None, "kv_lora_rank": 8, "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4, "v_head_dim": 8, "latent_norm_eps": 1e-6,
    }  # fmt: skip
    router = {"num_experts": 4, "num_experts_per_tok": 2, "score": "sigmoid", "bias": True}
    model = build(attention=attention, moe={"router": router, "moe_intermediate_size": 8}, rope={"interleave": True})
    save(model, tmp_path / "v3", family="deepseek_v3")
    path = tmp_path / "v3" / "model.safetensors"
    mtp = torch.randn(16, 32)
    save_file(load_file(path) | {"model.layers.2.eh_proj.weight": mtp}, path)
    (tmp_path / "v3" / "manifest.json").unlink()
    fields = json.loads((tmp_path / "v3" / "config.json").read_text())
    (tmp_path / "v3" / "config.json").write_text(json.dumps(fields | {"num_nextn_predict_layers": 1}))

    receipt = convert(tmp_path / "v3", tmp_path / "again")
    assert receipt["source_tensors"]["model.layers.2.eh_proj.weight"]["how"] == "kept as it is, not computed with"
    assert torch.equal(load_file(tmp_path / "again" / "model.safetensors")["model.layers.2.eh_proj.weight"], mtp)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["num_nextn_predict_layers"] == 1
    with pytest.raises(CheckpointError, match=r"eh_proj\.weight' would be left over.*--drop-extras"):
        convert(tmp_path / "v3", tmp_path / "x", to="kimi_k2")
    receipt = convert(tmp_path / "v3", tmp_path / "k2", to="kimi_k2", drop_extras=True)
    assert receipt["source_tensors"]["model.layers.2.eh_proj.weight"]["how"] == "left out, as asked"
    assert load_model(tmp_path / "k2").family == "kimi_k2"


def test_a_model_that_does_not_agree_is_not_written(mixtral, tmp_path, monkeypatch):
    import manyhands.checkpoint.convert as module

    value = module.Conversion.value
    monkeypatch.setattr(module.Conversion, "value", lambda self, name: value(self, name) * 1.5)
    with pytest.raises(CheckFailed, match="does not agree"):
        convert(mixtral, tmp_path / "x")
    assert not list(tmp_path.iterdir())
    assert convert(mixtral, tmp_path / "x", agreement=False)["agreement"] is None


QWEN3 = {"attention": MIXTRAL["attention"] | {"qk_norm": "head"}}
SHARED = {"moe": MIXTRAL["moe"] | {"n_shared_experts": 1}}
OLMOE = {"attention": MIXTRAL["attention"] | {"qk_norm": "full"}}
GATED = {"attention": MIXTRAL["attention"] | {"attention_bias": True}}
GATED |= {"moe": MIXTRAL["moe"] | {"n_shared_experts": 1, "shared_expert_gate": True}}


@pytest.mark.parametrize(
    ("changes", "family"),
    [({}, "mixtral"), (QWEN3, "qwen3_moe"), (OLMOE, "olmoe"), (GATED, "qwen2_moe"), (SHARED, "deepseek")],
)
def test_a_softmax_router_goes_where_the_docs_say(changes, family):
    assert nearest(build(**changes).config).model_type == family


def test_where_no_family_fits_the_one_value_that_would_is_named():
    with pytest.raises(ConfigError, match="no family holds this model exactly") as caught:
        nearest(build(**QWEN3, **SHARED).config)
    said = str(caught.value).split("One change would do: ")[1]
    assert "qwen3_moe with moe.n_shared_experts=0" in said
    assert "deepseek with attention.qk_norm=none" in said
    for changed, family in ((QWEN3, "qwen3_moe"), (SHARED, "deepseek")):
        assert nearest(build(**changed).config).model_type == family


def test_ours_goes_to_the_nearest_family(tmp_path):
    from manyhands.checkpoint.files import building
    from manyhands.checkpoint.model import save_model

    with building(tmp_path / "run") as new:
        save_model(new, build())
    assert convert(tmp_path / "run", tmp_path / "out")["target"]["model_type"] == "mixtral"
    with building(tmp_path / "odd") as new:
        save_model(new, build(hidden_act="gelu", moe=MIXTRAL["moe"] | {"hidden_act": "gelu"}))
    with pytest.raises(ConfigError, match=r"no family holds this model exactly; the nearest: .*hidden_act = gelu"):
        convert(tmp_path / "odd", tmp_path / "x")
