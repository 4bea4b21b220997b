"""Which layers are sparse and which see a window, from the many ways in which `config.json` files say it.

L layers, numbered from 0.
"""

from collections.abc import Callable, Mapping
from typing import Any

from manyhands.errors import ConfigError

Fields = Mapping[str, Any]
_SPARSE_WORDS = {"sparse": True, "moe": True, "dense": False, "mlp": False}
_WINDOW_WORDS = {
    "sliding_attention": True,
    "local_attention": True,
    "chunked_attention": True,
    "full_attention": False,
    "global_attention": False,
}
STARTS = ("first_k_dense_replace", "moe_layer_start_index", "num_dense_layers", "first_k_dense", "n_dense_layers")
STEPS = ("decoder_sparse_step", "interleave_moe_layer_step", "moe_layer_interval", "expert_interval")
SPARSE_LISTS = ("mlp_layer_types", "moe_layers", "moe_layers_enum", "mlp_only_layers", "dense_layers")
WINDOW_FIELDS = ("layer_types", "hybrid_layer_pattern", "sliding_window_pattern", "max_window_layers")


def sparse_layers(fields: Fields, layers: int, use: Callable[[str], None]) -> list[int]:
    """Numbers of the sparse layers; every field that said so is given to `use`. Raises `ConfigError`."""
    chosen = set(range(layers))
    for name in STARTS:
        if (start := _whole(fields, name, use)) is not None:
            chosen -= set(range(start))
    if (end := _whole(fields, "moe_layer_end_index", use)) is not None and end >= 0:
        chosen &= set(range(end + 1))
    for name in STEPS:
        if (step := _whole(fields, name, use)) is not None:
            chosen &= {i for i in chosen if step and (i + 1) % step == 0}
    if isinstance(freq := fields.get("moe_layer_freq"), list):
        chosen &= _flagged("moe_layer_freq", freq, layers, use)
    elif (every := _whole(fields, "moe_layer_freq", use)) is not None:
        chosen &= {i for i in chosen if every and i % every == 0}
    if fields.get("mlp_layer_types"):
        chosen &= _flagged("mlp_layer_types", fields["mlp_layer_types"], layers, use, _SPARSE_WORDS)
    for name in ("moe_layers", "moe_layers_enum"):
        if fields.get(name) is not None:
            chosen &= set(_numbers(name, fields[name], layers, use))
    for name in ("mlp_only_layers", "dense_layers"):
        if fields.get(name):
            chosen -= set(_numbers(name, fields[name], layers, use))
    return sorted(chosen)


def windowed_layers(fields: Fields, layers: int, use: Callable[[str], None]) -> list[bool]:
    """Whether each layer sees a window only. Raises `ConfigError` for a pattern that is not understood."""
    if fields.get("layer_types"):
        found = _flagged("layer_types", fields["layer_types"], layers, use, _WINDOW_WORDS)
    elif isinstance(fields.get("hybrid_layer_pattern"), list):
        found = _flagged("hybrid_layer_pattern", fields["hybrid_layer_pattern"], layers, use)
    elif isinstance(pattern := fields.get("sliding_window_pattern"), str):
        use("sliding_window_pattern")
        if not pattern or set(pattern) - set("LG"):
            raise _wrong("sliding_window_pattern", pattern)
        found = {i for i in range(layers) if pattern[i % len(pattern)] == "L"}
    elif (period := _whole(fields, "sliding_window_pattern", use)) is not None and period > 0:
        found = {i for i in range(layers) if (i + 1) % period}
    elif fields.get("use_sliding_window") is True and (first := _whole(fields, "max_window_layers", use)) is not None:
        use("use_sliding_window")
        found = {i for i in range(layers) if i >= first}
    elif fields.get("attention_chunk_size") and fields.get("sliding_window") is None:
        if "no_rope_layers" in fields:
            use("no_rope_layers")
        rotated = fields.get("no_rope_layers") or [int((i + 1) % 4 > 0) for i in range(layers)]  # Llama 4's default
        found = _flagged("no_rope_layers", rotated, layers, lambda _: None)
    else:
        found = set(range(layers))
    return [i in found for i in range(layers)]


def chunked(values: Fields) -> bool:
    """Whether the windows are chunks, each attended alone (Llama 4); `values` may be a file with `text_config`."""
    nested = values.get("text_config")
    fields = nested if isinstance(nested, Mapping) else values
    types = fields.get("layer_types")
    if isinstance(types, list) and types:
        return "chunked_attention" in types
    return bool(fields.get("attention_chunk_size")) and fields.get("sliding_window") is None


def _flagged(
    name: str, values: Any, layers: int, use: Callable[[str], None], words: Mapping[str, bool] | None = None
) -> set[int]:
    """Layers whose entry is 1, or a word that means yes."""
    use(name)
    known: Mapping[Any, bool] = words if words is not None else {0: False, 1: True}
    if not isinstance(values, list) or len(values) != layers:
        raise _wrong(name, values, f"one entry for each of {layers} layers")
    for value in values:
        if not isinstance(value, str | int) or value not in known:
            raise _wrong(name, value, f"{', '.join(map(str, known))}; the planner's formulas cover nothing else")
    return {i for i, value in enumerate(values) if known[value]}


def _numbers(name: str, values: Any, layers: int, use: Callable[[str], None]) -> list[int]:
    use(name)
    if isinstance(values, str):
        values = [int(part) if part.strip().isdecimal() else part for part in values.split(",")]
    if not isinstance(values, list) or not all(isinstance(n, int) and 0 <= n < layers for n in values):
        raise _wrong(name, values, f"numbers of layers below {layers}")
    return values


def _whole(fields: Fields, name: str, use: Callable[[str], None]) -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    use(name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise _wrong(name, value, "a whole number")
    return value


def _wrong(name: str, value: Any, expected: str = "") -> ConfigError:
    return ConfigError(f"{name} = {repr(value)[:60]}: expected {expected or 'a pattern of L and G'}")
