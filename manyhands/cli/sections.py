"""The help of verbs with many flags, in sections; and the verbs themselves. Plain text: rich doubles the time of help.

A flag that is in no section stands in the first, "Options": what one needs first.
"""

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from manyhands.cli.endings import UsageMistake
from manyhands.cli.examples import examples
from manyhands.cli.loudness import QUIET, everywhere, set_level, verbose

_SAMPLING = "--max-new-tokens --temperature --top-k --top-p --min-p --seed --stop"
_ON_DISK = "--memory --cache-policy --pin"
_TRACE = "--trace --trace-limit"
_FILES = "--to --dtype --max-shard-size --overwrite"
_READING = "--checkpoint --adapter --ignore-field"

SECTIONS: dict[str, dict[str, str]] = {
    "plan": {
        "Machine": "--machine --memory-size --bandwidth --count --network",
        "Use": "--context --batch --prompt --format --bits --kv-bits --load --speculate --accepted",
        "Experts on disk": "--memory --disk --trace",
        "Price": "--price --api-price --in-out --cached",
        "Training": "--tokens --utilisation --gpu-hours --train-memory --flops",
        "Expert parallelism": "--scale --devices --tokens-per-device --imbalance",
        "Output": "--include-rumours --explain --plot --json",
    },
    "choose": {
        "Machine": "--machine --memory --bandwidth --disk --host --devices",
        "Use": "--users --context --tokens-in --tokens-out --tokens-per-second --ttft",
        "Price": "--price --per-hour --per-million",
        "Models": "--license --min-total --min-active --mmlu --sparse --format --kv-bits --layout --trace",
        "Output": "--rows --plot --json",
    },
    "generate": {
        "Sampling": _SAMPLING,
        "What the experts do": f"--show-routing --without-expert --replay {_TRACE}",
        "How it is computed": f"--exact --speculate {_ON_DISK}",
        "The model": _READING,
        "Output": "--json",
    },
    "chat": {
        "Sampling": _SAMPLING,
        "What the experts do": f"--show-routing {_TRACE}",
        "Experts on disk": _ON_DISK,
        "The model": "--adapter --ignore-field",
    },
    "eval": {
        "Text": "--data --text-field --sequence-length --batch-size --max-batches",
        "Tasks": "--tasks --task-dir --num-fewshot --limit --apply-chat-template --add-bos",
        "The model": _READING,
        "Output": f"--output {_TRACE} --json",
    },
    "inspect": {
        "Text": "--data --text-field --max-tokens --sequence-length",
        "Beside what": "--against --checkpoints --random-routers --draws --seed --ablate",
        "The model": "--tokenizer --ignore-field",
        "Output": "--out --json",
    },
    "convert": {
        "What is written": f"{_FILES} --type --without-vocabulary --drop-extras --tokenizer",
        "The model": "--checkpoint --ignore-field --adapter --as-adapter",
        "Output": "--agreement --json",
    },
    "quantize": {
        "Formats": "--experts --linear --group-size",
        "Calibration and measurement": "--data --text-field --max-batches --measure",
        "Output": "--overwrite --ignore-field --json",
    },
    "check": {
        "What is checked": "--backend --dtype --routers --layout --seed",
        "Output": "--ignore-field --json",
    },
    "train": {
        "The run": "--preset --config --resume --out --data",
        "Instead of training": "--print-config --dry-run",
        "Output": "--json --strict",
    },
    "tune": {
        "Method": "--method --train --r --alpha --targets --num-experts --top-k",
        "Which experts (ESFT)": "--by --threshold --trace --experts",
        "Run": "--out --resume --lr --max-steps --max-seconds --batch-size --sequence-length --seed --set",
        "Output": "--show-data --json --strict",
    },
    "upcycle": {
        "Experts": "--experts --top-k --granularity --drop --noise --seed",
        "What is written": _FILES,
        "Output": "--ignore-field --json",
    },
    "prune": {
        "Experts": "--keep --by --merge",
        "Text": "--data --text-field --trace --max-batches --measure --curve --seed",
        "What is written": f"{_FILES} --drop-extras",
        "Output": "--ignore-field --json",
    },
    "serve": {
        "Models": "--model --adapter --served-model-name --ignore-field",
        "Network": "--host --port --api-key --api-key-file --insecure --allow-origin --max-body --request-timeout "
        "--shutdown-timeout",
        "Load": "--max-sequences --max-batch-tokens --max-waiting --kv-memory --prefix-caching --exact",
        "Experts on disk": _ON_DISK,
        "Output": _TRACE,
    },
    "simulate": {
        "Caches": "--policies --budgets --disk --memory-rate --record-bytes --pin",
        "Expert parallelism": "--layout --placement --redundant --groups --node --network --row-bytes",
        "Text": "--sequences --tokens",
        "Output": "--plot --json",
    },
}
"""By verb: the title of a section, and its flags."""

