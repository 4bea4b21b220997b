"""What the experts' load says of each sparse layer over the last 50 steps: collapse, dead experts, uneven use.

n logged steps   E experts   K experts per token
"""

import numpy as np

from manyhands.compare import limits
from manyhands.compare.finding import Finding
from manyhands.compare.history import History
from manyhands.trace.journal import LAST_STEPS, last_steps, of_layer
from manyhands.trace.series import Floats, Record

_CHOOSING = ("topk", "sparsemixer", "hierarchical", "positive")  # selections that can collapse
_NAMED = 4  # experts named in a sentence


def findings(history: History) -> list[Finding]:
    """Of every layer of a run that was long enough; one that has collapsed is told only that."""
    K, steps = history.num_experts_per_tok, history.steps
    if history.step < limits.MIN_STEPS or not K:
        return []
    found = []
    layers = sorted({layer for step in steps[-1:] for layer in step.get("moe") or {}}, key=int)
    for layer in layers:
        here = [step for step in steps if of_layer(step, layer).get("load")]
        loads_nE = np.array([of_layer(step, layer)["load"] for step in here], dtype=np.float64)
        E = loads_nE.shape[1]
        if E <= K:
            continue
        recent = len(last_steps(here, LAST_STEPS))
        told = _collapsed(history, layer, here, loads_nE, recent, K) if _can_collapse(history) else None
        if told is None or told.kind != "collapse":
            found += _dead(history, layer, loads_nE[-recent:], K)
        found += [] if told is None else [told]
    return found


def _can_collapse(history: History) -> bool:
    moe = None if history.run is None else history.run.model.moe
    return moe is None or moe.router.select in _CHOOSING


def _collapsed(
    history: History, layer: str, here: list[Record], loads_nE: Floats, recent: int, K: int
) -> Finding | None:
    """The K busiest experts have nearly all choices: the same ones, or others in every step."""
    E = loads_nE.shape[1]
    even = K / E
    busiest = np.sort(np.argsort(-loads_nE[-recent:].mean(axis=0), kind="stable")[:K])
    same_n = (loads_nE[:, busiest].sum(axis=1) - even) / (1 - even)
    each_n = (np.sort(loads_nE, axis=1)[:, -K:].sum(axis=1) - even) / (1 - even)
    same, each = float(same_n[-recent:].mean()), float(each_n[-recent:].mean())
    names = ", ".join(map(str, busiest[:_NAMED])) + (" …" if len(busiest) > _NAMED else "")
    experts = f"expert{'s' if K > 1 else ''} {names}"
    if each >= limits.COLLAPSED:
        alike = same >= limits.COLLAPSED
        since = _since(here, same_n if alike else each_n)
        whom = f"{experts} of {E}" if alike else f"the same {K} of {E} experts, others from step to step,"
        return Finding(
            "collapse",
            history.router_is_trained,
            f"layer {layer} sends nearly every token to {whom} {since}",
            _remedy(history),
            each,
            limits.COLLAPSED,
            int(layer),
        )
    if same < limits.UNEVEN:
        return None
    share = float(loads_nE[-recent:, busiest].sum(axis=1).mean())
    return Finding(
        "uneven",
        False,
        f"layer {layer} sends {share:.0%} of all choices to {experts} of {E}",
        _remedy(history),
        same,
        limits.UNEVEN,
        int(layer),
    )


def _since(here: list[Record], figure_n: Floats) -> str:
    """From when on the figure's running mean over nine records stayed above the limit."""
    width = min(9, len(figure_n))
    calm = np.convolve(figure_n, np.ones(width) / width, mode="valid")
    below = np.nonzero(calm < limits.COLLAPSED)[0]
    first = int(below[-1]) + 1 if len(below) else 0
    return "since the start" if first == 0 else f"since step {here[min(first, len(here) - 1)]['step']:,}"


def _dead(history: History, layer: str, loads_nE: Floats, K: int) -> list[Finding]:
    tokens = [step["tokens"] for step in history.steps[-2:] if step.get("tokens")]
    logged = [step["step"] for step in history.steps[-2:]]
    n, E = loads_nE.shape
    each = (tokens[-1] - tokens[0]) / (logged[-1] - logged[0]) if len(tokens) == 2 and logged[1] > logged[0] else 0.0
    if each * n * K / E < limits.DEAD_PAIRS:
        return []
    dead = np.nonzero(loads_nE.sum(axis=0) == 0)[0]
    if not len(dead):
        return []
    share = len(dead) / E
    names = ", ".join(map(str, dead[:_NAMED])) + (" …" if len(dead) > _NAMED else "")
    finding = Finding(
        "dead",
        share >= limits.DEAD and history.router_is_trained,
        f"layer {layer}: no token chose expert{'s' if len(dead) > 1 else ''} {names} ({len(dead)} of {E}) in the last "
        f"{LAST_STEPS} steps",
        _remedy(history),
        share,
        limits.DEAD,
        int(layer),
    )
    return [finding]


def _remedy(history: History) -> str:
    """What spreads the load, and how strong it is now."""
    run = history.run
    if run is None or run.model.moe is None:
        return "raise balance.aux_loss_coef or balance.bias_update_rate"
    if not history.router_is_trained:
        return "the router is frozen: train it too, or begin with a model whose experts fit these data"
    balance, router = run.balance, run.model.moe.router
    if router.select == "positive":
        return f"raise balance.l1_coef ({balance.l1_coef:g}), or lower optim.lr ({run.optim.lr:g})"
    ways = [f"balance.aux_loss_coef ({balance.aux_loss_coef:g})"]
    if router.bias and balance.bias_update == "sign":
        ways.insert(0, f"balance.bias_update_rate ({balance.bias_update_rate:g})")
    return f"raise {' or '.join(ways)}, or lower optim.lr ({run.optim.lr:g})"
