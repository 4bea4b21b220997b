"""The auxiliary loss from nothing to far too much, and the other ways to balance, on one model."""

from collections.abc import Mapping, Sequence

import torch

from manyhands.lab.experiment import Chart, Criterion, Curve, Figure, Outcome
from manyhands.lab.figures import by_arm, figures, loss_chart, mean
from manyhands.lab.job import Job
from manyhands.lab.language import Trained, arm, changed, regime, train_arm, with_experts

_STRENGTHS = (0.0, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_NONE, _USUAL, _MOST, _BIAS = "α 0", "α 0.01", "α 1", "bias"
_SHOWN = ("validation loss", "validation", "MaxVio, worst layer", "dead experts, worst layer")
_EQUAL = 0.02
"""Nats per token: losses that are nearer than this are called equal."""


def run(job: Job) -> Outcome:
    """Train every arm with each seed; route those with a bias by their scores alone."""
    base = regime(job, 250, 24, "balance.aux_loss_coef=0", "train.eval_every=" + ("12" if job.quick else "50"))
    E, K, F = (16, 2, 16) if job.quick else (64, 2, 64)
    softmax = with_experts(base, E, K, F)
    bias = with_experts(base, E, K, F, router="score: sigmoid, bias: true")
    strengths = (0.0, 1e-2) if job.quick else _STRENGTHS
    runs = {f"α {alpha:g}": changed(softmax, f"balance.aux_loss_coef={alpha}") for alpha in strengths}
    sweep = list(runs)
    runs[_BIAS] = bias
    if not job.quick:
        usual, diverse = (
            "balance.aux_loss_coef=0.01",
            ("balance.orthogonality_coef=0.001", "balance.variance_coef=0.001"),
        )
        runs |= {
            "bias, sequence-wise 0.0001": changed(bias, "balance.sequence_loss_coef=0.0001"),
            "sigmoid, no balancing": with_experts(base, E, K, F, router="score: sigmoid"),
            "α 0.01 per sequence": changed(softmax, usual, "balance.aux_scope=sequence"),
            "diversity terms alone": changed(softmax, *diverse),
            "α 0.01, diversity terms": changed(softmax, usual, *diverse),
        }
    trained: dict[str, list[Trained]] = {name: [] for name in runs}
    for seed in job.seeds:
        for name, of in runs.items():
            trained[name].append(train_arm(job, changed(of, f"train.seed={seed}"), f"{name} {seed}"))
    biased = {name: [_by_scores(one) for one in trained[name]] for name in runs if name.startswith(_BIAS)}
    return Outcome(
        tuple(arm(of, name) for name, of in runs.items()),
        by_arm(figures(trained, _SHOWN), _bias_figures(trained, biased)),
        _criteria(job, trained, biased, sweep),
        (loss_chart(trained, "Validation loss"), _u_chart({name: trained[name] for name in sweep})),
        notes=(
            "The auxiliary loss moves the scores themselves, so that a token always goes to the experts it scores "
            "highest; only a bias, or a capacity, sends it elsewhere.",
            "The diversity terms (orthogonality, variance) are of Guo et al. 2025 (arXiv 2505.22323); no DeepSeek "
            "report has them.",
        ),
    )


def _by_scores(trained: Trained) -> tuple[float, float]:
    """The share of tokens that do not visit the expert they score highest, and the loss without the bias."""
    model = trained.load()
    away = total = 0
    with torch.inference_mode():
        for ids, _ in trained.valid_batches(most=4):
            for routing in model(ids[:, :-1]).routings.values():
                best_T1 = routing.scores.argmax(1, keepdim=True)
                away += int((routing.expert_ids != best_T1).all(1).sum())
                total += len(best_T1)
    with torch.no_grad():
        for layer in model.sparse_layers().values():
            assert layer.router.e_score_correction_bias is not None
            layer.router.e_score_correction_bias.zero_()
    return away / total, trained.loss_of(model)


def _bias_figures(
    trained: Mapping[str, Sequence[Trained]], biased: Mapping[str, Sequence[tuple[float, float]]]
) -> tuple[Figure, ...]:
    found = []
    for name, seeds in biased.items():
        rise = tuple(loss - one.valid_loss for (_, loss), one in zip(seeds, trained[name], strict=True))
        found += [
            Figure(
                "tokens kept from the expert they score highest", name, tuple(100 * away for away, _ in seeds), "%", 1
            ),
            Figure("rise of the loss if routed by the scores alone", name, rise, "nats/token"),
        ]
    return tuple(found)


def _criteria(
    job: Job,
    trained: Mapping[str, Sequence[Trained]],
    biased: Mapping[str, Sequence[tuple[float, float]]],
    sweep: Sequence[str],
) -> tuple[Criterion, ...]:
    loss = {name: mean(seeds, "validation loss") for name, seeds in trained.items()}
    vio = {name: mean(seeds, "MaxVio, worst layer") for name, seeds in trained.items()}
    away = min(share for seeds in biased.values() for share, _ in seeds)
    sent = Criterion("a bias sends tokens past the expert they score highest", f"{100 * away:.1f} % of them", away > 0)
    if job.quick:
        weak, bias = f"{vio[_USUAL]:.2f} against {vio[_NONE]:.2f}", f"{vio[_BIAS]:.2f} against {vio[_NONE]:.2f}"
        return (
            Criterion("the auxiliary loss balances", f"MaxVio {weak}", 1.3 * vio[_USUAL] < vio[_NONE]),
            Criterion("the bias balances", f"MaxVio {bias}", vio[_BIAS] < vio[_NONE]),
            sent,
        )
    stronger = Criterion(
        "the stronger the auxiliary loss, the better the balance",
        f"MaxVio at {_NONE}, {_USUAL} and {_MOST}: {vio[_NONE]:.2f}, {vio[_USUAL]:.2f}, {vio[_MOST]:.2f}",
        vio[_NONE] > vio[_USUAL] > vio[_MOST],
    )
    best = min(sweep, key=lambda name: loss[name])
    return (
        stronger,
        Criterion(
            "too little costs quality, and too much: the loss is least between the ends",
            f"least at {best}: {loss[best]:.3f}; {_NONE} {loss[_NONE]:.3f}, {_MOST} {loss[_MOST]:.3f}",
            best not in (_NONE, _MOST),
        ),
        Criterion(
            f"the bias balances at least as well as {_USUAL}, at a loss within {_EQUAL} nats of it, or lower",
            f"MaxVio {vio[_BIAS]:.2f} against {vio[_USUAL]:.2f}, loss {loss[_BIAS] - loss[_USUAL]:+.3f}",
            vio[_BIAS] <= vio[_USUAL] and loss[_BIAS] <= loss[_USUAL] + _EQUAL,
        ),
        sent,
    )


def _u_chart(sweep: Mapping[str, Sequence[Trained]]) -> Chart:
    names = list(sweep)[::-1]
    return Chart(
        "Too little, too much",
        "MaxVio, worst layer",
        "validation loss, nats/token",
        (
            Curve(
                "α, from the largest on the left to none",
                [mean(sweep[name], "MaxVio, worst layer") for name in names],
                [mean(sweep[name], "validation loss") for name in names],
            ),
        ),
        "Each point is a strength of the auxiliary loss; the better the balance, the further to the left.",
    )