VERBS = {
    "Use a model": "generate chat serve eval",
    "Train": "train tune report compare sweep presets config",
    "See what the experts do": "inspect trace simulate check bench lab",
    "Change a model": "quantize convert prune upcycle",
    "Decide": "plan choose models doctor",
}
"""The title of a section, and its verbs."""


EVERYWHERE = ("--quiet", "--verbose", "--debug", "--help")


class Verb(TyperCommand):
    """A verb whose flags are shown in the sections of its name, after them those that all verbs have."""

    def get_params(self, ctx: Any) -> Any:
        """Its own, and those that all verbs have."""
        return [*super().get_params(ctx), *everywhere()]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Its own name goes with what is wrong."""
        try:
            return list(super().parse_args(ctx, args))
        except UsageMistake as error:
            error.ctx = error.ctx or ctx
            raise

    def invoke(self, ctx: Any) -> Any:
        """Do it; --json speaks to a program, which reads no remarks."""
        if ctx.params.get("json_output") and not verbose():
            set_level(QUIET)
        return super().invoke(ctx)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Its examples."""
        lines = examples(ctx.command_path.partition(" ")[2])
        with formatter.section("Examples") if lines else nullcontext():
            for line in lines:
                formatter.write(f"{'':{formatter.current_indent}}{line}\n")

    def format_options(self, ctx: Any, formatter: Any) -> None:
        arguments: list[tuple[str, str]] = []
        options: list[tuple[str, tuple[str, str]]] = []
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is None:
                continue
            if parameter.param_type_name == "argument":
                arguments.append(record)
            else:
                options.append((max(parameter.opts, key=len), record))
        _write(formatter, "Arguments", arguments)
        own = SECTIONS.get(self.name or "", {})
        titles = titles_of(own) | dict.fromkeys(EVERYWHERE, "Of every verb")
        for title in dict.fromkeys(["Options", *own, "Of every verb"]):
            _write(formatter, title, [record for flag, record in options if titles.get(flag, "Options") == title])


class Verbs(TyperGroup):
    """The verbs, in sections."""

    def get_params(self, ctx: Any) -> Any:
        """Its own, and those that all verbs have."""
        return [*super().get_params(ctx), *everywhere()]

    def invoke(self, ctx: Any) -> Any:
        """Do it. Whoever reads the output may leave, as `head` does: Typer would make that a failure, code 1."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise typer.Exit(141) from None

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        titles = titles_of(VERBS)
        commands = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}
        widest = max(map(len, commands))
        limit = formatter.width - 6 - widest
        rows = [(name, command.get_short_help_str(limit)) for name, command in commands.items() if command is not None]
        for title in [*VERBS, "Commands"]:
            of = [(f"{name:<{widest}}", told) for name, told in rows if titles.get(name, "Commands") == title]
            _write(formatter, title, of)


def titles_of(sections: dict[str, str]) -> dict[str, str]:
    """The title of each word."""
    return {word: title for title, words in sections.items() for word in words.split()}


def _write(formatter: Any, title: str, rows: Iterable[tuple[str, str]]) -> None:
    if rows := list(rows):
        with formatter.section(title):
            formatter.write_dl(rows)
