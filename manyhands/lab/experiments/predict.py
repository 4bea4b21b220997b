"""Recall of a token's K experts by what is known early, and what caches of part of the experts would hit.

T tokens, L sparse layers, E experts, K experts per token.
"""

import numpy as np

from manyhands.inspect.observed import Observed
from manyhands.inspect.predict import predictability
from manyhands.inspect.resample import Figure as Measured
from manyhands.inspect.resample import Resampler
from manyhands.lab.experiment import Chart, Criterion, Curve, Figure, Outcome
from manyhands.lab.job import Job
from manyhands.lab.language import arm
from manyhands.lab.reading import check_data, look, trained_mixture, watch
from manyhands.simulate.sweep import sweep
from manyhands.simulate.tokens import Tokens
from manyhands.simulate.wants import Wants

_SHARES = (0.25, 0.5)
_POLICIES = ("lru", "lfu", "belady")
_BYTES = 1000
"""Of an expert; only ratios count."""


def run(job: Job) -> Outcome:
    """A model per seed."""
    check_data(job)
    found: list[list[dict[str, Measured]]] = []
    hits: list[dict[tuple[str, float], float]] = []
    trained = None
    for seed in job.seeds:
        trained = trained_mixture(job, seed)
        model, read = look(job, trained, seed)
        seen = watch(model, read, seed, 1)
        sampled = Resampler(seen, 20, seed=seed)
        found.append([predictability(seen, layer, sampled) for layer in range(len(seen.layers))])
        job.note(f"seed {seed}: caches")
        hits.append(_caches(seen, 1000 if job.quick else 10_000))
    assert trained is not None
    moe = trained.run.model.moe
    assert moe is not None
    chance = moe.router.num_experts_per_tok / moe.router.num_experts
    by_id = [_mean(found, i, "token id") for i in range(len(found[0]))]
    constant = [_mean(found, i, "constant") for i in range(len(found[0]))]
    needed = max(constant) if job.quick else 0.7
    than = "the busiest experts" if job.quick else "0.7 of a token's experts"
    criteria = (
        Criterion(
            f"the token id alone foretells more than {than}",
            f"{min(by_id):.3f} in the layer where it is least",
            min(by_id) >= needed,
        ),
    )
    figures = []
    for i, layer in enumerate(found[0]):
        for name in layer:
            values = tuple(layers[i][name].value for layers in found)
            figures.append(Figure(f"recall from {_NAMES[name]}", f"layer {i}", values, beside=f"chance {chance:.2f}"))
    for share in _SHARES:
        for policy in _POLICIES:
            values = tuple(each[policy, share] for each in hits)
            beside = f"uniform routing {share:.2f}"
            figures.append(Figure(f"hits of {policy}", f"{share:.0%} of the experts in memory", values, beside=beside))
    layers = [float(i) for i in range(len(found[0]))]
    curves = tuple(
        Curve(_NAMES[name], layers, [_mean(found, i, name) for i in range(len(layers))], faint=name == "constant")
        for name in ("token id", "router early", "previous token", "constant")
    )
    chart = Chart("Experts foretold", "layer", "recall of a token's experts", curves, y_from_zero=True)
    notes = (
        "One sequence at a time. belady is the best that was possible, knowing the future. The router a sublayer early "
        "sees the hidden state before attention has been added: what a prefetch could use.",
    )
    return Outcome((arm(trained.run, "decoder"),), tuple(figures), criteria, (chart,), notes=notes)


_NAMES = {
    "constant": "the busiest experts",
    "token id": "the token id",
    "previous layer": "the layer below",
    "previous token": "the token before",
    "router early": "the router, a sublayer early",
}


def _mean(found: list[list[dict[str, Measured]]], layer: int, name: str) -> float:
    return float(np.mean([layers[layer][name].value for layers in found]))


def _caches(seen: Observed, tokens: int) -> dict[tuple[str, float], float]:
    """Hit rate of each policy with each share of all experts in memory, decoding one token after the other."""
    ids_TLK = seen.expert_ids[:tokens]
    T, L, _ = ids_TLK.shape
    none = seen.num_experts
    decoded = Tokens(
        np.where(ids_TLK < 0, none, ids_TLK).astype(np.uint16),
        np.arange(T, dtype=np.int32),
        seen.sequence[:T].astype(np.int32),
        np.ones(T, bool),
        none,
    )
    budgets = [round(share * L * seen.num_experts) * _BYTES for share in _SHARES]
    rows = sweep(Wants.of(decoded, [_BYTES] * L), _POLICIES, budgets)
    return {(row.policy, _SHARES[budgets.index(row.budget_bytes)]): row.tally.hit_rate for row in rows}
