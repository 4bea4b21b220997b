"""Red unless the native kernels are here and have every level of this processor: `python scripts/require_native.py`.

An install without a compiler goes on without them, and tests of them are skipped; a check of the whole must not.
"""

import platform
import sys
from pathlib import Path

from manyhands.kernels.native.library import default_level, levels, missing

FLAGS = {
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"},
    "avx512_bf16": {"avx512_bf16"},
    "amx": {"amx_tile", "amx_bf16", "amx_int8"},
}
"""What each level is compiled for, in the words of /proc/cpuinfo; a level needs those before it too."""


def main() -> None:
    """Look, and say."""
    if why := missing():
        sys.exit(f"the native kernels are not here: {why}")
    lacking = [level for level in expected() if level not in levels()]
    if lacking:
        sys.exit(f"this processor has {', '.join(lacking)}, and the native library was built without")
    print(f"native kernels: {default_level()} (this processor has: {', '.join(levels())})")


def expected() -> list[str]:
    """The levels that the processor's own flags promise."""
    if platform.machine() not in ("x86_64", "AMD64") or not Path("/proc/cpuinfo").is_file():
        return ["portable"]
    lines = (line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    here = set(next(lines, "").split())
    found = ["portable"]
    for level, flags in FLAGS.items():
        if not flags <= here:
            break
        found.append(level)
    return found


if __name__ == "__main__":
    main()
