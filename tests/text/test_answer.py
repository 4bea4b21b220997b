"""Answers parted into thought and word, however they come in pieces."""

import pytest

from manyhands.text.answer import Answer

CHANNELS = "<|start|>assistant<|channel|>final<|message|>"
THINK = "{{ content.split('</think>')[-1] }}"
BOTH = THINK + "{{ m.reasoning_content }}"

CASES = {
    "channels": (
        CHANNELS,
        "",
        "<|channel|>analysis<|message|>x < y<|end|><|start|>assistant<|channel|>final<|message|>Hi <|you|>!",
        "x < y",
        "Hi <|you|>!",
        {"content": "Hi <|you|>!"},
    ),
    "a call": (
        CHANNELS,
        "",
        "<|channel|>analysis<|message|>x<|end|><|start|>assistant<|channel|>commentary to=functions.f "
        '<|constrain|>json<|message|>{"a": 1}',
        'x{"a": 1}',
        "",
        {
            "thinking": "x",
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}],
        },
    ),
    "no channel": (CHANNELS, "", "Just so.", "", "Just so.", {"content": "Just so."}),
    "cut off in a header": (CHANNELS, "", "<|channel|>fin", "", "", {"content": ""}),
    "think": (THINK, "", "<think>\nx</think>\n\ny", "\nx", "y", {"content": "<think>\nx</think>\n\ny"}),
    "think, in a field": (
        BOTH,
        "",
        "<think>\nx\n</think>\n\ny",
        "\nx\n",
        "y",
        {"content": "y", "reasoning_content": "x"},
    ),
    "opened": (BOTH, "<think>\n", "x</think>y", "x", "y", {"content": "y", "reasoning_content": "x"}),
    "cut off in a thought": (BOTH, "<think>\n", "x </th", "x </th", "", {"content": "", "reasoning_content": "x </th"}),
    "no thought": (BOTH, "", "<b>y</b>", "", "<b>y</b>", {"content": "<b>y</b>"}),
    "plain": ("{{ m }}", "", "<think>x</think>", "", "<think>x</think>", {"content": "<think>x</think>"}),
}


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize("case", CASES)
def test_answers(case, size):
    template, prompt_end, raw, thought, said, message = CASES[case]
    answer = Answer(template, prompt_end)
    pieces = []
    for at in range(0, len(raw), size):
        pieces += answer.push(raw[at : at + size])
    pieces += answer.finish()
    assert "".join(text for thinking, text in pieces if thinking) == thought
    assert "".join(text for thinking, text in pieces if not thinking) == said
    assert answer.message() == {"role": "assistant", **message}
