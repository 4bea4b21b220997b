"""Edited routing in a program: a replay has the recorded bits; a mask, a swap, a force are what the modules make."""

from itertools import pairwise

import pytest
import torch

from manyhands.engine.batch import Batch, Row
from manyhands.engine.caches import Caches
from manyhands.engine.runner import Runner
from manyhands.kernels import native
from manyhands.moe import Force, Mask, Replay, Routing, Swap
from manyhands.moe.edit import Edits
from manyhands.runtime import prepare

from .test_program import CASES, packed_model

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no native kernels: {native.missing()}")

SPARSE = [name for name in CASES if name != "dense"]
FORMATS = ("plain", "float32", "int8", "int4")
IDS = [7, 3, 11, 30, 2, 2, 49, 8, 19]


def passes(runner: Runner, edits: Edits | None, cuts: tuple[int, ...] = (0, 6, 7, 8, 9)):
    """Logits of every token of one sequence, run in pieces, and its routing; `edits` has rows for all tokens."""
    cache = Caches(len(runner.model.layers)).new()
    logits, found = [], []
    for first, last in pairwise(cuts):
        given = edits and {
            n: e.rows(slice(first, last)) if isinstance(e, Replay | Routing) else e for n, e in edits.items()
        }
        forward = runner.run(Batch([Row(IDS[first:last], cache, every=True, edits=given)]))
        logits.append(forward.logits)
        found.append(forward.routed.layers)
    routings = {n: Routing.cat([f[n] for f in found]) for n in found[0]}
    return torch.cat(logits), routings


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", SPARSE)
def test_a_replay_has_the_recorded_bits(name: str, format: str) -> None:
    runner = Runner(packed_model(CASES[name], format))
    logits, recorded = passes(runner, None)
    assert runner._program is not None and any(part.why is None for part in runner._program.parts)
    for edits in (
        {n: Replay(r.expert_ids) for n, r in recorded.items()},
        {n: Replay.of(r, weights=True) for n, r in recorded.items()},
        {n: Replay(r.expert_ids) for n, r in recorded.items() if n == max(recorded)},
    ):
        again, routings = passes(runner, edits)
        assert torch.equal(again, logits)
        assert all(torch.equal(routings[n].weights, r.weights) for n, r in recorded.items())
    assert [p.why for p in runner._edited.parts] == [p.why for p in runner._program.parts]


EDITS = {"mask": Mask((4, 5)), "swap": Swap(0, 1), "force": Force((7, 1, 3)), "force one": Force((4,))}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("name", SPARSE)
def test_an_edit_is_what_the_modules_make_of_it(name: str, edit) -> None:
    model = packed_model(CASES[name], "float32")
    layer = max(model.sparse_layers())
    if isinstance(edit, Swap):
        chosen = passes(Runner(model), None)[1][layer].expert_ids[-1]
        edit = Swap(int(chosen[0]), next(e for e in range(8) if e not in chosen))
    logits, routings = passes(Runner(model), {layer: edit})
    with torch.no_grad():
        expected = model(torch.tensor([IDS]), edit={layer: edit})
    torch.testing.assert_close(logits, expected.logits[0], rtol=2e-4, atol=2e-4)
    for n, r in expected.routings.items():
        assert torch.equal(routings[n].expert_ids, r.expert_ids) and torch.equal(routings[n].kept, r.kept)
        torch.testing.assert_close(routings[n].weights, r.weights, rtol=1e-4, atol=1e-5)
    if isinstance(edit, Mask):
        off = routings[layer]
        assert not off.scores[:, [4, 5]].any() and (off.logits[:, [4, 5]] == float("-inf")).all()
    assert not torch.equal(logits, passes(Runner(model), None)[0])


def test_the_routers_stay_native() -> None:
    """What a mask costs is two biases, not the fast path."""
    runner = Runner(packed_model(CASES["dots"], "int8"))
    passes(runner, {1: Mask((0,))})
    assert runner._edited.whole and runner._edited.editable


