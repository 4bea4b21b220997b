"""What two introductions to mixtures of experts say, claim by claim, and what is so. Needs no torch.

`claims.toml` has the claims in our own words, each with a verdict, the reason, its source, and the command or the
experiment that shows it. A figure in it is an expression of the planner's and the catalogue's numbers: it is computed
each time and held against what the document prints.
"""

import functools
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from manyhands.catalog.entry import Printed, split_printed
from manyhands.config import Strict, parse
from manyhands.errors import DataError
from manyhands.format import show
from manyhands.lab.expression import evaluate
from manyhands.lab.quantities import QUANTITIES

Verdict = Literal["true", "caveat", "false", "unverifiable"]
"""true: it is so. caveat: so under a condition, or in part. false: it is not so. unverifiable: nobody has said, or
nothing that can be measured follows from it."""
Letter = Literal["A", "B"]
Text = Annotated[str, Field(min_length=1)]
Line = Annotated[int, Field(strict=True, ge=1)]


class Document(Strict):
    """One of the two. It is not part of this package: claims have its line numbers and our own words."""

    title: Text
    about: Text


class Figure(Strict):
    """A number that is computed, and what it must be for the claim's verdict to hold."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    """By which the claim's text quotes it: `{name}`."""
    label: Text
    value: Text
    """An expression of `quantities.QUANTITIES`."""
    unit: str = ""
    """As in `format.show`."""
    printed: Printed | None = None
    """What the document says, as it prints it; a share as a fraction."""
    by: Letter | None = None
    tolerance: Annotated[float, Field(gt=0.0, le=0.2)] | None = None
    """How far the two may differ, as a share of what is printed."""
    agrees: bool = True
    """False: they must differ by more than that, for the document is wrong."""
    at_least: float | None = None
    """What the claim's text needs of the number, where no document prints one."""
    at_most: float | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "Figure":
        if len({self.printed is None, self.by is None, self.tolerance is None}) > 1:
            raise ValueError("printed, by and tolerance go together")
        if self.printed is None and self.at_least is None and self.at_most is None:
            raise ValueError(f"nothing is asked of {self.name}: give printed, at_least or at_most")
        return self

    @property
    def said(self) -> float | None:
        """What the document prints, as a number."""
        if self.printed is None:
            return None
        digits, _, scale = split_printed(self.printed)
        return float(digits) * scale


class Claim(Strict):
    """One claim of one document, or of both."""

    id: Line
    where: dict[Letter, tuple[Line, ...]]
    """Lines. Empty: no document says it; it belongs beside one that they say."""
    says: Text
    """In our own words."""
    verdict: Verdict
    so: Text
    """What is so; `{name}` is a figure."""
    source: str | None = None
    """Where that stands, beyond this package; None: it follows from the commands."""
    commands: tuple[Text, ...] = ()
    """That show it, without `manyhands`."""
    experiments: tuple[Text, ...] = ()
    """Of the lab."""
    figures: tuple[Figure, ...] = ()
    lost: dict[Letter, tuple[Line, ...]] = Field(default_factory=dict)
    """Lines where the document announces a list that its text does not have."""

    @model_validator(mode="after")
    def _consistent(self) -> "Claim":
        if not (self.commands or self.experiments or self.source):
            raise ValueError(f"claim {self.id} has no command, no experiment and no source")
        if self.verdict == "true" and not all(figure.agrees for figure in self.figures):
            raise ValueError(f"claim {self.id} is true, and a figure of it disagrees with the document")
        try:
            self.so.format_map({figure.name: "" for figure in self.figures})
        except (KeyError, ValueError, IndexError) as error:
            raise ValueError(f"claim {self.id}: its text quotes {error}, which is none of its figures") from None
        return self


class Group(Strict):
    """Claims about one thing."""

    title: Text
    claim: tuple[Claim, ...]


