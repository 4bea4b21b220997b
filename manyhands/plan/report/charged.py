"""The section that quotes what a model's makers charge: the catalogue's figures, not an estimate."""

from manyhands.plan.report.figure import Figure, Section
from manyhands.plan.subject import Subject

LABELS = {"price_input": "10^6 tokens in", "price_output": "10^6 tokens out"}


def charged(subject: Subject) -> Section:
    """The prices that the catalogue has, each with its source in the notes."""
    figures, notes = [], []
    for price in subject.prices:
        label = LABELS[price.what]
        figures.append(Figure(label, price.value, "USD", note=price.explanation or ""))
        if (note := f"{price.kind}: {price.source}") not in notes:
            notes.append(note)
    return Section("charged", "What its makers charge", figures, notes=notes)
