"""What an encoder-decoder computes for a pair of sequences: one that is read, one that is written."""

from manyhands.config import EncoderDecoderConfig
from manyhands.plan.count_kind import router_flops, sequence_flops
from manyhands.plan.report import formulas as f
from manyhands.plan.report.figure import Cell, Figure, Section, Table

PUBLISHED = (512, 114)
"""Tokens in and out when T5 and Switch were trained: the "FLOPs/seq" of Switch's table 9 are of these."""
LENGTHS = ((128, 29), PUBLISHED, (2048, 456))
"""The others are span corruption at other lengths."""


def pairs(config: EncoderDecoderConfig) -> Section:
    """FLOPs per pair by length."""
    rows: list[tuple[Cell, ...]] = []
    for tokens_in, tokens_out in LENGTHS:
        forward, routers = sequence_flops(config, tokens_in, tokens_out), router_flops(config, tokens_in, tokens_out)
        row: list[Cell] = [f"{tokens_in:,} in, {tokens_out:,} out"]
        row.append(Figure("forward", forward, "FLOP", f.PAIR, f"S = {tokens_in}, T = {tokens_out}"))
        row += [Figure("routers", routers, "FLOP", f.PAIR_ROUTERS)] if config.router else []
        row.append(
            Figure("training", 3 * (forward + routers), "FLOP", f.PAIR_TRAINING, f"3·({forward:,} + {routers:,})")
        )
        rows.append(tuple(row))
    columns = ("pair", "forward", *(("routers",) if config.router else ()), "training")
    notes = ["lengths of span corruption: 15 % of a text in spans of 3, as T5 and Switch were trained (the second row)"]
    if config.router:
        notes.append("forward is without the routers, as Switch's paper counts; training is with them")
    return Section("compute", "FLOPs per pair of sequences", (), Table(columns, tuple(rows)), notes)
