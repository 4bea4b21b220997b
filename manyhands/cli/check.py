"""`manyhands check`: hold a model against the float64 dense oracle."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from manyhands.cli import complete
from manyhands.cli.options import IgnoreField
from manyhands.errors import ConfigError

if TYPE_CHECKING:
    from manyhands.checkpoint.source import Source
    from manyhands.config import BalanceConfig, BuiltConfig


def check(
    model: Annotated[
        str,
        typer.Argument(
            help="A preset, a run file (YAML), a checkpoint or a run's directory.", autocompletion=complete.presets
        ),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Changes to a preset or run file.")
    ] = None,
    backend: Annotated[list[str] | None, typer.Option(help="Only this expert backend. Repeatable.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Only float32 or bfloat16. Repeatable.")] = None,
    routers: Annotated[
        bool, typer.Option(help="Check all else as well: every router, attention, packed format and size.")
    ] = True,
    layout: Annotated[
        str | None,
        typer.Option(metavar="DPxEP[,…]", help="Train on so many processes, experts over EP of them, against one."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    ignore_field: IgnoreField = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Training and generation against a float64 oracle that runs all experts and has no cache.

    Forward, gradients and balance losses by every backend; generation, plain and packed; every router, attention,
    packed format and size at which something else runs. A large model is shrunk first. Of a checkpoint the weights
    themselves are read too, as many as two gigabytes. Exit code 4 if anything disagrees or a fast path never ran.

    With --layout nothing but that: DP × EP processes are started here, joined by gloo, and hold every loss, gradient,
    count and update of three training steps against one process, to 1e-6 of each tensor's largest.
    """
    config, balance, source = _describe(model, overrides or [], ignore_field or [])
    if layout is not None and (backend or dtype):
        raise ConfigError("--layout trains in float64 with 'eager': it goes with neither --backend nor --dtype")

    from rich.console import Console

    from manyhands.check import render, run_check
    from manyhands.cli.progress import named_bar

    with named_bar() as progress:
        if layout is not None:
            from manyhands.check.layout_jobs import parse_layouts, run_layouts

            report = run_layouts(config, balance, parse_layouts(layout), seed=seed, progress=progress)
        else:
            report = run_check(
                config,
                balance,
                seed=seed,
                backends=backend,
                dtypes=dtype,
                routers=routers,
                source=source,
                progress=progress,
            )
    if json_output:
        import json

        print(json.dumps(report.to_dict()))
    else:
        render(report, Console())
    report.raise_if_failed()


def _describe(
    model: str, overrides: list[str], ignore_fields: list[str]
) -> "tuple[BuiltConfig, BalanceConfig, Source | None]":
    from manyhands.config import BalanceConfig
    from manyhands.config.load import described_model, load_preset, load_run, preset_names

    path = Path(model)
    if path.is_dir() or model.endswith(".gguf"):
        if overrides:
            raise ConfigError(f"{model} is a checkpoint: it is checked as it is, without {overrides[0]!r}")
        from manyhands.checkpoint.find import open_checkpoint

        source = open_checkpoint(path, ignore_fields)
        return source.config, BalanceConfig(), source
    if ignore_fields:
        raise ConfigError(f"{model} is not a checkpoint: --ignore-field {ignore_fields[0]} is for its config.json")
    if path.suffix in (".yaml", ".yml") or path.is_file():
        run = load_run(path, overrides)
    elif model in preset_names():
        run = load_preset(model, overrides)
    else:
        raise ConfigError(
            f"{model!r} is neither a preset ({', '.join(preset_names())}), nor a run file, nor a checkpoint directory"
        )
    return described_model(run, model), run.balance, None
