"""`manyhands train`: start or continue a run."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from manyhands.cli import complete
from manyhands.cli.loudness import quiet
from manyhands.errors import ConfigError, UserError
from manyhands.files import RUN

if TYPE_CHECKING:
    from manyhands.config import RunConfig
    from manyhands.train.finish import Summary


def train(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SECTION.KEY=VALUE]...",
            help="Changes on top of the preset or file.",
            autocompletion=complete.changes,
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="A run that ships with manyhands, for example quickstart.", autocompletion=complete.presets),
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="A run file (YAML).")] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue the run in this directory, as it is.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run's directory. Default: runs/NAME.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Text: file, folder, glob, stdlib or hf:NAME. Repeatable. Same as data.sources."),
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the resolved run, with where each value is from, and end.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be trained, with its size and cost; write nothing.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the summary as JSON; implies -q.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 4 for a remark of the verdict too.")] = False,
) -> None:
    """Train a model, or continue where a run stopped.

    The run's directory holds the resolved run.yaml, the journal, the checkpoints and report.html. Starting the same
    run again continues it; SIGTERM or Ctrl-C saves first. start=PATH begins from a checkpoint in the place of new
    weights.

    The last lines are the verdict: what went wrong, if anything did, by limits that docs/verdicts.md states. Exit code
    0 for a run worth keeping or too short to judge, 4 for one that is not worth keeping.

    On N processes, which share out batch, weights and optimiser: torchrun --nproc-per-node N -m manyhands train …;
    parallel.ep=M keeps each set of experts on M of them. A run goes on with any number of processes.
    """
    from manyhands.parallel.started import alike

    changes = list(overrides or [])
    with alike():
        run, directory = _asked(changes, preset, config, resume, out, data)
    if print_config:
        if json_output or dry_run:
            raise UserError("--print-config prints YAML alone: leave --json and --dry-run out")
        _print_config(run, changes, preset, config, resume)
        return
    if dry_run:
        from manyhands.cli.dry_run import say

        say(directory, run, json_output)
        return

    from manyhands.parallel.group import joined
    from manyhands.train.memory import keep_freed_memory

    keep_freed_memory()
    with joined(run.train.device) as ranks:
        if run.tune is None:
            from manyhands.train.loop import train as start

            summary = start(directory, run, quiet=quiet(), ranks=ranks)
        else:
            from manyhands.tune.run import tune

            summary = tune(directory, run, quiet=quiet(), ranks=ranks)
    end(summary, json_output, strict, ranks.rank)


def _print_config(
    run: "RunConfig", changes: list[str], preset: str | None, config: Path | None, resume: Path | None
) -> None:
    from manyhands.config.load import preset_text
    from manyhands.config.origin import with_origins

    if preset is not None:
        print(with_origins(run, preset_text(preset), f"preset {preset}", changes), end="")
        return
    path = config if resume is None else resume / RUN
    assert path is not None
    print(with_origins(run, path.read_text(encoding="utf-8"), str(path), changes), end="")


def end(summary: "Summary", json_output: bool, strict: bool, rank: int) -> None:
    """Show, on rank 0, what a finished run reached, for a person or for a program; exit as its verdict says."""
    if not rank:
        _show(summary, json_output)
    if code := summary.verdict.exit_code(strict):
        raise typer.Exit(code)


def _show(summary: "Summary", json_output: bool) -> None:
    if json_output:
        import json
        from dataclasses import asdict

        print(json.dumps({**asdict(summary), "verdict": summary.verdict.as_json()}, default=_jsonable))
    else:
        print("\n".join(summary.lines()))


def _asked(
    changes: list[str],
    preset: str | None,
    config: Path | None,
    resume: Path | None,
    out: Path | None,
    data: list[str] | None,
) -> tuple["RunConfig", Path]:
    """The run that the options describe, and its directory."""
    from manyhands.config.load import load_preset, load_run

    if data:
        changes.append("data.sources=[" + ", ".join(_quoted(source) for source in data) + "]")
    if sum(source is not None for source in (preset, config, resume)) != 1:
        raise ConfigError("say what to train: one of --preset NAME, --config FILE, --resume DIRECTORY")
    if resume is not None:
        if out is not None:
            raise ConfigError("--resume continues in the run's own directory: leave --out away")
        if not (resume / RUN).is_file():
            raise ConfigError(f"--resume {resume}: there is no run.yaml in it, so it is not a run's directory")
        return load_run(resume / RUN, changes), resume
    if config is not None:
        return load_run(config, changes), out or Path("runs") / config.stem
    assert preset is not None
    return load_preset(preset, changes), out or Path("runs") / preset


def _quoted(source: str) -> str:
    return "'" + source.replace("'", "''") + "'"


def _jsonable(value: Any) -> str:
    return str(value)
