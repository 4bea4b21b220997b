"""One model, format, machine and layout held against a wish: an `Offer` that keeps it, or a `Loss` that says why not.

Speeds are bounds, as in `roof.py`: what fails here, fails. Nothing is said of the speed or price of what does not fit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil

from manyhands.plan.budget import expected_hits
from manyhands.plan.estimate import Point
from manyhands.plan.fit import Need, shown_share, usable
from manyhands.plan.machine import Machine
from manyhands.plan.price import price_per_million
from manyhands.plan.roof import MATRIX, WAIT, bound_of
from manyhands.plan.tiers import LAYOUTS, Hits, Layout, Tiers, lay_out, read_seconds
from manyhands.plan.wish import PASS_TOKENS, Case, Work

MOST_USERS, LONGEST = 1 << 20, 1 << 24
"""As far as is looked."""


@dataclass(frozen=True, slots=True)
class Place:
    """A machine that may be had, and what it costs."""

    machine: Machine
    host: Machine | None = None
    """The computer that its devices are in, if that is not the machine itself."""
    price: float | None = None
    """USD per device and hour."""
    hits: Hits = expected_hits
    recorded: Sequence[Point] = ()
    """Speeds that it reached, if it is this machine."""

    def of(self, devices: int) -> "Place":
        """So many devices of it."""
        if devices == self.machine.devices:
            return self
        named = self.machine.devices
        name, title = self.machine.name.removesuffix(f"x{named}"), self.machine.title.removeprefix(f"{named} x ")
        update = {"devices": devices, "name": f"{name}x{devices}", "title": f"{devices} x {title}"}
        return replace(self, machine=self.machine.model_copy(update=update))


@dataclass(frozen=True, slots=True)
class Loss:
    """What is missing."""

    case: Case
    place: Place
    what: str
    """One of memory, speed, first token, price per hour, price per million, layout, context."""
    ratio: float
    """How often too much, or too slow: above 1, and 1.05 is nearly."""
    said: str
    """For people."""


@dataclass(frozen=True, slots=True)
class Offer:
    """What keeps a wish. Seconds are the least there can be."""

    case: Case
    place: Place
    users: int
    """Of one copy."""
    need: Need
    tiers: Tiers
    seconds: dict[str, float]
    """Of one decoding step, by what takes them at the same time."""
    first: float | None
    """Seconds to the first token of one prompt; None where the matrix rate is not known."""
    per_million: float | None
    """USD for 10^6 tokens written, by a machine that is never idle."""
    copies: int = 1
    """Equal machines that share the users."""

    @property
    def devices(self) -> int:
        """Of all copies."""
        return self.place.machine.devices * self.copies

    @property
    def step(self) -> float:
        """Seconds of one decoding step."""
        return max(self.seconds.values())

    @property
    def speed(self) -> float:
        """Tokens per second of each user, at most."""
        return 1 / self.step

    @property
    def limits(self) -> list[tuple[str, float]]:
        """(what, seconds), the longest first: what limits the speed, and what would next."""
        return sorted(((what, took) for what, took in self.seconds.items() if took > 0), key=lambda each: -each[1])

    @property
    def per_hour(self) -> float | None:
        """USD, of all copies."""
        return None if self.place.price is None else self.place.price * self.devices

    @property
    def share(self) -> float:
        """Of the memory that can be used: what is not experts elsewhere."""
        return (self.need.total - self.tiers.host - self.tiers.disk) / usable(self.place.machine)

    @property
    def rank(self) -> int:
        """0 all in memory, 1 experts in host memory too, 2 on disk too."""
        return LAYOUTS.index(self.tiers.layout)


def offer(case: Case, place: Place, users: int, copies: int = 1, *, priced: bool = True) -> Offer | Loss:
    """Hold one case against its wish on one machine, `users` of them; against its budgets too if `priced`."""
    wish, machine, sizes = case.wish, place.machine, case.sizes
    if sizes.positions is not None and wish.context > sizes.positions:
        ratio = wish.context / sizes.positions
        return Loss(case, place, "context", ratio, f"is made for {sizes.positions:,} positions")
    need = case.need(users)
    tiers = lay_out(machine, place.host, need, case.routed, case.layer(users) if case.routed else 0.0)
    if tiers is None or tiers.layout not in wish.layouts:
        return _too_much(case, place, need, tiers)
    seconds = _seconds(case, place, tiers, case.decoded(users))
    if (speed := 1 / max(seconds.values())) < wish.speed:
        said = f"{speed:.3g} tokens/s each at best, {wish.speed:g} are asked"
        return Loss(case, place, "speed", wish.speed / speed, said)
    first = _first(case, place, tiers)
    if wish.first is not None and (first is None or first > wish.first):
        if first is None:
            return Loss(case, place, "first token", 10.0, "its matrix rate is not known, nor its first token")
        said = f"the first token after {first:.3g} s at best, {wish.first:g} are asked"
        return Loss(case, place, "first token", first / wish.first, said)
    per_million = _per_million(case, place, tiers, users, max(seconds.values()))
    made = Offer(case, place, users, need, tiers, seconds, first, per_million, copies)
    return (_too_dear(made) if priced else None) or made


def most_users(case: Case, place: Place, layout: Layout, most: int = MOST_USERS) -> int:
    """Who can be served at once on one such machine, in that layout or a faster one, whatever that costs.

    All else that is asked is kept. Costs are left out: a token of few users is dearer than one of many.
    """

    def works(users: int) -> bool:
        made = offer(case, place, users, priced=False)
        return isinstance(made, Offer) and made.rank <= LAYOUTS.index(layout)

    return _most(works, most)


def longest_context(case: Case, place: Place, users: int, layout: Layout) -> int:
    """Positions that so many users can have each, in the same way, up to what the model is made for."""

    def works(context: int) -> bool:
        made = offer(case.at(context), place, users, priced=False)
        return isinstance(made, Offer) and made.rank <= LAYOUTS.index(layout)

    return _most(works, case.sizes.positions or LONGEST)


def copies_for(case: Case, place: Place) -> Offer | Loss:
    """As many equal machines as the users need, within the devices that may be had."""
    wish, devices = case.wish, place.machine.devices
    made = offer(case, place, wish.users)
    if isinstance(made, Offer) or wish.devices is None or wish.users == 1 or made.what == "context":
        return made
    users = most_users(case, place, wish.layouts[-1], wish.users)
    copies = ceil(wish.users / users) if users else 0
    if not copies or copies * devices > wish.devices:
        return made
    return offer(case, place, ceil(wish.users / copies), copies)


def _most(works: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that works, if every smaller one does; 0 if none."""
    if not works(1):
        return 0
    low, high = 1, most + 1
    while high - low > 1:
        middle = min(2 * low, (low + high) // 2)
        low, high = (middle, high) if works(middle) else (low, middle)
    return low


def _seconds(case: Case, place: Place, tiers: Tiers, work: Work) -> dict[str, float]:
    step, flops, attention = work
    bound = bound_of(place.machine, case.sizes, case.storage, step, flops, attention)
    seconds = read_seconds(tiers, place.machine, place.host, step, case.sizes.num_experts, place.hits)
    if bound.compute_seconds is not None:
        seconds[MATRIX] = bound.compute_seconds
    if bound.wait_seconds:
        seconds[WAIT] = bound.wait_seconds
    return seconds


def _first(case: Case, place: Place, tiers: Tiers, prompts: int = 1) -> float | None:
    """Seconds of a pass over so many prompts."""
    seconds = _seconds(case, place, tiers, case.read(prompts))
    return max(seconds.values()) if MATRIX in seconds else None


def _per_million(case: Case, place: Place, tiers: Tiers, users: int, step: float) -> float | None:
    """Of tokens written; with an answer's length, what its prompt takes is on top, read with others' prompts."""
    wish, price = case.wish, place.price
    if price is None:
        return None
    each = step / users
    if wish.answer is not None:
        prompts = max(1, min(users, PASS_TOKENS // wish.prompt))
        read = _first(case, place, tiers, prompts)
        if read is None:
            return None
        each += read / prompts / wish.answer
    return price_per_million(price * place.machine.devices, 1 / each)


def _too_much(case: Case, place: Place, need: Need, tiers: Tiers | None) -> Loss:
    room = usable(place.machine)
    share = need.total / room
    if tiers is not None:
        if tiers.layout == "memory":
            return Loss(case, place, "layout", 1.0, "all of it fits in memory")
        said = f"needs {shown_share(share)} the memory, so experts in {_WHERE[tiers.layout]}"
        return Loss(case, place, "layout", share, said)
    others = need.total - case.routed
    said = f"needs {shown_share(share)} the memory"
    if case.routed and others > room:
        said += f", {shown_share(others / room)} without experts"
    return Loss(case, place, "memory", share, said)


_WHERE: dict[Layout, str] = {"memory": "memory", "host": "host memory", "disk": "files on disk"}


def _too_dear(made: Offer) -> Loss | None:
    wish = made.case.wish
    for what, asked, costs in (
        ("price per hour", wish.per_hour, made.per_hour),
        ("price per million", wish.per_million, made.per_million),
    ):
        if asked is None:
            continue
        if costs is None:
            unknown = "its matrix rate is not known, nor what prompts cost"
            why = "its price is not given" if made.place.price is None else unknown
            return Loss(made.case, made.place, what, 10.0, why)
        if costs > asked:
            unit = "an hour" if what == "price per hour" else "for a million tokens"
            return Loss(made.case, made.place, what, costs / asked, f"{costs:.3g} USD {unit}, {asked:g} are asked")
    return None
