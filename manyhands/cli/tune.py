"""`manyhands tune`: fine-tune a model that is there."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from manyhands.cli.loudness import quiet
from manyhands.cli.train import end
from manyhands.errors import ConfigError, UserError
from manyhands.files import RUN


def tune(
    model: Annotated[
        str | None, typer.Argument(help="A checkpoint, a run, or a name on the Hugging Face hub.", show_default=False)
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="What to learn from: rows (.jsonl, .parquet, hf:NAME, stdlib-docstrings), plain text (file, folder, "
            "glob, stdlib). Repeatable."
        ),
    ] = None,
    valid: Annotated[
        list[str] | None,
        typer.Option(help="What to measure on, and never to train on. Default: a twentieth of --data. Repeatable."),
    ] = None,
    method: Annotated[
        Literal["full", "lora", "esft", "molora", "mov", "perft"],
        typer.Option(
            help="full: the model's own weights. esft: the experts that this data uses most. Beside a frozen model: "
            "lora (low rank, experts too), molora and mov (a router mixes adapters; dense models), perft (thin experts "
            "beside a mixture)."
        ),
    ] = "full",
    train: Annotated[
        str | None,
        typer.Option(
            metavar="PART,…",
            help="full: what is trained: all, experts, shared, dense, attention, router, norms, embedding, head. "
            "Default: all but the routers.",
        ),
    ] = None,
    r: Annotated[int | None, typer.Option("--r", help="Rank of the adapters. Default: by the method.")] = None,
    alpha: Annotated[float | None, typer.Option(help="What adapters add is scaled by alpha/r. Default: 2·r.")] = None,
    targets: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,…",
            help="Where adapters stand: attention, dense, shared, routed, or names of matrices (q_proj). Default: "
            "attention and what the model's layers are, dense or routed.",
        ),
    ] = None,
    num_experts: Annotated[
        int | None, typer.Option(help="molora, mov, perft: adapters beside each layer. Default: 4.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="molora, mov, perft: adapters that a token takes. Default: all; perft 2.")
    ] = None,
    by: Annotated[
        Literal["token", "gate"] | None,
        typer.Option(help="esft: what an expert's relevance is, its share of choices (default) or of gate weights."),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="esft: the relevance of a layer's trained experts together. Default: 0.2, by gate 0.1."),
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="esft: choose from this recorded trace, and not from the data.")
    ] = None,
    experts: Annotated[
        Path | None, typer.Option(help="esft: train those that this expert_cfg.json (DeepSeek's) names.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run's directory. Default: runs/tune-METHOD.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue the tuning in this directory, as it is.")] = None,
    lr: Annotated[float | None, typer.Option(help="The highest learning rate. Default: by the method.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimiser steps. Default: 200.")] = None,
    max_seconds: Annotated[float | None, typer.Option(help="A time budget; the steps are what fits.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences per step. Default: 8.")] = None,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens of a sequence. Default: 512, or what the model takes.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the order of the data, and of new weights. Default: 0.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="SECTION.KEY=VALUE", help="Any other setting of the run. Repeatable."),
    ] = None,
    show_data: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Print the first N rows as the model would see them, and end."),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the summary as JSON; implies -q.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 4 for a remark of the verdict too.")] = False,
) -> None:
    """Fine-tune a model: its loss on held-out data before and after stands at the end.

    It is a run as `manyhands train` makes them: run.yaml, journal, checkpoints, report.html; starting it again
    continues it, SIGTERM or Ctrl-C saves first. Routers are frozen unless asked for. The last lines are the verdict, as
    of train: exit code 4 for a run that is not worth keeping.
    """
    changes = list(set_ or [])
    if resume is not None:
        if model is not None or out is not None or show_data is not None:
            raise UserError("--resume continues a tuning as it is: leave the model and --out away, and --show-data")
        from manyhands.config.load import load_run

        if not (resume / RUN).is_file():
            raise ConfigError(f"--resume {resume}: there is no run.yaml in it, so it is not a run's directory")
        run, directory = load_run(resume / RUN, changes), resume
        if run.tune is None:
            raise ConfigError(f"--resume {resume}: this run tunes no model: manyhands train --resume continues it")
    else:
        if model is None or not data:
            raise UserError("say which model is tuned and from what it learns: manyhands tune MODEL --data FILE")
        from manyhands.checkpoint.find import open_checkpoint
        from manyhands.config import parse
        from manyhands.config.tune import METHODS, EsftTuning
        from manyhands.tune.settings import settings

        given: dict[str, dict[str, Any]] = {
            "data": {"sources": data, "valid": valid},
            "optim": {"lr": lr},
            "train": {
                "max_steps": max_steps,
                "max_seconds": max_seconds,
                "batch_size": batch_size,
                "sequence_length": sequence_length,
                "seed": seed,
            },
        }
        sections = {
            section: {key: value for key, value in fields.items() if value is not None}
            for section, fields in given.items()
        }
        config = open_checkpoint(model).config
        names = None if targets is None else [target.strip() for target in targets.split(",")]
        if names is None and method == "lora":
            names = ["attention", "routed" if config.sparse_layers else "dense"]
        fields: dict[str, Any] = {"r": r, "alpha": 2 * r if alpha is None and r is not None else alpha}
        fields |= {"targets": names, "num_experts": num_experts, "top_k": top_k, "by": by, "threshold": threshold}
        if experts is not None:
            from manyhands.tune.expert_cfg import read_expert_cfg

            if trace is not None or by is not None or threshold is not None:
                raise UserError("--experts says which are trained: leave --trace, --by and --threshold away")
            fields |= read_expert_cfg(experts)
        fields = {key: value for key, value in fields.items() if value is not None}
        how = parse(METHODS[method], {"method": method, **fields}, f"--method {method}")
        parts = [part.strip() for part in train.split(",")] if train is not None else []
        if trace is not None:
            if not isinstance(how, EsftTuning):
                raise UserError(f"--trace is what --method esft chooses experts from; --method is {method}")
            from manyhands.tune.choose import chosen_from

            how = chosen_from(trace, how, config)
        run = settings(model, config, how, train=parts, sections=sections, overrides=changes)
        if show_data is not None:
            from manyhands.train.start import Start
            from manyhands.tune.show import show_data as show

            assert run.start is not None
            show(run, show_data, Start.open(run.start, packed=True).tokenizer)
            return
        directory = out or Path("runs") / f"tune-{method}"

    from manyhands.parallel.group import joined
    from manyhands.train.memory import keep_freed_memory
    from manyhands.tune.run import tune as start

    keep_freed_memory()
    with joined(run.train.device) as ranks:
        summary = start(directory, run, quiet=quiet(), ranks=ranks)
    end(summary, json_output, strict, ranks.rank)
