"""Multi-head and grouped-query attention to each sequence's blocks of keys and values."""

from torch import nn

from manyhands.kernels.moment import held
from manyhands.kernels.native import step
from manyhands.kernels.native.library import CAttention, CCache, CRotation
from manyhands.layers.attention import Attention
from manyhands.layers.latent_attention import LatentAttention
from manyhands.runtime.builder import ATTEND, ROPE_AND_CACHE, Builder, Unfit
from manyhands.runtime.claims import latent, linear, norm
from manyhands.runtime.covered import ATTENTION, ROPE


def emit(b: Builder, attention: nn.Module, layer: int) -> None:
    """From `normed` into `y`."""
    if type(attention) is LatentAttention:
        latent.emit(b, attention, layer)
        return
    if type(attention) is not Attention or not held(attention, "sinks"):
        raise Unfit(f"{type(attention).__name__} has no claim")
    a, d = attention.config, attention.config.head_dim
    if not ATTENTION.covers(a) or not ROPE.covers(b.config.rope):
        raise Unfit("attention or rope of a kind that no claim covers")
    if d % 16 or (attention.q_norm is None) != (a.qk_norm == "none"):
        raise Unfit(f"heads of width {d}, no multiple of 16" if d % 16 else "norms that the config does not say")
    H, G = a.num_attention_heads, a.kv_heads
    projections = {"q": (attention.q_proj, H * d), "k": (attention.k_proj, G * d), "v": (attention.v_proj, G * d)}
    linear.emit(b, "normed", b.D, projections)
    norms = [step.NO_NORM if n is None else norm.norm_of(n) for n in (attention.q_norm, attention.k_norm)]
    q, k, v = b.buffer("q", H * d), b.buffer("k", G * d), b.buffer("v", G * d)
    placed, heads = (b.tensor(name, H * d).data_ptr() for name in ("placed", "heads"))
    kind, pairs = step.NORMS[a.qk_norm], b.cos.shape[1]
    rotation = CRotation(b.cos.data_ptr(), b.sin.data_ptr(), 2 * pairs, 1, attention.interleave, *norms, kind)
    sinks, cache = b.float32(attention.sinks, H), CCache()
    how = CAttention(H, attention.window or 0, sinks, attention.scale, a.attn_logit_softcap or 0.0)
    b.call(ROPE_AND_CACHE, q, k, v, b.sequences, rotation, cache, placed)
    b.attention(layer, cache, (G, d), (G, d))
    b.call(ATTEND, how, b.sequences, placed, cache, heads)
    linear.emit(b, "heads", H * d, {"y": (attention.o_proj, b.D)})
