"""The kernels' tests at every level that this CPU has and that may run by default: `python scripts/verify_levels.py`.

The levels that a machine does not have run under an emulator (`scripts/emulate_levels.sh`). What fails
here does not belong into `VERIFIED` in `manyhands/kernels/native/library.py`.
"""

import sys

import pytest

from manyhands.kernels.native import library

if __name__ == "__main__":
    print("levels of this CPU:", ", ".join(library.levels()), "- by default:", library.default_level())
    sys.exit(pytest.main(["tests/kernels", "tests/quant", "tests/checkpoint/test_packed.py", *sys.argv[1:]]))
