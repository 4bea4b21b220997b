"""Try an installed manyhands as a stranger would: `python scripts/try_install.py`, from any folder.

Version and kernels, a short run of the quickstart preset, text from it, and, where the `serve` extra is there, one
answer over HTTP. The Python that runs this is the one that is tried; it needs no compiler and no network. Exit code 1
and the command's own words where one fails.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

STEPS = 20
COMMAND = [sys.executable, "-P", "-m", "manyhands"]


def told(what: str, *arguments: str) -> str:
    """Run a command line; its output. Exits with it if it fails."""
    began = time.perf_counter()
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, encoding="utf-8")
    if done.returncode not in (0, 4):  # 4: the verdict on so short a run
        sys.exit(f"{what}: `manyhands {' '.join(arguments)}` ended with {done.returncode}\n{done.stdout}{done.stderr}")
    print(f"{what:10} {time.perf_counter() - began:6.1f} s  manyhands {' '.join(arguments)}"[:100], flush=True)
    return done.stdout


def answered(run: Path, folder: Path) -> str:
    """What a served model answers to one request; the server is stopped after it."""
    log = folder / "serve.log"
    with open(log, "w") as out:
        server = subprocess.Popen([*COMMAND, "serve", str(run), "--port", "0"], stdout=out, stderr=out)
    try:
        end = time.monotonic() + 120
        while not (found := [word for word in log.read_text().split() if word.startswith("http://127.0.0.1:")]):
            if server.poll() is not None or time.monotonic() > end:
                sys.exit(f"serve: it did not start\n{log.read_text()}")
            time.sleep(0.1)
        asked = json.dumps({"model": run.name, "prompt": "def ", "max_tokens": 8}).encode()
        address = found[0].rstrip("/.,") + "/v1/completions"
        request = urllib.request.Request(address, asked, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as reply:
            return str(json.load(reply)["choices"][0]["text"])
    finally:
        server.terminate()
        server.wait(30)


def main() -> None:
    """Try it."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # not the sources: the installed package
        run = Path(folder) / "run"
        print(told("version", "--version").strip())
        told("plan", "plan", "mixtral-8x7b")
        words = (
            Path(folder) / "words.txt"
        )  # little text: the kernels and the loop are tried, not the tokenizer's patience
        words.write_text("".join(f"def number_{i % 97}(a, b):\n    return a * {i} + b\n\n" for i in range(20_000)))
        short = [f"train.max_steps={STEPS}", "train.max_seconds=null"]  # the preset's budget is in seconds
        told("train", "train", "--preset", "quickstart", "--out", str(run), "--data", str(words), *short)
        text = told("generate", "generate", str(run), "--prompt", "def ", "--max-new-tokens", "16")
        if not text.strip():
            sys.exit("generate: no text")
        if find_spec("uvicorn") is not None and find_spec("starlette") is not None:
            start = time.perf_counter()
            text = answered(run, Path(folder))
            print(f"{'serve':10} {time.perf_counter() - start:6.1f} s  answered {text!r}")
        else:
            print("serve      not tried: install manyhands[serve]")
    print(f"all of it in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
