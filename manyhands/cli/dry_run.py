"""`manyhands train --dry-run`: what would be trained, before anything is written."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manyhands.format import duration, rounded, show
from manyhands.terminal import shown

if TYPE_CHECKING:
    from manyhands.checkpoint.runs import RunDirectory
    from manyhands.config import RunConfig
    from manyhands.train.session import Session

_SAMPLE = 400_000
"""Characters of the text from which the number of its tokens is estimated."""
_FLOAT = 4


def say(path: Path, run: "RunConfig", json_output: bool) -> None:
    """Print it. Raises what the run itself would raise before it reads or writes anything, and `DataError`."""
    from manyhands.checkpoint.runs import RunDirectory
    from manyhands.parallel.ranks import Alone
    from manyhands.train.session import foresee

    directory = RunDirectory(path)
    told = _figures(directory, foresee(directory, run, Alone()))
    print(json.dumps(told, ensure_ascii=False) if json_output else "\n".join(_lines(told)))


def _figures(directory: "RunDirectory", session: "Session") -> dict[str, Any]:
    from manyhands.config.history import settings_at
    from manyhands.plan.count_kind import count_any

    run = settings_at(session.run, session.step)
    counts, train = count_any(run.model), run.train
    tokens = train.max_steps * train.batch_size * train.sequence_length
    trained, state = _trained(run)
    frozen = counts.total - trained if not run.saves_changes else counts.total
    text = _text(directory, session)
    seen = None if text is None else tokens / text["train_tokens"]
    return {
        "directory": str(directory.path),
        "steps_done": session.step,
        "steps": train.max_steps,
        "parameters": counts.total,
        "active_parameters": counts.active,
        "trained_parameters": trained,
        "memory_bytes": _FLOAT * (frozen + 2 * trained) + state,
        "tokens": tokens,
        "tokens_per_parameter": tokens / counts.total,
        "tokens_per_active_parameter": tokens / counts.active,
        "data": text,
        "epochs": seen,
        "max_seconds": train.max_seconds,
        "least_seconds": _least_seconds(run, counts.active, tokens),
        "dtype": train.dtype,
    }


def _trained(run: "RunConfig") -> tuple[int, int]:
    """Parameters that are trained, and bytes of what their optimisers keep of them.

    None of ESFT, which chooses its experts when the data has been read.
    """
    import torch

    from manyhands.config.tune import EsftTuning
    from manyhands.models import build
    from manyhands.models.tuned import adapt
    from manyhands.plan.training_memory import moments_of
    from manyhands.train.state import count_trained
    from manyhands.train.trainable import freeze

    with torch.device("meta"):
        model = build(run.model, run.train.experts_implementation)
    if isinstance(run.tune, EsftTuning) and run.tune.experts is None:
        return 0, 0
    if run.tune is not None and run.saves_changes:
        adapt(model, run.tune)
    else:
        freeze(model, run.trainable)
    trained = [(name, tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad]
    return count_trained(model), _FLOAT * sum(moments_of(name, shape, run.optim.name) for name, shape in trained)


def _least_seconds(run: "RunConfig", active: int, tokens: int) -> float | None:
    """Of the products alone, forward and backward, at this machine's measured rate; None where it was not measured."""
    from manyhands.plan.remember import remembered

    here = remembered()
    if here is None or (run.train.device == "cuda" and here.machine.kind != "gpu"):
        return None
    machine = here.processor if run.train.device == "cpu" else here.machine
    rate = machine.rates.get("bf16" if run.train.dtype == "bfloat16" else "fp32")
    return None if rate is None else 6 * active * tokens / rate


def _text(directory: "RunDirectory", session: "Session") -> dict[str, Any] | None:
    """What there is to learn from; None for rows and for sources that would have to be fetched."""
    from manyhands.files import TRAIN_TOKENS
    from manyhands.text import TokenFile, Tokenizer, read_documents, split_documents

    run = session.run
    prepared = directory.data_dir / TRAIN_TOKENS
    if run.rows is not None or any(source.startswith("hf:") for source in run.data.sources):
        return None
    if prepared.is_file():
        return {"train_tokens": TokenFile.open(prepared, run.model.vocab_size).info.num_tokens, "estimated": False}
    documents = read_documents(run.data.sources, run.data.text_field)
    if not run.data.valid:
        documents, _ = split_documents(documents, run.data.valid_fraction, run.data.seed)
    characters = sum(len(document.text) for document in documents)
    step = max(1, len(documents) // 50)
    sample = "\n".join(document.text[: _SAMPLE // 10] for document in documents[::step])[:_SAMPLE]
    if run.data.tokenizer is not None:
        tokenizer = Tokenizer.from_file(run.data.tokenizer)
    elif session.start is not None:
        tokenizer = session.start.tokenizer()
    else:
        tokenizer = Tokenizer.train(iter([sample]), run.model.vocab_size, run.tokenizer.pre)
    tokens = len(tokenizer.encode(sample)) * characters / max(1, len(sample))
    return {
        "documents": len(documents),
        "bytes": sum(document.num_bytes for document in documents),
        "train_tokens": max(1, round(tokens)),
        "estimated": True,
    }


def _lines(told: dict[str, Any]) -> list[str]:
    name = shown(told["directory"])
    done = f"goes on after step {told['steps_done']:,}" if told["steps_done"] else "begins"
    budget = told["max_seconds"]
    limit = "" if budget is None else f", or what fits into {duration(budget)}"
    lines = [f"{name}: the run {done}; {told['steps']:,} steps in all{limit}; nothing was written"]
    lines.append(
        f"model    {rounded(told['parameters'])} parameters, {rounded(told['active_parameters'])} active per token, "
        f"{rounded(told['trained_parameters'])} trained"
    )
    lines.append(
        f"memory   {show(told['memory_bytes'], 'B')} of weights, gradients and optimiser state; activations come on top"
    )
    lines.append(
        f"tokens   {show(told['tokens'], 'tokens').strip()} in all: {told['tokens_per_parameter']:.3g} per parameter, "
        f"{told['tokens_per_active_parameter']:.3g} per active one"
    )
    text = told["data"]
    if text is None:
        lines.append("data     not read in a dry run: rows are counted, and hf: sources fetched, when the run begins")
    else:
        about = "about " if text["estimated"] else ""
        lines.append(f"data     {about}{show(text['train_tokens'], 'tokens').strip()} tokens to train on")
        lines.append(f"epochs   {about}{told['epochs']:.3g}")
    least = told["least_seconds"]
    if budget is not None:
        lines.append(f"time     {duration(budget)} at most, by train.max_seconds")
    elif least is None:
        lines.append("time     not known: manyhands doctor measures this machine")
    else:
        lines.append(
            f"time     {show(least, 's')} at the very least: 6 · active parameters · tokens at this machine's measured "
            f"{told['dtype']} rate; small models take many times that"
        )
    return lines
