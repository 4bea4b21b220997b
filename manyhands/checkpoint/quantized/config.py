"""`quantization_config` of a `config.json`: what changes the values of weights is understood or refused.

Fields and defaults are those of transformers 5.23 (`FineGrainedFP8Config`, `Mxfp4Config`) and compressed-tensors
(`QuantizationConfig`, `QuantizationScheme`, `QuantizationArgs`). A field of type `Any` does not change them: lists of
modules (a stored companion says better what is quantised), activations, caches, how the file came about.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import Field, model_validator

from manyhands.config import Strict, parse
from manyhands.errors import CheckpointError, ConfigError

C = TypeVar("C", bound=Strict)
_LARGEST = 2**63 - 1  # a dimension of a tensor
_Size = Annotated[int, Field(gt=0, le=_LARGEST, strict=True)]
_Empty = Annotated[dict[str, Any], Field(max_length=0)] | None


class Fp8(Strict):
    """Float8 weights, one scale per block [rows, columns], or per tensor where `weight_block_size` is null."""

    quant_method: Literal["fp8"]
    fmt: Literal["e4m3", "e4m3fn", "float8_e4m3fn", "e5m2", "float8_e5m2"] | None = None
    weight_block_size: tuple[_Size, _Size] | None = (128, 128)
    scale_fmt: Literal["float", "ue8m0"] | None = None
    expert_dtype: Literal["fp8"] = "fp8"
    activation_scheme: Literal["dynamic", "static"] | None = None
    modules_to_not_convert: Any = None
    modules_to_convert: Any = None
    ignored_layers: Any = None
    dequantize: Any = None

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes of weights, by their names in `checkpoint/tensors.py`."""
        if self.fmt is None:
            return ("F8_E4M3", "F8_E5M2")
        return ("F8_E5M2",) if "e5m2" in self.fmt else ("F8_E4M3",)


class Mxfp4(Strict):
    """FP4 (e2m1) in groups of 32 with a power of two each."""

    quant_method: Literal["mxfp4"]
    modules_to_not_convert: Any = None
    dequantize: Any = None


class IntWeights(Strict):
    """`weights` of a group of compressed-tensors: integers, one scale per `group_size` columns or per row (-1)."""

    num_bits: Literal[4, 8] = 8
    type: Literal["int"] = "int"
    symmetric: Annotated[bool, Field(strict=True)] = True
    strategy: Literal["group", "channel"] | None = None
    group_size: Annotated[int, Field(ge=-1, le=_LARGEST, strict=True)] | None = None
    dynamic: Literal[False] = False
    actorder: Literal["weight", "static", False] | None = None  # "group" permutes the columns
    block_structure: None = None
    observer: Any = None
    observer_kwargs: Any = None
    scale_dtype: Any = None
    zp_dtype: Any = None

    @model_validator(mode="after")
    def _one_granularity(self) -> Self:
        size = self.group_size
        if size == 0 or (size is None and self.strategy != "channel"):
            raise ValueError(f"group_size = {size}: expected a positive size, or -1 with strategy 'channel'")
        if (self.strategy == "group" and size == -1) or (self.strategy == "channel" and (size or -1) > 0):
            raise ValueError(f"group_size = {size} contradicts strategy = {self.strategy!r}")
        return self

    @property
    def columns(self) -> int | None:
        """Columns that share a scale; None: the whole row."""
        return self.group_size if self.group_size and self.group_size > 0 else None


class _Group(Strict):
    targets: Any = None
    weights: IntWeights | None = None
    input_activations: Any = None
    output_activations: Any = None
    format: Literal["pack-quantized"] | None = None


class _CompressedTensors(Strict):
    quant_method: Literal["compressed-tensors"]
    format: Literal["pack-quantized"]
    config_groups: Annotated[dict[str, Any], Field(min_length=1)]
    sparsity_config: _Empty = None
    transform_config: _Empty = None
    ignore: Any = None
    kv_cache_scheme: Any = None
    quantization_status: Any = None
    global_compression_ratio: Any = None
    version: Any = None
    run_compressed: Any = None
    dequantize: Any = None
    use_optimized_inference: Any = None


def read_quantization(values: Mapping[str, Any], where: str) -> Fp8 | Mxfp4 | IntWeights:
    """Which format the weights have. `where` is the path of `config.json`.

    Raises `CheckpointError` naming the field, for a method that is not known or a field that is not supported.
    """
    place = f"{where}: quantization_config"
    if not isinstance(values, Mapping):
        raise CheckpointError(f"{place}: expected an object, found {type(values).__name__}")
    method = values.get("quant_method")
    if method == "fp8":
        return _read(Fp8, values, place)
    if method == "mxfp4":
        return _read(Mxfp4, values, place)
    if method == "compressed-tensors":
        return _int_weights(_read(_CompressedTensors, values, place), place)
    if method is None and not values.get("load_in_4bit") and not values.get("load_in_8bit"):
        raise CheckpointError(f"{place}.quant_method: this field is required; known: fp8, compressed-tensors, mxfp4")
    name = repr(method)[:60] if isinstance(method, str | None) else type(method).__name__
    raise CheckpointError(
        f"{place}.quant_method = {name} cannot be read (known: fp8, compressed-tensors, mxfp4); "
        "use an unquantised checkpoint of this model"
    )


def _int_weights(config: _CompressedTensors, place: str) -> IntWeights:
    """The one scheme of all groups: which group a tensor belongs to depends on classes of transformers' modules."""
    first: IntWeights | None = None
    for name, values in config.config_groups.items():
        field = f"{place}.config_groups.{name[:60]!r}"
        if not isinstance(values, Mapping):
            raise CheckpointError(f"{field}: expected an object, found {type(values).__name__}")
        weights = _read(_Group, values, field).weights
        first = first or weights
        if weights is not None and first is not None and _scheme(weights) != _scheme(first):
            raise CheckpointError(f"{field}.weights: not those of another group; one scheme per model is supported")
    if first is None:
        raise CheckpointError(f"{place}.config_groups: no group has weights")
    return first


def _scheme(weights: IntWeights) -> tuple[object, ...]:
    return weights.num_bits, weights.symmetric, weights.columns


def _read(cls: type[C], values: Mapping[str, Any], place: str) -> C:
    try:
        return parse(cls, values, place)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
