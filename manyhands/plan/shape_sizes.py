"""`Sizes` of a catalogue's shape: decoders that none of our families reads, so attention and caches have figures."""

from manyhands.catalog.shape import DecoderShape, Shape
from manyhands.config import AnyModelConfig, EncoderDecoderConfig, HierarchicalExpertsConfig, LocalExpertsConfig
from manyhands.plan.sizes import Sizes


def shape_sizes(shape: Shape) -> Sizes | None:
    """None for what is not a decoder: what a token costs then depends on the part it is in."""
    if not isinstance(shape, DecoderShape):
        return None
    a, moe = shape.attention, shape.moe
    layers = a.layers or shape.num_hidden_layers
    windowed = min(a.window_layers, layers)
    return Sizes(
        hidden_size=shape.hidden_size,
        heads=a.num_attention_heads,
        score_width=2 * a.head_dim,
        latent_score_width=2 * a.head_dim,
        kv_values=2 * a.num_key_value_heads * a.head_dim,
        windows=(a.sliding_window,) * windowed + (None,) * (layers - windowed),
        chunked=a.chunked,
        sparse_layers=moe.layers if moe else 0,
        num_experts=moe.num_experts if moe else 0,
        experts_per_token=moe.num_experts_per_tok if moe else 0,
        positions=shape.position_embeddings or None,
    )


def left_out(shape: Shape | AnyModelConfig) -> tuple[str, ...]:
    """What the figures do not contain, for people."""
    if not isinstance(shape, DecoderShape):
        if isinstance(shape, EncoderDecoderConfig):
            return ("an encoder-decoder: parameters, memory, and the FLOPs of a pair of sequences",)
        if isinstance(shape, LocalExpertsConfig | HierarchicalExpertsConfig):
            return ("numbers in, numbers out; every expert is evaluated for every example",)
        return ("not a decoder: parameters and memory only",)
    if shape.mamba is not None:
        return ("the state-space layers' scan and state are left out: small beside their weights",)
    return ()
