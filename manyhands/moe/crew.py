"""Experts shared out over processes, for one that generates: it sends them rows, they send back what their experts say.

Process 0 leads: it has all else of the model, and alone knows of requests, caches and chance. The others follow: they
wait for rows of their experts until they are told to end, so that nothing can part them.

    lead     rows sorted by expert ─ how many of each, to all ─ rows, to their owners ─ answers ─ sum
    follow   how many of each ─ rows ─ run ─ answers

An expert's rows are multiplied together, as on one process, and a token's experts are summed where it lies, in their
order: with `grouped_mm` the result is bit-equal.

R processes, E experts, T tokens, K experts per token, D width, N rows, B of them in one process.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from manyhands.errors import ProcessLost, UserError
from manyhands.kernels import BACKENDS, ExpertWeights, run_experts
from manyhands.kernels.moment import exactly, is_exact
from manyhands.kernels.permute import combine, gather, sort_pairs
from manyhands.moe.bank import ExpertBank
from manyhands.parallel.group import Group

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_END = -1
"""For a layer, in what the leader says: nothing comes any more."""


class Shared(NamedTuple):
    """The model whose experts are shared out; JSON has it as a list."""

    path: str
    num_experts: int
    """E, of each sparse layer."""
    implementation: str
    ignored: list[str]
    """Unknown fields of its config that are read past."""


class Crew:
    """The processes that hold the experts of one model: nearly as many each, and none where there are too few."""

    def __init__(self, ranks: Group) -> None:
        self.ranks = ranks
        self.owners: list[slice] = []
        """The experts of each process, once that is agreed on."""
        self._lock = threading.Lock()
        self._whole = True
        """No exchange was broken off: the others wait to be told what comes."""

    @property
    def leads(self) -> bool:
        """Whether this process is the one that generates."""
        return self.ranks.rank == 0

    def agree(self, shared: Shared | None) -> Shared:
        """What the leader brings, on every process, with which it is settled who holds which experts."""
        agreed = Shared(*self.ranks.tell(shared))
        ends = [rank * agreed.num_experts // self.ranks.size for rank in range(self.ranks.size + 1)]
        self.owners = [slice(*both) for both in pairwise(ends)]
        return agreed

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.owners[-1].stop)

    @property
    def own(self) -> slice:
        """The experts of this process."""
        return self.owners[self.ranks.rank]

    def meet(self) -> None:
        """Wait until every process has loaded its experts."""
        self.ranks.sum(torch.zeros(1))

    def ask(self, layer: int, rows_ND: Tensor, rows_E: Sequence[int], name: str, here: ExpertBank) -> Tensor:
        """[N, D]: what its expert says of each row; the first `rows_E[0]` are expert 0's, and so on. For the leader.

        `name` is the backend, `here` the experts of this process. Raises `ProcessLost` if another is gone.
        """
        own_B, *others = [sum(rows_E[own]) for own in self.owners]
        mine = partial(_run, rows_ND[:own_B], rows_E[self.own], name, here)
        with self._lock:
            if not any(others):
                return mine()
            self._whole = False
            what = [layer, _names().index(name), int(is_exact()), _DTYPES.index(rows_ND.dtype), *rows_E]
            self._broadcast(torch.tensor(what, device=self.ranks.device))
            self._exchange(rows_ND[own_B:], [0, *others], [0] * self.ranks.size)
            said_BD = mine()
            said_ND = torch.cat([said_BD, self._exchange(rows_ND[:0], [0] * self.ranks.size, [0, *others])])
            self._whole = True
        return said_ND

    @torch.inference_mode()
    def follow(self, banks: Mapping[int, ExpertBank]) -> None:
        """Run the experts of `banks`, by layer, for the leader, until it closes."""
        nothing = [0] * self.ranks.size
        while True:
            said = self._broadcast(torch.empty(4 + self.num_experts, dtype=torch.int64, device=self.ranks.device))
            layer, name, exact, dtype, *rows_E = said.tolist()
            if layer == _END:
                return
            bank, mine_B = banks[layer], [sum(rows_E[self.own]), *nothing[1:]]
            blank = torch.empty(0, bank.hidden_size, dtype=_DTYPES[dtype], device=self.ranks.device)
            rows_BD = self._exchange(blank, nothing, mine_B)
            with exactly(bool(exact)):
                said_BD = _run(rows_BD, rows_E[self.own], _names()[name], bank)
            self._exchange(said_BD, mine_B, nothing)

    def close(self) -> None:
        """Let the others end. For the leader; where an exchange was broken off they find out when this process ends."""
        with self._lock:
            if self._whole and self.owners:
                self._whole = False
                what = torch.full((4 + self.num_experts,), _END, dtype=torch.int64, device=self.ranks.device)
                with suppress(ProcessLost):  # nobody is there any more
                    self._broadcast(what)

    def _broadcast(self, said: Tensor) -> Tensor:
        with _together():
            dist.broadcast(said, group=self.ranks.group, group_src=0)
        return said

    def _exchange(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        arrived = rows.new_empty(sum(receive), rows.shape[1])
        with _together():
            dist.all_to_all_single(arrived, rows.contiguous(), receive, send, group=self.ranks.group)
        return arrived


class CrewExperts(ExpertBank):
    """E experts of one layer, some of them here, the others with the rest of a crew. For its leader; never trained."""

    def __init__(self, here: ExpertBank, crew: Crew, layer: int) -> None:
        super().__init__(here.implementation)
        self.here, self.crew, self.layer = here, crew, layer
        self.activation = here.activation

    @property
    def num_experts(self) -> int:
        """E."""
        return self.crew.num_experts

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.here.hidden_size

    def stacked(self, ids: Sequence[int]) -> ExpertWeights:
        """Raises `UserError`: they are not here."""
        raise UserError(
            "other processes hold experts of this model: their weights can be asked for on one process only"
        )

    def _run(self, x: Tensor, ids: Tensor, weights: Tensor, kept: Tensor, implementation: str | None) -> Tensor:
        if torch.is_grad_enabled() and (x.requires_grad or weights.requires_grad):
            raise UserError("other processes hold experts of this model: it generates, and no gradient goes through it")
        p = sort_pairs(ids, kept, self.num_experts)
        ends_E = p.offsets_E.long()
        rows_E = ends_E.diff(prepend=ends_E.new_zeros(1)).tolist()
        name = self.implementation if implementation is None else implementation
        return combine(self.crew.ask(self.layer, gather(x, p), rows_E, name, self.here), weights, p)


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ProcessLost("a process that holds a part of the model's experts is gone: start them all again") from error


def _run(rows_BD: Tensor, rows_C: Sequence[int], name: str, here: ExpertBank) -> Tensor:
    """What the C experts of this process say of their rows."""
    if not len(rows_BD):
        return rows_BD
    each_C = torch.tensor(rows_C, device=rows_BD.device)
    ids_B1 = torch.arange(len(rows_C), device=rows_BD.device).repeat_interleave(each_C)[:, None]
    ones_B1 = torch.ones_like(ids_B1, dtype=torch.float32)
    return run_experts(name, rows_BD, ids_B1, ones_B1, torch.ones_like(ids_B1, dtype=torch.bool), here)


def _names() -> list[str]:
    return ["auto", *BACKENDS]
