"""How often a run comes back when one of its processes is killed: `torchrun --max-restarts`, again and again.

    python scripts/restarts.py --times 20

Each time a tiny run of 2 processes is started, the process of rank 1 is killed with SIGKILL in the middle of a step,
and the run must end as if nothing had been: exit code 0, and the losses of a run that nobody disturbed.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SMALL = [
    "model.vocab_size=300",
    "model.hidden_size=32",
    "model.intermediate_size=64",
    "model.max_position_embeddings=32",
    "model.attention.num_attention_heads=2",
    "model.attention.head_dim=16",
    "model.moe.moe_intermediate_size=16",
    "train.sequence_length=32",
    "train.batch_size=4",
]
STEPS = ["train.max_steps=24", "train.save_every=4", "parallel.ep=2"]
KILL_AFTER = 9  # steps


def main() -> int:
    """Print one line for each time, and how many came back."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20)
    times = parser.parse_args().times
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text("".join(f"line {i % 97}: the hands are many\n" for i in range(600)))
        undisturbed = Path(folder) / "undisturbed"
        assert launch(undisturbed, text).wait() == 0
        back = sum(comes_back(Path(folder) / f"run{number}", text, losses(undisturbed)) for number in range(times))
    print(f"{back} of {times} came back")
    return 0 if back == times else 1


def launch(run: Path, text: Path) -> "subprocess.Popen[bytes]":
    """A run of two processes, which may be restarted once."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    train = ["-m", "manyhands", "train", "--preset", "tiny", "--quiet", "--out", str(run), "--data", str(text)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*torchrun, "--max-restarts", "1", *train, *SMALL, *STEPS]
    with open(run.with_suffix(".log"), "wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=env)


def comes_back(run: Path, text: Path, expected: dict[int, float]) -> bool:
    """Whether a run whose rank 1 is killed ends well, with the losses of one that is left alone."""
    began = time.monotonic()
    process = launch(run, text)
    while len(losses(run)) < KILL_AFTER and process.poll() is None:
        time.sleep(0.02)
    for pid in children(process.pid):
        if rank_of(pid) == "1":
            os.kill(pid, signal.SIGKILL)
    code = process.wait()
    found = losses(run)
    close = found.keys() == expected.keys() and all(
        abs(found[step] - loss) <= 1e-5 * loss for step, loss in expected.items()
    )
    sessions = sum(record["kind"] == "start" for record in records(run))
    good = code == 0 and close and sessions == 2
    print(
        f"{'came back' if good else 'FAILED'}: exit code {code}, {sessions} sessions, {len(found)} steps, "
        f"losses {'as undisturbed' if close else 'DIFFER'}, {time.monotonic() - began:.0f} s",
        flush=True,
    )
    if not good:
        print(run.with_suffix(".log").read_text()[-3000:])
    return good


def records(run: Path) -> list[dict[str, object]]:
    """The whole lines of a journal."""
    path = run / "journal.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def losses(run: Path) -> dict[int, float]:
    """Of each step, as it was written last."""
    return {int(str(r["step"])): float(str(r["loss"])) for r in records(run) if r["kind"] == "step"}


def children(pid: int) -> list[int]:
    """The processes that `pid` has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def rank_of(pid: int) -> str | None:
    """The rank that torchrun has given a process."""
    pairs = [entry.partition("=") for entry in Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")]
    return next((value for name, _, value in pairs if name == "RANK"), None)


if __name__ == "__main__":
    sys.exit(main())
