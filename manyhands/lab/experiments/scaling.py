"""Two ways to grow: a dense model's width, at growing cost, and the number of experts, at the same cost per token.

D model width, E experts.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean

from manyhands.config import RunConfig
from manyhands.config.decoder import as_decoder
from manyhands.lab.arms import train_arms
from manyhands.lab.experiment import Arm, Chart, Criterion, Curve, Figure, Outcome
from manyhands.lab.figures import figures, loss_chart, mean
from manyhands.lab.job import Job
from manyhands.lab.language import Trained, arm, changed, regime, with_experts

_SHOWN = ("validation loss", "validation", "MaxVio, worst layer", "time of a step")
_ROWS = 64
"""Rows per expert and step from which the larger factor of time is accepted."""
_SLOWER = 1.3


def run(job: Job) -> Outcome:
    """Train every size with each seed."""
    base = regime(job, 250, 30, "train.eval_every=" + ("15" if job.quick else "50"))
    widths, heads = ((16, 48), 8) if job.quick else ((48, 64, 96, 128), 16)
    counts, F = ((1, 8), 32) if job.quick else ((1, 4, 16, 64, 256), 128)
    dense = {D: _wide(base, D, heads) for D in widths}
    sparse = {E: with_experts(base, E, 1, F) for E in counts}
    runs = {f"dense, width {D}": of for D, of in dense.items()} | {f"{E} experts": of for E, of in sparse.items()}
    trained = train_arms(job, runs)
    arms = tuple(arm(of, name) for name, of in runs.items())
    by_width = {D: trained[f"dense, width {D}"] for D in widths}
    by_count = {E: trained[f"{E} experts"] for E in counts}
    cost = {one.name: one for one in arms}
    return Outcome(
        arms,
        figures(trained, _SHOWN) + _gains(by_count),
        _criteria(job, by_width, by_count, [cost[f"dense, width {D}"] for D in widths]),
        (_against_cost(trained, cost), loss_chart(trained, "Validation loss")),
        notes=(
            "Nothing is matched between the two series: each stands for itself. One expert is a dense model whose "
            "router has nothing to choose.",
            "The learning rate is the same for all, and was chosen for a width of 64.",
        ),
    )


def _wide(run: RunConfig, D: int, head: int) -> RunConfig:
    """The dense run at another width; heads keep theirs, feed-forward networks grow alike."""
    attention = f"{{num_attention_heads: {D // head}, head_dim: {head}, qk_norm: head}}"
    width = round(as_decoder(run.model).intermediate_size * D / run.model.hidden_size)
    return changed(run, f"model.hidden_size={D}", f"model.intermediate_size={width}", f"model.attention={attention}")


def _gains(by_count: Mapping[int, Sequence[Trained]]) -> tuple[Figure, ...]:
    """What each growth of the number of experts is worth, per doubling."""
    shown = []
    for few, many in pairwise(by_count):
        doublings = (many // few).bit_length() - 1
        gain = tuple(
            (a.valid_loss - b.valid_loss) / doublings for a, b in zip(by_count[few], by_count[many], strict=True)
        )
        shown.append(Figure(f"gain per doubling, from {few} to {many} experts", "", gain, "nats/token"))
    return tuple(shown)


def _criteria(
    job: Job, by_width: Mapping[int, Sequence[Trained]], by_count: Mapping[int, Sequence[Trained]], dense: Sequence[Arm]
) -> tuple[Criterion, ...]:
    wide = [mean(each, "validation loss") for each in by_width.values()]
    many = {E: mean(each, "validation loss") for E, each in by_count.items()}
    flops = [one.flops or 0.0 for one in dense]
    cost = Criterion(
        "a wider dense model has a lower loss and costs more",
        ", ".join(f"{loss:.3f} at {count / 1e3:.0f} kFLOP" for loss, count in zip(wide, flops, strict=True)),
        all(a > b for a, b in pairwise(wide)) and all(a < b for a, b in pairwise(flops)),
    )
    if job.quick:
        return (cost,)
    rows = next(iter(by_count.values()))[0].run.train
    tokens = rows.sequence_length * rows.batch_size
    up_to_64 = [loss for E, loss in many.items() if E <= 64]
    time = {E: fmean(one.step_seconds for one in each) for E, each in by_count.items()}
    slower = max(time[E] / time[1] for E in time if tokens / E >= _ROWS)
    gains = [figure.mean for figure in _gains(by_count)]
    return (
        cost,
        Criterion(
            "more experts lower the loss at the same cost per token, up to 64",
            ", ".join(f"{E}: {loss:.3f}" for E, loss in many.items()),
            all(a > b for a, b in pairwise(up_to_64)),
        ),
        Criterion(
            "each doubling is worth less than one before it, in the end",
            " → ".join(f"{gain:.3f}" for gain in gains),
            gains[-1] < max(gains),
        ),
        Criterion(
            f"a step takes at most {_SLOWER} times as long while each expert has {_ROWS} rows or more",
            f"{slower:.2f} times",
            slower <= _SLOWER if job.quiet else None,
        ),
    )


def _against_cost(trained: Mapping[str, Sequence[Trained]], cost: Mapping[str, Arm]) -> Chart:
    """Loss against what a token costs: one line falls to the right, the other straight down."""
    curves = []
    for series, start in (("dense, growing width", "dense"), ("growing number of experts", "")):
        names = [name for name in trained if name.startswith("dense") == (start == "dense")]
        flops = [(cost[name].flops or 0.0) / 1e3 for name in names]
        curves.append(Curve(series, flops, [mean(trained[name], "validation loss") for name in names]))
    return Chart(
        "What it costs", "kFLOP of a forward pass, per token", "validation loss, nats/token", tuple(curves),
        "A point per size, from the smallest up. More experts cost a token the router's products alone.",
    )  # fmt: skip
