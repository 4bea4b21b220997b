"""Whether what lies in a folder may be published as a version: `python scripts/release.py 0.1.0 dist > notes.md`.

The version must be the package's own and the changelog's newest heading; there must be a source distribution, a wheel
for x86-64 and one for aarch64 with the kernels in them, and one for any system without. Prints the changelog's section,
with the SHA-256 of each file, for the release's page. Exit code 1 and one line where something is missing.
"""

import hashlib
import re
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNELS = "manyhands/kernels/native/libmanyhands.so"
WHEELS = {"x86_64.whl": True, "aarch64.whl": True, "any.whl": False}
"""How the names end, and whether kernels are inside."""


def notes(version: str, changelog: str) -> str:
    """The section of a version. Exits if it is not the newest one."""
    heads = re.findall(r"^## \[([^\]]+)\].*$", changelog, re.M)
    released = [head for head in heads if head != "Unreleased"]
    if not released or released[0] != version:
        sys.exit(f"CHANGELOG.md: expected `## [{version}]` as the newest version, found {released[:1] or 'none'}")
    section = changelog.partition(f"## [{version}]")[2].partition("\n")[2]
    return re.split(r"^## \[", section, maxsplit=1, flags=re.M)[0].strip()


def check(version: str, folder: Path) -> list[Path]:
    """The files of a version. Exits if one is missing, or is of another version."""
    own = re.search(r'__version__ = "(.+)"', (ROOT / "manyhands" / "version.py").read_text())
    if own is None or own[1] != version:
        sys.exit(f"manyhands/version.py says {own and own[1]}, not {version}")
    files = sorted(path for path in folder.iterdir() if path.suffix in (".whl", ".gz"))
    strange = [path.name for path in files if not path.name.startswith(f"manyhands-{version}")]
    if strange:
        sys.exit(f"{folder}: of another version: {', '.join(strange)}")
    if not any(path.name == f"manyhands-{version}.tar.gz" for path in files):
        sys.exit(f"{folder}: no manyhands-{version}.tar.gz")
    for end, with_kernels in WHEELS.items():
        wheel = next((path for path in files if path.name.endswith(end)), None)
        if wheel is None:
            sys.exit(f"{folder}: no wheel that ends in {end}")
        with zipfile.ZipFile(wheel) as archive:
            if (KERNELS in archive.namelist()) != with_kernels:
                sys.exit(f"{wheel.name}: the kernels are {'missing' if with_kernels else 'inside'}")
    return files


def main() -> None:
    """Check, then print."""
    if len(sys.argv) != 3:
        sys.exit("usage: release.py VERSION FOLDER")
    version, folder = sys.argv[1], Path(sys.argv[2])
    files = check(version, folder)
    print(notes(version, (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")))
    print("\n| file | SHA-256 |\n|---|---|")
    for path in files:
        print(f"| {path.name} | `{hashlib.sha256(path.read_bytes()).hexdigest()}` |")


if __name__ == "__main__":
    main()
