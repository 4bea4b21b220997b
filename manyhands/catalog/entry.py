"""One published system: what it is, what was said about it by whom, and how far that may be trusted.

The architecture is the family's own `config.json` fields, or a `Shape`; counts are computed from it and are never
written down. What is written down are figures: a number as it was printed, its kind, and its source.
"""

from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from manyhands.catalog.shape import Shape
from manyhands.config import Strict, suggest

if TYPE_CHECKING:
    from manyhands.config import ModelConfig

Kind = Literal["published", "reported", "computed", "assumed", "rumour", "undisclosed"]
"""published: by those who made the system, or in its paper. reported: by third parties, of what its makers publish.
computed: from published numbers, by the source named. assumed: by convention or inference. rumour: said by third
parties and never confirmed. undisclosed: not said at all."""

COMPARED = {
    "total": "parameters",
    "total_without_embedding": "parameters",
    "total_with_vision": "parameters",
    "total_without_embedding_with_mtp": "parameters",
    "mtp": "parameters",
    "stored": "numbers",
    "active": "parameters",
    "active_without_embedding": "parameters",
    "body": "parameters",
    "experts_in_model": "experts",
    "forward_flops": "FLOP/token",
    "training_flops": "FLOP/token",
    "sequence_flops": "FLOP/sequence",
    "checkpoint": "bytes",
}
"""Quantities that are computed from an entry's architecture, and their units. `active` counts embedding and head,
`active_without_embedding` the head only, `body` neither. `stored`: every number in the files, block scales and copies
included. `training_flops`: forward and backward at 4096 positions; `forward_flops`: without attention;
`sequence_flops`: forward, 512 tokens in and 114 out, without routers."""
FACTS = {
    "context": "positions",
    "layers": "layers",
    "experts": "experts",
    "top_k": "experts",
    "expert_parameters": "parameters",
    "vision_parameters": "parameters",
    "tokens": "tokens",
    "accelerators": "devices",
    "accelerator_hours": "hours",
    "accelerator_days": "days",
    "core_years": "core-years",
    "training_flops_total": "FLOP",
    "energy": "MWh",
    "training_cost": "USD",
    "accelerator_hour_price": "USD/hour",
    "price_input": "USD/million tokens",
    "price_output": "USD/million tokens",
    "price_blended": "USD/million tokens",
    "mmlu": "% right",
}
"""Quantities that are only quoted, and their units. `price_blended`: three tokens in for one out. `mmlu` (arXiv
2009.03300) says how good a model is, roughly; only figures of one table, measured by one party, may be held against
each other."""
_SCALE = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12, "Z": 1e21, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
Printed = Annotated[str, Field(pattern=r"^[~>]?\d[\d,]*(\.\d+)?(K|M|G|B|T|Z|Ki|Mi|Gi)?$")]


class Figure(Strict):
    """One number as somebody printed it."""

    what: str
    """One of `COMPARED` or `FACTS`."""
    printed: Printed | None = None
    """`46.7B`; `~` stands before an approximation, `>` before a lower bound. None: undisclosed."""
    kind: Kind
    source: str = Field(min_length=1)
    """URL, or `arXiv <number>, <place>`."""
    device: str | None = None
    """What the hours, days or core-years are of."""
    tolerance: Annotated[float, Field(gt=0.0, le=0.2)] | None = None
    """How far the computed number may lie from this one, as a share; None where it is not compared."""
    explanation: str | None = None
    """Why the computed number differs, or what to know about this one."""

    @property
    def value(self) -> float | None:
        """The number, in `unit`; None if it is undisclosed."""
        if self.printed is None:
            return None
        digits, _, scale = split_printed(self.printed)
        return float(digits) * scale

    @property
    def unit(self) -> str:
        """The unit of `value`."""
        return COMPARED.get(self.what) or FACTS[self.what]

    @property
    def step(self) -> float:
        """One unit of the last digit that was printed, in `unit`; 0 if nothing was."""
        if self.printed is None:
            return 0.0
        digits, _, scale = split_printed(self.printed)
        return float(scale / 10 ** len(digits.partition(".")[2]))

    @model_validator(mode="after")
    def _consistent(self) -> "Figure":
        if self.what not in COMPARED and self.what not in FACTS:
            raise ValueError(f"unknown quantity {self.what!r}; {suggest(self.what, [*COMPARED, *FACTS])}")
        if (self.printed is None) != (self.kind == "undisclosed"):
            raise ValueError("a figure is printed, or it is of kind 'undisclosed'")
        if self.tolerance is not None and (self.what not in COMPARED or self.printed is None):
            raise ValueError(f"{self.what} is not compared, so it has no tolerance")
        return self


