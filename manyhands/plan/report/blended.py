"""The section of what input and output cost together on one's own machine, and when that is less than an API."""

from manyhands.format import show
from manyhands.plan.estimate import DECODE, PREFILL, estimate
from manyhands.plan.machine import Machine
from manyhands.plan.price import ApiPrice, blended, price_per_million
from manyhands.plan.report import formulas as f
from manyhands.plan.report.ask import Ask, short
from manyhands.plan.report.expected import kind_of
from manyhands.plan.report.figure import Figure, Section
from manyhands.plan.report.machine import decode, exceeds, prompts_together
from manyhands.plan.roof import Bound, prefill_bound
from manyhands.plan.subject import Subject


def mixed(subject: Subject, ask: Ask, machine: Machine, price: float) -> Section:
    """At best speed and as expected: the largest batch that is shown and fits, prompts read together."""
    hourly, ratio, cached = price * machine.devices, ask.in_out, ask.cached
    title = "Price of input and output together"
    fitting = [batch for batch in ask.batches if exceeds(subject, ask, machine, batch) is None]
    prompts = prompts_together(subject, ask, machine)
    if not fitting or not prompts or subject.sizes is None:
        return Section("blended", title, notes=["no price: it does not fit"])
    batch, length = max(fitting), ask.prompt_length
    out = decode(subject, ask, machine, batch)
    into = prefill_bound(machine, subject.sizes, subject.counts, ask.storage, length, ask.load, prompts=prompts)
    if into.rate is None:
        return Section("blended", title, notes=["no price: without a matrix rate nobody knows what input costs"])

    def expected(bound: Bound, work: str, many: bool) -> float:
        assert subject.sizes is not None
        kind = kind_of(subject, ask, machine, work, many=many)
        return estimate(bound, len(subject.sizes.windows), kind, ask.recorded_here).tokens_per_second

    likely = expected(into, PREFILL, False), expected(out, DECODE, batch > 1)
    label = f"10^6 tokens, {ratio:g} in to one out"
    figures = []
    for speeds, note in (((into.tokens_per_second, out.tokens_per_second), "at best speed"), (likely, "expected")):
        of_input, of_output = (price_per_million(hourly, speed) for speed in speeds)
        own = ApiPrice(of_input, of_output, cached=0.0)
        value = blended(own, ratio, cached)
        work = f"({ratio:g}·(1 - {cached:g})·{own.input:.4g} + {own.output:.4g}) / {ratio + 1:g}"
        figures.append(Figure(f"{label}, {note}", value, "USD", f.BLENDED, work))
    notes = [
        f"batch {batch} decodes, {prompts} x {short(length)} tokens are read in a pass; at {hourly:g} USD per hour",
    ]
    if cached:
        notes.append(f"{cached:.0%} of the input is in a cache already and costs nothing but memory")
    if ask.api_price is not None:
        figures += _against(ask.api_price, figures[1].value or 0.0, hourly, ratio, cached, notes)
    return Section("blended", title, figures, notes=notes)


def _against(api: ApiPrice, own: float, hourly: float, ratio: float, cached: float, notes: list[str]) -> list[Figure]:
    """From how many tokens an hour on the machine is paid for."""
    theirs = blended(api, ratio, cached)
    work = f"({ratio:g}·((1 - {cached:g})·{api.input:g} + {cached:g}·{api.cached:g}) + {api.output:g}) / {ratio + 1:g}"
    figures = [Figure(f"10^6 tokens, {ratio:g} in to one out, the API", theirs, "USD", f.BLENDED, work)]
    figures.append(
        Figure(
            "tokens an hour that cost as much",
            hourly / theirs * 1e6,
            "tokens",
            f.EVEN,
            f"{hourly:g} / {theirs:.4g}·10^6",
        )
    )
    share = own / theirs
    figures.append(Figure("of what is expected of the machine", share, "share", f.BUSY, f"{own:.4g} / {theirs:.4g}"))
    if share > 1:
        notes.append("the API is cheaper even were the machine never idle")
    else:
        notes.append(f"the machine is cheaper if it is busy more than {show(share, 'share')} of the time")
    return figures
