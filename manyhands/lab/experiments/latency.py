"""Time of a decoding step: a mixture, a dense model of its active size, and one of its total size.

B sequences, E experts, K experts per token, F expert width, D model width.
"""

from manyhands.lab.decoding import Steps, arm, decode, model_config, packed_model
from manyhands.lab.experiment import Chart, Criterion, Curve, Figure, Outcome
from manyhands.lab.job import Job

_BATCHES = (1, 4, 16)


def run(job: Job) -> Outcome:
    """The three models in turn, at batch 1 to 16."""
    E, K, F = (16, 2, 32) if job.quick else (32, 2, 256)
    rounds, steps = (1, 3) if job.quick else (5, 24)
    each = 1 if job.quick else 32  # kernels are slow at other widths, and the dense models' times are to be fair

    def width(units: int) -> int:
        return -(-units // each) * each

    configs = {
        "dense, as much active": model_config(
            0, 0, F=width(K * F + E // 3), quick=job.quick
        ),  # a router row is D, a unit 3·D
        "mixture": model_config(E, K, F=F, quick=job.quick),
        "dense, as much in all": model_config(0, 0, F=width(E * F + E // 3), quick=job.quick),
    }
    models = {}
    for name, config in configs.items():
        job.note(f"{name}: making it")
        models[name] = packed_model(config, job.scratch, job.seeds[0])
    best: dict[tuple[str, int], Steps] = {}
    for turn in range(rounds):
        for name, model in models.items():
            for B in _BATCHES:
                job.note(f"round {turn + 1} of {rounds}: {name}, batch {B}")
                step = decode(model, B, steps, job)
                if (name, B) not in best or step.seconds < best[name, B].seconds:
                    best[name, B] = step
    arms = tuple(arm(name, config) for name, config in configs.items())
    small, mixture, large = arms
    assert small.active and mixture.active and large.active and mixture.parameters and large.parameters

    def ratio(name: str, B: int) -> float:
        return best["mixture", B].seconds / best[name, B].seconds

    first, last = small.name, large.name
    criteria = [
        Criterion(
            "the small dense model has the mixture's active parameters, the large one its total, within 2 %",
            f"{small.active / mixture.active:.3f} and {large.parameters / mixture.parameters:.3f} of the mixture's",
            abs(small.active / mixture.active - 1) < 0.02 and abs(large.parameters / mixture.parameters - 1) < 0.02,
        )
    ]
    if not job.quick:
        criteria += [
            Criterion(
                "alone, a token of the mixture takes longer than of the dense model with as much active",
                f"{ratio(first, 1):.2f} times",
                ratio(first, 1) > 1 if job.quiet else None,
            ),
            Criterion(
                "and less long than of the dense model with as much in all",
                f"{ratio(last, 1):.2f} times",
                ratio(last, 1) < 1 if job.quiet else None,
            ),
        ]
    figures = []
    for name in configs:
        for B in _BATCHES:
            step = best[name, B]
            beside = "" if name == "mixture" else f"the mixture takes {ratio(name, B):.2f} times this"
            figures.append(Figure(f"a step of {B}", name, (1e3 * step.seconds,), "ms", 3, beside=beside))
            figures.append(Figure(f"tokens per second at batch {B}", name, (B / step.seconds,), digits=0))
    note = "On one device nothing is sent: a mixture adds the router, smaller matrices, and other experts each time."
    chart = Chart(
        "Tokens per second",
        "sequences in a step",
        "tokens per second",
        tuple(Curve(name, _BATCHES, [B / best[name, B].seconds for B in _BATCHES]) for name in configs),
        y_from_zero=True,
    )
    return Outcome(arms, tuple(figures), tuple(criteria), (chart,), notes=(note,))