def split_printed(printed: str) -> tuple[str, str, float]:
    """(digits, suffix, what the suffix stands for): `~46.7B` is 46.7, B, 10⁹."""
    text = printed.lstrip("~>").replace(",", "")
    digits = text.rstrip("KMGBTZi")
    suffix = text[len(digits) :]
    return digits, suffix, _SCALE[suffix]


class Storage(Strict):
    """How the published files hold the weights: bits per weight, scales included."""

    format: str
    routed: Annotated[float, Field(gt=0.0, le=64.0)]
    linear: Annotated[float, Field(gt=0.0, le=64.0)]
    """Attention, dense feed-forward networks and shared experts."""
    embedding: Annotated[float, Field(gt=0.0, le=64.0)]
    """Input embedding and head."""
    rest: Annotated[float, Field(gt=0.0, le=64.0)]
    """Routers, norms, biases."""
    kind: Kind = "published"
    source: str = Field(min_length=1)


class Mixture(NamedTuple):
    """One sparse layer."""

    experts: int
    shared: int
    """Experts that every token visits beside those chosen for it."""
    experts_per_token: int


class Entry(Strict):
    """One system of the catalogue."""

    id: str
    name: str
    org: str
    released: Annotated[str, Field(pattern=r"^\d{4}(-\d{2}(-\d{2})?)?$")]
    license: str
    kind: Literal["decoder", "encoder_decoder", "lstm", "mixture_1991", "undisclosed"]
    sparse: bool | None = None
    """None: undisclosed."""
    architecture: Kind
    """How far `config` or `shape` may be trusted: published, assumed (it reproduces the published counts), or
    undisclosed."""
    same_as: str | None = None
    """The entry whose architecture this system has, where its makers say so."""
    based_on: str | None = None
    """The entry it was made from, where its own architecture is not described."""
    config_fields: dict[str, Any] | None = None
    shape: Shape | None = Field(default=None, discriminator="kind")
    storage: Storage | None = None
    """None: not known. Where `config` names a 16-bit dtype and the file says nothing else, that dtype."""
    figures: tuple[Figure, ...] = ()
    notes: tuple[str, ...] = ()
    sources: tuple[str, ...] = Field(min_length=1)

    @property
    def config(self) -> "ModelConfig | None":
        """The model, where one of our families reads it. `same_as` is followed."""
        if self.config_fields is None:
            return None
        from manyhands.config.decoder import as_decoder
        from manyhands.families import read_config

        return as_decoder(read_config(self.config_fields, f"catalogue entry {self.id}")[1], "a catalogue entry")

    @property
    def mixture(self) -> Mixture | None:
        """Its sparse layers; None if it is dense, or if its architecture is not disclosed."""
        config, shape = self.config, self.shape
        if config is not None and config.moe is not None:
            router = config.moe.router
            return Mixture(router.num_experts, config.moe.n_shared_experts, router.num_experts_per_tok)
        layers: Any = getattr(shape, "moe", None) or shape
        router = getattr(layers, "router", None) or layers
        if not getattr(router, "num_experts", 0):
            return None
        wide = getattr(layers, "shared_intermediate_size", 0)
        shared = getattr(layers, "n_shared_experts", 0) or (wide // layers.moe_intermediate_size if wide else 0)
        k = getattr(router, "num_experts_per_tok", router.num_experts)  # 1991: every expert works
        return Mixture(router.num_experts, shared, k)

    @property
    def year(self) -> int:
        """When it was released."""
        return int(self.released[:4])

    @property
    def published(self) -> tuple[Figure, ...]:
        """The figures that can be compared with what is computed."""
        return tuple(figure for figure in self.figures if figure.what in COMPARED)

    @property
    def training(self) -> tuple[Figure, ...]:
        """Tokens, hours, cost, energy."""
        names = ("tokens", "accelerator", "core_years", "training_flops_total", "training_cost", "energy")
        return tuple(figure for figure in self.figures if figure.what.startswith(names))

    @property
    def prices(self) -> tuple[Figure, ...]:
        """What was charged for a million tokens when the source was written."""
        return tuple(figure for figure in self.figures if figure.what.startswith("price_"))

    @property
    def context(self) -> int | None:
        """How many positions it was released for."""
        figure = self.figure("context")
        return None if figure is None or figure.value is None else int(figure.value)

    def figure(self, what: str) -> Figure | None:
        """The first figure for `what`."""
        return next((figure for figure in self.figures if figure.what == what), None)

    @model_validator(mode="after")
    def _consistent(self) -> "Entry":
        described = (self.config_fields is not None) + (self.shape is not None)
        if described != (self.architecture != "undisclosed"):
            raise ValueError("an entry has one of config, shape and same_as, or an undisclosed architecture")
        return self
