"""Kill a small run with SIGKILL at random moments, again and again: `python scripts/kill_test.py [--kills 100]`.

After each kill the newest complete checkpoint must load, byte for byte as its manifest says, and the next start must
continue from it. Half of the kills are aimed at a save: they fall shortly after the temporary directory of a checkpoint
appears. At the end the run is finished undisturbed and its weights are compared with those of a run nobody killed.
"""

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from manyhands.checkpoint.runs import RunDirectory
from manyhands.checkpoint.state import load_tensors

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind.\n"
RUN = """
data: {sources: [DATA]}
model:
  vocab_size: 300
  hidden_size: 32
  num_hidden_layers: 2
  intermediate_size: 64
  max_position_embeddings: 32
  attention: {num_attention_heads: 2, head_dim: 16}
  moe: {moe_intermediate_size: 16, first_k_dense_replace: 1, router: {num_experts: 8, score: sigmoid, bias: true}}
schedule: {decay_fraction: 0.0}  # a rate that does not depend on max_steps, which is set at the end
train: {max_steps: STEPS, sequence_length: 32, batch_size: 4, save_every: 5, keep_checkpoints: 2}
"""


def main() -> None:
    """Run the test; exit code 1 at the first thing that is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text.txt").write_text("".join(f"{i} {TEXT}" for i in range(3000)))
        config = folder / "run.yaml"
        steps = 60 * arguments.kills  # more than can be done between kills
        config.write_text(RUN.replace("DATA", str(folder / "text.txt")).replace("STEPS", str(steps)))
        run, during_save, from_start = RunDirectory(folder / "killed"), 0, 0
        for kill in range(1, arguments.kills + 1):
            before = run.newest_valid()
            process = start(config, run.path)
            aimed = kill % 2 == 0
            during_save += wait_for_moment(process, run, rng, aimed)
            process.send_signal(signal.SIGKILL)
            process.wait()
            newest = run.newest_valid()  # hashes every file of the newest complete checkpoint
            if before is not None and (newest is None or newest[0] < before[0]):
                sys.exit(f"kill {kill}: the checkpoint of step {before[0]} was lost; the newest is {newest}")
            from_start += newest is None
            print(f"kill {kill}: newest checkpoint step {newest[0] if newest else '-'}", flush=True)
        newest = run.newest_valid()
        if newest is None:
            sys.exit("no checkpoint was ever written: the kills came too early to test anything")
        final = newest[0] + 10
        compare(config, run.path, folder / "undisturbed", final)
        print(
            f"{arguments.kills} kills ({during_save} during a save, {from_start} before any checkpoint): "
            f"{arguments.kills} clean resumes; the finished run equals an undisturbed one of {final} steps, bit for bit"
        )


def start(config: Path, out: Path, *changes: str) -> subprocess.Popen[bytes]:
    """`manyhands train` in its own process."""
    command = [sys.executable, "-m", "manyhands", "train", "-c", str(config), "--out", str(out), "--quiet", *changes]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def wait_for_moment(process: subprocess.Popen[bytes], run: RunDirectory, rng: random.Random, aimed: bool) -> bool:
    """Wait until it is time to kill; True if a save is under way then. The process must not end by itself."""
    deadline = time.monotonic() + 120
    while not run.journal_file.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    size = run.journal_file.stat().st_size if run.journal_file.exists() else 0
    while time.monotonic() < deadline and process.poll() is None:  # this session has begun to train
        if run.journal_file.stat().st_size > size:
            break
        time.sleep(0.01)
    if aimed:
        while time.monotonic() < deadline and process.poll() is None and not partials(run):
            pass
        time.sleep(rng.uniform(0.0, 0.02))
    else:
        time.sleep(rng.uniform(0.0, 1.0))
    if process.poll() is not None:
        assert process.stderr is not None
        sys.exit(f"the run ended by itself with code {process.returncode}: {process.stderr.read().decode()}")
    return bool(partials(run))


def partials(run: RunDirectory) -> list[Path]:
    """Unfinished checkpoint directories."""
    return list(run.checkpoints_dir.glob(".*partial*")) if run.checkpoints_dir.is_dir() else []


def compare(config: Path, killed: Path, undisturbed: Path, final: int) -> None:
    """Finish the killed run, do the same steps in one go elsewhere, and compare the last checkpoints bit by bit."""
    weights = []
    for out in (killed, undisturbed):
        if out == undisturbed:
            shutil.copytree(killed / "data", out / "data")
        process = start(config, out, f"train.max_steps={final}", "train.save_every=0")
        if process.wait() != 0:
            assert process.stderr is not None
            sys.exit(f"{out.name}: exit code {process.returncode}: {process.stderr.read().decode()}")
        newest = RunDirectory(out).newest_valid()
        assert newest is not None and newest[0] == final
        weights.append({f: load_tensors(newest[1] / f"{f}.safetensors") for f in ("model", "optimizer")})
    for file, tensors in weights[0].items():
        for name, tensor in tensors.items():
            if not torch.equal(tensor, weights[1][file][name]):
                sys.exit(f"{file}: {name} differs from the undisturbed run's")


if __name__ == "__main__":
    main()
