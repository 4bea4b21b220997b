"""Two ranks on the halves of each batch are one process on the whole: the same decisions, the same updates."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from manyhands.config import RunConfig
from manyhands.errors import TrainingHalted
from manyhands.models import Decoder, init_weights
from manyhands.parallel.ranks import Alone, Ranks, largest_of, sum_of
from manyhands.text import PackedBatches
from manyhands.train import step
from manyhands.train.guard import SpikeGuard
from manyhands.train.optim import build_optimizers

from ..small_runs import small_run
from ..thread_ranks import ThreadRanks, on_ranks

SETTINGS = [
    "optim.grad_clip=0.5",
    "optim.qk_clip=0.02",
    "model.attention.qk_norm=none",
    "balance.bias_update_rate=0.05",
    "balance.z_loss_coef=0.01",
]
TOLERANCE = 2e-5  # of a weight's largest entry, in float64: the router is float32, and Muon's matrices divide by norms


def steps(
    run: RunConfig, ranks: Ranks, seen: list[Any], spoil: Callable[[Decoder, int], None] | None = None
) -> dict[str, torch.Tensor]:
    """Four steps; `seen` gets what was decided."""
    model = Decoder(run.model, "eager")
    init_weights(model, 0)
    model.double().train()
    optimizers, guard = build_optimizers(model, run.optim), SpikeGuard(run.guard)
    tokens = torch.randint(0, 300, (4000,), generator=torch.Generator().manual_seed(1)).numpy()
    batches = PackedBatches(tokens, 32, 4, 0, ranks.rank, ranks.size)
    for number in range(1, 5):
        if spoil is not None:
            spoil(model, number)
        batch = next(batches)
        result = step.train_step(model, optimizers, guard, batch, run, number, 1e-3, torch.float64, None, ranks)
        counts = {layer: counter.counts.tolist() for layer, counter in result.counters.items()}
        seen.append((result.loss, result.grad_norm, result.terms, result.skipped, counts, result.count))
    return model.state_dict()


@pytest.mark.parametrize("scope", ["global", "sequence"])
def test_two_halves_are_the_whole(scope: str) -> None:
    run = small_run(Path("unused"), *SETTINGS, f"balance.aux_scope={scope}")
    alone: list[Any] = []
    weights = steps(run, Alone(), alone)
    seen: list[list[Any]] = [[], []]
    both = on_ranks(2, lambda ranks: steps(run, ranks, seen[ranks.rank]))
    assert seen[0] == seen[1] and all(torch.equal(both[0][name], both[1][name]) for name in weights)
    for (loss, norm, terms, *decided), (loss2, norm2, terms2, *decided2) in zip(alone, seen[0], strict=True):
        assert decided == decided2  # skipped or not, the pairs of every expert, how many targets
        assert (loss2, norm2, terms2) == (
            pytest.approx(loss, rel=1e-5),
            pytest.approx(norm, rel=1e-4),
            pytest.approx(terms, rel=1e-5),
        )
    for name, value in weights.items():
        if name.endswith("e_score_correction_bias"):
            assert torch.equal(value, both[0][name]) and value.abs().max() > 0
        torch.testing.assert_close(value, both[0][name], rtol=0, atol=TOLERANCE * float(value.abs().max()))


def test_a_spike_or_nan_on_one_rank_is_everybodys() -> None:
    """The guard judges the whole; a gradient that is not finite on one rank stops all, with every weight as it was."""
    run = small_run(Path("unused"), *SETTINGS)

    def work(ranks: ThreadRanks) -> tuple[str, bool]:
        before: dict[str, torch.Tensor] = {}
        models: list[Decoder] = []

        def spoil(model: Decoder, number: int) -> None:
            if number == 3:
                models.append(model)
                before.update({name: p.clone() for name, p in model.state_dict().items()})
                if ranks.rank == 1:
                    model.get_parameter("layers.1.mlp.experts.down_proj").register_hook(
                        lambda grad: grad * float("nan")
                    )

        with pytest.raises(TrainingHalted) as halted:
            steps(run, ranks, [], spoil)
        return str(halted.value), all(torch.equal(before[n], p) for n, p in models[0].state_dict().items())

    said = on_ranks(2, work)
    assert [text for text, _ in said] == [
        "step 3: the gradient of layers.1.mlp.experts.down_proj is not finite; no weight was changed"
    ] * 2
    assert all(same for _, same in said)


def test_numbers_of_one_and_of_two() -> None:
    assert sum_of([0.1, 2], Alone()) == largest_of([0.1, 2], Alone()) == [0.1, 2.0]
    assert on_ranks(2, lambda r: (sum_of([1.5, r.rank], r), largest_of([-1, r.rank], r))) == [([3, 1], [-1, 1])] * 2
