"""Packed models: written, mapped, run, refused. The same bytes on disk and in memory, the same numbers as unpacked."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from manyhands.checkpoint.convert import convert
from manyhands.checkpoint.files import building
from manyhands.checkpoint.model import load, load_model
from manyhands.checkpoint.packed import packed_headers, read_records, records_of
from manyhands.checkpoint.source import open_source
from manyhands.config import ModelConfig, MoEConfig, PackedConfig, Packing, RouterConfig
from manyhands.config.shapes import tensor_shapes
from manyhands.errors import CheckpointError, ConfigError, UserError
from manyhands.kernels.native import available, missing
from manyhands.kernels.native.library import default_level
from manyhands.layers.packed_linear import RecordLinear
from manyhands.models import Decoder, init_weights
from manyhands.moe import MoELayer
from manyhands.moe.packed import RecordExperts
from manyhands.quant import VERSION, pack_experts, pack_linear
from manyhands.quant.record import PAGE
from manyhands.quantize.quantize import quantize
from manyhands.quantize.receipt import Sample

from .hostile import FITTING, SINGLE, VALUES, edit, join, make, refused, split

DOTS1 = {
    "attention": {"num_attention_heads": 2, "head_dim": 8, "qk_norm": "head"},
    "moe": {
        **VALUES["moe"],
        "router": {**VALUES["moe"]["router"], "score": "sigmoid", "bias": True},
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
}
LATENT = {  # MLA with a latent query, as DeepSeek-V3's larger ones
    **FITTING["deepseek_v3"],
    "attention": {**FITTING["deepseek_v3"]["attention"], "q_lora_rank": 8},
}
FAMILIES = {"mixtral": {}, "deepseek_v3": LATENT, "gpt_oss": FITTING["gpt_oss"], "dots1": DOTS1}
FORMATS = {
    "int4+int8": PackedConfig(experts=Packing(format="int4", group_size=32), linear=Packing(format="int8")),
    "int8+int4": PackedConfig(experts=Packing(format="int8"), linear=Packing(format="int4", group_size=64)),
    "bf16": PackedConfig(experts=Packing(format="bf16"), linear=Packing(format="bf16")),
    "experts only": PackedConfig(experts=Packing(format="int4", group_size=64)),
    "linear only": PackedConfig(linear=Packing(format="float32")),
}
RECORD, EXPERT_RECORD = "layers.0.self_attn.o_proj.record", "layers.1.mlp.experts.records"
IDS = torch.randint(0, 270, (2, 24), generator=torch.Generator().manual_seed(5))


def packed_copy(source: Path, target: Path, packed: PackedConfig = FORMATS["int4+int8"]) -> Path:
    quantize(open_source(source), target, packed, Sample(IDS, None))
    return target


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    return {
        name: make(folder / name, family=name, initializer_range=0.3, **fields) for name, fields in FAMILIES.items()
    }


@pytest.fixture(scope="module")
def packed(sources, tmp_path_factory):
    return packed_copy(sources["mixtral"], tmp_path_factory.mktemp("packed") / "model")


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("formats", list(FORMATS))
def test_the_same_numbers_as_unpacked(sources, tmp_path, family, formats):
    directory = packed_copy(sources[family], tmp_path / "packed", FORMATS[formats])
    model, plain = load_model(directory, experts_implementation="eager"), load_model(directory, decode=True)
    held = [module for module in model.modules() if isinstance(module, RecordLinear | RecordExperts)]
    assert len(held) == len(model.records) > 0 and not plain.records
    assert {type(p) for p in model.state_dict().values()} == {torch.Tensor}
    with torch.no_grad():
        a, b = model(IDS), plain(IDS)
        torch.testing.assert_close(a.logits, b.logits, atol=1e-4, rtol=1e-4)
        assert all(torch.equal(r.expert_ids, b.routings[n].expert_ids) for n, r in a.routings.items())
        cache = model.new_cache()  # MLA decodes another way than it reads a prompt
        steps = [model(IDS[:, s : s + 1], cache=cache).logits for s in range(IDS.shape[1])]
        torch.testing.assert_close(torch.cat(steps, 1), b.logits, atol=1e-4, rtol=1e-4)
        half = model(IDS, dtype=torch.bfloat16).logits
        assert half.dtype == torch.bfloat16 and (half - b.logits).abs().mean() < 0.1 * b.logits.std()


@pytest.mark.skipif(not available(), reason=missing() or "")
@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("formats", list(FORMATS))
def test_native_equals_the_fallback(sources, tmp_path, family, formats):
    """Exactly for float formats; integer weights meet tokens that were rounded to 8 bits, where they are few."""
    directory = packed_copy(sources[family], tmp_path / "packed", FORMATS[formats])
    exact, fast = (load_model(directory, experts_implementation=name) for name in ("eager", "auto"))
    # Levels that multiply bf16 round many rows to it.
    exactly = formats in ("bf16", "linear only") and default_level() not in ("avx512_bf16", "amx")
    modules = dict(fast.named_modules())
    generator = torch.Generator().manual_seed(3)
    for name, module in exact.named_modules():
        if not isinstance(module, RecordLinear | RecordExperts):
            continue
        for tokens in (1, 3, 40):
            x = torch.randn(tokens, module.layout.matrices[0].inputs, generator=generator)
            arguments = (x,)
            if isinstance(module, RecordExperts):
                with torch.no_grad():
                    arguments = (x, exact.get_submodule(name.removesuffix(".experts")).router(x))
            a, b = module(*arguments), modules[name](*arguments)
            assert a.shape == b.shape and a.dtype == b.dtype
            assert (a - b).norm() < (1e-5 if exactly else 0.02) * a.norm() + 1e-9, (name, tokens)
    if exactly:
        with torch.no_grad():
            torch.testing.assert_close(fast(IDS).logits, exact(IDS).logits, atol=1e-4, rtol=1e-4)


def test_what_is_packed_and_what_is_not(sources):
    config = open_source(sources["deepseek_v3"]).config
    names = set(packed_headers(config, FORMATS["int4+int8"], lambda _: torch.float32))
    assert {"layers.0.self_attn.q_a_proj.record", "layers.0.self_attn.kv_a_proj_with_mqa.record"} <= names
    assert {"layers.0.mlp.experts.records", "lm_head.record", "layers.0.self_attn.kv_b_proj.weight"} <= names
    assert {"layers.0.mlp.router.weight", "embed_tokens.weight", "norm.weight"} <= names
    tied = config.model_copy(update={"tie_word_embeddings": True})
    assert "lm_head.record" not in packed_headers(tied, FORMATS["int4+int8"], lambda _: torch.float32)
    for family in FAMILIES:  # every tensor once, packed or not
        config = open_source(sources[family]).config
        records = list(records_of(config, FORMATS["int4+int8"]))
        inside = [name for record in records for name in record.sections]
        rest = packed_headers(config, FORMATS["int4+int8"], lambda _: torch.float32).keys() - {r.name for r in records}
        assert sorted([*inside, *rest]) == sorted(tensor_shapes(config))


def test_save_gives_the_same_bytes_back(packed, tmp_path):
    model, tokenizer = load(packed)
    model.save(tmp_path / "again")
    for name in (SINGLE, "config.json", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (packed / name).read_bytes()
    model.save(tmp_path / "shards", max_shard_size=20_000)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    again, _ = load(tmp_path / "shards")
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in model.state_dict().items())
    assert tokenizer.vocab_size == 270


def test_records_are_those_of_the_packer(sources, packed):
    """Bit by bit what `pack_experts` and `pack_linear` make of the source's weights."""
    model, source = load_model(packed), load_model(sources["mixtral"])
    experts = source.layers[1].mlp.experts.weights()
    assert torch.equal(model.layers[1].mlp.experts.records, pack_experts(experts, "int4", 32).records)
    linear = pack_linear(source.layers[0].self_attn.o_proj.weight, None, "int8")
    assert torch.equal(model.layers[0].self_attn.o_proj.record, linear.record)
    assert torch.equal(model.embed_tokens.weight, source.embed_tokens.weight)


