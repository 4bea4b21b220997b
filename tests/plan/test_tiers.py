"""Where experts lie, and the frontier: what must hold of any model and machine."""

from itertools import pairwise

import pytest

from manyhands.plan.candidates import every_machine, formats
from manyhands.plan.choose import choose
from manyhands.plan.fit import Need, usable
from manyhands.plan.machine import machine_named
from manyhands.plan.offer import Offer, Place, longest_context, most_users, offer
from manyhands.plan.roof import decode_bound
from manyhands.plan.subject import read_subject
from manyhands.plan.tiers import found, lay_out, read_seconds
from manyhands.plan.traffic import StepBytes
from manyhands.plan.wish import Case, Wish

from .test_fit import PLAIN

CARD = PLAIN.model_copy(update={"kind": "gpu", "memory": 20e9, "bandwidth": 1e12, "disk": 5e9, "reserve": 0.0})
HOST = PLAIN.model_copy(update={"memory": 40e9, "reserve": 10e9})
WISH = Wish(context=4096, prompt=4096)


def cases(model: str, wish: Wish = WISH) -> list[Case]:
    subject = read_subject(model)
    return [Case(model, subject, storage, wish, only_at=rate) for storage, rate in formats(subject)]


@pytest.mark.parametrize(
    ("routed", "host", "expected"),
    [
        (15e9, HOST, ("memory", 15e9, 0, 0)),
        (45e9, HOST, ("host", 15e9, 30e9, 0)),
        (45e9 + 1, HOST, ("disk", 15e9, 30e9, 1)),
        (45e9, None, ("disk", 15e9, 0, 30e9)),
    ],
)
def test_the_fastest_tier_is_filled_first(routed: float, host: object, expected: tuple[object, ...]) -> None:
    tiers = lay_out(CARD, host, Need(routed + 4e9, 1e9, 0), routed, 1e9)  # type: ignore[arg-type]
    assert tiers is not None and (tiers.layout, tiers.device, tiers.host, tiers.disk) == expected
    assert tiers.routed == routed


def test_what_cannot_lie_anywhere() -> None:
    """All but experts must fit in the device; a layer's experts in memory; a disk must be there."""
    assert lay_out(CARD, HOST, Need(30e9 + 20e9 + 1, 0, 0), 30e9, 0) is None
    assert lay_out(CARD, None, Need(30e9 + 15e9, 0, 0), 30e9, 5e9 + 1) is None
    assert lay_out(CARD, None, Need(30e9 + 15e9, 0, 0), 30e9, 5e9) is not None
    assert lay_out(CARD.model_copy(update={"disk": None}), None, Need(45e9, 0, 0), 30e9, 0) is None
    assert lay_out(CARD.model_copy(update={"devices": 16}), HOST, Need(900e9, 0, 0), 800e9, 0) is None


def test_no_more_is_hit_than_lies_there() -> None:
    """One token may find its favourites; a batch that touches every expert finds the share that is held."""
    few, all_of_them = (StepBytes(1, distinct, 8e9, 1e9, 0) for distinct in (4, 128))
    assert found(0.3, few, 128) == pytest.approx(0.859) and found(0.3, all_of_them, 128) == pytest.approx(0.3)
    assert found(1, all_of_them, 128) == 1 and found(0.3, few, 128, lambda share: share / 2) == 0.15


def test_every_tier_reads_its_own_bytes() -> None:
    """Host: half of 8 GB are missed on the card (0.3 of 128 experts, 64 touched: 0.6 hit at most, 0.5 as said)."""
    tiers = lay_out(CARD, HOST, Need(54e9, 0, 0), 50e9, 1e9)
    assert tiers is not None and tiers.layout == "disk"  # 16 on the card, 30 beside it, 4 on disk
    step = StepBytes(1, 4, 8e9, 1e9, 0.5e9)
    seconds = read_seconds(tiers, CARD, HOST, step, 128, hits=lambda share: share)
    assert seconds["memory bandwidth"] == pytest.approx((1.5e9 + 8e9 * 16 / 50) / 1e12)
    assert seconds["host memory"] == pytest.approx(8e9 * 34 / 50 / 5e10)
    assert seconds["disk"] == pytest.approx(8e9 * 4 / 50 / 5e9)
    alone = lay_out(CARD, None, Need(54e9, 0, 0), 50e9, 1e9)
    assert alone is not None
    seconds = read_seconds(alone, CARD, None, step, 128, hits=lambda share: share)
    assert seconds["memory bandwidth"] == pytest.approx(9.5e9 / 1e12), "what is missed passes through the card"
    assert "host memory" not in seconds and seconds["disk"] == pytest.approx(8e9 * 34 / 50 / 5e9)


def test_all_in_memory_is_the_planners_bound() -> None:
    """The same roof as `plan`'s, whatever the batch and the machine."""
    for model, name in (("mixtral-8x7b", "h100x4"), ("deepseek-v3", "h200x8"), ("llama-3.1-8b", "m4-max")):
        for users in (1, 7, 64):
            case = cases(model)[0]
            machine = machine_named(name)
            made = offer(case, Place(machine), users)
            bound = decode_bound(
                machine, case.sizes, case.subject.counts, case.storage, batch=users, context=4096, kv_bits=16
            )
            assert isinstance(made, Offer) and made.step == pytest.approx(bound.seconds, rel=1e-12)


def test_one_more_user_is_one_too_many() -> None:
    case, place = cases("mixtral-8x7b")[-1], Place(machine_named("h100"))
    most = most_users(case, place, "memory")
    assert isinstance(offer(case, place, most), Offer) and case.need(most + 1).total > usable(place.machine)


def test_a_shorter_context_that_needs_no_disk_fits_too() -> None:
    """All of gpt-oss-120b is just too much for 64 GiB at 4096 positions, and fits at one."""
    case = cases("gpt-oss-120b")[0]
    machine = machine_named("desktop-ddr5")
    made = offer(case, Place(machine), 1)
    assert isinstance(made, Offer) and made.tiers.layout == "disk"
    assert isinstance(short := offer(case.at(1), Place(machine), 1), Offer) and short.tiers.layout == "memory"
    assert longest_context(case, Place(machine), 1, "disk") == case.sizes.positions
    assert 1 < longest_context(case, Place(machine), 1, "memory") < 4096


def test_nothing_on_the_frontier_is_beaten_and_all_else_is() -> None:
    """Over every machine: what is left out is named with what beats it, in everything."""
    models = [cases(name) for name in ("mixtral-8x7b", "gpt-oss-20b", "qwen3-30b-a3b", "llama-3.1-8b", "llama-2-70b")]
    places = [Place(machine) for machine in every_machine()]
    chosen = choose(models, places, by="machine")

    def worth(made: Offer) -> tuple[float, ...]:
        counts, machine = made.case.subject.counts, made.place.machine
        return counts.total, counts.active, made.case.kept, made.speed, -made.rank, -machine.all_memory

    for each in chosen.beaten:
        assert all(a >= b for a, b in zip(worth(each.by), worth(each.offer), strict=True))
    for one in chosen.offers:
        others = [other for other in chosen.offers if other is not one]
        assert not any(all(a >= b for a, b in zip(worth(o), worth(one), strict=True)) for o in others)
    assert all(made.share <= 1 + 1e-9 and made.speed >= WISH.speed for made in chosen.offers)
    ranks = [made.rank for made in chosen.offers]
    assert ranks == sorted(ranks)
    assert all(a.ratio <= b.ratio for a, b in pairwise(chosen.losses))
