"""One table of activations; what must repeat it is compared with it."""

import re
from pathlib import Path
from typing import get_args

from manyhands.check import oracle
from manyhands.config.activation import ACTIVATIONS, GATED, Activation
from manyhands.kernels.native.library import ACTIVATION_CODES

NATIVE = Path(__file__).parents[2] / "native"


def test_every_activation_has_a_row() -> None:
    assert tuple(ACTIVATIONS) == get_args(Activation)
    assert {name: form.matrices for name, form in ACTIVATIONS.items()} == {
        name: 3 if name in GATED else 2 for name in ACTIVATIONS
    }


def test_the_oracles_copy_is_equal() -> None:
    assert set(oracle.GATED) == GATED


def test_the_kernels_codes_and_constants_are_equal() -> None:
    stated = re.findall(r"\bMH_(\w*(?:GLU|GELU|RELU)\w*) = (\d+)", (NATIVE / "manyhands.h").read_text())
    assert {name.lower(): int(code) for name, code in stated} == ACTIVATION_CODES
    assert set(ACTIVATION_CODES) == set(ACTIVATIONS)
    # gated kinds come first: the kernels ask for `kind < MH_GELU`
    assert {name for name, code in ACTIVATION_CODES.items() if code < ACTIVATION_CODES["gelu"]} == GATED
    clamped, source = ACTIVATIONS["swiglu_oai"], (NATIVE / "activation.inl").read_text()
    assert f"set1({clamped.limit}f)" in source and f"{clamped.alpha}f" in source
