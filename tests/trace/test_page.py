import re
from importlib import resources

import numpy as np
import pytest

from manyhands.trace.charts import Line, line_chart
from manyhands.trace.heat import load_chart
from manyhands.trace.page import breakable, fill

PAGES = [
    ("manyhands.trace", "report.html"),
    ("manyhands.inspect", "page.html"),
    ("manyhands.lab", "page.html"),
    ("manyhands.compare.pages", "page.html"),
]


@pytest.mark.parametrize(("package", "page"), PAGES)
def test_a_page_stands_in_the_frame_and_has_no_look_of_its_own(package: str, page: str) -> None:
    text = (resources.files(package) / page).read_text(encoding="utf-8")
    assert text.startswith('{% extends "frame.html" %}')
    style = text.split("{% block style %}")[1].split("{% endblock %}")[0]
    assert not re.search(r"--(bg|ink|card|c\d):|^(body|main|table|\.card|\.tiles?) \{", style, re.MULTILINE)


def test_every_colour_has_a_dark_one_and_text_is_dark_enough() -> None:
    """WCAG 2, AA: 4.5 to 1 for text on the page and on a card."""
    style = (resources.files("manyhands.trace") / "page.css").read_text(encoding="utf-8")
    light, dark = (dict(re.findall(r"(--\w+): (#\w+)", part)) for part in style.split("}", 3)[:2])
    assert light.keys() == dark.keys() and len(light) > 12

    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for colours in (light, dark):
        for ground in ("--bg", "--card"):
            for ink in ("--ink", "--soft", "--good", "--bad", "--c0"):
                a, b = sorted((luminance(colours[ink]), luminance(colours[ground])))
                assert (b + 0.05) / (a + 0.05) >= 4.5, (ink, ground, colours[ink])


def test_the_foot_says_which_command_made_it_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/usr/bin/manyhands", "compare", "<script>x</script>", "a b"])
    values = {"results": [], "svg": str}
    page = fill("lab", "manyhands.lab", "page.html", values, {"spread": str})
    assert "manyhands compare &#39;&lt;script&gt;x&lt;/script&gt;&#39; &#39;a b&#39;" in page
    assert page.count("<script>") == 1 and '<meta name="generator" content="manyhands lab">' in page


def test_a_name_breaks_where_a_reader_would() -> None:
    assert breakable("model.moe_size<b>") == "model.<wbr>moe_<wbr>size&lt;b&gt;"


def test_a_chart_is_told_in_words() -> None:
    x = np.array([1.0, 2.0, 3.0])
    chart = line_chart([Line('a"b', x, np.array([3.0, 1.0, 2.0])), Line("raw", x, x, style="faint")], "loss", "step")
    assert 'aria-label="loss over step. a&#34;b: from 3 to 2, least 1, most 3"' in chart
    load = load_chart(np.array([[0.0, 3.0, 1.0, 0.0]]), np.array([0.0, 3.0, 1.0, 0.0]), 4, (1, 9))
    assert "load of 4 experts" in load and "2 of 4 rows got nothing" in load and "expert 1, took 3.00 times" in load
