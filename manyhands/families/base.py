"""What a family is: how one published `config.json` and its tensor names say what ours say, both ways.

Everything here is data about files; nothing needs torch.

L layers, E experts, D model width, F expert width.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from manyhands.config import BuiltConfig, ModelConfig
from manyhands.config.model import DECODER
from manyhands.config.shapes import tensor_shapes

Index = tuple[int | slice, ...]
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Piece:
    """One part of one of our tensors and where it is in the family's files. Pieces never overlap."""

    ours: str
    theirs: str
    ours_index: Index = ()
    """Of our tensor; () is all of it."""
    theirs_index: Index = ()
    transpose: bool = False
    """The last two dimensions are swapped."""
    otherwise: str | None = None
    """Where it is read from, whole, if the files have no `theirs`; where it was read from there, the two are equal."""


@dataclass(frozen=True, slots=True)
class Family:
    """One `model_type`."""

    model_type: str
    architecture: str
    """The class that transformers (or the publisher's code) loads it with."""
    published: str
    """Models in this format, for people."""
    read: Callable[[Any], BuiltConfig]
    """Takes a `Fields`. Raises `ConfigError` for what it does not know."""
    write: Callable[[Any], Json]
    """The same configuration as `config.json` fields; `export_config` checks that reading them gives it back."""
    pieces: Callable[[Any], Iterable[Piece]]
    kinds: tuple[str, ...] = (DECODER,)
    """The kinds of models that its files describe; `write` and `pieces` take no other."""
    dense: bool = False
    """Its models have no experts."""
    nearest: bool = True
    """Whether a fit for a model of one's own is looked for here: each layout once, and where transformers loads it
    (`deepseek`, which llama.cpp and vLLM load, is the exception)."""
    aux_loss_scale: Callable[[ModelConfig], float] | None = None
    """The reference's balance loss is this times our f·P of the pooled layers (`moe.balance.pool_layers`); None where
    it has none."""
    kept: Callable[[Json], tuple[str, ...]] = lambda _: ()
    """From `config.json`: prefixes of tensors this model does not compute with and a round trip keeps (an MTP module,
    a vision tower)."""
    kept_fields: tuple[str, ...] = ()
    """The fields of `config.json` that say so; they are carried along with those tensors."""
    dropped: tuple[str, ...] = (".rotary_emb.inv_freq",)
    """Endings of tensors that are recomputed and not kept."""
    text_field: str | None = None
    """The field of `config.json` that holds the language model's fields, where the model has other parts too."""
    saved_float32: tuple[str, ...] = ("e_score_correction_bias",)
    """Endings of our tensors that are written in float32 whatever the dtype of the rest."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """Tensors that some files hold once more, each with the name of which: they must be equal, and are dropped."""
    besides: Callable[[Any], Mapping[str, str]] = lambda _: {}
    """From our config: tensors that its files have besides those of `pieces`, each a copy of another of them."""
    token_ids: Mapping[str, int] = field(default_factory=dict)
    """The ids in `config.json` where neither the tokenizer nor the model's origin says others."""


def pooled_over_experts(config: ModelConfig) -> float:
    """The scale of transformers' `load_balancing_loss_func`: it counts K choices per token, so it is K·(f·P)."""
    assert config.moe is not None
    return float(config.moe.router.num_experts_per_tok)


Experts = Callable[[str, str, ModelConfig], Iterable[Piece]]
"""(our name, "layers.3.", config) -> its pieces, theirs without the prefix."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Tensor names of the usual shape: our names behind a prefix, some endings renamed, the experts apart."""

    experts: Experts | None = None
    rename: Mapping[str, str] | None = None
    """Our name within a layer -> theirs; a key that ends in a dot renames everything below it."""
    prefix: str = "model."
    head: str = "lm_head.weight"
    top: Mapping[str, str] | None = None
    """The same for `embed_tokens.weight` and `norm.weight`."""

    def __call__(self, config: ModelConfig) -> Iterator[Piece]:
        """Every tensor of `config`, in the order of the model."""
        for ours in tensor_shapes(config):
            if not ours.startswith("layers."):
                yield Piece(ours, self._top(ours))
                continue
            layer, tail = ours.split(".", 2)[1:]
            where = f"layers.{layer}."
            if tail.startswith("mlp.experts.") and self.experts is not None:
                for p in self.experts(tail, where, config):
                    yield Piece(ours, self.prefix + p.theirs, p.ours_index, p.theirs_index, p.transpose)
            else:
                yield Piece(ours, self.prefix + where + self._renamed(tail))

    def _top(self, ours: str) -> str:
        if ours.startswith("lm_head."):
            return self.head.removesuffix("weight") + ours.removeprefix("lm_head.")
        return self.prefix + (self.top or {}).get(ours, ours)

    def _renamed(self, tail: str) -> str:
        for ours, theirs in (self.rename or {}).items():
            if tail == ours or (ours.endswith(".") and tail.startswith(ours)):
                return theirs + tail[len(ours) :]
        return tail


def per_expert(gate: str, up: str, down: str) -> Experts:
    """One tensor per expert and projection; `gate` and the others are names with `{e}` for the expert."""

    def pieces(tail: str, where: str, config: ModelConfig) -> Iterator[Piece]:
        assert config.moe is not None
        E, F = config.moe.router.num_experts, config.moe.moe_intermediate_size
        assert tail in ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"), "export_config refuses other experts"
        for e in range(E):
            if tail == "mlp.experts.down_proj":
                yield Piece("", where + down.format(e=e), (e,))
            else:
                yield Piece("", where + gate.format(e=e), (e, slice(0, F)))
                yield Piece("", where + up.format(e=e), (e, slice(F, 2 * F)))

    return pieces


LLAMA_EXPERTS = per_expert(*(f"mlp.experts.{{e}}.{name}_proj.weight" for name in ("gate", "up", "down")))
"""`mlp.experts.7.gate_proj.weight`: most families."""
MIXTRAL_EXPERTS = per_expert(*(f"block_sparse_moe.experts.{{e}}.{name}.weight" for name in ("w1", "w3", "w2")))
"""`block_sparse_moe.experts.7.w1.weight`: w1 is the gate, w3 up, w2 down."""
