"""`manyhands config`: the fields of a run, found by their names."""

import shutil
import textwrap
from typing import TYPE_CHECKING, Annotated

import typer

from manyhands.cli import complete
from manyhands.errors import ConfigError

if TYPE_CHECKING:
    from manyhands.config.reference import Told


def config(
    field: Annotated[
        str | None,
        typer.Argument(
            metavar="[FIELD]",
            help="A path or the last part of one: model.moe.router, num_experts, lr.",
            autocompletion=complete.fields,
        ),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Every field of a run, or those of a name: default, what it may be, what it does, and the paper it comes from.

    Names that transformers, Megatron and nanoGPT use are understood: `manyhands config learning_rate`.
    """
    from manyhands.config.reference import everything, find, not_found

    found = everything() if field is None else find(field)
    if field is not None and not found:
        raise ConfigError(not_found(field) + "; without a name manyhands config lists all")
    if json_output:
        import json
        from dataclasses import asdict

        print(json.dumps([asdict(told) for told in found], ensure_ascii=False))
        return
    width = max(min(shutil.get_terminal_size((80, 24)).columns, 120), 40)
    if field is None:
        for told in found:
            print(_row(told, width))
        return
    print("\n\n".join("\n".join(_sheet(group, width)) for group in _alike(found)))


def _row(told: "Told", width: int) -> str:
    name = told.field + (f" ({told.only})" if told.only else "")
    values = "" if told.section else f"{told.default or '(required)'}   {told.may_be}"
    line = f"{name:<48} {values}".rstrip()
    return line if len(line) <= width else line[: width - 1] + "…"


def _alike(found: "list[Told]") -> "list[list[Told]]":
    """Together what is said alike of several kinds or paths."""
    groups: dict[tuple[str, ...], list[Told]] = {}
    for told in found:
        groups.setdefault((told.field.rpartition(".")[2], told.default, told.may_be, told.description), []).append(told)
    return list(groups.values())


def _sheet(group: "list[Told]", width: int) -> list[str]:
    names = [told.field + (f" ({told.only})" if told.only else "") for told in group]
    told, lines = group[0], [*names]
    if not told.section:
        lines.append(f"  default  {told.default}" if told.default else "  required")
        lines += _wrap("  may be   ", told.may_be, width)
    if told.description:
        lines += _wrap("  ", told.description, width)
    if told.sources:
        lines += _wrap("  source   ", ", ".join(told.sources), width)
    return lines


def _wrap(label: str, text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=label, subsequent_indent=" " * len(label), break_on_hyphens=False)
