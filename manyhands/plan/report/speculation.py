"""The section of `--speculate`: what guessing ahead gains, drafted by a block of the model's own kind or looked up."""

from manyhands.format import show
from manyhands.plan.estimate import DECODE, law_for
from manyhands.plan.machine import Machine
from manyhands.plan.report import formulas as f
from manyhands.plan.report.ask import Ask, short
from manyhands.plan.report.expected import kind_of
from manyhands.plan.report.figure import Cell, Figure, Section, Table
from manyhands.plan.report.machine import decode, exceeds
from manyhands.plan.speculation import guessing
from manyhands.plan.subject import Subject

_KEYS = ("step", "best", "expected", "gain", "pays_from")


def speculation(subject: Subject, ask: Ask, machine: Machine, drafts: int) -> Section:
    """Each batch that fits, with both kinds of drafts, and from how many accepted tokens on it pays."""
    sizes = subject.sizes
    assert sizes is not None
    rows: list[tuple[Cell, ...]] = []
    layers = len(sizes.windows)
    for batch in ask.batches:
        if exceeds(subject, ask, machine, batch) is not None:
            continue
        law, _ = law_for(kind_of(subject, ask, machine, DECODE, many=batch > 1), ask.recorded_here)
        plain = decode(subject, ask, machine, batch)
        usual = layers * law.seconds(plain.seconds / layers)
        for how, module in (("a block drafts", ask.storage), ("looked up", None)):
            step = guessing(
                *(machine, sizes, subject.counts, ask.storage, drafts, ask.accepted),
                batch=batch,
                context=ask.context,
                kv_bits=ask.kv_bits,
                load=ask.load,
                module=module,
            )
            seconds = step.expected_seconds(law)
            draft = show(step.draft.seconds, "s") if step.draft else "0"
            work = f"{ask.accepted:.4g}·{batch} / ({show(step.check.seconds, 's')} + {drafts}·{draft})"
            likely = f"a layer's bound / {law.share:.3g} + {show(law.constant, 's')}"
            spent = f"{seconds:.4g} / {usual:.4g}"
            rows.append(
                (
                    f"batch {batch}, {how}",
                    Figure("at best", step.speed(step.seconds), "tok/s", f.GUESSED, work),
                    Figure("expected", step.speed(seconds), "tok/s", f.GUESSED, likely),
                    Figure("gain", ask.accepted * usual / seconds, "", f.RATIO, f"{ask.accepted:.4g}·{usual:.4g}"),
                    Figure("pays from", seconds / usual, "tokens", f.PAYS, spent),
                )
            )
    title = f"Guessing {drafts} ahead, {ask.accepted:.3g} tokens a step"
    if not rows:
        return Section("speculation", title, notes=["no speed for what does not fit"])
    notes = [
        f"{short(ask.context)} context, weights in {ask.storage.name}; gain: expected, over the same batch without "
        "guessing; pays from: the tokens a step must give",
        f"a block drafts: a mean block of this model and its head, {drafts} times a step (multi-token prediction); its "
        "memory comes on top; looked up: guesses cost nothing (n-grams of the text)",
        "checked at batch 1 on one model: up to 11 % above the gains published for one to three drafts, 17 % for five "
        "(docs/planning.md)",
    ]
    columns = (f"on {machine.name}", "at best", "expected", "gain", "pays from")
    return Section("speculation", title, (), Table(columns, tuple(rows), _KEYS), notes)
