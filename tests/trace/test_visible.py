"""What the screen and the report print: numbers, strips of load, tokens."""

import torch

from manyhands.trace.strip import strip
from manyhands.trace.tokens import TokenShare
from manyhands.trace.visible import visible, what_experts_take


def test_the_fair_share_stands_at_half_height() -> None:
    assert strip([0.25] * 4, 80).plain == "▄▄▄▄"
    assert strip([0.25] * 4, 80, ascii_only=True).plain == "===="
    marked = strip([0.0, 0.25, 0.75, 0.0], 80)
    assert marked.plain == "▁▄█▁"
    assert [str(span.style) for span in marked.spans] == ["red", "green", "yellow", "red"]


def test_many_experts_share_cells_and_a_dead_one_still_shows() -> None:
    load = [1 / 99] * 100
    load[42] = 0.0
    binned = strip(load, 10)
    assert len(binned.plain) == 10
    assert [str(span.style) for span in binned.spans] == ["green"] * 4 + ["red"] + ["green"] * 5


def test_white_space_and_control_characters_are_visible() -> None:
    assert visible(" a\n\tb\x00") == "␣a⏎⇥b␀"
    assert visible("        ") == "␣×8"
    assert visible("\n    x") == "⏎␣×4x"
    assert visible("") == "∅" and len(visible("y" * 99)) == 24
    assert visible("\u202e") == "U+202E"


def test_the_deepest_shade_is_not_the_least_loaded_expert() -> None:
    """Expert 0 takes half of all pairs and one token always; expert 1 takes few, and its token half of the time."""
    tokens = TokenShare(3, 8)
    ids, experts = torch.tensor([[1] * 60 + [2] * 20]), torch.tensor([[[0]] * 60 + [[1], [2]] * 10])
    tokens.add(0, ids, experts)
    (layer,) = what_experts_take(tokens, None, [0])
    chips = {(expert.number, chip.text): chip for expert in layer.experts for chip in expert.chips}
    always, half = chips[0, "#1"], chips[1, "#2"]
    assert half.ratio > always.ratio and always.strength == 100 and half.strength < 50
