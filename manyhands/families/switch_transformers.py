"""Switch (arXiv 2101.03961): T5 with one expert of many in some of its layers.

Source: transformers 5.23 `models/switch_transformers`. An expert has room for `expert_capacity` tokens of each
sequence, in training and in evaluation. Gated networks (Switch-XXL) it documents and does not build. A stack that asks
for no sparse layer gets one all the same (layer 1, or 0 of one); one that asks for more than it has gets none.
"""

from collections.abc import Iterator

from manyhands.config import EncoderDecoderConfig, parse
from manyhands.config.shapes import tensor_shapes
from manyhands.errors import ConfigError
from manyhands.families.base import Family, Json, Piece
from manyhands.families.fields import Fields
from manyhands.families.t5 import TOKEN_IDS, stack_fields, within_stack, written_stack

_SIDES = {"encoder": "num_hidden_layers", "decoder": "num_decoder_layers"}
_MLP = {
    "mlp.up_proj.weight": "mlp.wi.weight",
    "mlp.down_proj.weight": "mlp.wo.weight",
    "mlp.router.weight": "mlp.router.classifier.weight",
    "mlp.router.bias": "mlp.router.classifier.bias",
    "mlp.experts.up_proj": "mlp.experts.expert_{e}.wi.weight",
    "mlp.experts.down_proj": "mlp.experts.expert_{e}.wo.weight",
}


def read(f: Fields) -> EncoderDecoderConfig:
    values = stack_fields(f)
    f.ignore("add_router_probs", "router_ignore_padding_tokens")  # nothing reads them
    f.ignore("router_z_loss_coef")
    f.only("router_dtype", "float32")
    values["hidden_act"] = f.only("dense_act_fn", "relu", "gelu")
    for side, layers in _SIDES.items():
        name = f"num_sparse_{side}_layers"
        asked = f.integer(name, 3)
        if asked < 0:
            raise f.wrong(name, "0 or more")
        f.only(f"{side}_sparse_step", values[layers] // (asked or 1))
        values[name] = 0 if asked > values[layers] else asked or 1
    values["router"] = {
        "num_experts": f.integer("num_experts", 8),
        "num_experts_per_tok": 1,
        "logit_bias": f.flag("router_bias", False),
        "jitter": f.number("router_jitter_noise", 0.01),
        "capacity_tokens": f.integer("expert_capacity", 64),
        "capacity_per": "sequence",
    }
    if not values["num_sparse_encoder_layers"] + values["num_sparse_decoder_layers"]:
        raise f.wrong("num_sparse_encoder_layers", "a model without a sparse layer is a T5: model_type = 't5'")
    tied = f.flag("tie_word_embeddings", True)
    f.only("num_selected_experts", 1)  # older files have these
    f.only("batch_prioritized_routing", False)
    f.only("router_type", "tokens_masked")
    f.only("feed_forward_proj", values["hidden_act"])
    f.only("is_gated_act", False)
    f.close()
    values |= {"tie_word_embeddings": tied, "share_embeddings": tied}
    return parse(EncoderDecoderConfig, values, f.where)


def write(config: EncoderDecoderConfig) -> Json:
    assert config.router is not None
    if config.hidden_act not in ("relu", "gelu"):
        raise ConfigError(
            f"this model does not fit switch_transformers: hidden_act = {config.hidden_act!r}; it builds 'relu' and "
            "'gelu', no gated network"
        )
    if config.router.capacity_tokens is None:
        raise ConfigError(
            "this model does not fit switch_transformers: moe.router.capacity_tokens = None; an expert there has room "
            "for a fixed number of tokens of each sequence"
        )
    sparse: Json = {}
    for side, name in _SIDES.items():
        layers, asked = getattr(config, name), getattr(config, f"num_sparse_{side}_layers")
        asked = asked or layers + 1
        sparse |= {f"num_sparse_{side}_layers": asked, f"{side}_sparse_step": layers // asked}
    return written_stack(config) | {
        **sparse,
        "dense_act_fn": config.hidden_act,
        "num_experts": config.router.num_experts,
        "expert_capacity": config.router.capacity_tokens,
        "router_bias": config.router.logit_bias,
        "router_jitter_noise": config.router.jitter,
        "router_dtype": "float32",
    }


def pieces(config: EncoderDecoderConfig) -> Iterator[Piece]:
    """Every tensor, in the order of the model; one Linear pair per expert."""
    E = 0 if config.router is None else config.router.num_experts
    for ours in tensor_shapes(config):
        if ours == "embed_tokens.weight" and config.tie_word_embeddings:
            yield Piece(ours, "shared.weight")
        elif ours == "embed_tokens.weight":
            yield Piece(ours, "encoder.embed_tokens.weight", otherwise="shared.weight")
        elif ours == "decoder.embed_tokens.weight":
            yield Piece(ours, ours, otherwise="shared.weight")
        elif ours == "lm_head.weight":
            yield Piece(ours, ours)
        else:
            theirs = within_stack(ours, _MLP)
            if ".mlp.experts." in ours:
                yield from (Piece(ours, theirs.format(e=e), (e,)) for e in range(E))
            else:
                yield Piece(ours, theirs)


def _besides(config: EncoderDecoderConfig) -> Json:
    """An untied model has three tables in its file; one that is missing there is made anew, at random."""
    if config.tie_word_embeddings:
        return {}
    first = "encoder.embed_tokens.weight"
    return {"shared.weight": first} | ({"decoder.embed_tokens.weight": first} if config.share_embeddings else {})


SWITCH_TRANSFORMERS = Family(
    model_type="switch_transformers",
    architecture="SwitchTransformersForConditionalGeneration",
    published="Switch-Base, Switch-Large, Switch-C",
    read=read,
    write=write,
    pieces=pieces,
    kinds=("encoder_decoder",),
    aux_loss_scale=lambda _: 1.0,
    copies={"encoder.embed_tokens.weight": "shared.weight", "decoder.embed_tokens.weight": "shared.weight"},
    kept=lambda values: ("shared.weight",) if values.get("tie_word_embeddings") is False else (),
    besides=_besides,
    token_ids=TOKEN_IDS,
)
