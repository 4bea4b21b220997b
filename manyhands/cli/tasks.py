"""`manyhands eval --tasks`: tasks of lm-eval, answered by a model, on the screen and in a file."""

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from manyhands.cli.progress import Loading, bars
from manyhands.errors import UserError
from manyhands.files import check_replaceable, write_atomic
from manyhands.terminal import shown
from manyhands.version import __version__

MARK = "manyhands_version"
"""Says that a file of results is ours, so that a later run may replace it."""


def answer_tasks(
    checkpoint: Path,
    tasks: list[str],
    how: dict[str, Any],
    answering: dict[str, Any],
    output: Path | None,
    ignore_fields: Sequence[str],
    json_output: bool,
    adapter: Path | None = None,
) -> None:
    """`how` are the arguments of `run_tasks`, `answering` those of `language_model`."""
    if find_spec("lm_eval") is None:  # before a model is loaded
        raise UserError("--tasks are lm-eval's, which is not installed: pip install 'manyhands[eval]'")
    if how["task_dir"] is not None and not how["task_dir"].is_dir():
        raise UserError(f"--task-dir {how['task_dir']}: there is no such folder")
    if output is not None:
        check_replaceable(output, f'"{MARK}"'.encode())

    from manyhands.checkpoint.model import load, only_decoder
    from manyhands.generate.harness import language_model, run_tasks

    with Loading(checkpoint) as read:
        loaded, tokenizer = load(checkpoint, ignore_fields=ignore_fields, adapter=adapter)
    model = only_decoder(loaded, "--tasks")
    if how["chat"] and tokenizer.chat_template is None:
        raise UserError("--apply-chat-template: the model has no chat template")
    read.said(loaded)
    with bars() as progress:
        lm = language_model(model, tokenizer, name=str(checkpoint), progress=progress, **answering)
        found = run_tasks(lm, tasks, **how)
    about = {"model": str(checkpoint), "tasks": tasks, MARK: __version__, "max_length": lm.max_length}
    report = {**about, **{name: found.get(name) for name in ("results", "groups", "versions", "n-shot", "n-samples")}}
    if output is not None:
        everything = {**report, "configs": found.get("configs"), "samples": found.get("samples")}
        write_atomic(output, json.dumps(everything, indent=1, default=str, ensure_ascii=False) + "\n")
    if json_output:
        print(json.dumps(report, default=str))
        return
    for line in lines(report):
        print(shown(line))
    if output is not None:
        print(f"every answer: {output}")


def lines(report: dict[str, Any]) -> list[str]:
    """A line for each task: its figures, each with its standard error where there is one."""
    made = []
    for task, figures in report["results"].items():
        parts = []
        for name, value in figures.items():
            metric, _, kind = name.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, int | float) or not kind:
                continue
            error = figures.get(f"{metric}_stderr,{kind}")
            spread = f" ± {error:.4f}" if isinstance(error, int | float) else ""
            parts.append(f"{metric} {value:.4f}{spread}" + ("" if kind == "none" else f" ({kind})"))
        shots = (report["n-shot"] or {}).get(task)
        asked = (report["n-samples"] or {}).get(task, {}).get("effective")
        about = [f"{asked:,} questions"] if asked is not None else []
        about += [f"{shots}-shot"] if shots is not None else []
        made.append(f"{task}: {', '.join(parts) or 'no figures'}" + (f" ({', '.join(about)})" if about else ""))
    return made
