"""The expert kernels, compiled if a C++ compiler is there; without one the install goes on and says so once.

MANYHANDS_REQUIRE_NATIVE=1 makes a failure the install's own, with what the compiler said. MANYHANDS_PURE=1 leaves the
kernels out: a wheel for any system.

setuptools and not scikit-build-core: there is one command per file and no library to find; CMake would be one more
thing that an install needs.

One object file per CPU level, each with its own flags: which one runs is decided at run time, on the user's machine.
"""

import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
PURE = bool(os.environ.get("MANYHANDS_PURE"))
X86 = platform.machine().lower() in ("x86_64", "amd64") and sys.maxsize > 2**32
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "vnni")), "-mprefer-vector-width=512"]
BF16 = [*AVX512, "-mavx512bf16"]
AMX = [*BF16, "-mamx-tile", "-mamx-bf16", "-mamx-int8"]
LEVELS = {"level_avx2": AVX2, "level_avx512": AVX512, "level_avx512_bf16": BF16, "level_amx": AMX}
COMMON = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-warning-option"]
COMMON += ["-ffp-contract=off"]  # levels agree: a product and a sum are one rounding where `fma` says so, nowhere else
COMMON += ["-Wno-maybe-uninitialized"]  # gcc's, wrong about its own intrinsics; unknown to clang


class BuildKernels(build_ext):
    """Compiles and links with the compiler itself: setuptools has no flags per file."""

    def get_ext_filename(self, fullname: str) -> str:
        """The name `manyhands.kernels.native.library` looks for: it is no Python module."""
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext: Extension) -> None:
        """Compile, a few files at a time, and link."""
        target = Path(self.get_ext_fullpath(ext.name))
        objects = Path(self.build_temp)
        compiler = os.environ.get("CXX", "c++").split()
        try:
            for directory in (objects, target.parent):
                directory.mkdir(parents=True, exist_ok=True)
            sources = [ROOT / source for source in ext.sources]
            with ThreadPoolExecutor(min(len(sources), os.cpu_count() or 1)) as pool:
                made = list(pool.map(lambda source: self.make_object(compiler, source, objects), sources))
            fresh = target.with_suffix(".new")
            self.invoke([*compiler, "-shared", "-pthread", "-o", str(fresh), *map(str, made)])
            fresh.replace(target)
        except (OSError, subprocess.CalledProcessError) as error:
            output = getattr(error, "stderr", "") or ""
            if os.environ.get("MANYHANDS_REQUIRE_NATIVE"):
                raise SystemExit(f"manyhands: the native expert kernels were not built ({error})\n{output}") from None
            print(f"manyhands: the native expert kernels were not built ({error}); the other backends do not need "
                  f"them\n{output}", file=sys.stderr)  # fmt: skip

    def make_object(self, compiler: list[str], source: Path, objects: Path) -> Path:
        """One object file."""
        made = objects / f"{source.stem}.o"
        flags = [*COMMON, *(["-DMH_X86"] if X86 else []), *LEVELS.get(source.stem, [])]
        self.invoke([*compiler, *flags, "-c", str(source), "-o", str(made)])
        return made

    def invoke(self, command: list[str]) -> None:
        """Run a compiler."""
        subprocess.run(command, check=True, capture_output=True, text=True)


class PlatformWheel(bdist_wheel):
    """The library belongs to a platform, not to a version of Python; without it the wheel is anybody's."""

    def get_tag(self) -> tuple[str, str, str]:
        """py3-none-<platform>."""
        return "py3", "none", "any" if PURE else super().get_tag()[2]


sources = sorted(f"native/{path.name}" for path in (ROOT / "native").glob("*.cpp") if X86 or path.stem not in LEVELS)
kernels = Extension("manyhands.kernels.native.libmanyhands", sources=sources, optional=True)
setup(
    ext_modules=[] if PURE else [kernels],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)
