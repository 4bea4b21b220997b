"""Four vowels by their two lowest resonances: Peterson and Barney's speakers from a file, or speakers made up.

F1 and F2 in Hz; i as in heed, I as in hid, A as in hod, V as in hud.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from manyhands.errors import DataError

VOWELS = ("i", "I", "A", "V")
"""X-SAMPA. The first two are spoken at the front of the mouth, the others at the back."""
_LABELS = {"i": "i", "iy": "i", "I": "I", "ih": "I", "A": "A", "aa": "A", "V": "V", "ah": "V", "^": "V"}
_MEANS = {
    "m": {"i": (270, 2290), "I": (390, 1990), "A": (730, 1090), "V": (640, 1190)},
    "w": {"i": (310, 2790), "I": (430, 2480), "A": (850, 1220), "V": (760, 1400)},
    "c": {"i": (370, 3200), "I": (530, 2730), "A": (1030, 1370), "V": (850, 1590)},
}
"""Of men, women and children: Peterson and Barney 1952, J. Acoust. Soc. Am. 24, table II."""
_SPEAKERS = {"m": 33, "w": 28, "c": 15}
_VOICE, _TOKEN = 0.08, 0.04
"""Made-up speakers differ by this share of a mean, and what one says by this."""
_MOST = 1 << 24
_HIGHEST = 20_000.0


@dataclass(frozen=True, slots=True)
class Vowels:
    """Spoken vowels, divided by speaker."""

    x: Tensor
    """[N, 2] Hz"""
    vowel: Tensor
    """[N] number in `VOWELS`."""
    test: Tensor
    """[N] bool: said by a speaker of whom nothing is trained on."""
    made_up: bool

    @property
    def targets(self) -> Tensor:
        """[N, 4] float32: 1 for the vowel, 0 for the others."""
        return torch.nn.functional.one_hot(self.vowel, len(VOWELS)).float()

    @property
    def back(self) -> Tensor:
        """[N] bool: A or V."""
        return self.vowel >= 2


def read_vowels(path: Path) -> Vowels:
    """Peterson and Barney's table as CSV: columns `speaker`, `vowel`, `f1`, `f2`, in any order and case.

    Every third speaker is tested, and the last one, the 76th, is left out, so that 50 and 25 remain. Raises `DataError`
    for a file that is none of this, naming the line.
    """
    try:
        if path.stat().st_size > _MOST:
            raise DataError(f"{path}: {path.stat().st_size:,} bytes is too long for a table of vowels")
        with path.open(encoding="utf-8", newline="") as file:
            rows = [{str(k).strip().lower(): str(v) for k, v in row.items()} for row in csv.DictReader(file)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as CSV: {error}") from None
    said: list[tuple[int, str, float, float]] = []
    for number, row in enumerate(rows, 2):
        try:
            vowel = _LABELS.get(row["vowel"].strip())
            if vowel is not None:
                said.append((int(row["speaker"]), vowel, _hertz(row["f1"]), _hertz(row["f2"])))
        except KeyError as error:
            raise DataError(f"{path}: there is no column {error}; expected: speaker, vowel, f1, f2") from None
        except ValueError as error:
            raise DataError(f"{path}: line {number}: {error}") from None
    said = [row for row in said if row[0] <= 75] or said
    for part, tested in (
        ("the rows", None),
        ("the speakers that are trained on", False),
        ("every third speaker", True),
    ):
        there = {vowel for speaker, vowel, *_ in said if tested in (None, speaker % 3 == 0)}
        if missing := [vowel for vowel in VOWELS if vowel not in there]:
            raise DataError(f"{path}: no vowel {missing[0]!r} among {part} (X-SAMPA i I A V, or iy ih aa ah)")
    return _divided(said, made_up=False)


def _hertz(text: str) -> float:
    value = float(text)
    if not 0.0 < value < _HIGHEST:
        raise ValueError(f"{text.strip()} is no resonance in Hz")
    return value


def made_up_vowels(seed: int = 0) -> Vowels:
    """As many speakers of each kind, each vowel twice, around the published means: a Gaussian for the voice, which
    moves all of a speaker's vowels, and one for what is said.
    """
    g = torch.Generator().manual_seed(seed)
    said: list[tuple[int, str, float, float]] = []
    speaker = 0
    for kind, count in _SPEAKERS.items():
        for _ in range(count):
            speaker += 1
            voice = 1.0 + _VOICE * torch.randn(2, generator=g)
            for vowel in VOWELS:
                for _ in range(2):
                    f1, f2 = torch.tensor(_MEANS[kind][vowel]) * voice * (1.0 + _TOKEN * torch.randn(2, generator=g))
                    said.append((speaker, vowel, float(f1), float(f2)))
    return _divided([row for row in said if row[0] <= 75], made_up=True)


def _divided(said: list[tuple[int, str, float, float]], made_up: bool) -> Vowels:
    return Vowels(
        torch.tensor([[f1, f2] for _, _, f1, f2 in said]),
        torch.tensor([VOWELS.index(vowel) for _, vowel, _, _ in said]),
        torch.tensor([speaker % 3 == 0 for speaker, _, _, _ in said]),
        made_up,
    )
