"""Parameters of a model of any kind, from its configuration.

D model width, F feed-forward width, E experts, K experts per token.
"""

from collections import Counter

from manyhands.config import (
    AnyModelConfig,
    EncoderDecoderConfig,
    HierarchicalExpertsConfig,
    LocalExpertsConfig,
    ModelConfig,
    RecurrentConfig,
)
from manyhands.config.activation import ACTIVATIONS, Form
from manyhands.errors import ConfigError
from manyhands.plan.count import Counts, count_model


def count_any(config: AnyModelConfig) -> Counts:
    """Count every parameter of `config`. Raises `ConfigError` for a kind that is not counted."""
    match config:
        case ModelConfig() | RecurrentConfig():
            return count_model(config)
        case EncoderDecoderConfig():
            return _encoder_decoder(config)
        case LocalExpertsConfig():
            return _every_expert(config, gate_rows=config.num_experts)
        case HierarchicalExpertsConfig():
            rows = sum(config.gates_of(level) * branches for level, branches in enumerate(config.branching))
            return _every_expert(config, gate_rows=rows, variances=config.num_experts)
    raise ConfigError(f"kind = {config.kind!r}: manyhands does not count this kind yet")


def sequence_flops(config: EncoderDecoderConfig, tokens_in: int, tokens_out: int) -> int:
    """Forward FLOPs of one pair of sequences, routers left out: 2 · weights · tokens, attention, and the head.

    A decoder's token sees half of the outputs and all of the inputs. With 512 and 114 this is the "FLOPs/seq" of
    arXiv 2101.03961, table 9, to about 5 %.
    """
    D, wide = config.hidden_size, config.num_attention_heads * config.head_dim
    routers = D * config.router.num_experts if config.router else 0
    encoder, decoder = _stack(config, decoder=False)[1], _stack(config, decoder=True)[1]
    encoder -= routers * len(config.sparse_encoder_layers)
    decoder -= routers * len(config.sparse_decoder_layers)
    weights = tokens_in * encoder + tokens_out * (decoder + D * config.vocab_size)
    seen_in = tokens_in * tokens_in * config.num_hidden_layers
    seen_out = (tokens_out * tokens_out // 2 + tokens_out * tokens_in) * config.num_decoder_layers
    return 2 * weights + 2 * 2 * wide * (seen_in + seen_out)


def router_flops(config: EncoderDecoderConfig, tokens_in: int, tokens_out: int) -> int:
    """Forward FLOPs of the routers of one pair of sequences: 2 · D · E in each sparse layer, for each token."""
    if config.router is None:
        return 0
    through = tokens_in * len(config.sparse_encoder_layers) + tokens_out * len(config.sparse_decoder_layers)
    return 2 * config.hidden_size * config.router.num_experts * through


def feed_forward(D: int, F: int, gated: bool, bias: bool = False) -> int:
    """Parameters of one network."""
    matrices = Form(gated).matrices
    return matrices * D * F + ((matrices - 1) * F + D if bias and F else 0)


def _encoder_decoder(s: EncoderDecoderConfig) -> Counts:
    table = s.vocab_size * s.hidden_size
    embedding, head = table * (1 if s.share_embeddings else 2), 0 if s.tie_word_embeddings else table
    parts, body = Counter({"embedding": embedding, "head": head}), 0
    for decoder in (False, True):
        stack, active = _stack(s, decoder=decoder)
        parts.update(stack)
        body += active
    # one table of relative positions each for encoder and decoder: looked up, so no part of the active counts
    tables = 2 * s.relative_attention_num_buckets * s.num_attention_heads
    parts["attention"] += tables
    idle = {"attention": tables, "routed experts": sum(parts.values()) - tables - embedding - head - body}
    return Counts(
        total=sum(parts.values()),
        active=body + embedding + head,
        active_without_embedding=body + (head or embedding),
        body=body,
        embedding=embedding,
        by_component={name: count for name, count in parts.items() if count},
        idle={name: count for name, count in idle.items() if count},
    )


def _stack(s: EncoderDecoderConfig, *, decoder: bool) -> tuple[Counter[str], int]:
    """(parts, active) of the encoder or the decoder."""
    D, layers, extra = s.hidden_size, s.num_hidden_layers, s.extra_encoder_networks
    sparse = len(s.sparse_encoder_layers)
    if decoder:
        layers, sparse, extra = s.num_decoder_layers, len(s.sparse_decoder_layers), s.extra_decoder_networks
    E, K = (s.router.num_experts, s.router.num_experts_per_tok) if s.router else (0, 0)
    network = feed_forward(D, s.intermediate_size, ACTIVATIONS[s.hidden_act].gated)
    parts = Counter(
        {
            "attention": (2 if decoder else 1) * layers * 4 * D * s.num_attention_heads * s.head_dim,
            "dense feed-forward": (layers - sparse + extra) * network,
            "routed experts": sparse * E * network,
            "router": sparse * D * E,
            "norms": ((3 if decoder else 2) * layers + extra + 1) * D,
        }
    )
    return parts, sum(parts.values()) - sparse * (E - K) * network


def _every_expert(s: LocalExpertsConfig | HierarchicalExpertsConfig, gate_rows: int, variances: int = 0) -> Counts:
    """Linear experts and gates with biases; all of them are evaluated for every example."""
    columns = s.num_inputs + 1
    parts = {"experts": s.num_experts * s.num_outputs * columns, "gates": gate_rows * columns}
    body = sum(parts.values())
    if variances:
        parts["variances"] = variances
    idle = {"variances": variances} if variances else {}
    return Counts(body + variances, body, body, body, embedding=0, by_component=parts, idle=idle)
