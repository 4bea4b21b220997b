"""Tasks: the step knows none of them. A loss is a sum over targets divided by their number, however they are cut."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from manyhands.config import RunConfig
from manyhands.errors import DataError
from manyhands.models import Decoder, init_weights
from manyhands.parallel.ranks import Ranks
from manyhands.trace.journal import read_journal
from manyhands.train import loop
from manyhands.train.guard import SpikeGuard
from manyhands.train.optim import Optimizers
from manyhands.train.step import StepResult, train_step
from manyhands.train.task import Count, Forward, LanguageModelling, Loss, Task, next_token_loss

from ..small_runs import small_run, write_text
from ..thread_ranks import ThreadRanks, on_ranks


@dataclass(frozen=True)
class Masked:
    """Ids [B, S + 1], and which of the S next tokens are asked for [B, S]."""

    ids: torch.Tensor
    asked: torch.Tensor


class MaskedTargets(LanguageModelling):
    """The prompt's tokens are read and not asked for."""

    def split(self, batch: Masked, size: int | None) -> Sequence[Masked]:  # type: ignore[override]
        size = size or len(batch.ids)
        return [Masked(*part) for part in zip(batch.ids.split(size), batch.asked.split(size), strict=True)]

    def count(self, micro: Masked) -> Count:  # type: ignore[override]
        return Count(len(micro.ids), micro.asked.numel(), int(micro.asked.sum()))

    def loss(self, model: Decoder, micro: Masked, how: Forward) -> Loss:  # type: ignore[override]
        return next_token_loss(model, micro.ids, micro.asked, how)

    def batches(self, data: Any, run: RunConfig, ranks: Ranks) -> Any:
        stream = super().batches(data, run, ranks)

        class Halves:
            """The second half of every sequence is asked for."""

            state_dict, load_state_dict = stream.state_dict, stream.load_state_dict

            def __next__(self) -> Masked:
                ids = next(stream)
                asked = torch.arange(ids.shape[1] - 1).expand(len(ids), -1) >= ids.shape[1] // 2
                return Masked(ids, asked)

        return Halves()

    def figures(self, loss: float, data: Any) -> dict[str, float]:
        return {}


class Classify(LanguageModelling):
    """Another kind of batch: a list of (ids [S], class), one target per sequence."""

    def split(self, batch: list[Any], size: int | None) -> Sequence[Any]:  # type: ignore[override]
        size = size or len(batch)
        return [batch[i : i + size] for i in range(0, len(batch), size)]

    def count(self, micro: list[Any]) -> Count:  # type: ignore[override]
        return Count(len(micro), sum(len(ids) for ids, _ in micro), len(micro))

    def loss(self, model: Decoder, micro: list[Any], how: Forward) -> Loss:  # type: ignore[override]
        hidden = model.hidden(torch.stack([ids for ids, _ in micro]), dtype=how.dtype)
        wanted = torch.tensor([wanted for _, wanted in micro])
        return Loss(F.cross_entropy(F.linear(hidden.states[:, -1], model.head_weight), wanted), hidden.routings, {})


def take(
    batch: Any, task: Task | None, *changes: str, ranks: Ranks | None = None
) -> tuple[StepResult, dict[str, torch.Tensor]]:
    """One step in float64 that changes nothing, and its gradients. (The router is float32 at any dtype.)"""
    run = small_run(Path("unused"), "balance.aux_scope=sequence", "optim.grad_clip=null", *changes)
    model = Decoder(run.model, "eager")
    init_weights(model, 0)
    model.double().train()
    result = train_step(model, Optimizers([]), SpikeGuard(run.guard), batch, run, 1, 0.0, torch.float64, task, ranks)
    return result, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def ids_of(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 300, (4, 33), generator=torch.Generator().manual_seed(seed))


def assert_same(one: Any, other: Any, tolerance: float = 1e-6) -> None:
    """Relative to each gradient's largest entry: the float32 router and balance terms round differently."""
    assert one[0].loss == pytest.approx(other[0].loss, rel=tolerance)
    assert one[0].terms == pytest.approx(other[0].terms, rel=tolerance)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        torch.testing.assert_close(gradient, other[1][name], rtol=0, atol=tolerance * float(gradient.abs().max()))


UNEQUAL = torch.zeros(4, 32, dtype=torch.bool)
UNEQUAL[0] = True
UNEQUAL[1, 30:] = True
UNEQUAL[3, 7] = True  # and row 2 has no target


@pytest.mark.parametrize("size", [1, 2])
def test_accumulation_over_unequal_masks_is_one_big_batch(size: int) -> None:
    batch = Masked(ids_of(), UNEQUAL)
    parts = take(batch, MaskedTargets(), f"train.micro_batch_size={size}")
    assert_same(take(batch, MaskedTargets()), parts)
    assert parts[0].count == Count(4, 128, 35)
    means = [take(Masked(ids_of()[i : i + 1], UNEQUAL[i : i + 1]), MaskedTargets())[0].loss for i in (0, 1, 3)]
    assert abs(sum(means) / 3 - parts[0].loss) > 0.01  # what a mean of means would have said


@pytest.mark.parametrize("rows", [slice(0, 4), slice(1, 3)], ids=["34 and 1 targets", "2 and none"])
def test_unequal_masks_on_two_ranks_are_one_big_batch(rows: slice) -> None:
    ids, asked = ids_of()[rows], UNEQUAL[rows]
    half = len(ids) // 2

    def work(ranks: ThreadRanks) -> tuple[StepResult, dict[str, torch.Tensor]]:
        mine = slice(half * ranks.rank, half * (ranks.rank + 1))
        size = "train.micro_batch_size=1"
        return take(Masked(ids[mine], asked[mine]), MaskedTargets(), size, ranks=ranks)

    whole = take(Masked(ids, asked), MaskedTargets())
    for found in on_ranks(2, work):
        assert_same(whole, found)
        assert found[0].count == whole[0].count


def test_all_targets_are_language_modelling_bit_for_bit() -> None:
    one = take(ids_of(), None, "train.micro_batch_size=2")
    other = take(Masked(ids_of(), torch.ones(4, 32, dtype=torch.bool)), MaskedTargets(), "train.micro_batch_size=2")
    assert one[0].loss == other[0].loss and all(torch.equal(one[1][name], other[1][name]) for name in one[1])


def test_a_batch_may_be_anything() -> None:
    batch = [(ids[:32], number) for number, ids in enumerate(ids_of())]
    whole = take(batch, Classify())
    assert_same(whole, take(batch, Classify(), "train.micro_batch_size=1"))
    assert whole[0].count == Count(4, 128, 4) and whole[0].loss > 1


def test_a_step_without_a_target_is_an_error() -> None:
    with pytest.raises(DataError, match="step 1: none of its 128 tokens is a target"):
        take(Masked(ids_of(), torch.zeros_like(UNEQUAL)), MaskedTargets())


def test_a_run_of_another_task(tmp_path: Path) -> None:
    """The loop as it is: tokens are those that were read, and the text's bits per byte are not made up."""
    run = small_run(write_text(tmp_path), "train.max_steps=2")
    loop.train(tmp_path / "run", run, quiet=True, task=MaskedTargets())
    first = next(r for r in read_journal(tmp_path / "run" / "journal.jsonl") if r["kind"] == "step")
    assert first["tokens"] == 128 and "bits_per_byte" not in first
