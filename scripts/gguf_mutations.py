"""Spoil small GGUF files at random, and load each: a model or one line, no crash, no hang, bounded memory.

    python scripts/gguf_mutations.py [ROUNDS] [SEED]

Each thousand runs in a process of its own, which may have 6 GB of addresses and 20 minutes.
"""

import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BATCH = 1000
CODE = """
import resource, json, sys
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
from tests.checkpoint.gguf_mutations import fuzz
found = fuzz(int(sys.argv[1]), int(sys.argv[2]))
print(json.dumps({**found, "peak MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10}))
"""


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    failed = 0
    for number, start in enumerate(range(0, rounds, BATCH)):
        count = min(BATCH, rounds - start)
        command = [sys.executable, "-c", CODE, str(count), str(seed * 1_000_000 + number)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
        said = done.stdout.strip() or f"exit {done.returncode}: {done.stderr.strip()[-600:]}"
        print(f"{start + count:6} of {rounds}: {said}", flush=True)
        failed += done.returncode != 0
    print(
        f"{failed} of {-(-rounds // BATCH)} batches failed; peak of the children "
        f"{resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10} MB"
    )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
