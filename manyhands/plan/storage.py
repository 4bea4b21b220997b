"""Bits per weight by class of tensor, and what the weights take.

"Total times bits" is wrong for every mixed checkpoint: Kimi K2.5 keeps its experts in 4 bits and all else in 16.
"""

from dataclasses import dataclass, replace
from typing import Literal

from manyhands.config import Packing, suggest
from manyhands.defaults import GROUP_SIZE
from manyhands.errors import ConfigError
from manyhands.plan.count import Counts

TensorClass = Literal["routed", "linear", "embedding", "rest"]
CLASSES: tuple[TensorClass, ...] = ("routed", "linear", "embedding", "rest")
_CLASS_OF: dict[str, TensorClass] = {
    "routed experts": "routed",
    "embedding": "embedding",
    "head": "embedding",
    "router": "rest",
    "norms": "rest",
}
"""Everything else (attention, shared experts, dense feed-forward) is `linear`."""


@dataclass(frozen=True, slots=True)
class Storage:
    """A number format for each class of tensor, in bits per weight with its scales."""

    name: str
    routed: float
    linear: float
    embedding: float
    rest: float
    rate: str = "bf16"
    """The matrix rate of a machine that this computes at, if the machine has it."""
    note: str = ""
    parts: tuple[tuple[str, float], ...] = ()
    """Components of the count that have other bits than their class."""

    def bits(self, component: str) -> float:
        """Bits per weight of one of `count.COMPONENTS`."""
        for name, bits in self.parts:
            if name == component:
                return bits
        return float(getattr(self, tensor_class(component)))

    def shown(self) -> str:
        """`4.5/16/16/16`, in the order of `CLASSES`."""
        shown = "/".join(f"{getattr(self, name):.4g}" for name in CLASSES)
        return shown + "".join(f", {name} {bits:.4g}" for name, bits in self.parts)


BF16 = Storage("bf16", 16, 16, 16, 16)
INT8 = Storage("int8", 8.5, 8.5, 8.5, 16, "int8", "groups of 32 with one 16-bit scale (GGUF's Q8_0)")
INT4 = Storage("int4", 4.5, 4.5, 4.5, 16, "int8", "groups of 32 with one 16-bit scale (GGUF's Q4_0)")
FP8 = Storage("fp8", 8 + 32 / 128**2, 8 + 32 / 128**2, 16, 16, "fp8", "one float32 scale per 128 x 128 block")
MXFP4 = Storage("mxfp4", 4.25, 16, 16, 16, "bf16", "routed experts in groups of 32 with one 8-bit exponent")
FP32 = Storage("fp32", 32, 32, 32, 32, "fp32")
_INT4, _INT8 = Packing(format="int4", group_size=GROUP_SIZE).bits, Packing(format="int8").bits
PACKED_INT4 = Storage(
    "manyhands-int4", _INT4, _INT8, 16, 16, "int8", "what `quantize` writes by default", (("head", _INT8),)
)
PACKED_INT8 = Storage("manyhands-int8", _INT8, _INT8, 16, 16, "int8", "`quantize --experts int8`", (("head", _INT8),))
STORAGES = {storage.name: storage for storage in (BF16, INT8, INT4, FP8, MXFP4, FP32, PACKED_INT4, PACKED_INT8)}


def tensor_class(component: str) -> TensorClass:
    """Which of the four classes a component of the count belongs to."""
    return _CLASS_OF.get(component, "linear")


def weight_bytes(counts: Counts, storage: Storage) -> float:
    """Σ over components of parameters · bits / 8."""
    return sum(count * storage.bits(name) for name, count in counts.by_component.items()) / 8


def storage_named(name: str, native: Storage | None) -> Storage:
    """One of `STORAGES`, of `formats.NAMED`, or `native`; capitals do not matter. Raises `ConfigError`."""
    from manyhands.plan.formats import NAMED, SPELLINGS

    wanted = name.casefold().strip()
    wanted = SPELLINGS.get(wanted, wanted)
    if wanted == "native":
        if native is None:
            raise ConfigError(
                "the format of the published weights is not known here: give --format bf16, int8, int4, …"
            )
        return native
    known = STORAGES | NAMED
    if wanted not in known:
        raise ConfigError(f"unknown format {name!r}; " + suggest(wanted, [*known, "native"]))
    return known[wanted]


def with_bits(storage: Storage, text: str) -> Storage:
    """`storage` with some classes changed: `routed=2.5,linear=8.5`. Raises `ConfigError`."""
    changes: dict[str, float] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or name not in CLASSES:
            raise ConfigError(f"--bits {text!r}: expected CLASS=BITS,… with CLASS one of {', '.join(CLASSES)}")
        try:
            changes[name] = float(value)
        except ValueError:
            raise ConfigError(f"--bits {text!r}: {value!r} is not a number") from None
        if not 0.5 <= changes[name] <= 64:
            raise ConfigError(f"--bits {text!r}: {name} = {value} must lie between 0.5 and 64")
    return replace(storage, name="custom", note="as given with --bits", parts=(), **changes)  # type: ignore[arg-type]
