"""Run the notebooks of examples/notebooks as Jupyter does, each in a kernel of its own; nothing is written into them.

    pip install -e '.[notebooks]'
    python scripts/notebooks.py                      # all of them
    python scripts/notebooks.py plan_a_machine       # those with this in their name

A cell that raises, a notebook that takes more than LIMIT seconds of two cores, and stored outputs are failures: exit
code 1. What counts is the processor's time, so that a busy machine fails nothing.
"""

import resource
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "examples" / "notebooks"
LIMIT = 60.0
"""Seconds that a notebook may take of each of two cores."""
PATIENCE = 600
"""Seconds after which a cell is given up."""


def main(wanted: list[str]) -> int:
    """Run those whose name has one of `wanted` in it; all, if nothing is wanted. The exit code."""
    try:
        import nbformat
        from nbclient import NotebookClient
        from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
    except ImportError as error:
        print(f"{error.name} is missing: pip install -e '.[notebooks]'", file=sys.stderr)
        return 2
    paths = [path for path in sorted(FOLDER.glob("*.ipynb")) if not wanted or any(part in path.stem for part in wanted)]
    if not paths:
        print(f"no notebook of {FOLDER} has {' or '.join(wanted)} in its name", file=sys.stderr)
        return 2
    failed = False
    for path in paths:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        wrong = "it stores outputs" if any(cell.get("outputs") for cell in notebook.cells) else ""
        start, busy = time.perf_counter(), _processor()
        try:
            NotebookClient(notebook, timeout=PATIENCE, resources={"metadata": {"path": str(FOLDER)}}).execute()
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            wrong = str(error)
        seconds, busy = time.perf_counter() - start, _processor() - busy
        if not wrong and busy > 2 * LIMIT:
            wrong = f"more than {LIMIT:.0f} s of two cores"
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        pictures = sum("image/png" in output.get("data", {}) for output in outputs)
        warned = [output["text"] for output in outputs if output.get("name") == "stderr"]
        print(
            f"{path.stem:30} {seconds:5.1f} s ({busy:.1f} s of a core), {pictures} pictures  {wrong or 'ok'}",
            flush=True,
        )
        for text in warned:
            print(f"  on stderr: {text.strip()}")
        failed |= bool(wrong)
    return int(failed)


def _processor() -> float:
    """Seconds of a core that kernels which have ended took, with what they started."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