class Claims(Strict):
    """All of them."""

    documents: dict[Letter, Document]
    group: tuple[Group, ...]

    @model_validator(mode="after")
    def _numbered(self) -> "Claims":
        found = [claim.id for claim in self.all()]
        if sorted(found) != list(range(1, len(found) + 1)):
            raise ValueError("claims are numbered from 1, each once")
        return self

    def all(self) -> Iterator[Claim]:
        """In the order of the file."""
        for group in self.group:
            yield from group.claim


@dataclass(frozen=True, slots=True)
class Finding:
    """A figure, computed."""

    figure: Figure
    value: float

    @property
    def difference(self) -> float | None:
        """(computed - printed) / printed; None if no document prints it."""
        said = self.figure.said
        return None if said is None else (self.value - said) / said

    @property
    def holds(self) -> bool:
        """Whether the number is what the claim's verdict needs."""
        figure = self.figure
        if self.difference is not None and figure.tolerance is not None:
            agrees = abs(self.difference) <= figure.tolerance
            if agrees != figure.agrees:
                return False
        low, high = figure.at_least, figure.at_most
        return (low is None or self.value >= low) and (high is None or self.value <= high)

    @property
    def shown(self) -> str:
        """The number with its unit."""
        return show(self.value, self.figure.unit)

    @property
    def shown_printed(self) -> str:
        """What the document prints, in the same unit; empty if it prints nothing."""
        return "" if self.figure.said is None else show(self.figure.said, self.figure.unit)


@functools.cache
def read_claims() -> Claims:
    """The claims of `claims.toml`, checked."""
    text = (resources.files("manyhands.lab") / "claims.toml").read_text(encoding="utf-8")
    return parse(Claims, tomllib.loads(text), "claims.toml")


def findings(claim: Claim) -> list[Finding]:
    """Its figures, computed now."""
    return [Finding(figure, evaluate(figure.value, QUANTITIES)) for figure in claim.figures]


def answer(claim: Claim, found: list[Finding]) -> str:
    """What is so, with its figures in it."""
    return claim.so.format_map({finding.figure.name: finding.shown for finding in found})


def letter_of(name: str) -> Letter:
    """A or B, or a title or part of it. Raises `DataError` for anything else."""
    documents = read_claims().documents
    for letter, document in documents.items():
        if name.upper() == letter or name.lower() == document.title.lower():
            return letter
    found = [letter for letter, document in documents.items() if name.lower() in document.title.lower()]
    if len(found) == 1 and len(name) > 1:
        return found[0]
    known = ", ".join(f"{letter} ({document.title})" for letter, document in documents.items())
    raise DataError(f"--document {name}: expected {known}")


def chosen(document: str | None = None, word: str | None = None) -> list[tuple[Group, list[Claim]]]:
    """By group, the claims of one document and those in which a word stands. Raises `DataError` if there are none."""
    letter = letter_of(document) if document is not None else None
    kept = []
    for group in read_claims().group:
        claims = [claim for claim in group.claim if letter is None or letter in claim.where]
        claims = [claim for claim in claims if word is None or _stands(word, group, claim)]
        if claims:
            kept.append((group, claims))
    if not kept:
        raise DataError(f"--only {word}: in no claim, no answer, no command and no title of a group")
    return kept


def _stands(word: str, group: Group, claim: Claim) -> bool:
    texts = (group.title, claim.says, claim.so, str(claim.id), *claim.commands, *claim.experiments)
    return any(word.lower() in text.lower() for text in texts) if not word.isdigit() else int(word) == claim.id


def described(claim: Claim, found: list[Finding]) -> dict[str, Any]:
    """Everything of one claim, for programs."""
    values = claim.model_dump(mode="json", exclude={"so", "figures"})
    figures = [
        finding.figure.model_dump(mode="json", exclude_none=True, exclude={"value"})
        | {"expression": finding.figure.value, "value": finding.value, "holds": finding.holds}
        | ({"said": finding.figure.said, "difference": finding.difference} if finding.figure.printed else {})
        for finding in found
    ]
    return values | {"so": answer(claim, found), "figures": figures}
