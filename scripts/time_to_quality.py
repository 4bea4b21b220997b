"""How near to 7 times sooner: `python scripts/time_to_quality.py --out DIR [--hours 1] [--arms 64x1,64x2,128x1,256x1]`.

`manyhands lab run time-to-quality` with as much time as there is: a dense model goes on until it hardly learns, and
after each stretch every sparse model of no more active FLOPs until it is where the dense one was. So the curve is
complete wherever the script is cut off, and the same command goes on from there. From 2,000 dense steps on only the
two best arms do.

The text is every Python file of this Python, with what is installed beside it, so that little of it is read twice;
`--data` names other text. DIR holds a run of `manyhands train` per arm, and curve.json.
"""

import argparse
import json
import math
import shutil
import sysconfig
import time
from pathlib import Path

from manyhands.config import RunConfig
from manyhands.config.load import dump_run, load_run, parse_run
from manyhands.files import JOURNAL, PREPARED, RUN, write_atomic
from manyhands.lab.curves import Progress, Ratio, ratios
from manyhands.lab.job import Job
from manyhands.lab.language import REGIME, arm, changed, read_arm, with_experts
from manyhands.plan.count import count_model
from manyhands.train.data import prepare_data
from manyhands.train.loop import train
from manyhands.train.memory import keep_freed_memory

EVERY = 100
"""Steps between validations."""
STRETCH = 300
"""Steps between looks at who is ahead."""
PRUNE_AT, KEEP = 2000, 2


