"""What an engine has done, counted: every token at each of its experts, once."""

import numpy as np
import torch

from manyhands.engine.counters import Counters
from manyhands.engine.runner import Routed
from manyhands.moe import Routing

from .conftest import build


def routed(ids_LTK, sizes):
    """Of a pass of T tokens, as a native program gives it, or as modules do."""
    weights = torch.ones(ids_LTK.shape)
    scores = torch.zeros(ids_LTK.shape[1], 4)
    layers = {
        layer: Routing(ids, w, scores, scores, ids >= 0, torch.ones(len(ids), dtype=torch.bool))
        for layer, ids, w in zip((1, 2), ids_LTK, weights, strict=True)
    }
    return Routed(lambda: layers, ids_LTK.shape[1], (lambda: (ids_LTK, weights)) if sizes else None)


def test_every_token_counts_at_its_experts_and_no_expert_is_nobodys():
    generator, seen = torch.Generator().manual_seed(0), []
    counters = Counters(build().config, {1: 100, 2: 1})
    assert counters.total.experts == {} and counters.recent.experts == {}
    for number in range(6):
        ids = torch.randint(-1, 4, (2, 1 + number, 2), generator=generator)
        seen.append(ids)
        counters.step(routed(ids, number % 2), made=1)
    every = torch.cat(seen, 1)
    for i, layer in enumerate((1, 2)):
        right = [int((every[i] == e).sum()) for e in range(4)]
        assert counters.total.experts[layer].tolist() == counters.recent.experts[layer].tolist() == right
        assert counters.total.experts[layer].dtype == np.int64
    assert (counters.total.tokens, counters.total.made, counters.steps) == (21, 6, 6)
    distinct = [sum(len(set(layer[layer >= 0].tolist())) for layer in ids) for ids in seen]
    assert sorted(counters.distinct.elements()) == sorted(distinct) and counters.lookups == sum(distinct)
    assert counters.bytes_ram == sum(len(set(ids[0][ids[0] >= 0].tolist())) * 99 for ids in seen) + sum(distinct)


def test_a_dense_model_has_no_experts_to_count():
    counters = Counters(build().config.model_copy(update={"moe": None}), {})
    counters.step(Routed(dict, 3), made=1)
    assert counters.total.experts == {} and (counters.total.tokens, counters.distinct) == (3, {0: 1})
