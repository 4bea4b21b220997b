"""The best that any policy could do: keep what is wanted again soonest. It must be told the future."""

import heapq
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from manyhands.simulate.wants import Wants, runs
from manyhands.store.policies import Decision, Key, Miss, Policy

NEVER = int(np.iinfo(np.int32).max)


class Belady(Policy):
    """Of what is in memory and what was just read, that which is wanted again last gives way.

    next_uses   for each want in order, for each of its experts, the number of the next want that has it; `NEVER`.

    Belady, "A study of replacement algorithms for a virtual-storage computer", 1966 (MIN), with the newcomer among
    those that may go: for records of one size no policy of this interface hits more often. With records of several
    sizes it is a rule of thumb (the optimum is NP-hard).
    What a layer has just used may give way too, since no other layer needs it: only this policy does that.
    """

    def __init__(self, budget_bytes: int, record_bytes: Sequence[int], next_uses: Iterator[Sequence[int]]) -> None:
        super().__init__(budget_bytes, record_bytes)
        self._next_uses = next_uses
        self._next: dict[Key, int] = {}
        self._furthest: list[tuple[int, Key]] = []  # heap of (-next use, key), with stale entries

    def want(self, layer: int, experts: Sequence[int]) -> Decision:
        """As in `Policy`; wants must be those of which `next_uses` tells, in that order."""
        keys = [(layer, expert) for expert in experts]
        uses = next(self._next_uses)
        if len(uses) != len(keys):
            raise ValueError(f"Belady was told of {len(uses)} experts in this want, and it has {len(keys)}")
        resident, size = self.resident, self.record_bytes[layer]
        missing = [key for key in keys if key not in resident]
        for key, use in zip(keys, uses, strict=True):
            self._next[key] = use
            heapq.heappush(self._furthest, (-use, key))
        staying, leaving = self._choose(missing, self.used_bytes + len(missing) * size - self.budget_bytes)
        for key in leaving:
            self.used_bytes -= resident.pop(key)
        hits = tuple(key[1] for key in keys if key not in missing)
        misses = []
        for key in missing:
            kept = key in staying
            misses.append(Miss(key[1], leaving if kept else (), kept))
            if kept:
                resident[key] = size
                self.used_bytes += size
                leaving = ()
        return Decision(hits, tuple(misses))

    def _choose(self, missing: list[Key], over: int) -> tuple[set[Key], tuple[Key, ...]]:
        """Which of `missing` stay, and who in memory leaves, so that `over` bytes are none."""
        staying, leaving = set(missing), []
        size = self.record_bytes[missing[0][0]] if missing else 0
        while over > 0 and staying:
            use, key = heapq.heappop(self._furthest)
            if -use != self._next[key]:
                continue
            if key in staying:
                staying.remove(key)
                over -= size
            elif key in self.resident and key not in leaving:
                leaving.append(key)
                over -= self.resident[key]
        if not staying:  # with records of several sizes: nobody makes place for one that does not stay
            for key in leaving:
                heapq.heappush(self._furthest, (-self._next[key], key))
            leaving = []
        if len(self._furthest) > 1024 + 8 * len(self.resident):
            self._furthest = [(-self._next[key], key) for key in {*self.resident, *staying} - {*leaving}]
            heapq.heapify(self._furthest)
        return staying, tuple(leaving)

    def _use(self, keys: Sequence[Key]) -> None:
        raise NotImplementedError

    def _leaving(self, key: Key, short: int, wanted: set[Key]) -> list[Key] | None:
        raise NotImplementedError


def next_uses(wants: Wants) -> npt.NDArray[np.int32]:
    """[sum of sizes] for each wanted expert, the number of the next want that has it; `NEVER`."""
    L, W = len(wants.record_bytes), len(wants.sizes)
    layer_of = np.repeat(np.arange(W, dtype=np.int32) % L, wants.sizes).astype(np.uint16)
    following = np.full(len(wants.experts), NEVER, np.int32)
    for layer in range(L):
        place = np.flatnonzero(layer_of == layer)
        number = np.repeat(np.arange(layer, W, L, dtype=np.int32), wants.sizes[layer::L])
        expert = wants.experts[place]
        order = np.argsort(expert, kind="stable")
        again = expert[order[:-1]] == expert[order[1:]]
        following[place[order[:-1][again]]] = number[order[1:][again]]
    return following


def told(budget_bytes: int, wants: Wants, following: npt.NDArray[np.int32] | None = None) -> Belady:
    """The policy for exactly these wants; `following` is `next_uses(wants)`, where it is there already."""
    uses = next_uses(wants) if following is None else following
    return Belady(budget_bytes, wants.record_bytes, runs(uses, wants.sizes))
