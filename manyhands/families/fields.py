"""A `config.json` being read. Every field is taken, known to be harmless, or refused by name: never ignored."""

from collections.abc import Collection, Mapping
from typing import Any

from manyhands.config import ModelConfig, RopeConfig, parse, suggest
from manyhands.config.base import short_repr
from manyhands.errors import ConfigError
from manyhands.families.harmless import is_harmless

MISSING: Any = object()


class UnknownField(ConfigError):
    """A field that no reader knows. `name` is what `ignore_fields` takes: `rope_scaling.boost` for one inside."""

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        self.name = name


class Fields:
    """`config.json`'s fields, taken one by one; `close` refuses what nobody took and nobody said to ignore.

    Every method raises `ConfigError` naming the field, its value and what would be right.
    """

    def __init__(self, values: Mapping[str, Any], where: str, ignored: Collection[str] = (), inside: str = "") -> None:
        self.values, self.where = dict(values), where
        self._taken: set[str] = set()
        self.ignored, self._inside = ignored, inside
        """Unknown fields to be read past, by their whole names, and what ours begin with (`rope_scaling.`)."""

    def take(self, name: str, default: Any = MISSING) -> Any:
        """The field as it stands; null counts as absent where there is a default."""
        self._taken.add(name)
        value = self.values.get(name)
        if value is None:
            if default is MISSING:
                raise ConfigError(f"{self.where}: {name!r} is missing")
            return default
        return value

    def absent(self, **defaults: Any) -> None:
        """What the family's reference takes a field to be that is not there (null is there)."""
        self.values = {**defaults, **self.values}

    def integer(self, name: str, default: Any = MISSING) -> Any:
        """A whole number."""
        value = self.take(name, default)
        if value is not default and (isinstance(value, bool) or not isinstance(value, int) or abs(value) > 1 << 40):
            raise self.wrong(name, "expected a whole number")
        return value

    def number(self, name: str, default: Any = MISSING) -> Any:
        """A finite number."""
        value = self.take(name, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
            raise self.wrong(name, "expected a finite number")
        return float(value)

    def numbers(self, name: str) -> list[float]:
        """A list of finite numbers."""
        value = self.take(name)
        if not isinstance(value, list) or len(value) > 4096:
            raise self.wrong(name, "expected a list of numbers")
        return [Fields({name: entry}, self.where).number(name) for entry in value]

    def flag(self, name: str, default: Any = MISSING) -> Any:
        """true or false."""
        value = self.take(name, default)
        if value is not default and not isinstance(value, bool):
            raise self.wrong(name, "expected true or false")
        return value

    def section(self, name: str) -> "Fields | None":
        """An object of fields, or None."""
        value = self.take(name, None)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(name, "expected an object")
        return Fields(value, f"{self.where}: {name}", self.ignored, f"{self._inside}{name}.")

    def only(self, name: str, *allowed: Any) -> Any:
        """A field that may be absent or have one of these values: another would be another model."""
        value = self.take(name, allowed[0])
        if not any(value == a and isinstance(value, bool) == isinstance(a, bool) for a in allowed):
            raise self.wrong(name, f"this family is supported with {' or '.join(map(repr, allowed))}")
        return value

    def layers(self, name: str, count: int) -> list[Any] | None:
        """A list with one entry per layer, or None."""
        value = self.take(name, None)
        if value is not None and (not isinstance(value, list) or len(value) != count):
            raise self.wrong(name, f"expected a list of {count} entries, one per layer")
        return value

    def activation(self, name: str = "hidden_act") -> None:
        """SwiGLU, as nearly everybody writes it."""
        self.only(name, "silu", "swish", "swiglu")

    def rope(
        self, default_theta: float = 10_000.0, *, partial: bool = False, longrope: bool = False, **fixed: Any
    ) -> RopeConfig:
        """The rotation, from transformers 5's `rope_parameters` or the older `rope_theta` and `rope_scaling`.

        `partial`: the family's reference can rotate a part of each head; elsewhere asking for that is refused.
        `longrope`: it turns as usual or by LongRoPE with its own magnitudes, and in no other way.
        """
        given = [name for name in ("rope_parameters", "rope_scaling") if self.section(name) and self.values[name]]
        if len(given) == 2 and self.values["rope_parameters"] != self.values["rope_scaling"]:
            raise self.wrong("rope_scaling", "rope_parameters is given too, and says something else")
        scaling = self.section(given[0]) if given else None
        theta = self.number("rope_theta", None)
        share, said = self.number("partial_rotary_factor", None), self
        values: dict[str, Any] = {}
        if scaling is not None:
            rope_type = scaling.take("rope_type", None) or scaling.take("type", "default")
            scaling._taken |= {"rope_type", "type"}
            known = ("default", "longrope") if longrope else ("default", "linear", "yarn", "llama3")
            if rope_type not in known:
                raise scaling.wrong("rope_type", f"supported: {', '.join(map(repr, known))}", rope_type)
            values["rope_type"] = rope_type
            own_theta, own_partial = scaling.number("rope_theta", None), scaling.number("partial_rotary_factor", None)
            theta = own_theta if own_theta is not None else theta
            share, said = (share, said) if own_partial is None else (own_partial, scaling)
            values |= _scaling(scaling, rope_type, self.integer("max_position_embeddings"))
        values["rope_theta"] = default_theta if theta is None else theta
        if share not in (None, 1.0) and not partial:
            raise said.wrong("partial_rotary_factor", "this family rotates the whole head")
        if share is not None:
            values["partial_rotary_factor"] = share
        return parse(RopeConfig, values | fixed, f"{self.where}: rope")

    def ignore(self, *names: str) -> None:
        """Fields that are known to change nothing in this family."""
        self._taken |= set(names)

    def close(self) -> None:
        """Refuse what is left: `UnknownField`. A known field cannot be ignored."""
        for name, value in self.values.items():
            if self._inside + name in self.ignored and (name in self._taken or is_harmless(name, value)):
                raise self.wrong(name, "only an unknown field can be ignored, and this one is known")
        left = [name for name in sorted(set(self.values) - self._taken) if not is_harmless(name, self.values[name])]
        left = [name for name in left if self._inside + name not in self.ignored]
        if left:
            more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
            near = suggest(left[0], sorted(self._taken))
            raise UnknownField(
                f"{self.where}: unknown field {left[0]!r} may change what the model computes, so it is not "
                f"ignored{more}; {near}",
                self._inside + left[0],
            )

    def wrong(self, name: str, right: str, value: Any = MISSING) -> ConfigError:
        """The error for one field."""
        shown = short_repr(self.values.get(name) if value is MISSING else value)
        return ConfigError(f"{self.where}: {name} = {shown}: {right}")


def decoder_fields(f: Fields, *, tied: bool = False, eps: float = 1e-6) -> dict[str, Any]:
    """The fields that every decoder has, as `ModelConfig` wants them."""
    return {
        "vocab_size": f.integer("vocab_size"),
        "hidden_size": f.integer("hidden_size"),
        "num_hidden_layers": f.integer("num_hidden_layers"),
        "max_position_embeddings": f.integer("max_position_embeddings"),
        "rms_norm_eps": f.number("rms_norm_eps", eps),
        "initializer_range": f.number("initializer_range", 0.02),
        "tie_word_embeddings": f.flag("tie_word_embeddings", tied),
    }


def head_fields(f: Fields, *, head_dim: bool = True, **more: Any) -> dict[str, Any]:
    """Heads of multi-head and grouped-query attention; `head_dim` says whether the family has that field."""
    heads = f.integer("num_attention_heads")
    if heads < 1:
        raise f.wrong("num_attention_heads", "at least 1")
    own = f.integer("hidden_size") // heads
    given = f.integer("head_dim", own)
    if not head_dim and given != own:
        raise f.wrong("head_dim", f"this family has hidden_size / num_attention_heads = {own}")
    kv_heads = f.integer("num_key_value_heads", heads)
    return {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": given, **more}


def dense_layers(f: Fields) -> dict[str, Any]:
    """Qwen's way to say which layers are dense."""
    listed = f.take("mlp_only_layers", [])
    if not isinstance(listed, list):
        raise f.wrong("mlp_only_layers", "expected a list of layer numbers")
    return {"decoder_sparse_step": f.integer("decoder_sparse_step", 1), "mlp_only_layers": listed}


def windows(f: Fields, *, flag: bool = True, late: bool = True) -> dict[str, Any]:
    """Which layers have the sliding window: `layer_types`, or (`late`) those from `max_window_layers` on.

    `flag`: the family has `use_sliding_window`, false unless given.
    """
    layers = f.integer("num_hidden_layers")
    window, first, types = f.integer("sliding_window", None), f.integer("max_window_layers", layers), None
    used = f.flag("use_sliding_window", False) if flag else window is not None
    listed = f.layers("layer_types", layers)
    if listed is not None:
        types = listed
    elif used and not late:
        raise f.wrong("use_sliding_window", "which layers have the window differs between versions: give layer_types")
    elif used:
        types = ["sliding_attention" if i >= first else "full_attention" for i in range(min(max(layers, 0), 4096))]
    if flag and not used and types is not None and "sliding_attention" in types:
        raise f.wrong("use_sliding_window", "layer_types names layers with a window, so it must be true", False)
    if types is None or all(kind == "full_attention" for kind in types):
        return {}
    return {"sliding_window": window, "layer_types": types}


def written(config: ModelConfig, *, head_dim: bool = True) -> dict[str, Any]:
    """The same fields as `config.json` has them, and the rotation."""
    a = config.attention
    fields: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": a.num_attention_heads,
        "num_key_value_heads": a.kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_word_embeddings,
        "rope_parameters": rope_fields(config.rope),
        "rope_theta": config.rope.rope_theta,  # again, where llama.cpp and mlx-lm look for it
    }
    return fields | {"head_dim": a.head_dim} if head_dim else fields


def norm_top1(k: Any, renormalised: bool = True) -> bool:
    """Whether a router that always renormalises gives a single expert weight 1."""
    return k == 1 and renormalised


_SCALING = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_mscale", "long_mscale"),
}

