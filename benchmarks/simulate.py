"""Published cache curves of three real traces, row by row, beside the same replay here and beside our policies.

    python benchmarks/simulate.py DIR [--json]

DIR holds NAME.route.csv and NAME-curve.csv of the BigMoeOnEdge project (github.com/Helldez/BigMoeOnEdge, commit
2d4f2b1: docs/bench-data/2026-07-15-route-trace and 2026-07-20-cache-replay).

`Soft` is that project's rule, written after its `scripts/route-replay.py` (tie-breaks and seed too), and only here:
everything a layer wants is taken in first, and what is then too much is evicted, never what this layer wants. So it may
exceed its budget while a layer runs, and cannot let a newcomer pass by. Our policies keep the budget at every moment.
"""

import argparse
import bisect
import csv
import json
import random
import sys
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from manyhands.simulate import Wants, replay, told
from manyhands.simulate.sweep import judged
from manyhands.simulate.tokens import Tokens
from manyhands.store.policies import Key, policy
from manyhands.trace.foreign import opened
from manyhands.trace.recording import Trace

MIB = 1 << 20
Batch = tuple[int, list[int], bool]
"""Layer, its experts in the order of tokens and slots (with repetitions), whether it is of a decoded token."""


class Soft:
    """One of the six published policies: belady, lru, lfu, random, and lru and lfu in equal parts for each layer."""

    def __init__(self, name: str, budget: int, sizes: tuple[int, ...], uses: dict[Key, list[int]]) -> None:
        self.name, self.sizes, self.uses = name, sizes, uses
        self.by_layer = name.startswith("layer")
        self.limit = budget // len(sizes) if self.by_layer else budget
        self.memory: OrderedDict[Key, None] = OrderedDict()
        self.used = [0] * len(sizes)
        self.last: dict[Key, int] = {}
        self.count: Counter[Key] = Counter()
        self.random = random.Random(1234)
        self.clock = self.held = 0
        self.hits, self.lookups, self.read = [0, 0], [0, 0], 0

    def run(self, batches: list[Batch]) -> "Soft":
        settled = next(i for i, batch in enumerate(batches) if batch[2]) + len(self.sizes)
        for number, (layer, experts, decode) in enumerate(batches):
            for expert in experts:
                self.clock += 1
                self.last[layer, expert] = self.clock
            wanted = list(dict.fromkeys((layer, expert) for expert in experts))
            for key in wanted:
                self.lookups[decode] += 1
                self.count[key] += 1
                if key in self.memory:
                    self.hits[decode] += 1
                    continue
                self.memory[key] = None
                self.used[layer] += self.sizes[layer]
                self.read += self.sizes[layer]
            self.evict(layer, set(wanted), number)
            if number >= settled:
                self.held = max(self.held, sum(self.used))
        return self

    def evict(self, layer: int, wanted: set[Key], number: int) -> None:
        while (self.used[layer] if self.by_layer else sum(self.used)) > self.limit:
            pool = [key for key in self.memory if key not in wanted and (key[0] == layer or not self.by_layer)]
            if not pool:
                return
            if self.name == "random":
                out = self.random.choice(pool)
            elif self.name == "belady":
                out = max(pool, key=lambda key: self.next_use(key, number))
            elif self.name in ("lfu", "layerlfu"):
                out = min(pool, key=lambda key: (self.count[key], self.last[key]))
            else:
                out = min(pool, key=lambda key: self.last[key])
            del self.memory[out]
            self.used[out[0]] -= self.sizes[out[0]]

    def next_use(self, key: Key, number: int) -> float:
        uses = self.uses[key]
        at = bisect.bisect_right(uses, number)
        return uses[at] if at < len(uses) else float("inf")

    def row(self) -> tuple[str, str, str]:
        """As published: hits in percent, of all and of decoded tokens, and MiB read."""
        every, decoded = 100 * sum(self.hits) / sum(self.lookups), 100 * self.hits[1] / self.lookups[1]
        return f"{every:.3f}", f"{decoded:.3f}", f"{self.read / MIB:.1f}"


def batches_of(trace: Trace) -> Iterator[Batch]:
    for rows in trace.steps():
        decode = bool(rows.phase[0] == 1)
        for layer in range(rows.expert_ids.shape[1]):
            ids = rows.expert_ids[:, layer].ravel()
            yield layer, ids[ids != trace.manifest.none].tolist(), decode


def compare(folder: Path, name: str) -> list[dict[str, Any]]:
    with opened(folder / f"{name}.route.csv") as trace:
        sizes = trace.manifest.record_bytes or ()
        batches = list(batches_of(trace))
        wants = Wants.of(Tokens.of(trace), sizes)
    uses: dict[Key, list[int]] = defaultdict(list)
    for number, (layer, experts, _) in enumerate(batches):
        for expert in set(experts):
            uses[layer, expert].append(number)
    found = []
    with (folder / f"{name}-curve.csv").open(newline="") as file:
        for line in csv.DictReader(file):
            budget = int(line["budget_mib"]) * MIB
            soft = Soft(line["policy"], budget, sizes, uses).run(batches)
            hard = None
            if line["policy"] == "belady":
                hard = replay(told(budget, wants), wants)
            elif line["policy"] in ("lru", "lfu"):
                hard = replay(policy(line["policy"], budget, sizes), wants)
            published = (line["hit_pct_cum"], line["hit_pct_decode"], line["read_mib"])
            found.append(
                {
                    "trace": name,
                    "budget_mib": int(line["budget_mib"]),
                    "policy": line["policy"],
                    "published": published,
                    "same_rule": soft.row(),
                    "equal": published == soft.row(),
                    "held_mib": soft.held / MIB,
                    "ours_decode_pct": None if hard is None else 100 * judged(hard).hit_rate,
                    "ours_all_pct": None if hard is None else 100 * hard.all.hit_rate,
                }
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    names = sorted(path.name.removesuffix("-curve.csv") for path in options.folder.glob("*-curve.csv"))
    if not names:
        sys.exit(f"{options.folder}: no NAME-curve.csv beside a NAME.route.csv")
    rows = [row for name in names for row in compare(options.folder, name)]
    if options.json:
        print(json.dumps(rows))
        return
    print(
        "published, and the same rule here: hits in % of all and of decoded tokens, MiB read; held: most MiB after an"
    )
    print(
        "eviction, from the second decoded token on; ours: hits in % of all and of decoded tokens, never over budget\n"
    )
    for row in rows:
        ours = "" if row["ours_all_pct"] is None else f"{row['ours_all_pct']:.3f} {row['ours_decode_pct']:.3f}"
        over = "!" if row["held_mib"] > row["budget_mib"] else " "
        print(
            f"{row['trace']:7}{row['budget_mib']:5}  {row['policy']:9}"
            f"{'  '.join(row['published']):>30}{'  =' if row['equal'] else '  ≠'}{'  '.join(row['same_rule']):>30}"
            f"{row['held_mib']:10.0f}{over}{ours:>20}"
        )
    print(f"\n{sum(row['equal'] for row in rows)} of {len(rows)} published rows equal to the last digit")
    over = sum(row["held_mib"] > row["budget_mib"] for row in rows)
    print(f"{over} of {len(rows)} hold more than their budget (!) between two layers of a decoded token")


if __name__ == "__main__":
    main()
