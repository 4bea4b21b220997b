"""The kernels' tests at every level this CPU has, verified before or not: `python scripts/verify_levels.py`.

AVX-512 and AMX were written on a machine without them and ran under an emulator only (`scripts/emulate_levels.sh`). What
fails here does not belong into `VERIFIED` in `manyhands/kernels/native/library.py`, which says what runs by default.
"""

import sys

import pytest

from manyhands.kernels.native import library

if __name__ == "__main__":
    print("levels of this CPU:", ", ".join(library.levels()))
    library.VERIFIED = library.LEVELS  # type: ignore[assignment]
    sys.exit(pytest.main(["tests/kernels", "tests/quant", "tests/checkpoint/test_packed.py", *sys.argv[1:]]))
