"""The oracle of an encoder-decoder, float64, written from the papers and apart from `manyhands/models`.

T5 (arXiv 1910.10683, section 2.1), Switch (2101.03961), ST-MoE (2202.08906). Both stacks see whole sequences: there is
no cache in it, so it is also what decoding to a cache must give. Buckets of relative positions are found in whole
numbers, not by a logarithm.

B batch, S positions of the input, T of the output, H heads, d head width, M micro-batches.
"""

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import torch
from torch import Tensor

from manyhands.check.oracle import feed_forward, moe_layer
from manyhands.check.oracle_attention import Params, rms_norm
from manyhands.check.oracle_dense import DenseRouting
from manyhands.config import EncoderDecoderConfig
from manyhands.moe import Routing


@lru_cache
def bucket(distance: int, num_buckets: int, max_distance: int) -> int:
    """Of how many positions lie between: the near half has one each, the far half n·(log d/e)/(log far/e) of them."""
    near = num_buckets // 2
    if distance < near:
        return distance
    far = num_buckets - near
    steps = [j for j in range(far + 1) if Fraction(distance, near) ** far >= Fraction(max_distance, near) ** j]
    return min(num_buckets - 1, near + max(steps))


def position_bias(table: Tensor, config: EncoderDecoderConfig, length: int, *, both_ways: bool) -> Tensor:
    """[H, S, S]: what a head adds to the logit of query i and key j."""
    n, far = config.relative_attention_num_buckets, config.relative_attention_max_distance
    rows: list[list[int]] = []
    for i in range(length):
        if both_ways:
            rows.append([bucket(abs(j - i), n // 2, far) + (n // 2 if j > i else 0) for j in range(length)])
        else:
            rows.append([bucket(max(i - j, 0), n, far) for j in range(length)])
    return table[torch.tensor(rows)].permute(2, 0, 1)


def attend(
    p: Params, prefix: str, x_BSD: Tensor, y_BLD: Tensor, heads: int, bias: Tensor | float, visible: Tensor
) -> Tensor:
    """softmax(q·k + bias)·v, without a division; `visible` [B, S, L] bool. Who sees nobody sees all."""
    q, k, v = (
        (t @ p[f"{prefix}.{name}_proj.weight"].T).view(*t.shape[:2], heads, -1)
        for name, t in (("q", x_BSD), ("k", y_BLD), ("v", y_BLD))
    )
    logits = torch.einsum("bshd,blhd->bhsl", q, k) + bias
    blind = ~visible.any(-1, keepdim=True)
    logits = logits.masked_fill(~(visible | blind)[:, None], float("-inf"))
    e = (logits - logits.amax(-1, keepdim=True)).exp()
    said = torch.einsum("bhsl,blhd->bshd", e / e.sum(-1, keepdim=True), v)
    return said.flatten(2) @ p[f"{prefix}.o_proj.weight"].T


@dataclass(frozen=True, slots=True)
class Drawn:
    """What routing needs to know of a pass, by micro-batch."""

    training: bool
    generators: list[torch.Generator]
    tested: list[dict[int, Routing]]
    """The routings under test."""
    slack: float
    routings: list[dict[int, DenseRouting]]
    """Filled layer by layer."""


@dataclass(frozen=True, slots=True)
class Seq2SeqOutput:
    """What `transduce` returns."""

    logits: Tensor
    """[B, T, V]"""
    states: Tensor
    """[B, T, D]: what the head is multiplied with."""
    routings: list[dict[int, DenseRouting]]
    """Per micro-batch, by layer."""


def transduce(
    config: EncoderDecoderConfig,
    p: Params,
    ids_BS: Tensor,
    mask_BS: Tensor,
    decoder_ids_BT: Tensor,
    decoder_mask_BT: Tensor,
    *,
    training: bool,
    seeds: list[int],
    tested: list[dict[int, Routing]],
    slack: float,
) -> Seq2SeqOutput:
    """The whole batch at once; only routing is by micro-batch.

    `seeds` [M] start each micro-batch's random draws and `tested` [M] are the routings under test.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    drawn = Drawn(training, generators, tested, slack, [{} for _ in seeds])
    table = p["embed_tokens.weight"]
    memory = _stack(config, p, "encoder", table[ids_BS], ids_BS, mask_BS, None, drawn)
    own_table = table if config.share_embeddings else p["decoder.embed_tokens.weight"]
    seen = memory, mask_BS[:, None]
    x = _stack(config, p, "decoder", own_table[decoder_ids_BT], decoder_ids_BT, decoder_mask_BT, seen, drawn)
    if config.tie_word_embeddings:
        x = x / config.hidden_size**0.5
    head = table if config.tie_word_embeddings else p["lm_head.weight"]
    return Seq2SeqOutput(x @ head.T, x, drawn.routings)


def _stack(
    config: EncoderDecoderConfig,
    p: Params,
    name: str,
    x: Tensor,
    ids_BS: Tensor,
    mask_BS: Tensor,
    memory: tuple[Tensor, Tensor] | None,
    drawn: Drawn,
) -> Tensor:
    decoder, H, eps, S = memory is not None, config.num_attention_heads, config.rms_norm_eps, x.shape[1]
    sparse = config.sparse_decoder_layers if decoder else config.sparse_encoder_layers
    first = config.num_hidden_layers if decoder else 0
    bias = position_bias(p[f"{name}.relative_attention_bias.weight"], config, S, both_ways=not decoder)
    visible = mask_BS[:, None].expand(-1, S, S)
    visible = visible & torch.ones(S, S, dtype=torch.bool).tril() if decoder else visible
    for layer in range(config.num_decoder_layers if decoder else config.num_hidden_layers):
        prefix = f"{name}.layers.{layer}."
        normed = rms_norm(x, p[prefix + "input_layernorm.weight"], eps)
        x = x + attend(p, prefix + "self_attn", normed, normed, H, bias, visible)
        if memory is not None:
            normed = rms_norm(x, p[prefix + "cross_attention_layernorm.weight"], eps)
            x = x + attend(p, prefix + "cross_attn", normed, memory[0], H, 0.0, memory[1].expand(-1, S, -1))
        normed = rms_norm(x, p[prefix + "post_attention_layernorm.weight"], eps)
        if layer in sparse:
            x = x + _mixture(config, p, prefix + "mlp.", normed, first + layer, ids_BS, mask_BS, drawn)
            if prefix + "extra_layernorm.weight" in p:
                normed = rms_norm(x, p[prefix + "extra_layernorm.weight"], eps)
                x = x + feed_forward(p, prefix + "extra_mlp.", normed, config.hidden_act)
        else:
            x = x + feed_forward(p, prefix + "mlp.", normed, config.hidden_act)
    return rms_norm(x, p[f"{name}.norm.weight"], eps)


def _mixture(
    config: EncoderDecoderConfig,
    p: Params,
    prefix: str,
    normed: Tensor,
    layer: int,
    ids_BS: Tensor,
    mask_BS: Tensor,
    drawn: Drawn,
) -> Tensor:
    assert config.moe is not None
    M, outputs = len(drawn.generators), []
    for m, (x_m, mask_m, ids_m) in enumerate(zip(normed.chunk(M), mask_BS.chunk(M), ids_BS.chunk(M), strict=True)):
        y, routing = moe_layer(
            p,
            prefix,
            x_m.flatten(0, 1),
            config.moe,
            training=drawn.training,
            mask_T=mask_m.flatten(),
            ids_T=ids_m.flatten(),
            generator=drawn.generators[m],
            tested=drawn.tested[m][layer],
            slack=drawn.slack,
            sequence_length=normed.shape[1],
        )
        outputs.append(y)
        drawn.routings[m][layer] = routing
    return torch.cat(outputs).view_as(normed)
