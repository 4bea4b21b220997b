"""Policies by budgets on one trace, and what each would read per second of a disk."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from manyhands.errors import ConfigError
from manyhands.simulate.belady import next_uses, told
from manyhands.simulate.replay import Result, Tally, replay
from manyhands.simulate.wants import Wants
from manyhands.store.policies import policy

POLICIES = ("lfu", "lru", "pinned", "belady")
_CYCLES = (0.25, 0.5, 1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Row:
    """One policy under one budget. `of_belady`: its hits as a share of the hits that were possible."""

    policy: str
    budget_bytes: int
    result: Result
    of_belady: float | None

    @property
    def tally(self) -> Tally:
        """Of the decoded tokens, where there are any; else of all."""
        return judged(self.result)


def judged(result: Result) -> Tally:
    """What policies are compared by: decoded tokens, where there are any."""
    return result.decode if result.decode.tokens else result.all


def budgets_in_cycles(wants: Wants, cycle_bytes: int, num_experts: int) -> list[int]:
    """From a quarter of one token's experts by doubling, as long as not all experts fit."""
    every = num_experts * sum(wants.record_bytes)
    return [round(share * cycle_bytes) for share in _CYCLES if share * cycle_bytes < every] or [every]


def sweep(
    wants: Wants,
    policies: Sequence[str],
    budgets: Sequence[int],
    counts: Sequence[Sequence[int]] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Row]:
    """Every policy under every budget, budget after budget; Belady is always run, and shown if it is asked for.

    `counts` [L][E] is what `pinned` starts from. Raises `ConfigError` for an unknown policy.
    """
    for name in policies:
        if name not in POLICIES:
            raise ConfigError(f"no cache policy {name!r}: {', '.join(POLICIES)}")
    rows: list[Row] = []
    online = [name for name in policies if name != "belady"]
    total, done = len(budgets) * (len(online) + 1), 0
    following = next_uses(wants)
    for budget in budgets:
        best = replay(told(budget, wants, following), wants)
        most = judged(best).hits
        progress(done := done + 1, total)
        found = {"belady": best}
        for name in online:
            found[name] = replay(policy(name, budget, wants.record_bytes, counts), wants)
            progress(done := done + 1, total)
        rows += [Row(name, budget, found[name], judged(found[name]).hits / most if most else None) for name in policies]
    return rows


@dataclass(frozen=True)
class Speed:
    """Tokens per second. Infinite where nothing is read.

    roofline   by the disk alone, everything else being free.
    forecast   the disk's time and the memory's one after the other, for the experts and the dense weights.
    """

    roofline: float
    forecast: float


def speed(tally: Tally, disk: float, memory: float | None, dense_bytes: int) -> Speed:
    """Of `tally` with a disk and a memory that give so many bytes a second; the dense weights are read once a pass.

    Without `memory` the forecast is the roofline. Reading the next experts while others are computed brings the
    truth above the forecast, at most to the roofline; random reads slower than the stated rate bring it below.
    """
    read = tally.read_bytes / disk
    through = (tally.wanted_bytes + dense_bytes * tally.steps) / memory if memory else 0.0
    return Speed(_rate(tally.tokens, read), _rate(tally.tokens, read + through))


def _rate(tokens: int, seconds: float) -> float:
    return tokens / seconds if seconds else float("inf")