_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor", "short_mscale", "long_mscale"),
}


def _scaling(scaling: Fields, rope_type: str, max_positions: int) -> dict[str, Any]:
    values = {name: scaling.number(name, None) for name in _SCALING[rope_type]}
    if rope_type in ("yarn", "llama3", "longrope"):
        original = scaling.values.get("original_max_position_embeddings")
        if isinstance(original, float) and original.is_integer():  # some files have 4096.0
            scaling.values["original_max_position_embeddings"] = int(original)
        original = scaling.integer("original_max_position_embeddings", None)
        values["original_max_position_embeddings"] = original or max_positions
    else:
        scaling.ignore("original_max_position_embeddings")
    if rope_type == "yarn":
        values["truncate"] = scaling.flag("truncate", True)
        if values["factor"] is None and "factor" in scaling.values:  # null: what transformers takes it to be
            values["factor"] = max_positions / values["original_max_position_embeddings"]
    if rope_type == "longrope":
        values |= {name: scaling.numbers(name) for name in ("short_factor", "long_factor")}
        scaling.ignore("factor", "attention_factor")  # of which the magnitudes are made where they are not given
    for name in _REQUIRED[rope_type]:
        if values[name] is None:
            raise ConfigError(f"{scaling.where}: {name!r} is missing")
    scaling.ignore("max_position_embeddings")  # transformers writes a copy into older files
    scaling.close()
    return {name: value for name, value in values.items() if value is not None}


def rope_fields(rope: RopeConfig) -> dict[str, Any]:
    """`rope_parameters` as transformers 5 writes them."""
    fields: dict[str, Any] = {"rope_type": rope.rope_type, "rope_theta": rope.rope_theta}
    names = _SCALING[rope.rope_type]
    fields |= {name: getattr(rope, name) for name in names if getattr(rope, name) is not None}
    if rope.rope_type in ("yarn", "llama3", "longrope"):
        fields["original_max_position_embeddings"] = rope.original_max_position_embeddings
    if rope.rope_type == "longrope":
        fields |= {"short_factor": list(rope.short_factor or ()), "long_factor": list(rope.long_factor or ())}
        fields |= dict(zip(("short_mscale", "long_mscale"), rope.mscales, strict=True))
    if rope.rope_type == "yarn" and not rope.truncate:
        fields["truncate"] = False
    if rope.partial_rotary_factor != 1.0:
        fields["partial_rotary_factor"] = rope.partial_rotary_factor
    return fields
