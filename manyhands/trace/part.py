"""What a trace is made of: its description, and its parts as arrays that have been checked.

T tokens   L sparse layers   K experts per token   E experts
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from manyhands.config import Strict
from manyhands.errors import DataError

DESCRIPTION = "trace.json"
MOST_PART_BYTES = 64 << 20
"""Of the arrays of a part."""

Array = npt.NDArray[Any]
OPTIONAL = ("weights", "kept", "residency", "logits")
"""Arrays that a trace may have besides those that each has."""
TOKEN_ARRAYS = {"token_ids": "int32", "sequence": "int32", "position": "int32", "phase": "uint8", "step": "int32"}
"""What each trace has per token, [T], and as what."""
_Count = Annotated[int, Field(ge=1, le=1 << 20)]
_Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def part_name(number: int) -> str:
    """Of a part's file."""
    return f"part-{number:05d}.safetensors"


class Phase(IntEnum):
    """What a token was run for."""

    PREFILL = 0
    DECODE = 1
    TRAINING = 2
    SCORING = 3


class Manifest(Strict):
    """What a trace is of: `trace.json`, there before the first part is."""

    format: Literal["manyhands trace"] = "manyhands trace"
    version: Literal[1] = 1
    source: Annotated[str, Field(max_length=1000)] = ""
    """Who recorded it, or from what it was imported. For people."""
    model: _Hash | None = None
    """Fingerprint of the model's files (`trace.fingerprint`), where there were any."""
    tokenizer_sha256: _Hash | None = None
    """Of `tokenizer.json`: whose numbers `token_ids` are."""
    layers: Annotated[tuple[Annotated[int, Field(ge=0, lt=1 << 20)], ...], Field(min_length=1, max_length=4096)]
    """The L numbers of the model's sparse layers, ascending: what the second dimension of the arrays stands for."""
    num_experts: Annotated[int, Field(ge=1, lt=1 << 16)]
    num_experts_per_tok: _Count
    """K, the largest of all layers; a layer with fewer has none in the last places."""
    record_bytes: tuple[Annotated[int, Field(ge=1, lt=1 << 48)], ...] | None = None
    """What one expert of each of the L layers takes where the model was run."""
    dense_bytes: Annotated[int, Field(ge=0, lt=1 << 56)] | None = None
    """What all weights that each token reads take besides: attention, shared experts, head."""
    recorded: tuple[Literal["weights", "kept", "residency", "logits"], ...] = ()
    """The optional arrays that each part has."""
    every: _Count = 1
    """In training: each so many steps one was recorded."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if list(self.layers) != sorted(set(self.layers)):
            raise ValueError("layers are not ascending numbers")
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(f"{self.num_experts_per_tok} experts per token of {self.num_experts}")
        if self.record_bytes is not None and len(self.record_bytes) != len(self.layers):
            raise ValueError(f"{len(self.record_bytes)} record_bytes for {len(self.layers)} layers")
        if len(set(self.recorded)) < len(self.recorded):
            raise ValueError("recorded names an array twice")
        return self

    @property
    def id_dtype(self) -> np.dtype[Any]:
        """Of `expert_ids`: uint8 for fewer than 256 experts, else uint16."""
        return np.dtype(np.uint8 if self.num_experts < 256 else np.uint16)

    @property
    def none(self) -> int:
        """The number in `expert_ids` that stands for no expert: the largest of its dtype."""
        return int(np.iinfo(self.id_dtype).max)

    def shapes(self, T: int) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Dtype and shape of each array of a part of T tokens."""
        L, K = len(self.layers), self.num_experts_per_tok
        found: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
            name: (np.dtype(kind), (T,)) for name, kind in TOKEN_ARRAYS.items()
        }
        found["expert_ids"] = (self.id_dtype, (T, L, K))
        optional: dict[str, tuple[str, tuple[int, ...]]] = {
            "weights": ("float16", (T, L, K)),
            "kept": ("uint8", (T, L, K)),
            "residency": ("uint8", (T, L, K)),
            "logits": ("float16", (T, L, self.num_experts)),
        }
        return found | {name: (np.dtype(optional[name][0]), optional[name][1]) for name in self.recorded}

    def token_bytes(self) -> int:
        """What a token takes in a part."""
        return sum(dtype.itemsize * int(np.prod(shape)) for dtype, shape in self.shapes(1).values())


