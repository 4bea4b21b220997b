"""The section that quotes what is charged for a model: the catalogue's figures, not an estimate."""

from manyhands.plan.report.figure import Figure, Section
from manyhands.plan.subject import Subject

LABELS = {
    "price_input": "10^6 tokens in",
    "price_output": "10^6 tokens out",
    "price_blended": "10^6 tokens, three in to one out",
}


def charged(subject: Subject) -> Section:
    """The prices that the catalogue has, each with its source in the notes."""
    figures, notes = [], []
    for price in subject.prices:
        label = LABELS[price.what]
        figures.append(Figure(label, price.value, "USD", note=price.explanation or ""))
        if (note := f"{price.kind}: {price.source}") not in notes:
            notes.append(note)
    return Section("charged", "What is charged for it", figures, notes=notes)
