"""What the worth record says of each sparse layer: experts that say nothing, or the same as another.

E experts.
"""

from manyhands.compare import limits
from manyhands.compare.finding import Finding
from manyhands.compare.history import History

_NAMED = 4  # experts named in a sentence


def findings(history: History) -> list[Finding]:
    """Of the last `worth` record, if the run was long enough; `compare/worth.py` has the figures."""
    layers = (history.worth or {}).get("layers") or {}
    if history.step < limits.MIN_STEPS:
        return []
    found = []
    for layer in sorted(layers, key=int):
        of = layers[layer]
        E = len(of["cost"])
        sizes, twins = of.get("size") or [None] * E, of.get("twin") or [None] * E
        distances = of.get("distance") or [None] * E
        silent = [e for e in range(E) if sizes[e] == 0.0]
        same = [
            e for e in range(E) if e not in silent and distances[e] is not None and distances[e] < limits.ALIKE
        ]  # two that say nothing are told as that
        if not silent and not same:
            continue
        said = []
        if silent:
            said.append(f"{_names(silent)} of {E} say{'s' if len(silent) == 1 else ''} nothing")
        if same:
            said.append(f"{_names(same)} of {E} say what another says (expert {same[0]} what {twins[same[0]]} says)")
        share = len(silent + same) / E
        found.append(
            Finding(
                "interchangeable",
                share >= limits.INTERCHANGEABLE and _begun_here(history),
                f"layer {layer}: {' and '.join(said)}",
                "begin with experts that differ, or take fewer (manyhands prune)",
                share,
                limits.INTERCHANGEABLE,
                int(layer),
            )
        )
    return found


def _begun_here(history: History) -> bool:
    """Whether the experts are this run's own, and not those of a model that it began with."""
    return history.run is None or history.run.start is None


def _names(experts: list[int]) -> str:
    listed = ", ".join(map(str, experts[:_NAMED])) + (" …" if len(experts) > _NAMED else "")
    return f"expert{'s' if len(experts) > 1 else ''} {listed}"
