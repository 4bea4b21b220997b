"""A family: a `config.json` and tensor names of its own, on mathematics that is here already."""

from .recipe import Edit, Recipe

CHECK = """
import json
from pathlib import Path
import torch
import manyhands as mh
from safetensors import safe_open
from manyhands.families import export_config, family_named, read_config

router = mh.RouterConfig(num_experts=4, score="sigmoid", routed_scaling_factor=1.5)
moe = mh.MoEConfig(router=router, moe_intermediate_size=16)
attention = {"num_attention_heads": 2, "head_dim": 16}
config = mh.ModelConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, attention=attention, moe=moe)
model = mh.Decoder(config).eval()
mh.init_weights(model, seed=3)
mh.save(model, "tiny", family="example_moe")
fields = json.loads(Path("tiny/config.json").read_text())
assert fields["model_type"] == "example_moe" and fields["route_scale"] == 1.5
with safe_open("tiny/model.safetensors", "pt") as file:
    assert "model.layers.1.moe.router.weight" in file.keys()
again = mh.load_model("tiny")
assert again.family == "example_moe"
ids = torch.tensor([[1, 2, 3, 4]])
with torch.inference_mode():
    assert torch.equal(again(ids).logits, model(ids).logits)
again.save("copy")  # in its own family
assert read_config(json.loads(Path("copy/config.json").read_text()), "copy")[1] == again.config
for wrong in ({"hyper_connections": 4}, {"route_scale": "much"}):
    try:
        read_config(fields | wrong, "config.json")
    except mh.ConfigError as error:
        assert next(iter(wrong)) in str(error)
    else:
        raise AssertionError(wrong)
"""

FAMILY = '''"""ExampleMoE: sigmoid scores, renormalised and scaled.

Source: the publisher's modelling code.
"""

from manyhands.config import ModelConfig, parse
from manyhands.families.base import LLAMA_EXPERTS, Family, Json, Layout
from manyhands.families.fields import Fields, decoder_fields, head_fields, written


def read(f: Fields) -> ModelConfig:
    f.activation()
    width = f.integer("intermediate_size")
    router = {
        "num_experts": f.integer("num_experts"),
        "num_experts_per_tok": f.integer("num_experts_per_tok"),
        "score": "sigmoid",
        "routed_scaling_factor": f.number("route_scale", 1.0),
    }
    values = decoder_fields(f) | {
        "intermediate_size": width,
        "attention": head_fields(f),
        "rope": f.rope(),
        "moe": {"router": router, "moe_intermediate_size": width},
    }
    f.close()
    return parse(ModelConfig, values, f.where)


def write(config: ModelConfig) -> Json:
    assert config.moe is not None
    router = config.moe.router
    return written(config) | {
        "intermediate_size": config.moe.moe_intermediate_size,
        "num_experts": router.num_experts,
        "num_experts_per_tok": router.num_experts_per_tok,
        "route_scale": router.routed_scaling_factor,
    }


EXAMPLE_MOE = Family(
    model_type="example_moe",
    architecture="ExampleMoeForCausalLM",
    published="ExampleMoE 2B",
    read=read,
    write=write,
    pieces=Layout(LLAMA_EXPERTS, {"mlp.router.weight": "moe.router.weight"}),
)
'''

RECIPE = Recipe(
    "Add a family",
    (
        Edit("manyhands/families/example_moe.py", FAMILY),
        Edit(
            "manyhands/families/registry.py",
            "from manyhands.families.example_moe import EXAMPLE_MOE\n",
            after="from manyhands.families.ernie4_5_moe import ERNIE4_5_MOE\n",
        ),
        Edit("manyhands/families/registry.py", "        EXAMPLE_MOE,\n", after="        GROK_1,\n"),
    ),
    CHECK,
)
