"""How often the interval of `manyhands compare` holds the truth: `python scripts/compare_coverage.py RUN…`.

The runs, two configurations with two seeds or more each, are the population: how far a seed moves a whole run, how far
a document sets the configurations apart, and how far a seed moves a single document are taken from them. Then documents
are drawn again (with their sizes and their differences, from those there are) and seeds (normally distributed) so many
times, and it is counted how often the interval holds the population's own difference. Leaves with 1 outside 90–99 %.
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np

from manyhands.compare.groups import grouped
from manyhands.compare.interval import difference, figures
from manyhands.compare.run import Run, runs_in


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--draws", type=int, default=2000)
    given = parser.parse_args()
    groups = grouped([Run.open(path) for path in runs_in(given.runs)])
    assert len(groups) == 2 and all(len(group.runs) > 1 for group in groups), "two configurations, two seeds each"
    losses = [[run.losses for run in group.runs] for group in groups]
    assert all(each is not None for runs in losses for each in runs), "every run must have losses by document"
    size_X = losses[0][0].size_X.astype(float)  # type: ignore[union-attr]
    kept = size_X > 0
    size_X, X = size_X[kept], int(kept.sum())
    arms = [np.stack([each.last.nats_X[kept] / math.log(2) / size_X for each in runs]) for runs in losses]  # type: ignore[union-attr]
    share_X = size_X / size_X.sum()
    means = [arm.mean(0) for arm in arms]
    truth = float(((means[1] - means[0]) * share_X).sum())
    of_run = [float((arm * share_X).sum(1).std(ddof=1)) for arm in arms]
    of_both = []
    for arm in arms:
        off = arm - arm.mean(0)
        off -= (off * share_X).sum(1, keepdims=True)
        of_both.append(np.sqrt((off**2).sum(0) / (len(arm) - 1)))  # [X], a document's own
    print(f"{X} documents, {size_X.sum():,.0f} bytes; difference {truth:+.4f} bits per byte")
    print(f"seeds move a run by {of_run[0]:.4f} and {of_run[1]:.4f}, a document of it by {of_both[0].mean():.4f}")
    rng, held, halves = np.random.default_rng(0), 0, []
    for _ in range(given.draws):
        drawn = rng.integers(X, size=X)
        sums = []
        for arm, level, spread, sd in zip(arms, means, of_run, of_both, strict=True):
            S = len(arm)
            noise = rng.normal(0, spread, (S, 1)) + rng.normal(0, 1, (S, X)) * sd[drawn]
            sums.append((level[drawn] + noise) * size_X[drawn])
        sizes = size_X[drawn]
        found = difference(figures(sums[0], sizes), figures(sums[1], sizes), sums[0], sums[1], sizes)
        held += abs(found.value - truth) <= found.half
        halves.append(found.half)
    print(
        f"the interval, ± {np.median(halves):.4f} as a rule, held it in {held / given.draws:.1%} of {given.draws} draws"
    )
    return 0 if 0.90 <= held / given.draws <= 0.99 else 1


if __name__ == "__main__":
    sys.exit(main())
