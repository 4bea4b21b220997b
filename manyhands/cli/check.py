"""`manyhands check`: hold a model against the float64 dense oracle."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from manyhands.errors import ConfigError

if TYPE_CHECKING:
    from manyhands.config import BalanceConfig, ModelConfig


def check(
    model: Annotated[str, typer.Argument(help="A preset, a run file (YAML), a checkpoint or a run's directory.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Changes to a preset or run file.")
    ] = None,
    backend: Annotated[list[str] | None, typer.Option(help="Only this expert backend. Repeatable.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Only float32 or bfloat16. Repeatable.")] = None,
    routers: Annotated[bool, typer.Option(help="Check every kind of router as well, each in one layer.")] = True,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    json_output: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Forward, every gradient, every balance loss, backend by backend, against an oracle that runs all experts.

    A large model is shrunk first. Exit code 4 if anything disagrees.
    """
    config, balance = _describe(model, overrides or [])

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from manyhands.check import render, run_check

    errors = Console(stderr=True)
    bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=errors, transient=True)
    with bar:
        task = bar.add_task("", total=None)
        report = run_check(
            config,
            balance,
            seed=seed,
            backends=backend,
            dtypes=dtype,
            routers=routers,
            progress=lambda what, done, total: bar.update(task, description=what, completed=done, total=total),
        )
    if json_output:
        import json

        print(json.dumps(report.to_dict()))
    else:
        render(report, Console())
    report.raise_if_failed()


def _describe(model: str, overrides: list[str]) -> "tuple[ModelConfig, BalanceConfig]":
    from manyhands.config import BalanceConfig
    from manyhands.config.load import load_preset, load_run, preset_names

    path = Path(model)
    if path.is_dir():
        if overrides:
            raise ConfigError(f"{model} is a checkpoint: it is checked as it is, without {overrides[0]!r}")
        from manyhands.checkpoint.model import find, read_config

        return read_config(find(path)), BalanceConfig()
    if path.suffix in (".yaml", ".yml") or path.is_file():
        run = load_run(path, overrides)
    elif model in preset_names():
        run = load_preset(model, overrides)
    else:
        raise ConfigError(
            f"{model!r} is neither a preset ({', '.join(preset_names())}), nor a run file, nor a checkpoint directory"
        )
    return run.model, run.balance
