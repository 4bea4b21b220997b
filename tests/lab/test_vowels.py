"""Vowels from a file and made up, and the arm: data that the experiments of 1991 and 1994 stand on."""

from pathlib import Path

import pytest
import torch

from manyhands.errors import DataError
from manyhands.lab.arm import FRICTION, swings
from manyhands.lab.experiments.jacobs_1991 import bits
from manyhands.lab.plane import plane
from manyhands.lab.vowels import VOWELS, made_up_vowels, read_vowels


def table(path: Path, rows: str, head: str = "Speaker,Vowel,F1,F2") -> Path:
    path.write_text(f"{head}\n{rows}")
    return path


def test_a_table_is_read_and_divided_by_speaker(tmp_path: Path) -> None:
    rows = "".join(
        f"{speaker},{vowel},{300 + speaker},{2000 + speaker}\n"
        for speaker in (1, 2, 3, 76)
        for vowel in ("iy", "ih", "aa", "ah", "uw")
    )
    vowels = read_vowels(table(tmp_path / "pb.csv", rows))
    assert len(vowels.x) == 12 and not vowels.made_up, "no uw, and not the last speaker"
    assert vowels.test.tolist() == [False] * 8 + [True] * 4
    assert vowels.vowel.tolist() == [0, 1, 2, 3] * 3 and vowels.back.tolist() == [False, False, True, True] * 3
    assert vowels.x[0].tolist() == [301, 2001] and vowels.targets[2].tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize(
    ("rows", "head", "says"),
    [
        ("1,i,300,2000\n", "speaker,vowel,f1,formant", "no column 'f2'"),
        ("1,i,three,2000\n", "speaker,vowel,f1,f2", "line 2: could not convert"),
        ("1,i,300,2000\n", "speaker,vowel,f1,f2", "no vowel 'I'"),
        ("", "speaker,vowel,f1,f2", "no vowel 'i'"),
    ],
)
def test_what_is_no_table_is_said_in_a_line(rows: str, head: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=says):
        read_vowels(table(tmp_path / "pb.csv", rows, head))
    with pytest.raises(DataError, match="cannot be read"):
        read_vowels(tmp_path / "nothing.csv")


def test_made_up_vowels_have_the_published_means() -> None:
    vowels = made_up_vowels(1)
    assert len(vowels.x) == 75 * 4 * 2 and int(vowels.test.sum()) == 25 * 8
    men = torch.arange(len(vowels.x)) < 33 * 8
    for number, mean in enumerate(((270, 2290), (390, 1990), (730, 1090), (640, 1190))):
        found = vowels.x[men & (vowels.vowel == number)].mean(0)
        # 33 voices of 8 % and 66 tokens of 4 %: 1.5 % of a mean, of which four are allowed
        torch.testing.assert_close(found, torch.tensor(mean).float(), rtol=0.06, atol=0)
    assert torch.equal(made_up_vowels(1).x, vowels.x) and not torch.equal(made_up_vowels(2).x, vowels.x)


def test_bits_are_those_of_a_table() -> None:
    label = torch.tensor([False, True] * 50)
    assert bits(label.long(), label, 4) == pytest.approx(1.0)
    assert bits(torch.zeros(100, dtype=torch.long), label, 4) == pytest.approx(0.0)
    assert bits(torch.tensor([0, 1, 2, 3] * 25), label, 4) == pytest.approx(1.0)


def test_the_arm_keeps_its_energy_but_for_friction_and_work() -> None:
    """dE/dt of the arm's kinetic energy ½ vᵀM(q)v equals the power of the torques less that of friction: by a small
    step along the motion."""
    x, y = swings(50, 0)
    elbow, v, torque = torch.atan2(x[:, 1], x[:, 0]), x[:, 2:4], x[:, 4:6]

    def energy(elbow: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        m11, m12 = 3 + 2 * elbow.cos(), 1 + elbow.cos()
        return 0.5 * (m11 * v[:, 0] ** 2 + 2 * m12 * v[:, 0] * v[:, 1] + v[:, 1] ** 2)

    h = 1e-5
    rise = energy(elbow + h * v[:, 1], v + h * y) - energy(elbow - h * v[:, 1], v - h * y)
    power = (v * (torque - FRICTION * v)).sum(1)
    torch.testing.assert_close(rise / (2 * h), power, rtol=1e-6, atol=1e-6)


def test_a_picture_names_what_it_shows() -> None:
    regions = torch.tensor([[0, 0, 1], [2, 2, 2]]).numpy()
    letters = [(VOWELS[0], torch.tensor([[0.5, 0.5]]).double().numpy())]
    svg = plane(regions, letters, (0, 1), (0, 2), ("F1 <Hz>", "F2"), ["one", "two", "three"])
    assert svg.count("<rect") == 3 + 3 and "F1 &lt;Hz&gt;" in svg and ">three<" in svg and ">i<" in svg


WHOLE = "".join(f"{speaker},{vowel},300,2000\n" for speaker in range(1, 7) for vowel in ("iy", "ih", "aa", "ah"))


@pytest.mark.parametrize(
    ("was", "instead", "says"),
    [
        ("2,iy,300,2000", "2,iy,nan,2000", "line 6: nan is no resonance"),
        ("2,iy,300,2000", "2,iy,300,inf", "line 6: inf is no resonance"),
        ("2,iy,300,2000", "2,iy,-300,2000", "line 6: -300 is no resonance"),
        ("2,iy,300,2000", "2,iy,,2000", "line 6: could not convert"),
        ("2,iy,300,2000", "inf,iy,300,2000", "line 6: invalid literal"),
    ],
)
def test_a_row_that_is_no_vowel_is_said_by_its_line(was: str, instead: str, says: str, tmp_path: Path) -> None:
    path = table(tmp_path / "pb.csv", WHOLE.replace(was, instead))
    with pytest.raises(DataError, match=says):
        read_vowels(path)


@pytest.mark.parametrize(("kept", "part"), [((1, 2, 4), "every third speaker"), ((3, 6), "that are trained on")])
def test_there_must_be_vowels_to_train_on_and_to_test(kept: tuple[int, ...], part: str, tmp_path: Path) -> None:
    rows = "".join(line + "\n" for line in WHOLE.split() if int(line.split(",")[0]) in kept)
    with pytest.raises(DataError, match=f"no vowel 'i' among .*{part}"):
        read_vowels(table(tmp_path / "pb.csv", rows))


def test_a_picture_of_points_in_one_place() -> None:
    here = torch.full((2, 2), 3.0).double().numpy()
    svg = plane(torch.zeros(2, 2).long().numpy(), [("i", here)], (3.0, 3.0), (3.0, 3.0), ("F1", "F2"), ["one"])
    assert "nan" not in svg and svg.count(">i<") == 2