def main() -> None:
    """Go on, stretch by stretch, until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--hours", type=float, default=1.0, help="of this call; the next goes on")
    parser.add_argument("--arms", default="64x1,64x2,128x1,256x1", help="experts x experts per token")
    parser.add_argument("--width", type=int, default=152, help="of the dense feed-forward networks")
    parser.add_argument("--data", nargs="+", help="files, folders, globs, 'stdlib'")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    keep_freed_memory()
    end = time.perf_counter() + 3600 * given.hours
    runs = described(given)
    prepare(given.out, runs)
    job = Job(False, (given.seed,), given.out)
    while time.perf_counter() < end:
        behind = [name for name in going_on(given.out, runs) if not passed(given.out, runs, name)]
        if behind:
            advance(job, given.out, runs[behind[0]], behind[0])
            continue
        report(job, given.out, runs)
        goal = 1.25 * max(steps_done(given.out, "dense"), STRETCH)
        while steps_done(given.out, "dense") < goal and time.perf_counter() < end:
            advance(job, given.out, runs["dense"], "dense")
    report(job, given.out, runs, whole=True)


def described(given: argparse.Namespace) -> dict[str, RunConfig]:
    """The dense run and the sparse ones, none of which has more active FLOPs."""
    library, beside = sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["purelib"]
    sources = given.data or ["stdlib", f"{beside}/**/*.py"]
    print(f"text: {', '.join(sources)}" + (f" (stdlib: {library})" if "stdlib" in sources else ""), flush=True)
    dense = parse_run(
        REGIME,
        "the lab's regime",
        [
            f"data.sources={json.dumps(sources)}",
            "data.valid_fraction=0.002",
            f"model.intermediate_size={given.width}",
            f"train.eval_every={EVERY}",
            f"train.seed={given.seed}",
            "train.save_seconds=120",
            "train.keep_checkpoints=1",
        ],
    )
    runs = {"dense": dense}
    for name in given.arms.split(","):
        experts, _, each = name.partition("x")
        runs[name] = fitted(dense, int(experts), int(each))
    return runs


def fitted(dense: RunConfig, E: int, K: int) -> RunConfig:
    """E experts, K per token, as wide as the dense model's active FLOPs allow with the router's; a multiple of 4."""
    room = count_model(dense.model).active_without_embedding
    width = dense.model.intermediate_size // K // 4 * 4
    while width > 0:
        run = with_experts(dense, E, K, width)
        if count_model(run.model).active_without_embedding <= room:
            return run
        width -= 4
    raise SystemExit(f"{E}x{K}: the router alone has more FLOPs than the dense model; give a larger --width")


def prepare(out: Path, runs: dict[str, RunConfig]) -> None:
    """The text once, in DIR/text; each arm is a run with it."""
    text = out / "text"
    prepare_data(text, runs["dense"], lambda said: print(said, flush=True))
    for name, run in runs.items():
        made = arm(run, name)
        print(f"{name}: {made.parameters:,} parameters, {made.flops:,.0f} FLOPs per token forward", flush=True)
        if not (out / name / RUN).is_file():
            shutil.rmtree(out / name, ignore_errors=True)  # a copy that was cut off
            shutil.copytree(text, out / name / "data")
            write_atomic(out / name / RUN, dump_run(run))
        elif (before := load_run(out / name / RUN)).model != run.model or before.data != run.data:
            raise SystemExit(f"{out / name} is another model, or has other text: choose another --out")
    assert (text / PREPARED).is_file()


def advance(job: Job, out: Path, run: RunConfig, name: str) -> None:
    """One stretch more."""
    steps = (steps_done(out, name) // STRETCH + 1) * STRETCH
    with job.clock() as clock:
        train(out / name, changed(run, f"train.max_steps={steps}"), quiet=True)
    best = min(progress(out, run, name).losses)
    busy = "" if job.quiet else "; the machine is busy: times mean little"
    print(f"  {name}: step {steps:,}, best validation loss {best:.4f} ({clock.seconds:.0f} s{busy})", flush=True)


def steps_done(out: Path, name: str) -> int:
    """By the journal."""
    path = out / name / JOURNAL
    if not path.is_file():
        return 0
    return max(read_arm(out / name, load_run(out / name / RUN), 0).training.steps, default=0)


def progress(out: Path, run: RunConfig, name: str) -> Progress:
    """Validation losses so far; of an arm that has not begun, none."""
    if not (out / name / JOURNAL).is_file():
        return Progress((), (), ())
    return read_arm(out / name, run, 0).validation


def passed(out: Path, runs: dict[str, RunConfig], name: str) -> bool:
    """Whether this arm is at least where the dense one is."""
    dense = progress(out, runs["dense"], "dense").losses
    return not dense or min(progress(out, runs[name], name).losses, default=math.inf) <= min(dense)


def curves(out: Path, runs: dict[str, RunConfig]) -> dict[str, list[Ratio]]:
    """The ratios of every sparse arm."""
    dense = progress(out, runs["dense"], "dense")
    found = {name: progress(out, run, name) for name, run in runs.items() if name != "dense"}
    return {name: ratios(dense, there) if dense.losses and there.losses else [] for name, there in found.items()}


def going_on(out: Path, runs: dict[str, RunConfig]) -> list[str]:
    """The arms that still go on: the best ones, once the dense model is some way."""
    found = curves(out, runs)
    names = sorted(found, key=lambda name: -(found[name][-1].by_steps if found[name] else math.inf))
    return names[:KEEP] if steps_done(out, "dense") > PRUNE_AT else names


def report(job: Job, out: Path, runs: dict[str, RunConfig], whole: bool = False) -> None:
    """Write curve.json; print the newest ratios, or the `whole` curve and where it is going."""
    found = curves(out, runs)
    parameters = count_model(runs["dense"].model).total
    per_step = runs["dense"].train.batch_size * runs["dense"].train.sequence_length
    lines = {
        name: [
            {
                "loss": r.loss,
                "dense_step": r.slow_step,
                "step": r.fast_step,
                "by_steps": r.by_steps,
                "by_clock": r.by_clock,
            }
            for r in one
        ]
        for name, one in found.items()
    }
    document = {"dense_parameters": parameters, "tokens_per_step": per_step, "quiet": job.quiet, "arms": lines}
    write_atomic(out / "curve.json", json.dumps(document, indent=1))
    for name, one in found.items():
        if not one:
            continue
        shown = doublings(one) if whole else one[-1:]
        for r in shown:
            print(
                f"{name}: at the dense loss {r.loss:.4f} of step {r.slow_step:,.0f} "
                f"({r.slow_step * per_step / parameters:,.0f} tokens per parameter): "
                f"{r.by_steps:.2f} times sooner by steps, {r.by_clock:.2f} by clock",
                flush=True,
            )
        if whole and len(shown) > 1:
            before, last = shown[-2:]
            growth = (last.by_steps - before.by_steps) / math.log2(last.slow_step / before.slow_step)
            print(f"{name}: {growth:+.2f} by steps for the last doubling of the dense model's steps", flush=True)


def doublings(one: list[Ratio]) -> list[Ratio]:
    """The last ratio, and those at a half, a quarter, … of its dense steps."""
    found, step = [one[-1]], one[-1].slow_step / 2
    while earlier := [r for r in one if r.slow_step <= step]:
        found.insert(0, earlier[-1])
        step = earlier[-1].slow_step / 2
    return found


if __name__ == "__main__":
    main()
