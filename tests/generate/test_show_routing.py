"""A token and its experts on one line."""

import io

import torch
from rich.console import Console

from manyhands.generate import SamplingConfig, generate, routing_line
from manyhands.generate.show_routing import expert_style
from manyhands.moe import Routing


def routings(experts, weights, num_experts=16):
    def routing(ids, w):
        ids_TK, scores_TE = torch.tensor(ids), torch.zeros(len(ids), num_experts)
        mask_T = torch.ones(len(ids), dtype=torch.bool)
        return Routing(ids_TK, torch.tensor(w), scores_TE, scores_TE, ids_TK >= 0, mask_T)

    return {layer: routing([experts[layer]], [weights[layer]]) for layer in experts}


TWO_LAYERS = routings({1: [3, 7], 2: [12, 3]}, {1: [0.611, 0.22], 2: [0.9, 0.1]})


def test_plain_text():
    line = routing_line(" return", TWO_LAYERS)
    assert line.plain == "␣return           L1  3·0.61  7·0.22  L2 12·0.90  3·0.10"
    other = routings({1: [0, 1], 2: [5, -1]}, {1: [0.5, 0.5], 2: [1, 0]})
    assert routing_line("\n", other).plain == "⏎                 L1  0·0.50  1·0.50  L2  5·1.00"


def test_long_tokens_and_many_experts_are_cut():
    line = routing_line("supercalifragilistic", TWO_LAYERS, most=1)
    assert line.plain == "supercalifragil…  L1  3·0.61 …  L2 12·0.90 …"


def test_an_expert_has_one_colour_and_none_without_a_terminal():
    assert len({expert_style(e).color.triplet for e in range(256)}) == 256
    line = routing_line("x", TWO_LAYERS)
    styles = [span.style for span in line.spans if line.plain[span.start : span.end].strip().startswith("3·")]
    assert styles == [expert_style(3)] * 2
    out = io.StringIO()
    Console(file=out, force_terminal=False).print(line, soft_wrap=True)
    assert "\x1b" not in out.getvalue()
    Console(file=out, force_terminal=True, color_system="truecolor").print(line)
    assert "\x1b[38;2;" in out.getvalue()


def test_lines_of_a_real_generation_have_the_same_columns(make):
    steps = generate(make(), [[1, 2]], SamplingConfig(max_new_tokens=4))
    lines = [routing_line("☕" * n, step.routings[0]).cell_len for n, step in enumerate(steps)]
    assert len(lines) == 4 and len(set(lines)) == 1