def test_mapped_not_copied(packed):
    """Each record is a page of the file."""
    model = load_model(packed)
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(packed / SINGLE)):
            ranges.append([int(n, 16) for n in line.split()[0].split("-")])
    for name in model.records:
        start, size = model.state_dict()[name].data_ptr(), model.state_dict()[name].nbytes
        assert start % PAGE == 0 and any(a <= start and start + size <= b for a, b in ranges), name


MEMORY = """
import sys, torch
from manyhands.checkpoint.model import load_model
def resident(name): return int(next(l for l in open("/proc/self/status") if l.startswith(name)).split()[1]) * 1024
load_model(sys.argv[1])(torch.tensor([[1, 2, 3]]))
before = resident("VmRSS")
model = load_model(sys.argv[2], verified=True)
loaded = resident("VmRSS") - before
for t in model.state_dict().values(): t.view(torch.uint8).amax()
print(loaded, resident("VmRSS") - before, sum(t.nbytes for t in model.state_dict().values()))
"""


def test_memory_is_the_packed_weights_and_no_more(sources, packed, tmp_path):
    big = ModelConfig(
        vocab_size=256, hidden_size=512, num_hidden_layers=2, intermediate_size=512,
        attention={"num_attention_heads": 8, "head_dim": 64},
        moe=MoEConfig(router=RouterConfig(num_experts=64, num_experts_per_tok=2), moe_intermediate_size=512),
    )  # fmt: skip
    config = PackedConfig(experts=Packing(format="bf16"), linear=Packing(format="bf16"))
    from manyhands.checkpoint.packed import write_packed
    from manyhands.checkpoint.tensors import DTYPES

    with building(tmp_path / "big") as partial:
        headers = packed_headers(big, config, lambda _: torch.float32)
        write_packed(
            partial,
            big,
            config,
            lambda _: torch.float32,
            lambda name: torch.zeros(headers[name].shape, dtype=DTYPES[headers[name].dtype]),
        )
    command = [sys.executable, "-c", MEMORY, str(packed), str(tmp_path / "big")]
    loaded, touched, size = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert size > 200e6
    assert loaded < 0.05 * size, "loading reads nothing"
    assert touched < 1.1 * size, "and reading copies nothing"


