"""Every family against its reference: the rows of `benchmarks/parity.py`, and other ways to run the same files."""

import pytest
import torch

from manyhands.checkpoint.model import load_model
from manyhands.families import FAMILIES

from .conftest import Made
from .encoder_decoders import CASES as PAIRS
from .other_references import ALL
from .parity import IDS, MASK, B, S, measure
from .references import positions

WITH_A_LOSS = {"mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "granitemoe", "phimoe"}


def test_every_family_has_a_case() -> None:
    assert {case.split(",")[0] for case in [*ALL, *PAIRS]} == FAMILIES.keys() - {"manyhands"}


@pytest.mark.parametrize("hostile", [False, True], ids=["plain", "hostile"])
@pytest.mark.parametrize("case", ALL)
def test_as_the_reference(case: str, hostile: bool, made: Made, tmp_path) -> None:
    row = measure(case, made(case, hostile), tmp_path, tied_experts=hostile)
    assert row.logits_std > 0.1  # a comparison of zeros would prove nothing
    assert row.prefill < 1e-4 and row.decode < 1e-4
    assert row.routing == 1.0
    assert row.gradient < 1e-4
    assert row.round_trip
    assert (row.router_loss is not None) == (case.split(",")[0] in WITH_A_LOSS)
    assert row.router_loss is None or row.router_loss < 1e-5


@pytest.mark.parametrize("case", ALL)
def test_backends_padding_and_bfloat16(case: str, made: Made) -> None:
    reference = made(case)
    right = torch.ones(B, S, dtype=torch.long)
    right[1, -9:] = 0
    expected = {"left": reference.run(IDS, MASK)[0], "right": reference.run(IDS, right)[0]}
    masks = {"left": MASK, "right": right}
    for backend in ("eager", "grouped_mm"):
        model = load_model(reference.directory, dtype=torch.float32, experts_implementation=backend)
        for side, mask in masks.items():
            with torch.no_grad():
                difference = (model(IDS, mask).logits - expected[side])[mask.bool()].abs().max()
            assert difference < 1e-4, (backend, side)
    half = load_model(reference.directory, dtype=torch.bfloat16)
    for name, t in half.state_dict().items():
        router = name.endswith(("router.weight", "router.bias", "e_score_correction_bias"))
        assert t.dtype == (torch.float32 if router else torch.bfloat16), name
    with torch.no_grad():
        logits = half(IDS, MASK).logits
    assert logits.dtype == torch.bfloat16
    real = MASK.bool()
    # a token that changes its experts moves far: the middle one tells whether the sums are right
    off = (logits.double() - expected["left"])[real].norm(dim=-1) / expected["left"][real].norm(dim=-1)
    assert off.median() < 0.1, off


def test_the_padding_of_the_comparison() -> None:
    assert positions(MASK)[1, 9:].tolist() == list(range(S - 9)), "padding in front moves no position"
