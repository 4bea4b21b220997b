"""Values that are not finite, spikes."""

import json
import math
import random

import pytest
import torch

from manyhands.config import GuardConfig
from manyhands.errors import TrainingHalted
from manyhands.train.guard import SpikeGuard, first_non_finite


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_first_tensor_that_is_not_finite_is_named(bad, dtype):
    tensors = {name: torch.randn(7, 5, dtype=dtype) for name in "abcd"}
    assert first_non_finite(tensors.items()) is None
    tensors["c"][3, 2] = bad
    assert first_non_finite(tensors.items()) == "c"
    tensors["b"][0, 0] = bad
    assert first_non_finite(iter(tensors.items())) == "b"


def test_opposite_infinities_do_not_cancel():
    assert first_non_finite([("x", torch.tensor([math.inf, -math.inf]))]) == "x"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_sum_that_overflows_accuses_nobody(dtype):
    large = torch.full((100,), torch.finfo(dtype).max, dtype=dtype)
    assert first_non_finite([("x", large), ("y", -large)]) is None
    assert first_non_finite([("x", large), ("y", torch.tensor([math.nan]))]) == "y"


def test_nothing_to_check():
    odd = [("none", None), ("int", torch.tensor([1])), ("empty", torch.empty(0)), ("bool", torch.tensor(True))]
    assert first_non_finite(odd) is None
    assert first_non_finite([]) is None
    parameter = torch.nn.Parameter(torch.tensor([math.nan]))
    assert first_non_finite([*odd, ("p", parameter)]) == "p"


def filled(config=None, steps=128, seed=0):
    guard, rng = SpikeGuard(config or GuardConfig()), random.Random(seed)
    for _ in range(steps):
        assert not guard.observe(rng.gauss(3, 0.1), rng.gauss(1, 0.05))
    return guard


def test_exactly_the_spike_is_skipped_and_counted():
    guard, rng = filled(), random.Random(1)
    assert not guard.observe(3 + 4 * 0.1, 1)
    assert guard.observe(3 + 10 * 0.1, 1)
    assert guard.observe(3, 4)
    assert (guard.num_skipped, guard.num_consecutive) == (2, 2)
    for _ in range(300):
        assert not guard.observe(rng.gauss(3, 0.1), rng.gauss(1, 0.05))
    assert (guard.num_skipped, guard.num_consecutive, guard.num_observed) == (2, 0, 431)


def test_one_spike_does_not_hide_the_next():
    guard = filled()
    for _ in range(3):
        assert guard.observe(1e6, 1e6)
        assert not guard.observe(3, 1)
    assert max(guard.state_dict()["losses"]) < 6 and max(guard.state_dict()["grad_norms"]) < 30


@pytest.mark.parametrize(("before", "after"), [((1.0, 0.5), (1.01, 2.0)), ((0.5, 1.0), (2.0, 1.0)), ((2, 1), (7, 6))])
@pytest.mark.parametrize("spread", [0.0, 0.03])
def test_a_level_that_lasts_is_learnt(before, after, spread):
    guard, rng = SpikeGuard(GuardConfig()), random.Random(0)
    draw = lambda pair: [value * math.exp(rng.gauss(0, spread)) for value in pair]  # noqa: E731
    assert not any(guard.observe(*draw(before)) for _ in range(200))
    assert sum(guard.observe(*draw(after)) for _ in range(400)) <= 4
    assert guard.num_levels <= 1
    assert guard.observe(20 * after[0], after[1]) and guard.observe(after[0], 20 * after[1])  # spikes still are


def test_a_flat_loss_one_percent_up_is_no_spike():
    guard = SpikeGuard(GuardConfig())
    assert not any(guard.observe(1.0, 1.0) for _ in range(200))
    assert not any(guard.observe(1.01, 1.0) for _ in range(200))


def test_what_keeps_rising_is_no_level():
    guard = filled()
    with pytest.raises(TrainingHalted):
        for step in range(60):
            guard.observe(4 * 1.3**step, 1)


