"""A checkpoint is checked by its own weights: whole where it is small, and it says what it read where it is large."""

import pytest
import torch

from manyhands.check import own, own_read, run_check
from manyhands.checkpoint.find import find
from manyhands.checkpoint.model import save
from manyhands.checkpoint.source import open_source
from manyhands.config import AttentionConfig, ModelConfig, MoEConfig, PackedConfig, Packing, RouterConfig
from manyhands.models import Decoder, init_weights
from manyhands.quantize.quantize import quantize
from tests.check.configs import BALANCE

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=96,
    num_hidden_layers=4,
    intermediate_size=128,
    attention=AttentionConfig(num_attention_heads=4, num_key_value_heads=2, head_dim=32, qk_norm="head"),
    moe=MoEConfig(moe_intermediate_size=48, router=RouterConfig(num_experts=18, num_experts_per_tok=2)),
    tie_word_embeddings=False,
    initializer_range=0.1,
)
DEEPSEEK = CONFIG.model_copy(
    update={
        "attention": AttentionConfig(
            kind="mla", num_attention_heads=4, kv_lora_rank=48, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16
        ),
        "moe": MoEConfig(
            moe_intermediate_size=48,
            first_k_dense_replace=1,
            n_shared_experts=1,
            router=RouterConfig(
                num_experts=32, num_experts_per_tok=4, score="sigmoid", bias=True, n_group=4, topk_group=2,
                routed_scaling_factor=2.5,
            ),
        ),
    }
)  # fmt: skip


@pytest.fixture
def written(tmp_path):
    def write(config: ModelConfig, family: str, spoil=None, packed: PackedConfig | None = None):
        model = Decoder(config)
        init_weights(model, seed=0)
        if spoil:
            with torch.no_grad():
                spoil(dict(model.named_parameters()))
        save(model, tmp_path / "M", family=family)
        if packed is None:
            return open_source(find(tmp_path / "M"))
        quantize(open_source(tmp_path / "M"), tmp_path / "P", packed)
        return open_source(find(tmp_path / "P"))

    return write


def _checked(source):
    return run_check(
        source.config, BALANCE, source=source, backends=["eager"], dtypes=["float32"], cases=[], decoding=False,
        routers=False,
    )  # fmt: skip


PACKED = PackedConfig(experts=Packing(format="int4", group_size=32), linear=Packing(format="int8"))
KINDS = [(CONFIG, "qwen3_moe"), (CONFIG, "manyhands"), (DEEPSEEK, "deepseek_v3")]


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("packed", [None, PACKED], ids=["plain", "packed"])
@pytest.mark.parametrize(("config", "family"), KINDS, ids=["qwen3", "ours", "deepseek"])
def test_green_and_says_what_it_read(written, monkeypatch, config, family, packed, large):
    if large:
        monkeypatch.setattr(own, "WHOLE_VALUES", 0)
    report = _checked(written(config, family, packed=packed))
    assert report.ok, "\n".join(row.line() for row in report.failures)
    said = "\n".join(report.read)
    assert "100 % of the bytes" in said
    assert {"decoding: logits", "weights are finite"} <= {row.quantity for row in report.rows}
    if large:
        assert "layers 0, " in said and "experts 0, " in said and "whole" in said
        assert "whole experts" in {row.quantity for row in report.rows}
    else:
        assert "with all" in said
    assert ("packed records" in {row.quantity for row in report.rows}) == (packed is not None)
    assert report.to_dict()["read"] == report.read


@pytest.mark.parametrize("large", [False, True])
def test_one_nan_is_red_and_named(written, monkeypatch, large):
    if large:
        monkeypatch.setattr(own, "WHOLE_VALUES", 0)

    def spoil(parameters):
        parameters["layers.2.mlp.experts.down_proj"][17, 5, 3] = torch.nan

    report = _checked(written(CONFIG, "qwen3_moe", spoil))
    (row,) = [row for row in report.rows if row.quantity == "weights are finite"]
    assert row.failing == ("model.layers.2.mlp.experts.17.down_proj.weight",)


def test_nothing_but_nan_is_red(written):
    def spoil(parameters):
        for p in parameters.values():
            p.fill_(torch.nan)

    assert not _checked(written(CONFIG, "manyhands", spoil)).ok


def test_the_budget_holds_and_is_said(written):
    source = written(CONFIG, "qwen3_moe")
    read = list(own_read.finite(source, budget=1 << 17))
    assert sum(size for _, _, size in read) <= 1 << 17
    every = list(own_read.finite(source))
    assert {name for name, _, _ in every} == set(source.logical)


def test_a_record_read_wrong_is_red(written, monkeypatch):
    import manyhands.quant.packed

    source = written(CONFIG, "manyhands", packed=PACKED)
    right = manyhands.quant.packed.decode
    monkeypatch.setattr(manyhands.quant.packed, "decode", lambda *a: 1.1 * right(*a))
    assert "packed records" in {row.quantity for row in _checked(source).failures}


def test_one_expert_is_what_the_whole_model_has(written):
    from manyhands.checkpoint.model import load_model

    source = written(DEEPSEEK, "deepseek_v3")
    state = load_model(source.directory).state_dict()
    name = "layers.3.mlp.experts.gate_up_proj"
    assert torch.equal(own_read.expert(source, name, 9, state[name].shape[1:]), state[name][9].float())
