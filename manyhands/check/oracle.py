"""The oracle: a decoder in float64 in which every expert is evaluated for every token.

    y_t = Σ_e G_te · Expert_e(x_t),  G [T, E] dense, 0 where an expert was not chosen or had no room

Nothing is sorted, gathered or skipped. Feed-forward networks, norms, attention (`oracle_attention.py`), routing
(`oracle_routing.py`), losses (`oracle_balance.py`) and the order of the blocks are written here again: nothing is
shared with what is checked but its description and its weights.

B batch, S sequence, T = B·S tokens, D width, E experts, V vocabulary, M micro-batches.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from manyhands.check.oracle_attention import Params, attention, layer_norm, rms_norm
from manyhands.check.oracle_dense import DenseRouting, RouterWeights
from manyhands.check.oracle_routing import route
from manyhands.check.oracle_soft import soft
from manyhands.config import ModelConfig, MoEConfig
from manyhands.moe import Routing

GATED = ("swiglu", "swiglu_oai", "geglu", "geglu_tanh")


def float64_copy(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter (a leaf that takes a gradient) and buffer, by name, in float64."""
    copies = {name: p.detach().double().requires_grad_() for name, p in module.named_parameters()}
    return copies | {name: b.detach().double() for name, b in module.named_buffers()}


