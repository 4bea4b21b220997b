"""`report.html`: one file that shows a run to a person, offline. The page itself is `report.html` in this folder."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from manyhands.config import RunConfig
from manyhands.config.load import dump_run
from manyhands.files import write_atomic
from manyhands.format import compact, duration, number, show
from manyhands.trace.balance_charts import LayerRow, balance_charts, in_trouble, layer_rows
from manyhands.trace.charts import Line, line_chart
from manyhands.trace.journal import LAST_STEPS, of_layer
from manyhands.trace.origin import origin, unlike_defaults
from manyhands.trace.page import fill
from manyhands.trace.series import (
    Record,
    bin_mean,
    column,
    envelope,
    smooth,
    window,
)
from manyhands.trace.tokens import TokenShare
from manyhands.trace.visible import what_experts_take
from manyhands.trace.worth_chart import worth_layers, worth_over_time

_POINTS = 400  # per line
_MOST_SKIPPED = 20
_MOST_SAMPLES = 8


@dataclass(frozen=True)
class Tile:
    """One headline figure."""

    label: str
    value: str
    about: str
    bad: bool = False


def write_report(
    path: str | Path,
    journal_records: Sequence[Record],
    run: RunConfig | None,
    tokens: TokenShare | None = None,
    decode: Callable[[int], str] | None = None,
    extra: Mapping[str, Any] | None = None,
    random_tokens: TokenShare | None = None,
    verdict: Mapping[str, Any] | None = None,
    name: str | None = None,
    problem: str | None = None,
) -> None:
    """Write one self-contained HTML file, replacing `path` at once.

    journal_records   from `read_journal`; any part may be missing, as in a run that was killed early.
    tokens, decode    what each expert takes, and a token id's text; left out if None.
    extra             `compressors`: {name: bits per byte on the same validation text}. Any other entry is printed
                      as a line of its own.
    random_tokens     the same as `tokens` of a router with random weights (random_router.py), which stands beside it.
    verdict           `Verdict.as_json()` (compare/verdict.py), which stands at the top.
    name              the run's; None: that of the page's folder.
    problem           why `run`, its description, is None.

    Raises `StorageError` if the disk refuses; an older report is then intact.
    """
    name = name or Path(path).resolve().parent.name
    write_atomic(
        path, render_report(name, journal_records, run, tokens, decode, extra, random_tokens, verdict, problem)
    )


def render_report(
    name: str,
    records: Sequence[Record],
    run: RunConfig | None,
    tokens: TokenShare | None,
    decode: Callable[[int], str] | None,
    extra: Mapping[str, Any] | None,
    random_tokens: TokenShare | None = None,
    verdict: Mapping[str, Any] | None = None,
    problem: str | None = None,
) -> str:
    """The page as text; `name` is the run's."""
    steps = [record for record in records if record["kind"] == "step"]
    evals = [record for record in records if record["kind"] == "eval"]
    start = next((record for record in reversed(records) if record["kind"] == "start"), {})
    end = next((record for record in reversed(records) if record["kind"] == "end"), None)
    extra = dict(extra or {})
    compressors: dict[str, float] = extra.pop("compressors", None) or {}
    layers = sorted({layer for step in steps for layer in step.get("moe") or {}}, key=int)
    rows = layer_rows(steps, layers)
    worths, samples = ([record for record in records if record["kind"] == kind] for kind in ("worth", "sample"))
    values = {
        "name": name,
        "verdict": verdict,
        "start": start,
        "ended": _ended(steps, end, run),
        "tiles": _tiles(steps, evals, start, rows),
        "compared": _compared(evals, compressors),
        "charts": _charts(steps, evals, compressors),
        "balance": balance_charts(steps, layers),
        "rows": rows,
        "open_rows": in_trouble(rows),
        "fair": 100 / len(of_layer(steps[-1], layers[0])["load"]) if layers else None,
        "last": _last(steps),
        "taken": what_experts_take(tokens, decode, tokens.layers, random=random_tokens) if tokens else [],
        "worth": worth_layers(worths[-1] if worths else None),
        "worth_record": worths[-1] if worths else None,
        "worth_time": worth_over_time(worths),
        "samples": samples[-1:] + samples[-2::-1][: _MOST_SAMPLES - 1],
        "skipped": [step for step in steps if step.get("skipped")],
        "most_skipped": _MOST_SKIPPED,
        "extra": {**origin(start, steps, evals), **extra},
        "changed": [] if run is None else unlike_defaults(run),
        "config": None if run is None else dump_run(run),
        "problem": problem,
    }
    return fill("report", "manyhands.trace", "report.html", values)


def _ended(steps: Sequence[Record], end: Record | None, run: RunConfig | None) -> str:
    if not steps:
        return "No step has been taken yet."
    step = steps[-1]["step"]
    if end is None or end["step"] < step:
        return f"Stopped or still running at step {step}."
    planned = end.get("max_steps") or max(step, 0 if run is None else run.train.max_steps)
    return f"Ended at step {step} of {planned}: {end.get('reason') or 'no reason given'}."


