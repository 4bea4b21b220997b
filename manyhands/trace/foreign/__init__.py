"""Traces of other engines: `read` says what one is of and gives its tokens, `import_trace` makes a trace of it.

Each file here is one engine's form. A format knows less than ours does, and what it does not say has to be given
(`Hints`), or stays unknown: who shared a forward pass, which of a text's tokens were the prompt, what the token was.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from manyhands.errors import DataError, UserError
from manyhands.trace.foreign import big_moe_on_edge, lattice, llama_cpp, megatron, sglang, vllm
from manyhands.trace.foreign.common import Foreign, Hints, first_line, jsonl_keys
from manyhands.trace.part import DESCRIPTION
from manyhands.trace.recorder import Recorder
from manyhands.trace.recording import Trace

__all__ = ["FORMATS", "Foreign", "Hints", "import_trace", "opened", "read"]

FORMATS: dict[str, Callable[[Path, Hints], Foreign]] = {
    "big-moe-on-edge": big_moe_on_edge.read,
    "lattice": lattice.read,
    "llama.cpp": llama_cpp.read,
    "megatron": megatron.read,
    "sglang": sglang.read,
    "vllm": vllm.read,
}
_PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def read(path: str | Path, hints: Hints | None = None, format: str | None = None) -> Foreign:
    """Another engine's trace, in `format` or in the one that it looks like.

    Raises `DataError`, naming file and line, for what is not in that format; `UserError` for what has to be given.
    """
    path = Path(path)
    if path.suffix in _PICKLES:
        raise DataError(
            f"{path}: a pickle, which can run any code and is never read; save the ids where it comes from: "
            "numpy.save(FILE, expert_ids) of an array [T, L, K]"
        )
    if not path.exists():
        raise DataError(f"{path}: does not exist")
    if not path.is_file() and not path.is_dir():
        raise DataError(f"{path}: not a file and not a directory")
    name = format or _looks_like(path)
    if name not in FORMATS:
        raise UserError(f"no format is called {name!r}; there are {', '.join(FORMATS)}")
    return FORMATS[name](path, hints or Hints())


def import_trace(
    source: str | Path, target: str | Path, hints: Hints | None = None, format: str | None = None
) -> Trace:
    """Make a trace, in a new directory, of another engine's. Raises what `read` and `Recorder` do."""
    foreign = read(source, hints, format)
    recorder = Recorder(target, **foreign.fields)
    try:
        for block in foreign.blocks():
            recorder.add_arrays(**block)
        if not recorder.num_tokens:
            raise DataError(f"{source}: there is no token in it")
        recorder.close()
    except BaseException:
        recorder.discard()
        raise
    return Trace.open(target)


@contextmanager
def opened(path: str | Path, hints: Hints | None = None) -> Iterator[Trace]:
    """A trace of ours, or another engine's, which is imported into a temporary directory for as long as it is open."""
    if (Path(path) / DESCRIPTION).is_file():
        yield Trace.open(path)
        return
    if Path(path).is_dir() and not any(Path(path).glob("router_trace_rank*.jsonl")):
        Trace.open(path)  # says what is missing
    with tempfile.TemporaryDirectory(prefix="manyhands-trace-") as folder:
        yield import_trace(path, Path(folder) / "trace", hints)


def _looks_like(path: Path) -> str:
    if path.is_dir():
        return "megatron"
    if path.suffix == ".npy":
        return "vllm"
    line = first_line(path)
    if line.startswith("# route_trace"):
        return "big-moe-on-edge"
    if path.suffix == ".jsonl":
        return "lattice" if "token_idx" in jsonl_keys(path) else "megatron"
    if path.suffix == ".json":
        return "sglang" if sglang.is_answer(path) else "vllm"
    if path.suffix == ".csv":
        return "llama.cpp"
    raise UserError(f"{path}: whose trace is it? Say so with --from: {', '.join(FORMATS)}")
