"""Multi-head latent attention, absorbed: queries go to each sequence's blocks of latents, for prompts too."""

from torch import nn

from manyhands.kernels.moment import held
from manyhands.kernels.native import step, views
from manyhands.kernels.native.library import CAttention, CCache, CRotation
from manyhands.layers.latent_attention import LatentAttention
from manyhands.layers.linear import Linear
from manyhands.runtime.builder import ATTEND, LATENT_PRODUCTS, LATENT_ROPE_AND_CACHE, NORM, Builder, Unfit
from manyhands.runtime.claims import linear, norm
from manyhands.runtime.covered import LATENT, ROPE


def emit(b: Builder, attention: nn.Module, layer: int) -> None:
    """From `normed` into `y`."""
    if type(attention) is not LatentAttention:
        raise Unfit(f"{type(attention).__name__} has no claim")
    a = attention.config
    H, R, n, r, v = a.num_attention_heads, a.kv_lora_rank, a.qk_nope_head_dim, a.qk_rope_head_dim, a.v_head_dim
    if not LATENT.covers(a) or not ROPE.covers(b.config.rope):
        raise Unfit("attention or rope of a kind that no claim covers")
    if any(width % 16 for width in (R, n, r, v)) or 2 * b.cos.shape[1] != r:
        raise Unfit(f"a latent of {R} and heads of {n} + {r} and {v}, not all multiples of 16")
    up = attention.kv_b_proj
    plain = (
        type(up) is Linear and up._parameters.get("bias") is None and held(up, "weight") and views.plain(up.weight, 2)
    )
    if not plain or up.weight.shape != (H * (n + v), R):
        raise Unfit("an up-projection of latents that is packed, or lies as the kernels do not read it")
    latent = step.latent_of(up.weight, H, n)
    _queries(b, attention, H * (n + r), R + r)
    q, kv, placed = b.buffer("q", H * (n + r)), b.buffer("kv", R + r), b.buffer("placed", H * (R + r))
    said, heads = b.buffer("said", H * R), b.buffer("heads", H * v)
    k_norm = norm.norm_of(attention.kv_a_layernorm)
    rotation = CRotation(b.cos.data_ptr(), b.sin.data_ptr(), r, 1, attention.interleave, step.NO_NORM, k_norm, 0)
    how, cache = CAttention(H, a.window(layer) or 0, None, attention.scale, 0.0), CCache()
    b.call(LATENT_PRODUCTS, latent, q, placed)
    b.call(LATENT_ROPE_AND_CACHE, latent, q, kv, b.sequences, rotation, cache, placed)
    b.attention(layer, cache, (1, R + r), values=R)
    b.call(ATTEND, how, b.sequences, placed.data, cache, said.data)
    b.call(LATENT_PRODUCTS, latent, said, heads, n=(1, 0))
    linear.emit(b, "heads", H * v, {"y": (attention.o_proj, b.D)})


def _queries(b: Builder, attention: LatentAttention, width: int, latent: int) -> None:
    """`q`, through a low rank or not, and the compressed `kv`."""
    kv = (attention.kv_a_proj_with_mqa, latent)
    if attention.q_proj is not None:
        linear.emit(b, "normed", b.D, {"q": (attention.q_proj, width), "kv": kv})
        return
    assert attention.q_a_layernorm is not None
    rank, struct = attention.config.q_lora_rank, norm.norm_of(attention.q_a_layernorm)
    if rank is None or struct.width != rank:
        raise Unfit("a norm of another width")
    linear.emit(b, "normed", b.D, {"q_a": (attention.q_a_proj, rank), "kv": kv})
    b.call(NORM, struct, b.buffer("q_a", rank), b.buffer("q_a", rank))
    linear.emit(b, "q_a", rank, {"q": (attention.q_b_proj, width)})