def test_false_alarms_on_long_tails():
    """At most about one ordinary update in a thousand, with tails down to an infinite variance."""
    rng = random.Random(0)
    tails = {
        "lognormal": lambda: math.exp(rng.gauss(0, 1)),
        "pareto": lambda: rng.paretovariate(2),
        "rare doubling": lambda: rng.gauss(0.7, 0.05) * (2.2 if rng.random() < 1 / 200 else 1),
    }
    for name, draw in tails.items():
        guard = SpikeGuard(GuardConfig(max_skips=1000))
        skipped = sum(guard.observe(rng.gauss(3, 0.1), draw()) for _ in range(2000))
        assert skipped <= 4, (name, skipped)


@pytest.mark.parametrize("pair", [(math.nan, 1.0), (3.0, math.inf), (3.0, math.nan)])
@pytest.mark.parametrize("steps", [0, 128])
def test_a_value_that_is_not_finite_is_a_spike_from_the_first_step(pair, steps):
    assert filled(steps=steps).observe(*pair)


def test_ten_in_a_row_stop_the_run_with_advice():
    guard = filled()
    for step in range(9):
        assert guard.observe(9 * 2**step, 1)
    assert not guard.observe(3, 1)
    for _ in range(9):
        assert guard.observe(90, 1)  # no level: thirty times the mean
    with pytest.raises(TrainingHalted) as caught:
        guard.observe(90, 1)
    message = str(caught.value)
    assert "\n" not in message and message.startswith("step 148: 10 updates in a row were skipped")
    for advice in ("weights are those of step 138", "optim.lr", "warmup_steps", "data around step 139", "--resume"):
        assert advice in message
    assert guard.num_skipped == 19 and caught.value.exit_code == 3


def test_the_window_survives_a_resume_bit_for_bit():
    config = GuardConfig(spike_window=64)
    whole, rng = filled(config, 200), random.Random(7)
    assert whole.observe(9, 1)
    resumed = SpikeGuard(config)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict(), allow_nan=False)))
    assert resumed.state_dict() == whole.state_dict()
    assert len(resumed.state_dict()["losses"]) == 64
    for step in range(200):
        pair = (rng.gauss(3, 0.1) + (step % 50 == 9), rng.gauss(1, 0.05))
        assert whole.observe(*pair) == resumed.observe(*pair)
    assert resumed.state_dict() == whole.state_dict()
    assert whole.num_skipped == 5


def test_the_saved_window_is_a_copy():
    guard = filled()
    state = guard.state_dict()
    before = list(state["losses"])
    guard.observe(3, 1)
    assert state["losses"] == before


def test_a_normal_start_of_training_is_never_a_spike():
    for seed in range(20):
        guard, rng = SpikeGuard(GuardConfig()), random.Random(seed)
        for step in range(600):
            loss = 2.5 + 6 * math.exp(-step / 40) + rng.gauss(0, 0.05)
            norm = (0.5 + 5 * math.exp(-step / 15) + min(step, 100) / 100) * math.exp(rng.gauss(0, 0.15))
            assert not guard.observe(loss, norm), (seed, step)
        assert not guard.observe(0.01, 0.001)


def test_a_flat_window_does_not_trigger_on_noise():
    guard = SpikeGuard(GuardConfig())
    for step in range(200):
        assert not guard.observe(2 + 1e-7 * (step % 3), 1)
    assert not guard.observe(2 + 1e-3, 1 + 1e-3)
    assert guard.observe(2.1, 1)


def test_judging_begins_when_the_window_says_enough():
    guard = filled(steps=31)
    assert not guard.observe(1e3, 1)
    assert filled(steps=32).observe(1e3, 1)
    small = GuardConfig(spike_window=8)
    assert not filled(small, steps=7).observe(1e3, 1)
    assert filled(small, steps=8).observe(1e3, 1)


def test_it_can_be_turned_off():
    guard = filled(GuardConfig(spike_sigma=None))
    assert not guard.observe(1e9, 1e9)
    assert guard.num_skipped == 0
