"""The page at `/` is one file that needs nothing from outside, names what it uses, and never makes markup of a text.

How it behaves is tried in a browser by `scripts/page_check.py`.
"""

import base64
import re
from collections import Counter
from html.parser import HTMLParser
from importlib.resources import files

PAGE = (files("manyhands.serve") / "page.html").read_text(encoding="utf-8")
SCRIPT = PAGE.split("<script>\n")[1].split("</script>")[0]
STYLE = PAGE.split("<style>\n")[1].split("</style>")[0]
VOID = {"meta", "link", "input", "br", "img", "hr"}
SVG = {"path", "circle"}


class Outline(HTMLParser):
    """Every element with its attributes, its text and what it stands in; tags that do not close are an error."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[int] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: Counter[int] = Counter()
        self.parents: dict[int, list[str]] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute twice in <{tag}>"
        self.parents[len(self.elements)] = [self.elements[i][0] for i in self.open]
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in SVG, f"<{tag}/> does not close itself in HTML"
        self.elements.append((tag, dict(attrs)))
        self.parents[len(self.elements) - 1] = []

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.elements[self.open[-1]][0] == tag, f"</{tag}> at {self.getpos()} closes nothing"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for element in self.open:
            self.texts[element] += len(data.strip())


def outline() -> Outline:
    parser = Outline()
    parser.feed(PAGE)
    parser.close()
    return parser


def ids() -> list[str]:
    return [attributes["id"] or "" for _, attributes in outline().elements if "id" in attributes]


def test_the_file_is_whole_and_small() -> None:
    parser = outline()
    assert parser.open == [] and PAGE.startswith("<!doctype html>") and PAGE.endswith("</html>\n")
    assert len(PAGE.encode()) < 60_000
    assert ("html", {"lang": "en"}) in parser.elements


def test_nothing_comes_from_outside() -> None:
    assert not re.search(r"(?i)\b(https?|wss?|ftp):|[\"'(]//|@import|@font-face", PAGE)
    for tag, attributes in outline().elements:
        assert not {"srcset", "action", "formaction", "poster", "background", "ping"} & attributes.keys()
        assert "src" not in attributes, f"<{tag}> loads a file"
        if "href" in attributes:
            assert re.match(r"#|data:image/png;base64,", attributes["href"] or "")
    assert "url(" not in STYLE


def test_addresses_are_relative_and_known() -> None:
    """A proxy may put the page below a prefix."""
    asked = set(re.findall(r"""["'`]/?((?:v1|tokenizer_info|metrics|health)[\w/]*)""", SCRIPT))
    assert asked == {"v1/models", "v1/routing", "v1/completions", "v1/chat/completions", "tokenizer_info"}
    assert not re.search(r"""["'`]/(v1|tokenizer_info)""", SCRIPT)


def test_the_icon_is_a_picture() -> None:
    encoded = re.search(r"data:image/png;base64,([^\"]+)", PAGE)
    assert encoded and base64.b64decode(encoded[1], validate=True).startswith(b"\x89PNG\r\n\x1a\n")


def test_text_never_becomes_markup_or_code() -> None:
    ways = r"innerHTML|outerHTML|insertAdjacentHTML|setHTML|document\.write|DOMParser|createContextualFragment|srcdoc"
    assert not re.search(ways, SCRIPT)
    assert not re.search(r"\beval\b|\bFunction\(|javascript:|set(Timeout|Interval)\(\s*[\"'`]|\bimport\b", SCRIPT)
    for tag, attributes in outline().elements:
        assert not [name for name in attributes if name.startswith("on")], f"<{tag}> has code in an attribute"
    assert {"style", "script"} == {tag for tag, _ in outline().elements if tag in ("style", "script")}


def test_each_id_is_there_once_and_what_is_used_exists() -> None:
    there = Counter(ids())
    assert [name for name, count in there.items() if count > 1] == []
    lists = re.findall(r"const (?:SAMPLING|KEPT) = \[(.*?)\]", SCRIPT)
    used = set(re.findall(r"""\$\(["']([\w-]+)["']\)""", SCRIPT)) | set(re.findall(r'"(\w+)"', " ".join(lists)))
    assert len(used) > 40 and used - there.keys() == set()
    for _, attributes in outline().elements:
        for name in ("for", "aria-labelledby", "aria-controls", "aria-describedby"):
            assert set((attributes.get(name) or "").split()) <= there.keys()


def test_style_and_script_name_what_exists() -> None:
    colours = set(re.findall(r"(--[\w-]+):", STYLE)) | {"--hue"}
    assert set(re.findall(r"var\((--[\w-]+)\)", STYLE)) | set(re.findall(r'colour\("(--[\w-]+)"\)', SCRIPT)) <= colours
    selectors = re.findall(r"(?:^|[\s,(])#([a-z][\w-]*)(?=[^{};]*\{)", STYLE, re.MULTILINE)
    assert selectors and set(selectors) <= set(ids())


def test_both_schemes_have_every_colour() -> None:
    light, dark = (
        set(re.findall(r"(--[\w-]+):", block))
        for block in re.findall(r":root(?:\[[^]]*\])? \{(.*?)\}", STYLE, re.DOTALL)
    )
    assert light - dark == {"--mono"} and dark <= light


def test_everything_that_takes_input_has_a_name() -> None:
    parser = outline()
    labelled = {attributes.get("for") for tag, attributes in parser.elements if tag == "label"}
    seen = 0
    for at, (tag, attributes) in enumerate(parser.elements):
        if tag in ("button", "a"):
            named = bool(attributes.get("aria-label")) or parser.texts[at] > 0
        elif tag in ("input", "select", "textarea"):
            named = (
                bool(attributes.get("aria-label")) or attributes.get("id") in labelled or "label" in parser.parents[at]
            )
        elif tag == "canvas" and "aria-hidden" not in attributes and "role" in attributes:
            named = bool(attributes.get("aria-label"))
        else:
            continue
        seen += 1
        assert named, f"<{tag} {attributes}> has no name"
    assert seen > 25


def test_what_a_reader_hears_and_who_wants_less_motion() -> None:
    assert 'id="said" class="unseen" role="status" aria-live="polite"' in PAGE
    assert "prefers-reduced-motion" in STYLE and "prefers-color-scheme" in SCRIPT and ":focus-visible" in STYLE
    assert "outline: none" not in STYLE and "outline: 0" not in STYLE


def test_limits_of_the_settings_are_the_servers() -> None:
    fields = {attributes.get("id"): attributes for tag, attributes in outline().elements if tag == "input"}
    limits = {name: (fields[name].get("min"), fields[name].get("max")) for name in ("temperature", "min_p", "top_k")}
    assert limits == {"temperature": ("0", "2"), "min_p": ("0", "1"), "top_k": ("-1", None)}
    assert fields["top_p"]["max"] == "1" and float(fields["top_p"]["min"] or 0) > 0
