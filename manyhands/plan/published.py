"""Published figures beside the computed ones: what `manyhands models --check` shows.

D model width.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil, prod
from typing import Literal

from manyhands.catalog import Entry, Figure, entries
from manyhands.catalog.entry import split_printed
from manyhands.config import EncoderDecoderConfig, ModelConfig
from manyhands.config.shapes import tensor_shapes
from manyhands.plan.compute import training_flops
from manyhands.plan.count import BUFFERS, Counts, count_model
from manyhands.plan.count_kind import sequence_flops
from manyhands.plan.count_shape import count_shape, experts_in_model
from manyhands.plan.shape_sizes import shape_sizes
from manyhands.plan.sizes import sizes_of
from manyhands.plan.storage import tensor_class

Verdict = Literal["rounds to it", "cut to it", "within", "explained", "off"]
"""The computed number rounds to the printed digits, is cut to them, lies within the figure's tolerance, lies outside
with an explanation in the catalogue, or lies outside without one."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One published figure and what follows from the same system's architecture."""

    id: str
    what: str
    unit: str
    kind: str
    printed: str
    published: float
    computed: float
    verdict: Verdict
    because: str
    """The catalogue's explanation, where it has one."""
    source: str

    def computed_as_printed(self) -> str:
        """The computed number in the unit of the printed one, to two digits more."""
        digits, suffix, scale = split_printed(self.printed)
        decimals = len(digits.partition(".")[2]) + (2 if suffix else 0)
        return f"{self.computed / scale:,.{decimals}f}{suffix}"

    @property
    def difference(self) -> float:
        """(computed - published) / published."""
        return (self.computed - self.published) / self.published


def counts_of(entry: Entry) -> Counts | None:
    """The parameters of a catalogue entry; None if its architecture is undisclosed."""
    if entry.shape is not None:
        return count_shape(entry.shape)
    config = entry.config
    return None if config is None else count_model(config)


def compare_all() -> list[Comparison]:
    """Every figure of the catalogue that can be computed; rumours are not."""
    return [row for entry in entries() for row in compare(entry)]


def compare(entry: Entry) -> Iterator[Comparison]:
    """The figures of one entry."""
    if entry.config_fields is None and entry.shape is None:
        return
    values = _Computed(entry)
    for figure in entry.published:
        if figure.value is not None and figure.kind != "rumour":
            yield _comparison(entry.id, figure, figure.value, values(figure.what))


def computed_figure(entry: Entry, what: str) -> float:
    """What follows from the architecture of `entry` for one of `catalog.COMPARED`; the entry must have one."""
    return _Computed(entry)(what)


def _comparison(name: str, figure: Figure, published: float, computed: float) -> Comparison:
    difference, slack = computed - published, 1e-9 * published
    verdict: Verdict
    if abs(difference) <= figure.step / 2 + slack:
        verdict = "rounds to it"
    elif 0 <= difference < figure.step:
        verdict = "cut to it"
    elif figure.tolerance is not None and abs(difference) <= figure.tolerance * published:
        verdict = "within"
    else:
        verdict = "explained" if figure.explanation else "off"
    return Comparison(
        id=name,
        what=figure.what,
        unit=figure.unit,
        kind=figure.kind,
        printed=figure.printed or "",
        published=published,
        computed=computed,
        verdict=verdict,
        because=figure.explanation or "",
        source=figure.source,
    )


class _Computed:
    """What follows from an entry's architecture, by the names of `catalog.COMPARED`."""

    def __init__(self, entry: Entry) -> None:
        counts = counts_of(entry)
        assert counts is not None
        self.entry, self.config, self.counts = entry, entry.config, counts

    def __call__(self, what: str) -> float:
        c = self.counts
        outside = c.by_component.get("embedding", 0) + c.by_component.get("head", 0)
        formulas: dict[str, Callable[[], float]] = {
            "total": lambda: c.total,
            "total_without_embedding": lambda: c.total - outside,
            "total_with_vision": lambda: c.total + self._vision(),
            "total_without_embedding_with_mtp": lambda: c.total - outside + mtp_parameters(self._config()),
            "mtp": lambda: mtp_parameters(self._config()),
            "stored": self._stored,
            "active": lambda: c.active,
            "active_without_embedding": lambda: c.active_without_embedding,
            "body": lambda: c.body,
            "experts_in_model": lambda: experts_in_model(self.entry.shape) if self.entry.shape else 0,
            "forward_flops": lambda: 2 * c.active_without_embedding,
            "training_flops": self._training_flops,
            "sequence_flops": self._sequence_flops,
            "checkpoint": self._checkpoint,
        }
        return formulas[what]()

    def _config(self) -> ModelConfig:
        assert self.config is not None, self.entry.id
        return self.config

    def _training_flops(self) -> float:
        shape = self.entry.shape
        sizes = shape_sizes(shape) if shape is not None else sizes_of(self._config())
        assert sizes is not None, self.entry.id
        return training_flops(sizes, self.counts, 4096)

    def _vision(self) -> float:
        figure = self.entry.figure("vision_parameters")
        return (figure.value if figure is not None else None) or 0.0

    def _stored(self) -> float:
        """Weights, selection biases, the scales of FP8, and the MTP module with its copies of embedding and head."""
        config, mtp = self._config(), (self.entry.config_fields or {}).get("num_nextn_predict_layers", 0)
        extra = mtp * (mtp_parameters(config) + 2 * self.counts.embedding)
        fp8 = self.entry.storage is not None and self.entry.storage.format.startswith("FP8")
        return float(self.counts.total + self.counts.buffers + (block_scales(config) if fp8 else 0) + extra)

    def _sequence_flops(self) -> float:
        shape = self.entry.shape
        assert isinstance(shape, EncoderDecoderConfig), self.entry.id
        return sequence_flops(shape, 512, 114)

    def _checkpoint(self) -> float:
        storage = self.entry.storage
        assert storage is not None, self.entry.id
        parts = self.counts.by_component.items()
        bits = sum(n * float(getattr(storage, tensor_class(part))) for part, n in parts)
        return (bits + 16 * self._vision()) / 8


def mtp_parameters(config: ModelConfig) -> int:
    """One multi-token-prediction module without its copies of embedding and head (arXiv 2412.19437 §2.2).

    One more sparse block, a projection of 2·D to D and three norms.
    """
    last, D = f"layers.{config.num_hidden_layers - 1}.", config.hidden_size
    block = sum(prod(s) for name, s in _parameters(config).items() if name.startswith(last))
    return block + 2 * D * D + 3 * D


def block_scales(config: ModelConfig, block: int = 128) -> int:
    """Scales stored beside FP8 weights: one per `block`² of every matrix in attention and feed-forward networks."""
    count = 0
    for name, shape in _parameters(config).items():
        if ".router." in name or len(shape) < 2 or not name.startswith("layers."):
            continue
        *experts, rows, columns = shape
        halves = 2 if name.endswith("gate_up_proj") else 1  # stored as two matrices
        count += prod(experts) * halves * ceil(rows // halves / block) * ceil(columns / block)
    return count


def _parameters(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {name: s for name, s in tensor_shapes(config).items() if not name.endswith(BUFFERS)}
