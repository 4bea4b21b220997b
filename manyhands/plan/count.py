"""Parameters, counted from a description: all of them, and those that work for one token.

E experts, K experts per token, V vocabulary, D width.
"""

from dataclasses import dataclass, field
from math import prod

from manyhands.config import BuiltConfig
from manyhands.config.shapes import tensor_shapes

COMPONENTS = (
    "embedding",
    "head",
    "attention",
    "recurrent",
    "router",
    "routed experts",
    "shared experts",
    "dense feed-forward",
    "norms",
)
"""The parts of a model, in the order in which they are shown."""
BUFFERS = ("router.e_score_correction_bias", "router.l1_steps", ".average_outputs")
"""Endings of the tensors that no gradient trains: saved with the model, not counted as parameters."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Numbers of parameters. Vendors publish three different active counts, so each has its name here."""

    total: int
    active: int
    """Work for one token: all but the experts it does not visit. With the input embedding and the head."""
    active_without_embedding: int
    """The same without the input embedding, which is looked up, not multiplied; a tied table counts, as the head."""
    body: int
    """Active, with neither embedding nor head."""
    embedding: int
    """The input embedding, V·D."""
    by_component: dict[str, int] = field(default_factory=dict)
    """Adds up to `total`."""
    idle: dict[str, int] = field(default_factory=dict)
    """By component, what does not work for one token; adds up to `total - active`."""
    buffers: int = 0
    """Numbers that are saved with the model and are no parameters: V3's e_score_correction_bias. In no other count."""


def count_model(config: BuiltConfig) -> Counts:
    """Count every tensor of `config`. Equal, to the last parameter, to the model that is built from it."""
    components = dict.fromkeys(COMPONENTS, 0)
    buffers = 0
    for name, shape in tensor_shapes(config).items():
        if name.endswith(BUFFERS):
            buffers += prod(shape)
        else:
            components[component(name)] += prod(shape)
    total, embedding = sum(components.values()), components["embedding"]
    idle = {}
    if config.moe is not None:
        router, layers = config.moe.router, len(config.sparse_layers)
        each = components["routed experts"] // router.num_experts
        idle["routed experts"] = each * (router.num_experts - router.num_experts_per_tok)
        idle["router"] = router.idle_gate_weights(config.hidden_size) * layers
    active = total - sum(idle.values())
    body = active - embedding - components["head"]
    return Counts(
        total=total,
        active=active,
        active_without_embedding=body + (components["head"] or embedding),
        body=body,
        embedding=embedding,
        by_component={name: count for name, count in components.items() if count},
        idle={name: count for name, count in idle.items() if count},
        buffers=buffers,
    )


def component(name: str) -> str:
    """Which part of the decoder our tensor `name` belongs to, one of `COMPONENTS`."""
    if name.startswith(("embed_tokens.", "lm_head.")):
        return "embedding" if name.startswith("embed") else "head"
    if "norm." in name and ".self_attn." not in name:
        return "norms"
    for part, title in _PARTS:
        if part in name:
            return title
    raise AssertionError(name)


_PARTS = (
    (".self_attn.", "attention"),
    (".lstm.", "recurrent"),
    (".mlp.router.", "router"),
    (".mlp.experts.", "routed experts"),
    (".mlp.shared_expert", "shared experts"),
    (".mlp.", "dense feed-forward"),
)