def test_a_group_with_one_expert_left_is_routed_by_the_module() -> None:
    model = packed_model(CASES["dots"], "float32")  # groups of two
    runner, edits = Runner(model), {1: Mask((0,))}
    logits, routings = passes(runner, edits)
    with torch.no_grad():
        expected = model(torch.tensor([IDS]), edit=edits)
    assert not runner._edited.follows(edits) and runner._edited.follows({1: Mask((0, 1))})
    torch.testing.assert_close(logits, expected.logits[0], rtol=2e-4, atol=2e-4)
    assert torch.equal(routings[1].expert_ids, expected.routings[1].expert_ids)


def test_an_edited_step_leaves_nothing_behind() -> None:
    runner = Runner(packed_model(CASES["mixtral"], "int4"))
    edits = {0: Mask((1, 2)), 1: Force((5,)), 2: Swap(0, 3)}
    plain, edited = passes(runner, None)[0], passes(runner, edits)[0]
    assert torch.equal(passes(runner, {0: Replay(torch.full((9, 3), -1))})[0], plain)  # in the editable program
    assert torch.equal(passes(runner, None)[0], plain) and torch.equal(passes(runner, edits)[0], edited)


def test_an_edited_step_sees_changed_weights() -> None:
    model = packed_model(CASES["gpt-oss"], "float32")
    runner, edits = Runner(model), {1: Mask((3,))}
    before = passes(runner, edits)[0]
    with torch.no_grad():
        model.layers[1].mlp.router.bias.add_(torch.randn(8, generator=torch.Generator().manual_seed(0)))
        after, expected = passes(runner, edits)[0], model(torch.tensor([IDS]), edit=edits).logits[0]
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, expected, rtol=2e-4, atol=2e-4)


def test_a_program_that_was_not_made_for_edits_refuses_them() -> None:
    model = packed_model(CASES["mixtral"], "float32")
    with pytest.raises(AssertionError):
        prepare(model, 4).run([1], [1], [Caches(3).new()], [0], edits={0: Mask((1,))})


@pytest.mark.parametrize("name", ["mixtral", "dots", "gpt-oss"])
def test_rows_that_are_told_different_things_are_each_as_alone(name: str) -> None:
    model = packed_model(CASES[name], "int8")
    layer, runner = max(model.sparse_layers()), Runner(packed_model(CASES[name], "int8"))
    mask = {layer: Mask((6, 7))}
    told = [None, mask, mask, {layer: Swap(1, 2)}, {layer: Replay(torch.tensor([[5, 0, 2]] * 4))}, None]

    def run(which: list[int]) -> dict[int, torch.Tensor]:
        caches = Caches(3)
        rows = [Row([3 + i, 9, 4, 20], caches.new(), every=True, edits=told[i]) for i in which]
        batch = Batch(rows)
        forward = runner.run(batch, states=True)
        assert forward.states is not None and len(forward.states) == 4 * len(which)
        ids = forward.routed.layers[layer].expert_ids
        return {
            i: torch.cat((forward.logits[place].flatten(), ids[start : start + 4].flatten()))
            for i, place, start in zip(which, batch.logits, batch.starts, strict=True)
        }

    together = run([0, 1, 2, 3, 4, 5])
    for i in range(6):
        assert torch.equal(run([i])[i], together[i]), i


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scoring_with_an_edit(dtype: torch.dtype) -> None:
    model = packed_model(CASES["mixtral"], "plain").to(dtype)
    runner, ids = Runner(model), torch.tensor([IDS, IDS[::-1]])
    for edits in ({1: Mask((0,))}, {1: Replay(torch.tensor([[0, 1, 2]] * 18))}):
        found = runner.score(ids, None, edit=edits)
        with torch.no_grad():
            expected = model.hidden(ids, edit=edits)
        slack = 1e-4 if dtype == torch.float32 else 5e-2
        torch.testing.assert_close(found.states, expected.states, rtol=slack, atol=slack)
        assert not torch.equal(found.states, runner.score(ids, None).states)
