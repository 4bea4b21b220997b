"""QK-Clip on projections whose rows lie on several processes, by logits that no process has seen all of."""

import pytest
import torch
from torch import Tensor

from manyhands.parallel.group import Group
from manyhands.train.qk_clip import qk_clip_
from tests.gloo import on_processes
from tests.sharded import cut, gathered, mesh_for
from tests.train.test_qk_clip import CONFIGS, TOKENS, Attention, D, build, logits

TAU = 1.0


def built(name: str) -> Attention:
    return build(CONFIGS[name])[0].float()


def tokens(rank: int) -> Tensor:
    """The tokens of one process; those of the last are the largest."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(TOKENS, D, generator=generator) * (1 + rank)


def largest(name: str, rank: int) -> Tensor:
    """[H], of one process's tokens."""
    return logits(built(name), tokens(rank), CONFIGS[name])[0].amax((1, 2)).float()


def _clipped(ranks: Group) -> dict[str, tuple[list[float], int]]:
    """Of each kind of attention, the largest logits here, and how many weights were changed, all as on one process."""
    found = {}
    for name in ["mha", "gqa", "mla"]:
        one, attn, here = built(name), built(name), largest(name, ranks.rank)
        cut(attn, mesh_for(ranks, 1))
        everywhere = ranks.max(here)
        qk_clip_(one, everywhere, TAU, CONFIGS[name])
        qk_clip_(attn, everywhere, TAU, CONFIGS[name])
        before = dict(built(name).named_parameters())
        for path, weight in gathered(attn).items():
            assert torch.equal(weight, one.get_parameter(path).detach()), (name, path)
        found[name] = here.tolist(), sum(not torch.equal(w, before[path]) for path, w in gathered(attn).items())
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_equals_one_process_where_the_largest_logit_is_elsewhere(size: int) -> None:
    ranks = on_processes(size, _clipped)
    for name, changed in {"mha": 4, "gqa": 4, "mla": 2}.items():  # query and key; with biases where there are some
        by_rank = torch.tensor([found[name][0] for found in ranks])
        assert (by_rank[0] < by_rank.amax(0)).all(), "the first process has not seen any head's largest"
        assert {found[name][1] for found in ranks} == {changed}
