"""Word classes of Python, by character."""

from manyhands.lab.reading import CLASSES, python_words


def test_each_token_has_its_class_at_its_place() -> None:
    text = 'def area(r):\n    # of a circle\n    return math.pi * pow(r, 2) if r else "ä"\n'
    found = [(text[a:b], CLASSES[kind]) for a, b, kind in python_words(text)]
    assert found == [
        ("def", "keyword"), ("area", "definition"), ("(", "bracket"), ("r", "name"), (")", "bracket"),
        (":", "separator"), ("# of a circle", "comment"), ("return", "keyword"), ("math", "name"), (".", "separator"),
        ("pi", "attribute"), ("*", "operator"), ("pow", "call"), ("(", "bracket"), ("r", "name"), (",", "separator"),
        ("2", "number"), (")", "bracket"), ("if", "keyword"), ("r", "name"), ("else", "keyword"), ('"ä"', "string"),
    ]  # fmt: skip


def test_what_is_no_python_has_none() -> None:
    assert python_words("f(") == ()
