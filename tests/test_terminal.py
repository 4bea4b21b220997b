"""What reaches a terminal."""

from manyhands.terminal import clean, shown


def test_a_model_does_not_steer_the_terminal():
    assert clean("a\x1b[2J\x07\r\n\tb\x9b1m\x7f\u05d0") == "a[2J\n\tb1m\u05d0"
    assert clean("a\u202eb\u2066c") == "abc"
    assert clean("half \ud800") == "half ?"


def test_names_are_shown_for_what_they_are():
    assert shown("a\x1b[2J.txt \u202e \udc80 \u00e9") == "a\\x1b[2J.txt \\u202e \\udc80 \u00e9"
