"""What is planned: a system of the catalogue, a `config.json`, a checkpoint or run directory, a run file, a preset."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manyhands.config import (
    AnyModelConfig,
    EncoderDecoderConfig,
    ModelConfig,
    PackedConfig,
    parse,
    read_model_config,
)
from manyhands.errors import ConfigError
from manyhands.files import CONFIG, RUN
from manyhands.plan.count import Counts, count_model
from manyhands.plan.own_files import storage_of_files, storage_of_sizes
from manyhands.plan.sizes import Sizes, sizes_of
from manyhands.plan.storage import Storage
from manyhands.plan.stored_dtype import native_storage
from manyhands.strict_json import read_object

if TYPE_CHECKING:
    from manyhands.catalog import Entry, Figure

_LIMIT = 1 << 20


@dataclass(frozen=True, slots=True)
class Subject:
    """One model, read and checked."""

    name: str
    origin: str
    """What was read, for people."""
    counts: Counts
    config: ModelConfig | None = None
    sizes: Sizes | None = None
    """None where only parameters are known; then there is no attention, no cache and no speed."""
    native: Storage | None = None
    """How its published or saved weights are held; None: not known."""
    file_bytes: int | None = None
    """Of the safetensors files in its directory, if it is one."""
    pairs: EncoderDecoderConfig | None = None
    """An encoder-decoder, whose FLOPs are those of a pair of sequences."""
    prices: "tuple[Figure, ...]" = ()
    """What is charged for it, where the catalogue has it."""
    notes: tuple[str, ...] = field(default=())
    catalogue: str | None = None
    """Its id in the catalogue, if it is an unchanged system of it."""


def read_subject(model: str, overrides: Sequence[str] = (), *, include_rumours: bool = False) -> Subject:
    """Find out what `model` names, and read it. Raises `ConfigError` for an unknown name and for a wrong field."""
    from manyhands.catalog import load, names

    path = Path(model)
    if path.is_dir():
        return _directory(path, overrides)
    if model.endswith(".gguf"):
        return _gguf(path, overrides)
    if path.suffix == ".json" or (path.is_file() and path.suffix not in (".yaml", ".yml")):
        _no_overrides(model, overrides)
        return _config_file(path, path.parent.name if path.name == CONFIG and path.parent.name else path.stem)
    if path.suffix not in (".yaml", ".yml") and model.lower() in names():
        entry = load(model)
        return _changed(entry, overrides) if overrides else of_catalogue(entry, include_rumours=include_rumours)

    from manyhands.config.load import described_model, load_preset, load_run, preset_names  # YAML costs 15 ms

    if path.suffix in (".yaml", ".yml"):
        return _any_kind(described_model(load_run(path, overrides), model), path.stem, f"run file {path}")
    if model in preset_names():
        return _any_kind(load_preset(model, overrides).model, model, f"preset {model}")
    near = difflib.get_close_matches(model.lower(), [*names(), *preset_names()], n=3, cutoff=0.5)
    hint = f"the nearest names: {', '.join(near)}" if near else "`manyhands models` lists the catalogue"
    raise ConfigError(f"{model!r} is no file, no directory, no preset and not in the catalogue; {hint}")


def _directory(path: Path, overrides: Sequence[str]) -> Subject:
    from manyhands.config.load import load_run

    name = path.resolve().name
    if (path / CONFIG).is_file():
        _no_overrides(str(path), overrides)
        return _config_file(path / CONFIG, name)
    if (path / RUN).is_file():
        return _any_kind(load_run(path / RUN, overrides).model, name, f"run {path}")
    from manyhands.families.gguf import gguf_in

    if (file := gguf_in(path)) is not None:
        return _gguf(file, overrides)
    raise ConfigError(f"{path}: neither a checkpoint (no config.json) nor a run (no run.yaml)")


def _ours(config: ModelConfig, name: str, origin: str) -> Subject:
    storage, _ = native_storage({"dtype": "float32"})
    return Subject(name, origin, count_model(config), config, sizes_of(config), storage)


def _any_kind(config: AnyModelConfig, name: str, origin: str) -> Subject:
    from manyhands.plan.count_kind import count_any
    from manyhands.plan.shape_sizes import left_out

    if isinstance(config, ModelConfig):
        return _ours(config, name, origin)
    pairs = config if isinstance(config, EncoderDecoderConfig) else None
    return Subject(name, origin, count_any(config), pairs=pairs, notes=left_out(config))


def _config_file(path: Path, name: str) -> Subject:
    from manyhands.families import FAMILIES, read_config
    from manyhands.plan.guess import guess_config
    from manyhands.plan.guess_layers import chunked

    values = read_json(path)
    notes: list[str] = []
    model_type = values.get("model_type")
    if model_type is not None and not isinstance(model_type, str):
        raise ConfigError(f"{path}: model_type = {repr(model_type)[:60]}: expected a name")
    if model_type is None and "kind" in values:
        return _any_kind(read_model_config(values, str(path)), name, str(path))
    if model_type in FAMILIES:
        family, config = read_config(values, str(path))
        origin = f"{path} ({family.published})"
        fields = values | (values.get(family.text_field) or {}) if family.text_field else values
    else:
        config, notes = guess_config(values, str(path))
        nested = values.get("text_config") or values.get("language_config")
        origin = str(path)
        outer = {name: value for name, value in values.items() if value is not None}
        fields = nested | outer if isinstance(nested, dict) else values
    if not isinstance(config, ModelConfig):
        found = _any_kind(config, name, str(path))
        stored = storage_of_files(path.parent, found.counts, packed=False) if model_type == "manyhands" else None
        return replace(found, native=stored or found.native, file_bytes=_file_bytes(path))
    counts, sizes = count_model(config), sizes_of(config)
    storage, note = native_storage(fields if model_type != "manyhands" else {"dtype": "float32"})
    if model_type == "manyhands":
        packed = values.get("packed") is not None
        storage = storage_of_files(path.parent, counts, packed) or (_packed(values, path) if packed else storage)
    return Subject(
        name=name,
        origin=origin,
        counts=counts,
        config=config,
        sizes=sizes if sizes.chunked else replace(sizes, chunked=chunked(values)),
        native=storage,
        file_bytes=_file_bytes(path),
        notes=(*notes, *([note] if note else [])),
    )


def _file_bytes(path: Path) -> int | None:
    """Of the weights beside this `config.json`."""
    return sum(file.stat().st_size for file in path.parent.glob("*.safetensors")) or None


def _gguf(path: Path, overrides: Sequence[str]) -> Subject:
    from manyhands.plan.gguf_file import read_gguf

    _no_overrides(str(path), overrides)
    found = read_gguf(path)
    counts = count_model(found.config)
    return Subject(
        name=path.stem,
        origin=f"{path} ({found.published})",
        counts=counts,
        config=found.config,
        sizes=sizes_of(found.config),
        native=storage_of_sizes(found.sizes, counts, packed=False),
        file_bytes=found.file_bytes,
    )


def _packed(values: dict[str, Any], path: Path) -> Storage:
    """Of a packed model whose files are not there: what its description says, without padding."""
    packed = parse(PackedConfig, values["packed"], f"{path}: packed")
    bits = [16.0 if p is None else p.bits for p in (packed.experts, packed.linear)]
    note = f"experts {packed.experts or '16 bits'}, linear layers {packed.linear or '16 bits'}, without padding"
    return Storage("packed", bits[0], bits[1], 16, 16, "int8", note, (("head", bits[1]),))


def read_json(path: Path) -> dict[str, Any]:
    """An object from a file that may be anything. Raises `ConfigError` with one line."""
    try:
        if path.stat().st_size > _LIMIT:
            raise ConfigError(f"{path}: {path.stat().st_size:,} bytes is too long for a config.json")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    return read_object(path, _LIMIT, ConfigError)


def of_catalogue(entry: "Entry", *, include_rumours: bool = False) -> Subject:
    """One system of the catalogue. Raises `ConfigError` where its architecture is not public."""
    if (config := entry.config) is not None:
        origin = f"catalogue entry {entry.id}"
        sizes, notes = _released_for(sizes_of(config), entry)
        return Subject(
            name=entry.name,
            origin=origin,
            counts=count_model(config),
            config=config,
            sizes=sizes,
            native=_stored(entry),
            prices=entry.prices,
            notes=notes,
            catalogue=entry.id,
        )
    if entry.shape is not None:
        from manyhands.plan.count_shape import count_shape
        from manyhands.plan.shape_sizes import left_out, shape_sizes

        shape = shape_sizes(entry.shape)
        return Subject(
            name=entry.name,
            origin=f"catalogue entry {entry.id}",
            counts=count_shape(entry.shape),
            sizes=_released_for(shape, entry)[0] if shape is not None else None,
            native=_stored(entry),
            pairs=entry.shape if isinstance(entry.shape, EncoderDecoderConfig) else None,
            prices=entry.prices,
            notes=left_out(entry.shape),
            catalogue=entry.id,
        )
    return _undisclosed(entry, include_rumours)


def _changed(entry: "Entry", changes: Sequence[str]) -> Subject:
    """A system of the catalogue with some fields changed: no longer the published one, so without its price."""
    from manyhands.plan.changed import changed

    if not isinstance(entry.config, ModelConfig):
        raise ConfigError(f"{entry.id}: {changes[0]!r}: only a decoder whose fields are all known can be changed")
    config = changed(entry.config, changes, entry.id)
    sizes = sizes_of(config)
    if sizes.positions == sizes_of(entry.config).positions:
        sizes, _ = _released_for(sizes, entry)
    said = ", ".join(changes)
    return Subject(
        f"{entry.name}, changed",
        f"catalogue entry {entry.id} with {said}",
        count_model(config),
        config,
        sizes,
        _stored(entry),
    )


def _released_for(sizes: Sizes, entry: "Entry") -> tuple[Sizes, tuple[str, ...]]:
    """With the context it was released for, which `manyhands models` shows too; a note where its file has another."""
    if entry.context is None or entry.context == sizes.positions:
        return sizes, ()
    note = (
        f"released for {entry.context:,} positions; its configuration has {sizes.positions:,}"
        if sizes.positions
        else ""
    )
    return replace(sizes, positions=entry.context), (note,) if note else ()


def _stored(entry: "Entry") -> Storage | None:
    held = entry.storage
    if held is None:
        return None
    name = held.format.split()[0].lower()
    return Storage(
        name, held.routed, held.linear, held.rest, held.rest, "fp8" if name == "fp8" else "bf16", held.format
    )


def _undisclosed(entry: "Entry", include_rumours: bool) -> Subject:
    said = {what: figure for what in ("total", "active") if (figure := entry.figure(what)) is not None}
    rumours = {what: figure for what, figure in said.items() if figure.kind == "rumour" and figure.value}
    if entry.based_on:
        hint = f"; it is said to be made from {entry.based_on}: plan that"
    elif "total" in rumours:
        hint = f"; a rumour says {rumours['total'].printed}: --include-rumours computes with it"
    else:
        hint = ""
    if "total" not in rumours or not include_rumours:
        if entry.prices:
            hint += f"; its price: {_charged(entry.prices)}"
        raise ConfigError(
            f"{entry.id}: the architecture of {entry.name} is not public, so there is nothing to compute{hint}"
        )
    total = int(rumours["total"].value or 0)
    active = int(rumours["active"].value or 0) if "active" in rumours else total
    idle = {"routed experts": total - active}
    counts = Counts(total, active, active, active, 0, {"routed experts": total}, idle)
    sources = "; ".join(f"{what} {figure.printed}: {figure.source}" for what, figure in rumours.items())
    return Subject(entry.name, f"catalogue entry {entry.id}", counts, notes=(f"RUMOUR, never confirmed: {sources}",))


def _charged(prices: "Sequence[Figure]") -> str:
    """`0.50 USD/million tokens in, 2.50 out (reported)`."""
    ways = [f"{price.printed} {price.unit} {_WAY[price.what]}" for price in prices]
    return f"{', '.join(ways)} ({prices[0].kind}; `manyhands models` has the source)"


_WAY = {"price_input": "in", "price_output": "out", "price_blended": "three in to one out"}


def _no_overrides(model: str, overrides: Sequence[str]) -> None:
    if overrides:
        raise ConfigError(f"{model}: {overrides[0]!r} changes run files and presets only")
