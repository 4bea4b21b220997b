"""Where experts lie: each on one device or on several, so that a recorded load is shared out evenly.

DeepSeek's expert-parallel load balancer (arXiv 2412.19437 §3.4; github.com/deepseek-ai/EPLB): the busiest experts get
further copies, and copies are packed onto devices of equal size, the heaviest first, onto the lightest with room.
Groups of experts that a token's choice is limited to are packed onto nodes first, so that a token reaches few nodes.

L layers   E experts   S slots of experts, S/R successive ones on each of R devices   G groups of E/G successive experts
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from manyhands.errors import ConfigError

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Slots:
    """Which expert lies in each slot.

    experts_LS  [L, S] int64; every expert of a layer lies somewhere.
    devices     R.
    """

    experts_LS: npt.NDArray[np.int64]
    devices: int

    @cached_property
    def copies(self) -> npt.NDArray[np.int64]:
        """[L, E] how many slots have each expert."""
        E = int(self.experts_LS.max()) + 1
        return np.stack([np.bincount(slots, minlength=E) for slots in self.experts_LS])

    def device_load(self, load_LE: Array) -> npt.NDArray[np.float64]:
        """[L, R] of a load of experts, each copy taking an equal part: what `device_of` does to many tokens."""
        L, R = len(self.experts_LS), self.devices
        each_LS = np.take_along_axis(load_LE / self.copies, self.experts_LS, axis=1)
        found: npt.NDArray[np.float64] = each_LS.reshape(L, R, -1).sum(-1)
        return found

    def device_of(self, ids_TLK: Array, turn_T: Array, none: int) -> npt.NDArray[np.int64]:
        """[T, L, K] the device that computes each pair; R for no expert (`none`).

        The token of turn t takes copy number t mod copies of an expert, in the order of slots. Tokens take turns as
        they come, so copies get equal parts, and nothing is drawn.
        """
        here = ids_TLK != none
        ids_TLK = np.where(here, ids_TLK, 0).astype(np.int64)
        layer_L1 = np.arange(len(self.experts_LS))[:, None]
        copies_TLK = self.copies[layer_L1, ids_TLK]
        devices = self._devices[layer_L1, ids_TLK, turn_T[:, None, None] % copies_TLK]
        return np.where(here, devices, self.devices)

    @cached_property
    def _devices(self) -> npt.NDArray[np.int64]:
        """[L, E, most copies] the device of each copy; 0 behind an expert's last."""
        L, S = self.experts_LS.shape
        copies = self.copies
        order = np.argsort(self.experts_LS, axis=1, kind="stable")
        sorted_LS = np.take_along_axis(self.experts_LS, order, axis=1)
        first = np.cumsum(copies, axis=1) - copies
        number = np.arange(S) - np.take_along_axis(first, sorted_LS, axis=1)
        found = np.zeros((L, copies.shape[1], int(copies.max())), np.int64)
        found[np.arange(L)[:, None], sorted_LS, number] = order // (S // self.devices)
        return found


def imbalance(load_LR: Array) -> npt.NDArray[np.float64]:
    """[L] busiest over mean; 1 where nothing came."""
    mean_L = load_LR.mean(-1)
    found: npt.NDArray[np.float64] = np.divide(load_LR.max(-1), mean_L, out=np.ones(len(load_LR)), where=mean_L > 0)
    return found


def contiguous(layers: int, experts: int, devices: int) -> Slots:
    """Experts in their order, E/R on each device, as in training. Raises `ConfigError` where R does not divide E."""
    if experts % devices:
        raise ConfigError(f"{devices} devices do not divide {experts} experts")
    return Slots(np.broadcast_to(np.arange(experts, dtype=np.int64), (layers, experts)).copy(), devices)


def balanced(load_LE: Array, devices: int, redundant: int = 0, groups: int = 1, nodes: int = 1) -> Slots:
    """Experts placed by a load, with `redundant` further copies per layer.

    Where `nodes` divides `groups`, groups are packed onto nodes and copies stay within their node (the "hierarchical"
    policy); elsewhere nodes and groups are not looked at (the "global" one). Ties go to the lower index.
    Raises `ConfigError` where devices do not divide the slots, nodes the devices, or groups the experts.
    """
    E = load_LE.shape[1]
    slots = E + redundant
    if slots % devices:
        raise ConfigError(
            f"{devices} devices do not divide {slots} slots ({E} experts and {redundant} redundant): "
            f"{redundant + -slots % devices} redundant ones would do"
        )
    if devices % nodes:
        raise ConfigError(f"{nodes} nodes do not divide {devices} devices")
    if E % groups:
        raise ConfigError(f"{groups} groups do not divide {E} experts")
    if groups % nodes:
        groups = nodes = 1
    placed = [_placed(np.asarray(load_E, np.float64), slots, devices, groups, nodes) for load_E in load_LE]
    return Slots(np.array(placed, np.int64), devices)


def _placed(load_E: npt.NDArray[np.float64], slots: int, devices: int, groups: int, nodes: int) -> list[int]:
    """The expert of each slot of one layer."""
    size = len(load_E) // groups
    placed: list[int] = []
    for members in _packed(load_E.reshape(groups, size).sum(1).tolist(), nodes):
        experts = [group * size + i for group in members for i in range(size)]
        copied, shares = _copied(load_E[experts].tolist(), slots // nodes)
        placed += [experts[copied[i]] for device in _packed(shares, devices // nodes) for i in device]
    return placed


def _copied(load: Sequence[float], slots: int) -> tuple[list[int], list[float]]:
    """Who lies in each of `slots`: everybody once, then whoever has most for each copy; and what each copy gets."""
    copies = [1] * len(load)
    heap = [(-value, i) for i, value in enumerate(load)]
    heapq.heapify(heap)
    found = list(range(len(load)))
    while len(found) < slots:
        i = heap[0][1]
        found.append(i)
        copies[i] += 1
        heapq.heapreplace(heap, (-load[i] / copies[i], i))
    return found, [load[i] / copies[i] for i in found]


def _packed(weights: Sequence[float], packs: int) -> list[list[int]]:
    """Items in packs of equal size: the heaviest first, each into the lightest pack with room."""
    room = len(weights) // packs
    if room == 1:
        return [[i] for i in range(packs)]
    found: list[list[int]] = [[] for _ in range(packs)]
    lightest = [(0.0, pack) for pack in range(packs)]
    for i in sorted(range(len(weights)), key=lambda i: -weights[i]):
        weight, pack = heapq.heappop(lightest)
        found[pack].append(i)
        if len(found[pack]) < room:
            heapq.heappush(lightest, (weight + weights[i], pack))
    return found
