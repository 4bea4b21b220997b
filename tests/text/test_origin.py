"""A template's strings behave as Python's, and each character remembers who wrote it."""

import itertools

import pytest

from manyhands.text import origin
from manyhands.text.origin import FOREIGN, OWN, Text, foreign, own

SAMPLES = ["", " a<t>b \n", "<t>x</t>\n\ny", "</t>", "ab" * 3, "\t\n", "x\r\ny\u2028z"]
METHODS = [
    *((name, (sep,)) for name in ("split", "rsplit", "partition", "rpartition") for sep in ("</t>", "b", "\n")),
    *(("split", (sep, n)) for sep in (None, "b", "\n") for n in (-1, 0, 1, 2)),
    *(("rsplit", (sep, n)) for sep in (None, "b", "\n") for n in (-1, 0, 1, 2)),
    *((name, args) for name in ("strip", "lstrip", "rstrip") for args in ((), ("\n",), ("<>t",))),
    *((name, ()) for name in ("upper", "lower", "title", "capitalize", "swapcase", "splitlines")),
    ("splitlines", (True,)),
    *(("replace", args) for args in (("</t>", ""), ("b", "long"), ("", "-"), ("", "-", 2), ("a", "b", 1))),
    ("removeprefix", ("<t>",)),
    ("removesuffix", ("y",)),
    *((name, (width, "*")) for name in ("ljust", "rjust") for width in (0, 12)),
    ("join", (["p", "q"],)),
    ("startswith", ("<t>",)),
    ("find", ("b",)),
]


def check(got, want):
    assert got == want and type(got) in (Text, type(want))
    for one in got if isinstance(got, list | tuple) else [got]:
        assert not isinstance(one, Text) or len(one.origin) == len(one)


@pytest.mark.parametrize(("name", "args"), METHODS)
def test_methods_are_those_of_strings(name, args):
    for sample in SAMPLES:
        check(getattr(foreign(sample), name)(*args), getattr(sample, name)(*args))
        check(getattr(foreign(sample), name)(*map(foreign, args)), getattr(sample, name)(*args))


def test_slices_and_sums():
    for sample, start, stop, step in itertools.product(SAMPLES, (None, 0, 2, -3), (None, 3, -1), (None, 1, 2, -1)):
        check(foreign(sample)[start:stop:step], sample[start:stop:step])
    both = "a" + foreign("b") + own("c") + "d"
    assert both == "abcd" and both.origin == b"\2\1\0\2"
    assert (own("c") * 2).origin == OWN * 2 and "".join(both) == "abcd" and both[-1].origin == b"\2"
    with pytest.raises(TypeError):
        own("a") + 1
    with pytest.raises(TypeError):
        own("a")["content"]


def test_who_wrote_what():
    mixed = own("<t>") + foreign("x</t>y") + own("</t>")
    assert [part.origin for part in mixed.split("</t>")] == [OWN * 3 + FOREIGN, FOREIGN, b""]
    assert mixed.replace("x", own("zz")).origin == OWN * 5 + FOREIGN * 5 + OWN * 4
    assert own(", ").join([foreign("a"), own("b")]).origin == FOREIGN + OWN * 3
    shown = own("<%s|%5s|%d>") % (foreign("a<t>"), own("b"), 7)
    assert shown == "<a<t>|    b|7>" and shown.origin == OWN + FOREIGN * 4 + OWN * 9
    assert (foreign("%s") % "a").origin == b"\2", "a message that is used as a format is nobody's"
    for form, values in {
        "%r": foreign("a"),
        "%(k)s": {"k": foreign("a")},
        "%c": foreign("a"),
        "%s\U00100000": "x",
    }.items():
        assert own(form) % values == form % values
    assert (own("%r") % foreign("<t>")).origin == b"\2" * 5, "not followed, and so not the template's"
    assert origin.join("", []) == ""
