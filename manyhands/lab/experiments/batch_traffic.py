"""Experts that a step touches, and tokens per second, at batch 1 to 64, beside the formula that the planner uses.

B sequences, E experts, K experts per token.
"""

from manyhands.lab.decoding import arm, decode, model_config, packed_model
from manyhands.lab.experiment import Chart, Criterion, Curve, Figure, Outcome
from manyhands.lab.job import Job
from manyhands.plan.count import count_model
from manyhands.plan.sizes import sizes_of
from manyhands.plan.storage import PACKED_INT8
from manyhands.plan.traffic import decode_bytes, distinct_experts

_OFF = 0.1
"""By how much the touched experts may differ from the formula: random routers are not quite uniform."""


def run(job: Job) -> Outcome:
    """One model, growing batches."""
    E, K = (16, 2) if job.quick else (64, 4)
    batches = (1, 4, 16) if job.quick else (1, 2, 4, 8, 16, 32, 64)
    steps = 4 if job.quick else 24
    config = model_config(E, K, quick=job.quick)
    decoder = packed_model(config, job.scratch, job.seeds[0])
    found = {}
    for B in batches:
        job.note(f"batch {B}")
        found[B] = decode(decoder, B, steps, job)
    counts, sizes, int8 = count_model(config), sizes_of(config), PACKED_INT8
    read = {B: decode_bytes(sizes, counts, int8, batch=B).total for B in batches}
    expected = {B: distinct_experts(E, K, B) for B in batches}
    gain = {B: B * found[1].seconds / step.seconds for B, step in found.items()}
    bound = {B: B * read[1] / read[B] for B in batches}
    off = max(abs(found[B].distinct / expected[B] - 1) for B in batches)
    most = batches[-1]
    criteria = [
        Criterion(
            f"experts touched are the formula's within {_OFF:.0%} at every batch",
            f"{off:.1%} at worst",
            off <= _OFF,
        ),
        Criterion(
            f"a step of {most} sequences touches nearly every expert of a layer",
            f"{found[most].distinct:.1f} of {E}",
            found[most].distinct >= 0.8 * E,
        ),
    ]
    if not job.quick:
        criteria.append(
            Criterion(
                f"batch {most} gains less than {most} times the tokens per second",
                f"{gain[most]:.1f} times",
                gain[most] < most if job.quiet else None,
            )
        )
    figures: list[Figure] = []
    for B, step in found.items():
        name, formula, allowed = f"batch {B}", f"formula {expected[B]:.1f}", f"bytes alone allow {bound[B]:.2f}"
        figures += [
            Figure("experts a step touches", name, (step.distinct,), f"of {E}", 1, beside=formula),
            Figure("bytes a token", name, (read[B] / B / 1e6,), "MB"),
            Figure("tokens per second", name, (B / step.seconds,), digits=0),
            Figure("as a multiple of batch 1", name, (gain[B],), digits=2, beside=allowed),
        ]
    x = [float(B) for B in batches]
    charts = (
        Chart(
            "Experts that a step touches",
            "sequences in a step",
            "experts of a layer",
            (
                Curve("measured", x, [found[B].distinct for B in batches]),
                Curve("uniform routing", x, [expected[B] for B in batches], faint=True),
            ),
            y_from_zero=True,
        ),
        Chart(
            "Tokens per second over those at batch 1",
            "sequences in a step",
            "times",
            (
                Curve("measured", x, [gain[B] for B in batches]),
                Curve("if only bytes counted", x, [bound[B] for B in batches], faint=True),
            ),
            "Bytes read per step, from the formula, would allow the second curve.",
            y_from_zero=True,
        ),
    )
    return Outcome((arm("the model", config),), tuple(figures), tuple(criteria), charts)
