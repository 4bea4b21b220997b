"""The few sizes that the formulas of attention, caches and experts need, from a configuration or a shape."""

from dataclasses import dataclass

from manyhands.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of one decoder."""

    hidden_size: int
    heads: int
    score_width: int
    """Multiply-adds per head and position: the width of a key plus the width of a value."""
    latent_score_width: int
    """The same when decoding: MLA works on the cached latent itself (arXiv 2405.04434 §2.1.2), 2·R + r."""
    kv_values: int
    """Numbers that one token leaves in the cache of one layer: 2·G·d, or R + r for MLA (arXiv 2405.04434, table 1)."""
    windows: tuple[int | None, ...]
    """The sliding window of each layer that has attention; None where it sees everything."""
    sparse_layers: int
    num_experts: int
    experts_per_token: int
    node_limit: int | None = None
    """Groups of experts that one token's may lie in (V3: one group per node); None without such a limit."""
    groups: int = 1
    chunked: bool = False
    """The windows are chunks: a token sees the start of its chunk and what follows, not the last `window` tokens."""
    positions: int | None = None
    """The longest context it is made for."""

    @property
    def mla(self) -> bool:
        """Whether decoding computes attention differently from prefill."""
        return self.latent_score_width != self.score_width


def sizes_of(config: ModelConfig) -> Sizes:
    """Of one of our models."""
    a, router = config.attention, config.moe.router if config.moe is not None else None
    if a.kind == "mla":
        score = a.qk_nope_head_dim + a.qk_rope_head_dim + a.v_head_dim
        latent, values = 2 * a.kv_lora_rank + a.qk_rope_head_dim, a.kv_lora_rank + a.qk_rope_head_dim
    else:
        score = latent = 2 * a.head_dim
        values = 2 * a.kv_heads * a.head_dim
    return Sizes(
        hidden_size=config.hidden_size,
        heads=a.num_attention_heads,
        score_width=score,
        latent_score_width=latent,
        kv_values=values,
        windows=tuple(a.window(layer) or a.chunk(layer) for layer in range(config.num_hidden_layers)),
        chunked=a.attention_chunk_size is not None,
        sparse_layers=len(config.sparse_layers),
        num_experts=router.num_experts if router else 0,
        experts_per_token=router.num_experts_per_tok if router else 0,
        node_limit=router.topk_group if router and router.n_group > 1 else None,
        groups=router.n_group if router else 1,
        positions=config.max_position_embeddings,
    )
