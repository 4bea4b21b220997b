"""Muon's matrices whose rows lie on several processes: each is brought together on one of them, and only there.

    my rows of M matrices ─ all-to-all ─▶ some whole matrices ─ orthogonalise ─ all-to-all ─▶ my rows of the results

Nothing is computed twice, and what is sent is twice the matrices' bytes, however many processes there are; gathering
them everywhere would send and compute R times as much. The form of Dion (arXiv 2504.05295) and torchtitan's DistMuon.

Letters: R processes, M matrices of one size, n × m one matrix, r of its n rows here.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def rows_by_rank(n: int, R: int) -> list[int]:
    """How many of n rows each of R processes holds: as `torch.chunk` cuts, so the last ones may hold none."""
    size = -(-n // R)
    return [max(0, min(size, n - rank * size)) for rank in range(R)]


def orthogonal_rows(
    rows_M: Sequence[Tensor],
    n: int,
    group: dist.ProcessGroup,
    orthogonalize: Callable[[Tensor], Tensor],
    first: int = 0,
) -> list[Tensor]:
    """This process's rows of M matrices, made orthogonal. Collective.

    Each process gets M/R whole matrices, neighbours in the list; where R does not divide M, some get one more.

    Args:
        rows_M: this process's rows `[r, m]` of each of the M n × m matrices, cut as `rows_by_rank` says.
        n: rows of a whole matrix.
        group: the processes that hold the rows.
        orthogonalize: what is done with whole matrices: `[B, n, m]` → the same shape, B ≥ 1.
        first: the process that is the first to get one more.

    Returns:
        M tensors of the shape of `rows_M`'s.
    """
    R, me, M, m = group.size(), group.rank(), len(rows_M), rows_M[0].shape[1]
    rows = rows_by_rank(n, R)
    taken = [len(range((rank - first) % R, M, R)) for rank in range(R)]
    mine = [rows[me] * m * count for count in taken]  # elements of my rows, by whose matrix they belong to
    wanted = [r * m * taken[me] for r in rows]  # elements of my matrices, by who holds them
    came = _exchange(torch.cat([x.reshape(-1) for x in rows_M]), mine, wanted, group)
    parts = torch.split(came, wanted)
    whole_Bnm = torch.cat([part.view(taken[me], r, m) for part, r in zip(parts, rows, strict=True)], dim=1)
    if len(whole_Bnm):
        whole_Bnm = orthogonalize(whole_Bnm)
    back = torch.cat([part.reshape(-1) for part in torch.split(whole_Bnm, rows, dim=1)])
    return list(_exchange(back, wanted, mine, group).view(M, rows[me], m).unbind())


def _exchange(flat: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    """Give each process its `send` elements of `flat`, in their order; what they gave this one."""
    found = flat.new_empty(sum(receive))
    dist.all_to_all_single(found, flat, receive, send, group=group)
    return found
