"""How a model's publisher has it sampled: the part of generation_config.json that chooses tokens."""

from collections.abc import Mapping
from typing import Any

from manyhands.config import SamplingConfig, parse
from manyhands.defaults import TEMPERATURE
from manyhands.errors import CheckpointError, ConfigError
from manyhands.files import GENERATION

_HERE = ("temperature", "top_k", "top_p", "min_p")
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "constraints": (),
    "diversity_penalty": (0,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "frequency_penalty": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "sequence_bias": (),
    "suppress_tokens": ([],),
    "top_h": (1,),
    "typical_p": (1,),
}
"""What also chooses tokens, and is not done here, at the values that change nothing."""
_USUAL = {"temperature": TEMPERATURE, "top_k": None, "top_p": 1.0, "min_p": 0.0}


def sampling_from(
    published: Mapping[str, Any], asked: Mapping[str, Any], **others: Any
) -> tuple[SamplingConfig, str | None]:
    """What `asked` says (None: nothing), else the file, else the usual temperature, no filter; and a line that says so.

    `do_sample: false` in the file is greedy. A `top_k` of 0 there is none. No line where the file says nothing.
    Raises `CheckpointError` naming a field of the file that is wrong, `ConfigError` for what was asked.
    """
    found = published_sampling(published)
    given = {name: asked[name] for name in _HERE if asked.get(name) is not None}
    sampling = parse(SamplingConfig, {**_USUAL, **found, **given, **others})
    ignored = [
        f"{name} {published[name]}"
        for name, neutral in NEUTRAL.items()
        if published.get(name) is not None and published[name] not in neutral
    ]
    if not found and not ignored:
        return sampling, None
    used = {name: value for name, value in found.items() if name not in given}
    parts = [f"{_words(used)} from {GENERATION}"] if used else []
    parts += [f"{_words(given)} as asked"] if given else []
    parts += [f"not done here: {', '.join(ignored)} of {GENERATION}"] if ignored else []
    return sampling, "sampling: " + "; ".join(parts)


def published_sampling(published: Mapping[str, Any]) -> dict[str, Any]:
    """What the file says of our fields. Raises `CheckpointError` naming the one that is wrong."""
    found = {name: published[name] for name in _HERE if published.get(name) is not None}
    if found.get("top_k") == 0:
        found["top_k"] = None
    try:
        parse(SamplingConfig, found)
    except ConfigError as error:
        raise CheckpointError(f"{GENERATION}: {error}") from None
    return {"temperature": 0.0} if published.get("do_sample") is False else found


def _words(values: Mapping[str, Any]) -> str:
    if values.get("temperature") == 0:
        return "greedy"
    return ", ".join(f"{name} {'off' if value is None else f'{value:g}'}" for name, value in values.items())
