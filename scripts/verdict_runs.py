"""Twelve runs made to go wrong and six good ones, and what the verdict says of each; what the tests judge is kept.

    python scripts/verdict_runs.py OUT            # every run, some minutes on a core; exit code 1 if a verdict is wrong
    python scripts/verdict_runs.py OUT collapse   # some of them
    python scripts/verdict_runs.py OUT --keep     # and put what a verdict reads of them into tests/compare/recorded

The text is a part of the standard library's sources, so figures differ between versions of Python; verdicts should not.
"""

import argparse
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from manyhands.compare.verdict import judge
from manyhands.config import RunConfig
from manyhands.config.load import load_preset, load_run
from manyhands.config.tune import LoraTuning
from manyhands.errors import ManyhandsError
from manyhands.text import PackedBatches
from manyhands.trace.journal import read_journal
from manyhands.train import loop
from manyhands.tune.settings import settings

LIBRARY = Path(sysconfig.get_paths()["stdlib"])
KEPT = Path(__file__).parent.parent / "tests" / "compare" / "recorded"
SMALL = [
    *("model.vocab_size=512", "train.sequence_length=32", "train.batch_size=8", "train.save_seconds=0"),
    f"data.sources=['{LIBRARY / 'email'}', '{LIBRARY / 'json'}', '{LIBRARY / 'unittest'}']",
]
TINY = [
    *("model.hidden_size=48", "model.intermediate_size=96", "model.moe.moe_intermediate_size=24"),
    *("train.max_steps=160", "train.eval_every=40"),
]
LITTLE_TEXT = [f"data.sources=['{LIBRARY / 'json' / 'encoder.py'}', '{LIBRARY / 'json' / 'scanner.py'}']"]
LITTLE_TEXT += [f"data.valid=['{LIBRARY / 'json' / 'decoder.py'}']", "train.max_steps=240"]
UNBALANCED = ["model.moe.router.bias=false", "balance.aux_loss_coef=0"]

WRONG: dict[str, tuple[list[str], str]] = {
    # its settings on top of the tiny preset; what the verdict must find
    "overfit": ([*LITTLE_TEXT, "train.eval_every=40"], "overfit"),
    "overfit-unseen": ([*LITTLE_TEXT, "train.eval_every=0"], "overfit"),
    "diverged": (["optim.lr=3", "schedule.decay_fraction=0", "guard.spike_sigma=null"], "diverged"),
    "chance": (["optim.lr=1e-7"], "chance"),
    "rate-low": (["optim.lr=1e-4"], "rate_low"),
    "rate-high": (["optim.lr=1", "schedule.decay_fraction=0.9", "guard.spike_sigma=null"], "rate_high"),
    "collapse": ([*UNBALANCED, "model.moe.router.init=zeros", "optim.router_lr_scale=0"], "collapse"),
    "dead": (
        [
            *("balance.aux_loss_coef=0", "optim.router_lr_scale=30"),
            "model.moe.router={num_experts: 16, num_experts_per_tok: 1, score: softmax}",
        ],
        "dead",
    ),
    "waiting": (["train.max_steps=55"], "data_wait"),
    "skipped": (["guard.spike_sigma=0.2", "guard.spike_window=8", "guard.max_skips=1000", "optim.lr=0.3"], "skipped"),
    "halted": (["guard.spike_sigma=0.2", "guard.spike_window=8", "guard.max_skips=1", "optim.lr=0.3"], "halted"),
    "killed": ([], "unfinished"),
}
GOOD = ("tiny", "quickstart", "dense", "recurrent", "encoder-decoder", "lora")
REMARKS = {"waiting", "skipped"}
"""Wrong runs that are worth keeping all the same."""


def described(name: str, out: Path) -> RunConfig:
    """The run of that name."""
    if name in WRONG:
        return load_preset("tiny", [*SMALL, *TINY, *WRONG[name][0]])
    if name == "tiny":
        return load_preset("tiny", [*SMALL, *TINY, "train.max_steps=300"])
    if name == "quickstart":
        return load_preset("quickstart", [*SMALL, "train.max_seconds=null", "train.max_steps=200"])
    if name == "dense":
        return load_preset("tiny", [*SMALL, *TINY[:2], "model.moe=null", "train.max_steps=300"])
    if name == "recurrent":
        return load_preset("shazeer-tiny", [*SMALL, "train.max_steps=200", "train.batch_size=16"])
    if name == "encoder-decoder":
        few = ["model.vocab_size=544", "train.max_steps=200", "train.batch_size=32"]
        return load_preset("switch-tiny", [SMALL[1], *SMALL[3:], *few])
    base = out / "tiny"
    sections = {"data": {"sources": [str(LIBRARY / "logging"), str(LIBRARY / "asyncio")]}}
    sections |= {"train": {"max_steps": 60, "sequence_length": 32}, "optim": {"lr": 0.003}}
    return settings(
        str(base), load_run(base / "run.yaml").model, LoraTuning.model_validate({"method": "lora"}), sections=sections
    )


