"""Loading takes the memory of the weights and little more; `benchmarks/parity.py` measures every family."""

import sys
from pathlib import Path

import pytest

from .conftest import Made
from .loading import peak_over_size, random_checkpoint


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_of_loading(made: Made, tmp_path: Path) -> None:
    small = made("qwen3_moe").directory
    random_checkpoint(small, tmp_path / "big")
    assert len(list((tmp_path / "big").glob("*.safetensors"))) > 1
    assert 0.9 < peak_over_size(small, tmp_path / "big") < 1.1