def _tiles(steps: Sequence[Record], evals: Sequence[Record], start: Record, rows: Sequence[LayerRow]) -> list[Tile]:
    tiles = []
    if evals:
        last = evals[-1]
        tiles += [
            Tile("bits per byte", number(last.get("valid_bits_per_byte")), "on validation text; lower is better"),
            Tile("perplexity", number(last.get("valid_perplexity"), 2), "per token, on validation text"),
        ]
    if steps:
        speed = column(steps, "tokens_per_s")
        speed = speed[np.isfinite(speed)]
        tiles += [
            Tile("tokens/s", compact(float(np.median(speed))) if len(speed) else "–", "median over the steps"),
            Tile(
                "tokens seen",
                compact(steps[-1].get("tokens") or 0),
                f"in {steps[-1]['step']:,} steps",
            ),
            *_used(steps),
            Tile("training time", duration(steps[-1].get("elapsed") or 0), "in steps: without validation and saving"),
        ]
    if "parameters" in start:
        sparse = bool(start.get("sparse_layers"))
        about = f"{compact(start['active_parameters'])} active per token" if sparse else "all active"
        tiles.append(Tile("parameters", compact(start["parameters"]), about))
    if rows:
        worst = max(rows, key=lambda row: row.max_vio or 0)
        vio = worst.max_vio or 0.0
        dead = sum(row.dead for row in rows)
        dropped = max((row.dropped or 0 for row in rows), default=0)
        tiles += [
            Tile("MaxVio", number(vio, 2), f"worst layer ({worst.layer}), mean of {_last(steps)}", vio > 0.5),
            Tile("dead experts", str(dead), f"got nothing in {_last(steps)}", dead > 0),
            Tile("dropped", f"{100 * dropped:.2g} %", "of routed pairs, worst layer", dropped > 0.01),
        ]
    if steps:
        skipped = sum(bool(step.get("skipped")) for step in steps)
        tiles.append(Tile("skipped updates", str(skipped), "by the guard against spikes and NaN", skipped > 0))
    return tiles


def _last(steps: Sequence[Record]) -> str:
    """Over which steps figures of balance are taken, in words."""
    count = min(LAST_STEPS, steps[-1]["step"]) if steps else 0
    return "the one step" if count == 1 else f"the last {count} steps"


def _used(steps: Sequence[Record]) -> list[Tile]:
    """Of the machine: operations per second and memory, where the journal has them."""
    tiles = []
    flops, mfu = (column(steps, name) for name in ("flops_per_s", "mfu"))
    if np.isfinite(flops).any():
        about = "of the model, forward and backward"
        if np.isfinite(mfu).any():
            about = f"{100 * float(np.nanmedian(mfu)):.0f} % of this machine's measured matrix rate"
        tiles.append(Tile("operations", show(float(np.nanmedian(flops)), "FLOP/s"), about))
    if memory := max((step.get("peak_memory") or 0 for step in steps), default=0):
        tiles.append(Tile("peak memory", show(memory, "B"), "of the process, or its GPU"))
    return tiles


def _compared(evals: Sequence[Record], compressors: Mapping[str, float]) -> list[tuple[str, float, float, bool]]:
    """(name, bits per byte, bar length of 100, is it this model), best first."""
    figures = [(name, float(value), False) for name, value in compressors.items()]
    if evals and evals[-1].get("valid_bits_per_byte") is not None:
        figures.append(("this model", float(evals[-1]["valid_bits_per_byte"]), True))
    longest = max((value for _, value, _ in figures), default=1.0)
    ranked = sorted(figures, key=lambda figure: figure[1])
    return [(name, value, 100 * value / longest, mine) for name, value, mine in ranked] if compressors else []


def _charts(steps: Sequence[Record], evals: Sequence[Record], compressors: Mapping[str, float]) -> dict[str, Markup]:
    x, x_eval = column(steps, "step"), column(evals, "step")
    skipped = column(steps, "skipped") > 0

    def curve(name: str, color: str = "var(--c0)") -> list[Line]:
        y = column(steps, name)
        calm = smooth(np.where(skipped, np.nan, y), window(len(y)))
        calm = np.where(np.isfinite(y), calm, np.nan)  # a mean near a loss that is lost would look like a loss
        return [
            Line("each step", *envelope(x, y, 2 * _POINTS), color=color, style="faint"),
            Line("training", bin_mean(x, _POINTS), bin_mean(calm, _POINTS), color),
        ]

    def valid(name: str) -> Line:
        return Line("validation", x_eval, column(evals, name), "var(--c1)", "dots")

    small: dict[str, Any] = {"height": 150, "y_from_zero": True, "spikes_run_off": True}
    rate = Line("learning rate", bin_mean(x, _POINTS), bin_mean(column(steps, "lr"), _POINTS), "var(--c2)")
    return {
        "bits": line_chart(
            [*curve("bits_per_byte"), valid("valid_bits_per_byte")],
            "bits per byte",
            references=compressors,
            height=320,
            spikes_run_off=True,
        ),
        "loss": line_chart([*curve("loss"), valid("valid_loss")], "loss, nats per token", spikes_run_off=True),
        "lr": line_chart([rate], "learning rate", height=150, y_from_zero=True),
        "grad": line_chart(curve("grad_norm", "var(--c3)"), "gradient norm", **small),
        "speed": line_chart(curve("tokens_per_s", "var(--c4)"), "tokens per second", **small),
    }
