"""Every measure of this room on one `Observed`, as plain values: what the page draws and `--json` prints."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from manyhands.inspect.balance import coactivation, load, over_time
from manyhands.inspect.compare import agreement, check_same, saturation
from manyhands.inspect.observed import Observed
from manyhands.inspect.predict import predictability
from manyhands.inspect.resample import Resampler
from manyhands.inspect.specialise import domains, first_entropy, syntax, vocabulary


def measure(
    seen: Observed,
    draws: int = 100,
    seed: int = 0,
    against: tuple[str, Observed] | None = None,
    checkpoints: Sequence[tuple[str, Observed]] = (),
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """All that `seen` allows: syntax needs tags, domains two of them, vocabulary token ids.

    draws         bootstrap draws of whole texts behind each interval.
    against       another routing of the same tokens, and its name, to compare with.
    checkpoints   named routings of a run's checkpoints on tokens of their own, the last one last.

    Raises `DataError` if routings that are compared are not of the same tokens.
    """
    say = progress or (lambda _: None)
    sampled = Resampler(seen, draws, seed=seed)
    identified = bool((seen.token_ids >= 0).all())
    layers = []
    for i, number in enumerate(seen.layers):
        say(f"measuring layer {number}")
        found: dict[str, Any] = {
            "layer": number,
            "first_expert_entropy_bits": first_entropy(seen, i),
            "load": load(seen, i),
            "coactivation": coactivation(seen, i, seed),
            "over_time": over_time(seen, i, sampled),
            "predictability": predictability(seen, i, sampled),
        }
        if identified:
            found["vocabulary"] = vocabulary(seen, i, sampled)
        if seen.tag is not None:
            found["syntax"] = syntax(seen, i, sampled)
        if len(seen.domains) > 1:
            found["domains"] = domains(seen, i, sampled, seed)
        layers.append(found)
    result: dict[str, Any] = {
        "tokens": len(seen),
        "texts": int(seen.text.max()) + 1,
        "num_experts": seen.num_experts,
        "num_experts_per_tok": seen.experts_per_token,
        "domains": list(seen.domains),
        "tags": list(seen.tags),
        "random_routers": 0 if seen.random_ids is None else len(seen.random_ids),
        "bootstrap_draws": draws,
        "layers": layers,
    }
    if against is not None:
        name, other = against
        check_same(seen, other, ("the model", name))
        result["against"] = {"name": name, "layers": agreement(seen, other, sampled)}
    if checkpoints:
        result["saturation"] = saturation(checkpoints, Resampler(checkpoints[-1][1], draws, seed=seed))
    return result


def plain(value: Any) -> Any:
    """As JSON has it: numbers of five digits, null for what is not a number."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, (float, np.floating)):
        return float(f"{float(value):.5g}") if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value