def go(name: str, out: Path) -> None:
    """Run it to whatever end it has."""
    real_step, real_next = loop.train_step, PackedBatches.__next__

    def slow(batches: PackedBatches) -> torch.Tensor:
        time.sleep(0.3)
        return real_next(batches)

    def deadly(*args: Any) -> Any:
        if args[5] == 70:  # the step
            os.kill(os.getpid(), signal.SIGKILL)
        return real_step(*args)

    slowly = mock.patch.object(PackedBatches, "__next__", slow) if name == "waiting" else mock.MagicMock()
    dying = mock.patch.object(loop, "train_step", deadly) if name == "killed" else mock.MagicMock()
    with slowly, dying:
        try:
            loop.train(out / name, described(name, out), quiet=True)
        except ManyhandsError as error:
            print(f"  {error}")


def what_is_judged(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The fields that a verdict reads, and no more digits than it needs; step by step for the verdict's windows."""
    kept = []
    for record in records:
        wanted = {"kind", "step", "valid_loss", "reason", "max_steps", "num_experts", "num_experts_per_tok", "start"}
        wanted |= {
            "data",
            "loss",
            "skipped",
            "tokens",
            "data_wait",
            "epochs",
            "worth",
            "layers",
            "bits_per_byte",
            "flops",
        }
        if record["kind"] == "step":
            wanted -= {"bits_per_byte"}
        slim = {name: value for name, value in record.items() if name in wanted}
        if moe := record.get("moe"):
            slim["moe"] = {layer: {"load": [round(share, 4) for share in f["load"]]} for layer, f in moe.items()}
        for name in ("loss", "data_wait", "epochs"):
            if isinstance(slim.get(name), float):
                slim[name] = round(slim[name], 4)
        if "data" in slim:
            slim["data"] = {name: value for name, value in slim["data"].items() if name != "sources"}
        kept.append(slim)
    return kept


def keep(name: str, folder: Path) -> None:
    """Its journal and description, for tests/compare/test_recorded.py."""
    records, text = read_journal(folder / "journal.jsonl"), (folder / "run.yaml").read_text()
    slim = what_is_judged(records)
    run = load_run(folder / "run.yaml")
    assert judge(slim, run).outcome == judge(records, run).outcome
    KEPT.mkdir(exist_ok=True)
    told = {"expected": WRONG[name][1] if name in WRONG else None, "fault": name in WRONG and name not in REMARKS}
    text = text.replace(str(LIBRARY), "/lib").replace(str(folder.parent), "/runs")
    data = json.dumps({**told, "run": text, "records": slim}, separators=(",", ":"))
    (KEPT / f"{name}.json.gz").write_bytes(gzip.compress(data.encode(), 9, mtime=0))


def main() -> None:
    """Run, judge, say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*", default=[*WRONG, *GOOD])
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    bad = 0
    for name in asked.names:
        folder = asked.out / name
        if name == "killed" and not asked.child:
            subprocess.run([sys.executable, __file__, str(asked.out), name, "--child"])
        elif not folder.is_dir() or asked.child:
            shutil.rmtree(folder, ignore_errors=True)
            go(name, asked.out)
        verdict = judge(read_journal(folder / "journal.jsonl"), load_run(folder / "run.yaml"))
        kinds: dict[str, bool] = {}
        for finding in verdict.findings:
            kinds[finding.kind] = finding.fault or kinds.get(finding.kind, False)
        want = WRONG[name][1] if name in WRONG else None
        right = not any(kinds.values()) if want is None or name in REMARKS else kinds.get(want, False)
        right = right and (want is None or want in kinds)
        bad += not right
        print(f"{'right' if right else 'WRONG'}  {name} (expected: {want or 'no fault'})", flush=True)
        print("\n".join(f"  {line}" for line in verdict.lines()), flush=True)
        if asked.keep:
            keep(name, folder)
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
