"""The kernels' tests at every level this CPU has, verified before or not: `python scripts/verify_levels.py`.

AVX-512 and AMX were written on a machine without them. Green here, a level belongs into `VERIFIED` in
`manyhands/kernels/native/library.py`; it is then what runs by default.
"""

import sys

import pytest

from manyhands.kernels.native import library

if __name__ == "__main__":
    print("levels of this CPU:", ", ".join(library.levels()))
    library.VERIFIED = library.LEVELS  # type: ignore[assignment]
    sys.exit(pytest.main(["tests/kernels", "tests/quant", "tests/checkpoint/test_packed.py", *sys.argv[1:]]))
