"""What `manyhands convert MODEL NAME.gguf` writes, run by llama.cpp: `python benchmarks/gguf_parity.py [CASE ...]`

`--peer PYTHON` is a Python with llama.cpp in it, in an environment of its own (`pip install xllamacpp`). The cases are
small random models of every family that llama.cpp has, and each `--model DIR` besides.

    text          of how many greedy continuations every token is the same
    difference    largest difference of a log-probability, over the vocabulary and all steps before the texts part
    mean          the mean of those differences
    tokenizer     whether two difficult texts have the same tokens

The reference is the model as it was, in float32; for the other types, what the file holds, decoded to float32.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from manyhands.checkpoint.gguf.blocks import FILE_TYPES, FileType
from manyhands.checkpoint.gguf.export import export
from manyhands.checkpoint.model import load, load_model
from manyhands.errors import ManyhandsError
from manyhands.models import Decoder
from tests.checkpoint.gguf_models import MODELS, saved

STEPS, PROMPTS, LENGTH = 32, 4, 12
TEXTS = [
    "Hello, world!  It's 12345 o'clock.\n\n\tNaïve café, déjà vu; ½ × 3 = 1.5 — 你好，世界 🙂🙃\r\n  if x:\n    y_1",
    "we'LL they've I'M don't 'sup 1 22 333 4444 a  b   c\n \n  \n",
]
PEER = Path(__file__).with_name("gguf_peer.py")


def main() -> None:
    """Parse, measure, print a row per case and type."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"all, unless given: {'; '.join(MODELS)}")
    parser.add_argument("--peer", default=sys.executable, help="a Python with xllamacpp")
    parser.add_argument("--types", nargs="+", default=list(FILE_TYPES), choices=FILE_TYPES)
    parser.add_argument("--model", action="append", default=[], help="a checkpoint, besides")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for case in arguments.cases or ([] if arguments.model else MODELS):
            directory = Path(scratch) / case.replace(" ", "-").replace(",", "")
            saved(case, directory)
            rows += measured(case, directory, arguments.types, arguments.peer, Path(scratch), not arguments.json)
        for path in arguments.model:
            rows += measured(
                Path(path).name, Path(path), arguments.types, arguments.peer, Path(scratch), not arguments.json
            )
    if arguments.json:
        print(json.dumps(rows, indent=1))


def measured(
    case: str, directory: Path, types: list[FileType], peer: str, scratch: Path, say: bool
) -> list[dict[str, Any]]:
    """One case in every type."""
    rows = []
    for file_type in types:
        path = scratch / f"{directory.name}-{file_type}.gguf"
        try:
            receipt = export(directory, path, file_type=file_type, to=None)
            row = compared(directory, path, file_type, peer) | {"arch": receipt["target"]["architecture"]}
        except (ManyhandsError, subprocess.SubprocessError) as error:
            row = {"error": str(error)[-300:]}
        rows.append({"case": case, "type": file_type} | row)
        if say:
            print(json.dumps(rows[-1]), flush=True)
        path.unlink(missing_ok=True)
    return rows


def compared(directory: Path, path: Path, file_type: FileType, peer: str) -> dict[str, Any]:
    """Ours and llama.cpp's on the same prompts."""
    before, words = load(directory, dtype=torch.float32, decode=True)
    model = before if file_type == "f32" else load_model(path, dtype=torch.float32, decode=True)
    V = model.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(1, words.vocab_size, (PROMPTS, LENGTH), generator=generator).tolist()
    halves = [n for n in range(V) if n in words.eos_token_ids or not whole(words.token_bytes(n))]
    request = {"gguf": str(path), "prompts": prompts, "steps": STEPS, "vocab": V, "texts": TEXTS, "banned": halves}
    file, answer = path.with_suffix(".json"), path.with_suffix(".answer.json")
    file.write_text(json.dumps(request), encoding="utf-8")
    done = subprocess.run([peer, str(PEER), str(file), str(answer)], capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise subprocess.SubprocessError(done.stderr[-300:] or f"the peer ended with {done.returncode}")
    theirs = json.loads(answer.read_text(encoding="utf-8"))
    same, differences = 0, []
    for prompt, ids, rows in zip(prompts, theirs["ids"], theirs["logprobs"], strict=True):
        ours = torch.log_softmax(logits_of(model, prompt + ids)[len(prompt) - 1 : -1], -1)
        chosen = ours.index_fill(1, torch.tensor(halves, dtype=torch.long), -torch.inf).argmax(-1).tolist()
        same += chosen == ids
        until = next((n for n, (a, b) in enumerate(zip(chosen, ids, strict=True)) if a != b), len(ids)) or 1
        found = torch.tensor(rows[:until])
        differences.append((found - ours[:until]).abs().flatten())
    words_equal = [words.encode(text) for text in TEXTS] == theirs["tokens"]
    every = torch.cat(differences)
    found = {"text": f"{same}/{PROMPTS}", "difference": float(every.max()), "mean": float(every.mean())}
    return found | {"tokenizer": "equal" if words_equal else "DIFFERS"}


def whole(data: bytes) -> bool:
    """Whether a token is text by itself: the server keeps back what it knows of one that is not."""
    try:
        return bool(data.decode("utf-8"))
    except UnicodeDecodeError:
        return False


@torch.no_grad()
def logits_of(model: Decoder, ids: list[int]) -> torch.Tensor:
    """[S, V], in one pass."""
    return model(torch.tensor([ids])).logits[0].float()


if __name__ == "__main__":
    main()
