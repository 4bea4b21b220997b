"""Every family against its reference: one row each. `python benchmarks/parity.py [--json] [CASE ...]`

The reference is transformers itself on small random models, plain and hostile (large router logits, exact ties, large
activations); where transformers has no class it is composed of its parts, and for Grok-1 it is the published maths
written out (`tests/families`). Shown is the worse of the two. Loading is measured in processes of their own on
checkpoints of 250 MB and more.

    prefill, decode   largest absolute difference of a logit, padding in the batch, float32
    routing           share of (token, choice) pairs with the same expert
    gradient          largest difference of a gradient, over the largest of that tensor
    router loss       relative difference of the balance loss after its scale; - where the reference has none
    round trip        written back: the same bytes, and the reference loads them with nothing missing or left over
    peak / size       largest growth of resident memory while loading and reading every weight, over the weights' bytes;
                      then the same with conversion (float32 to bfloat16; quantised files to float32)
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.families import encoder_decoders
from tests.families.loading import peak_over_size, random_checkpoint
from tests.families.other_references import ALL, make_any
from tests.families.parity import measure

HEAD = ("family", "prefill", "decode", "routing", "gradient", "router loss", "round trip", "peak / size", "converting")


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [*ALL, *encoder_decoders.CASES, *encoder_decoders.LARGE]
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"all, unless given: {'; '.join(every)}")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--no-loading", action="store_true", help="leave out the memory of loading")
    arguments = parser.parse_args()
    if unknown := set(arguments.cases) - set(every):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    versions = {"transformers": transformers.__version__, "torch": torch.__version__, "date": date.today().isoformat()}
    if not arguments.json:
        print(", ".join(f"{name} {value}" for name, value in versions.items()))
        print(line(HEAD), line(("---",) * len(HEAD)), sep="\n", flush=True)
    rows = []
    for case in arguments.cases or every:
        rows.append(row(case, loading=not arguments.no_loading))
        if not arguments.json:
            print(line(shown(rows[-1])), flush=True)
    if arguments.json:
        print(json.dumps({"versions": versions, "rows": rows}, indent=1))


def row(case: str, loading: bool) -> dict[str, Any]:
    """The worse of plain and hostile, and the memory of loading."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        if case in encoder_decoders.CASES or case in encoder_decoders.LARGE:
            made = encoder_decoders.make(case, path / "small")
            found = asdict(encoder_decoders.measure(case, made, path))
            loading = loading and case not in encoder_decoders.LARGE
            return found | (_loading(path / "small", path / "big", "bfloat16") if loading else {})
        references = {hostile: make_any(case, path / f"{hostile}" / "small", hostile) for hostile in (False, True)}
        both = [asdict(measure(case, made, path / f"{hostile}", hostile)) for hostile, made in references.items()]
        worst = {name: max(b[name] for b in both) for name in ("prefill", "decode", "gradient")}
        losses = [b["router_loss"] for b in both if b["router_loss"] is not None]
        worst |= {"router_loss": max(losses, default=None), "routing": min(b["routing"] for b in both)}
        worst |= {"family": case, "round_trip": all(b["round_trip"] for b in both)}
        if loading:
            other = "float32" if references[False].unquantised else "bfloat16"
            worst |= _loading(references[False].directory, path / "big", other)
        return worst


def _loading(small: Path, big: Path, other: str) -> dict[str, float]:
    random_checkpoint(small, big)
    return {"loading": peak_over_size(small, big), "converting": peak_over_size(small, big, other)}


def shown(row: dict[str, Any]) -> tuple[str, ...]:
    """A row as text."""
    small = [f"{row[name]:.1e}" for name in ("prefill", "decode")]
    loss = "-" if row["router_loss"] is None else f"{row['router_loss']:.1e}"
    loading = [f"{row[name]:.3f}" if name in row else "-" for name in ("loading", "converting")]
    same = "equal" if row["round_trip"] else "DIFFERS"
    return (row["family"], *small, f"{row['routing']:.0%}", f"{row['gradient']:.1e}", loss, same, *loading)


def line(cells: tuple[str, ...]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