def activation(h: Tensor, name: str) -> Tensor:
    """SwiGLU and GeGLU: gate half times up half; GELU is the exact one unless the name says tanh."""
    if name not in GATED:
        return _gelu(h) if name == "gelu" else h * (h > 0)
    gate, up = h[..., : h.shape[-1] // 2], h[..., h.shape[-1] // 2 :]
    if name == "swiglu":
        return gate / (1.0 + (-gate).exp()) * up
    if name == "swiglu_oai":
        gate, up = torch.where(gate > 7.0, 7.0, gate), torch.where(up.abs() > 7.0, 7.0 * up.sign(), up)
        return gate / (1.0 + (-1.702 * gate).exp()) * (up + 1.0)
    if name == "geglu_tanh":
        return 0.5 * gate * (1.0 + (math.sqrt(2.0 / math.pi) * (gate + 0.044715 * gate**3)).tanh()) * up
    return _gelu(gate) * up


def _gelu(h: Tensor) -> Tensor:
    return 0.5 * h * (1.0 + torch.erf(h / math.sqrt(2.0)))


def feed_forward(p: Params, prefix: str, x: Tensor, act: str) -> Tensor:
    """A dense feed-forward network."""
    h = x @ p[prefix + "up_proj.weight"].T
    if act in GATED:
        h = torch.cat((x @ p[prefix + "gate_proj.weight"].T, h), -1)
    return activation(h, act) @ p[prefix + "down_proj.weight"].T


def every_expert(p: Params, prefix: str, x_TD: Tensor, act: str) -> Tensor:
    """[T, E, D]: all experts' outputs for all tokens."""
    up = "gate_up_proj" if act in GATED else "up_proj"
    h = torch.einsum("td,efd->tef", x_TD, p[prefix + up])
    if prefix + up + "_bias" in p:
        h = h + p[prefix + up + "_bias"]
    y = torch.einsum("tef,edf->ted", activation(h, act), p[prefix + "down_proj"])
    return y + p[prefix + "down_proj_bias"] if prefix + "down_proj_bias" in p else y


def moe_layer(
    p: Params,
    prefix: str,
    x_TD: Tensor,
    config: MoEConfig,
    *,
    training: bool,
    mask_T: Tensor,
    ids_T: Tensor,
    generator: torch.Generator,
    tested: Routing,
    slack: float,
    sequence_length: int | None = None,
) -> tuple[Tensor, DenseRouting]:
    """[T, D] -> [T, D] and who went where; see `route` for the arguments."""
    router = prefix + "router."
    weights = RouterWeights(
        p[router + "weight"],
        p.get(router + "e_score_correction_bias"),
        p.get(router + "noise_weight"),
        p.get(router + "bias"),
        p.get(router + "l1_steps"),
        p.get(router + "group_weight"),
        p.get(router + "group_noise_weight"),
    )

    def experts(x: Tensor) -> Tensor:
        return every_expert(p, prefix + "experts.", x, config.hidden_act)

    if config.router.select == "soft":
        scale, length = p[router + "slot_scale"], sequence_length or len(x_TD)
        outputs_TED, routing = soft(x_TD, weights, scale, config.router, mask_T, length, experts)
    else:
        routing = route(
            x_TD,
            weights,
            config.router,
            training=training,
            mask_T=mask_T,
            ids_T=ids_T,
            generator=generator,
            tested=tested,
            slack=slack,
            sequence_length=sequence_length,
        )
        outputs_TED = experts(x_TD) if config.weigh == "output" else _weighed(x_TD, routing, experts)
    y = torch.einsum("te,ted->td", routing.weights * routing.kept, outputs_TED)
    if config.unchosen != "nothing":
        others = torch.where(routing.chosen, 0.0, routing.scores) * config.router.routed_scaling_factor
        if config.router.norm_topk_prob and config.router.num_experts_per_tok > 1:
            others = others / torch.where(routing.chosen, routing.scores, 0.0).sum(1, keepdim=True).detach()
        if config.unchosen == "average":
            y = y + others @ p[prefix + "average_outputs"]
        elif training:
            y = y + torch.einsum("te,ted->td", others - others.detach(), outputs_TED.detach())
    if config.n_shared_experts:
        shared = feed_forward(p, prefix + "shared_experts.", x_TD, config.hidden_act)
        if config.shared_expert_gate:
            shared = shared / (1.0 + (-x_TD @ p[prefix + "shared_expert_gate.weight"].T).exp())
        y = y + shared
    return y, replace(routing, outputs=outputs_TED)


def _weighed(x_TD: Tensor, routing: DenseRouting, experts: Callable[[Tensor], Tensor]) -> Tensor:
    """[T, E, D]: what expert e says of w_te·x_t, over w_te, so that the weight times it is what is added."""
    said = [experts(x_TD * w_T[:, None])[:, e] for e, w_T in enumerate(routing.weights.unbind(1))]
    w_TE = torch.where(routing.chosen, routing.weights, 1.0)
    return torch.stack(said, 1) / w_TE[..., None]


@dataclass(frozen=True, slots=True)
class OracleOutput:
    """What the oracle's forward returns."""

    logits: Tensor
    """[B, S, V]"""
    states: Tensor
    """[B, S, D]: what the head is multiplied with."""
    routings: list[dict[int, DenseRouting]]
    """Per micro-batch, by layer."""


def decode(
    config: ModelConfig,
    p: Params,
    ids_BS: Tensor,
    mask_BS: Tensor,
    *,
    training: bool,
    seeds: list[int],
    tested: list[dict[int, Routing]],
    slack: float,
) -> OracleOutput:
    """The whole batch at once; only routing is by micro-batch, since capacity and random draws belong to one.

    `seeds` [M] start each micro-batch's random draws and `tested` [M] are the routings under test.
    """
    (B, S), M = ids_BS.shape, len(seeds)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    routings: list[dict[int, DenseRouting]] = [{} for _ in seeds]
    x = p["embed_tokens.weight"][ids_BS] * config.embedding_multiplier

    def normalise(x: Tensor, name: str) -> Tensor:
        if config.norm == "layer_norm":
            return layer_norm(x, p[name + ".weight"], p[name + ".bias"], config.rms_norm_eps)
        return rms_norm(x, p[name + ".weight"], config.rms_norm_eps)

    def add(x: Tensor, y: Tensor, norm: str) -> Tensor:
        y = normalise(y, norm) if config.output_norms else y
        return x + config.residual_multiplier * y

    for layer in range(config.num_hidden_layers):
        prefix = f"layers.{layer}."
        normed = normalise(x, prefix + "input_layernorm")
        attended = attention(p, prefix + "self_attn.", normed, config, layer, mask_BS)
        x = add(x, attended, prefix + "attention_output_norm")
        normed = normalise(x, prefix + "post_attention_layernorm")
        if not config.is_sparse(layer):
            y = feed_forward(p, prefix + "mlp.", normed, config.hidden_act)
            x = add(x, y, prefix + "mlp_output_norm")
            continue
        assert config.moe is not None
        outputs = []
        for m, (x_m, mask_m, ids_m) in enumerate(zip(normed.chunk(M), mask_BS.chunk(M), ids_BS.chunk(M), strict=True)):
            y, routing = moe_layer(
                p,
                prefix + "mlp.",
                x_m.flatten(0, 1),
                config.moe,
                training=training,
                mask_T=mask_m.flatten(),
                ids_T=ids_m.flatten(),
                generator=generators[m],
                tested=tested[m][layer],
                slack=slack,
                sequence_length=S,
            )
            outputs.append(y)
            routings[m][layer] = routing
        x = add(x, torch.cat(outputs).view(B, S, -1), prefix + "mlp_output_norm")
    x = normalise(x, "norm") * config.output_multiplier
    head = p["embed_tokens.weight"] if config.tie_word_embeddings else p["lm_head.weight"]
    logits = x @ head.T
    return OracleOutput(logits + p["lm_head.bias"] if config.lm_head_bias else logits, x, routings)