def test_training_is_refused_in_one_line(packed):
    model = load_model(packed)
    with pytest.raises(UserError, match="packed weights cannot be trained"):
        model.train()
    assert not any(module.training for module in model.modules())
    assert load_model(packed, decode=True).train().training


def test_a_family_gets_them_unpacked(packed, tmp_path):
    load_model(packed).save(tmp_path / "saved", family="mixtral")
    receipt = convert(packed, tmp_path / "converted", to="mixtral")
    assert receipt["source_tensors"][RECORD]["how"] == "decoded to F32"
    assert len(receipt["source_tensors"][EXPERT_RECORD]["became"]) == 12
    plain = load_model(packed, decode=True)(IDS).logits
    assert not load_model(packed)(IDS).logits.requires_grad
    for name in ("saved", "converted"):
        assert torch.equal(load_model(tmp_path / name)(IDS).logits, plain)


@pytest.mark.parametrize("name", ["auto", "eager", "grouped_mm"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["swiglu", "swiglu_oai", "geglu", "relu"])
def test_every_implementation_equals_the_dequantised_experts(name, bias, activation):
    router = RouterConfig(num_experts=6, num_experts_per_tok=2, random_second=True, norm_topk_prob=True)
    config = MoEConfig(router=router, moe_intermediate_size=24, hidden_act=activation, expert_bias=bias)
    layer, plain = MoELayer(config, 40), MoELayer(config, 40)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(0, 0.3)
    stacked = layer.experts.weights()
    packed = pack_experts(stacked, "bf16" if name == "auto" else "int4", 32)  # auto may round tokens beside int4
    plain.load_state_dict(layer.state_dict())
    up, down, up_bias, down_bias = packed.dequantize()
    with torch.no_grad():
        held = plain.experts.weights()
        held.up.copy_(up), held.down.copy_(down)
        if held.up_bias is not None and held.down_bias is not None:
            held.up_bias.copy_(up_bias), held.down_bias.copy_(down_bias)
    records = RecordExperts(packed.layout, 6)
    records.records = packed.records
    for tokens in (0, 1, 17):
        x = torch.randn(tokens, 40)
        routing = layer.router(x)  # training mode: some second experts are -1 and not kept
        got, expected = records(x, routing, name), plain.experts(x, routing, "eager")
        # Two roundings of many rows to bf16, 2⁻⁹ each and at most twice that.
        near = 2**-6 if name == "auto" and default_level() in ("avx512_bf16", "amx") else 1e-5
        assert (got - expected).norm() <= near * expected.norm() + 1e-9
        outputs, expected = records.outputs(x, routing, name), plain.experts.outputs(x, routing, "eager")
        assert (outputs - expected).norm() <= near * expected.norm() + 1e-9


def test_an_unknown_implementation_is_named(packed):
    with pytest.raises(ConfigError, match="did you mean 'eager'"):
        RecordExperts(load_model(packed).layers[0].mlp.experts.layout, 4, "eagre")


# What a hostile or damaged directory may say.


def packed_section(**fields):
    def spoil(folder):
        section = json.loads((folder / "config.json").read_text())["packed"]
        edit(folder / "config.json", packed=section | fields)

    return spoil


def header(change, data=lambda data: data):
    def spoil(folder):
        entries, content = split(folder / SINGLE)
        change(entries)
        text = json.dumps(entries).encode()
        join(folder / SINGLE, text + b" " * (-(8 + len(text)) % PAGE), data(content))

    return spoil


def resized(name, shape):
    """The tensor gets another shape of the right number of bytes, taken from or given to the last tensor."""

    def change(entries):
        entries[name]["shape"] = shape

    return header(change)


def renamed(entries):
    entries["layers.0.self_attn.p_proj.record"] = entries.pop(RECORD)


def doubled(entries):
    end = max(entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__")
    name = "layers.0.self_attn.o_proj.weight"
    entries[name] = {"dtype": "F32", "shape": [16, 16], "data_offsets": [end, end + 1024]}


def unaligned(folder):
    entries, content = split(folder / SINGLE)
    text = json.dumps(entries).encode()
    join(folder / SINGLE, text + b" " * (-len(text) % 8), content)


def model_field(name, value):
    def spoil(folder):
        values = json.loads((folder / "config.json").read_text())
        edit(folder / "config.json", model=values["model"] | {name: value})

    return spoil


HOSTILE = {
    "version": (packed_section(version=2), r"packed\.version"),
    "format": (packed_section(experts={"format": "int3", "group_size": 0}), r"packed\.experts\.format"),
    "group": (packed_section(experts={"format": "int4", "group_size": 16}), r"packed\.experts\.group_size"),
    "no group": (packed_section(experts={"format": "int4", "group_size": 0}), "int4 takes 32 or 64"),
    "group of int8": (packed_section(linear={"format": "int8", "group_size": 32}), "int8 takes 0"),
    "unknown field": (packed_section(shared={"format": "int8"}), "unknown field 'packed.shared'"),
    "another format": (packed_section(linear={"format": "float32", "group_size": 0}), r"record' has shape .*float32"),
    "nothing": (packed_section(experts=None, linear=None), "nothing is packed"),
    "experts plain": (packed_section(experts=None), r"mlp\.experts\.gate_up_proj' is missing"),
    "a list": (lambda folder: edit(folder / "config.json", packed=[1]), "packed = "),
    "not packed at all": (lambda folder: edit(folder / "config.json", packed=None), r"_proj\.weight' is missing"),
    "not ours": (lambda folder: edit(folder / "config.json", model_type="mixtral"), "num_experts_per_tok"),
    "missing": (header(renamed), f"'{RECORD}' is missing"),
    "dtype": (header(lambda e: e[RECORD].update(dtype="I8")), f"'{RECORD}' is I8; a packed record is U8"),
    "float": (header(lambda e: e[RECORD].update(dtype="F32", shape=[1024])), f"'{RECORD}' is F32"),
    "shape": (resized(RECORD, [2, 2048]), f"'{RECORD}' has shape"),
    "experts": (resized(EXPERT_RECORD, [2, 8192]), f"'{EXPERT_RECORD}' has shape .2, 8192."),
    "one record for all": (resized(EXPERT_RECORD, [16384]), f"'{EXPERT_RECORD}' has shape"),
    "twice": (header(doubled, lambda data: data + bytes(1024)), r"o_proj\.weight' is stored twice"),
    "unaligned": (unaligned, "not on a 4096-byte page"),
    "truncated": (header(lambda e: None, lambda data: data[:-4096]), "truncated"),
    "wider model": (model_field("hidden_size", 1024), "has shape"),
    "more layers": (model_field("num_hidden_layers", 3), r"layers\.2\.self_attn\.q_proj\.record' is missing"),
    "vast": (model_field("num_hidden_layers", 4096), "is missing"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_refused(packed, tmp_path, case):
    """Sealed again, as somebody hostile would: the manifest says that every byte is as it should be."""
    spoil, message = HOSTILE[case]
    with building(tmp_path / "spoilt") as partial:
        for path in packed.iterdir():
            if path.name != "manifest.json":
                shutil.copyfile(path, partial / path.name)
        spoil(partial)
    refused(tmp_path / "spoilt", message)


def test_a_damaged_byte_is_found(packed, tmp_path):
    shutil.copytree(packed, tmp_path / "damaged")
    data = bytearray((tmp_path / "damaged" / SINGLE).read_bytes())
    data[9000] ^= 1
    (tmp_path / "damaged" / SINGLE).write_bytes(data)
    with pytest.raises(CheckpointError, match="SHA-256"):
        load_model(tmp_path / "damaged")


def test_sizes_no_record_has(packed):
    """Products over 2⁶³ and widths over the record's limit are refused before anything is allocated."""
    source = open_source(packed)
    wide = source.config.attention.model_copy(update={"num_attention_heads": 1 << 20, "head_dim": 1 << 20})
    config = source.config.model_copy(update={"attention": wide})
    with pytest.raises(CheckpointError, match="sizes are between"):
        read_records(source.files, config, source.packed)


def test_the_version_is_that_of_the_record_layout():
    assert PackedConfig().version == VERSION


def test_a_plain_checkpoint_has_no_packed_section(tmp_path):
    model = Decoder(ModelConfig(**VALUES))
    init_weights(model, seed=0)
    from manyhands.checkpoint.model import save

    save(model, tmp_path / "plain", family="manyhands")
    assert set(json.loads((tmp_path / "plain" / "config.json").read_text())) == {"model_type", "version", "model"}
