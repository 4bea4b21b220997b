"""A program whose experts are brought into memory as they are wanted, beside the same model with all of them there."""

import copy

import pytest
import torch

from manyhands.engine.batch import Batch, Row
from manyhands.engine.caches import Caches
from manyhands.engine.runner import Runner, has_integers
from manyhands.kernels import ExpertWeights, native
from manyhands.models import Decoder
from manyhands.moe import ExpertBank
from manyhands.moe.packed import RecordExperts
from manyhands.quant import FetchedExperts, PackedExperts

from ..kernels.some_resident import SomeResident
from .test_program import CASES, packed_model

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no native kernels: {native.missing()}")


class FetchedBank(ExpertBank):
    """Experts of which two are in memory."""

    def __init__(self, packed: PackedExperts, activation: str) -> None:
        super().__init__()
        self.packed, self.activation = packed, activation
        self.source = SomeResident(packed, [0, 5])

    @property
    def num_experts(self) -> int:
        return self.packed.num_experts

    @property
    def hidden_size(self) -> int:
        return self.packed.layout.matrices[0].inputs

    def stacked(self, ids) -> ExpertWeights:
        part = PackedExperts(self.packed.records[list(ids)], self.packed.layout)
        return ExpertWeights(*part.dequantize(), self.activation)

    def fetched_experts(self) -> FetchedExperts:
        return self.source.experts


def fetched_model(model: Decoder) -> tuple[Decoder, dict[int, FetchedBank]]:
    """The same model with such banks."""
    model, banks = copy.deepcopy(model), {}
    for layer, moe in model.sparse_layers().items():
        assert type(moe.experts) is RecordExperts
        banks[layer] = moe.experts = FetchedBank(moe.experts.packed, moe.experts.activation)
    return model.eval(), banks


def steps(runner: Runner, cache, first: int, *counts: int) -> torch.Tensor:
    """States of the next tokens, so many at a time."""
    states = []
    for count in counts:
        ids = list(range(first, first + count))
        states.append(runner.run(Batch([Row(ids, cache)]), states=True).states)
        first += count
    return torch.cat(states)


@torch.no_grad()
@pytest.mark.parametrize("format", ["int8", "bf16"])
@pytest.mark.parametrize("case", ["qwen3", "dots", "qwen2", "gpt-oss"])
def test_a_program_fetches(case: str, format: str) -> None:
    model = packed_model(CASES[case], format)
    other, banks = fetched_model(model)
    runner = Runner(other)
    expected = steps(Runner(model), Caches(3).new(), 0, 1, 7, 1, 12, 1)
    assert torch.equal(steps(runner, Caches(3).new(), 0, 1, 7, 1, 12, 1), expected)
    assert runner._program.whole
    for layer, bank in banks.items():
        begun = [what for what in bank.source.asked if what[0] == "begin"]
        assert [what[1] for what in begun] == [layer] * 5
        assert len(bank.source.asked) > 5


@torch.no_grad()
def test_many_rows_are_fetched_too() -> None:
    """Plain weights beside them would go through the modules from 17 rows on."""
    model = packed_model(CASES["qwen2"], "bf16")
    other, banks = fetched_model(model)
    steps(Runner(other), Caches(3).new(), 0, 40)
    assert all([what[0] for what in bank.source.asked].count("begin") == 1 for bank in banks.values())
    assert not has_integers(other.modules())
    assert has_integers(fetched_model(packed_model({}, "int8"))[0].sparse_layers()[0].modules())


@torch.no_grad()
def test_the_table_may_change_between_steps() -> None:
    """Evicted records are overwritten: an old address would give other numbers. The program stays the same."""
    model = packed_model(CASES["qwen3"], "int8")
    other, banks = fetched_model(model)
    runner, cache, theirs = Runner(other), Caches(3).new(), Caches(3).new()
    program = None
    for i, kept in enumerate([(), (1, 2), range(8), (7,), (0, 3)]):
        for bank in banks.values():
            bank.source.keep(kept)
        assert torch.equal(steps(runner, cache, i, 1), steps(Runner(model), theirs, i, 1))
        assert program is None or runner._program is program
        program = runner._program


@torch.no_grad()
@pytest.mark.parametrize("change", ["source", "table", "memory", "native"])
def test_another_table_is_seen(change: str) -> None:
    model = packed_model(CASES["qwen3"], "int8")
    other, banks = fetched_model(model)
    runner, cache, theirs = Runner(other), Caches(3).new(), Caches(3).new()
    assert torch.equal(steps(runner, cache, 0, 1), steps(Runner(model), theirs, 0, 1))
    program = runner._program
    for bank in banks.values():
        if change == "source":
            bank.source = SomeResident(bank.packed, [1])
        elif change == "table":
            old = bank.source.experts
            bank.source.experts = FetchedExperts(old.table.clone(), old.layout, old.source)
            old.table.fill_(64)  # an address of nothing
        elif change == "memory":
            table = bank.source.experts.table
            table.set_(table.clone())
        else:
            bank.implementation = "eager"
    assert not program.current()
    again = steps(runner, cache, 1, 1)
    if change == "native":
        assert not runner._program.whole
    else:
        assert torch.equal(again, steps(Runner(model), theirs, 1, 1))


@torch.no_grad()
def test_what_the_source_raises_ends_the_step_and_not_the_next() -> None:
    model = packed_model(CASES["dots"], "int8")
    other, banks = fetched_model(model)
    bank = banks[max(banks)]
    expected = steps(Runner(model), Caches(3).new(), 0, 5)
    runner = Runner(other)

    def broken(layer: int, expert: int) -> int:
        raise OSError("the disk is gone")

    bank.source.wait = broken
    with pytest.raises(OSError, match="the disk is gone"):
        steps(runner, Caches(3).new(), 0, 5)
    del bank.source.wait
    assert torch.equal(steps(runner, Caches(3).new(), 0, 5), expected)


@torch.no_grad()
def test_records_that_move_leave_no_table_behind() -> None:
    """A program's table is of the records as they lie: others at another place are another program."""
    model = packed_model(CASES["qwen3"], "int8")
    runner, cache, theirs = Runner(model), Caches(3).new(), Caches(3).new()
    for i in range(3):
        assert torch.equal(steps(runner, cache, i, 1), steps(Runner(model), theirs, i, 1))
        for moe in model.sparse_layers().values():
            old = moe.experts.records
            moe.experts.records = old.flip(1).flip(1)
            old.fill_(255)