@dataclass(frozen=True, slots=True)
class Part:
    """Some successive tokens of a trace, in the order in which they ran."""

    expert_ids: Array
    """[T, L, K] uint8 or uint16, best first; `Manifest.none` for no expert."""
    token_ids: Array
    """[T] int32; -1 where nobody said."""
    sequence: Array
    """[T] int32: which text a token is of."""
    position: Array
    """[T] int32: its place in that text."""
    phase: Array
    """[T] uint8, `Phase`."""
    step: Array
    """[T] int32, never falling: tokens of equal step shared a forward pass."""
    weights: Array | None = None
    """[T, L, K] float16: what each expert's output was multiplied by."""
    kept: Array | None = None
    """[T, L, K] uint8: 0 where an expert's capacity left the pair out."""
    residency: Array | None = None
    """[T, L, K] uint8: where the expert's weights were found, as the engine that recorded it numbers that."""
    logits: Array | None = None
    """[T, L, E] float16, of the router."""

    def __len__(self) -> int:
        return len(self.step)

    def rows(self, tokens: slice | Array) -> "Part":
        """Some of the tokens: views for a slice, a copy for indices or a mask."""
        return Part(**{name: array[tokens] for name, array in self.arrays().items()})

    def arrays(self) -> dict[str, Array]:
        """Those it has, by name."""
        found = {name: getattr(self, name) for name in NAMES}
        return {name: array for name, array in found.items() if array is not None}


NAMES = ("expert_ids", *TOKEN_ARRAYS, *OPTIONAL)


def cat(parts: list[Part]) -> Part:
    """The tokens of several parts of one trace, one after the other."""
    if len(parts) == 1:
        return parts[0]
    each = [part.arrays() for part in parts]
    return Part(**{name: np.concatenate([arrays[name] for arrays in each]) for name in each[0]})


def check_part(arrays: dict[str, Array], manifest: Manifest, where: str) -> Part:
    """The arrays as a part. Raises `DataError` that `where` begins if they are not what the manifest says."""
    T = len(arrays["step"]) if "step" in arrays and arrays["step"].ndim == 1 else 0
    wanted = manifest.shapes(T)
    if arrays.keys() != wanted.keys():
        name = min(arrays.keys() ^ wanted.keys())
        raise DataError(f"{where}: array {name!r} is {'missing' if name in wanted else 'not one of a trace’s'}")
    for name, (dtype, shape) in wanted.items():
        found = arrays[name]
        if found.dtype != dtype or found.shape != shape:
            raise DataError(f"{where}: {name} is {found.dtype} {list(found.shape)}, expected {dtype} {list(shape)}")
    if T == 0:
        return Part(**arrays)

    def check(wrong: Array, name: str, what: str) -> None:
        if wrong.any():
            at = np.unravel_index(int(wrong.argmax()), wrong.shape)
            raise DataError(f"{where}: {name}{[int(i) for i in at]} is {arrays[name][at]}: {what}")

    ids, none = arrays["expert_ids"], manifest.none
    check((ids >= manifest.num_experts) & (ids != none), "expert_ids", f"there are {manifest.num_experts} experts")
    check(arrays["phase"] > max(Phase), "phase", f"at most {max(Phase):d}")
    for name in ("sequence", "position", "step"):
        check(arrays[name] < 0, name, "must not be negative")
    check(arrays["token_ids"] < -1, "token_ids", "a token's number, or -1")
    if (np.diff(arrays["step"]) < 0).any():
        raise DataError(f"{where}: step falls from one token to the next")
    for name in ("weights", "logits"):
        if name in arrays:
            check(~np.isfinite(arrays[name]), name, "must be a finite number")
    if "kept" in arrays:
        check(arrays["kept"] > 1, "kept", "0 or 1")
    return Part(**arrays)
