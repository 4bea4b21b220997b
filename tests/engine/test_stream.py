"""Text from tokens: whole characters, and stop strings wherever the tokens cut them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyhands.generate import TextStream
from manyhands.text import StreamDecoder


def pieces_of(chunks, stop=()):
    """What a stream says to tokens that stand for `chunks` of bytes, the end included."""
    stream = TextStream(StreamDecoder(chunks.__getitem__), stop)
    pieces = []
    for number in range(len(chunks)):
        pieces.append(stream.push(number))
        if stream.stopped:
            break
    return [*pieces, stream.finish()], stream.stopped


def up_to_stop(text, stop):
    """The definition: read on until a stop string is complete, cut where the longest of those begins."""
    for end in range(1, len(text) + 1):
        begins = [end - len(s) for s in stop if text[:end].endswith(s)]
        if begins:
            return text[: min(begins)], True
    return text, False


TEXT = st.text("ab\nß☕🙂", max_size=24)


@settings(deadline=None, max_examples=300)
@given(TEXT, st.lists(st.text("ab\n☕", min_size=1, max_size=4), max_size=3), st.lists(st.integers(1, 5), max_size=90))
def test_pieces_add_up_to_the_text_before_the_stop(text, stop, lengths):
    data, chunks = text.encode(), []
    for length in [*lengths, len(data)]:
        chunks.append(data[:length])
        data = data[length:]
    pieces, stopped = pieces_of(chunks, stop)
    assert ("".join(pieces), stopped) == up_to_stop(text, stop)
    assert not any("\ufffd" in piece for piece in pieces)


def test_half_a_character_waits_for_the_other_half():
    cup = "☕".encode()
    assert pieces_of([b"a" + cup[:1], cup[1:2], cup[2:] + b"b"])[0] == ["a", "", "☕b", ""]
    assert pieces_of([b"a" + cup[:2]])[0] == ["a", "\ufffd"]


def test_only_what_could_become_a_stop_string_is_held_back():
    assert pieces_of([b"one E", b"N", b"emy", b" EN", b"D more"], ["END"])[0] == ["one ", "", "ENemy", " ", "", ""]
    assert pieces_of([b"one E", b"N"], ["END"]) == (["one ", "", "EN"], False)


@pytest.mark.parametrize(("chunks", "text"), [([b"xabcdy"], "xa"), ([b"xab", b"c", b"dy"], "xa")])
def test_the_stop_string_that_is_complete_first_wins(chunks, text):
    assert "".join(pieces_of(chunks, ["abcd", "bc"])[0]) == text


@pytest.mark.parametrize(("stop", "found"), [(["abcd", "bc"], "bc"), (["no", "abcd"], "abcd"), (["bc", "abc"], "abc")])
def test_which_stop_string_it_was_is_known(stop, found):
    stream = TextStream(StreamDecoder([b"xab", b"cd", b"y"].__getitem__), stop)
    stream.push(0)
    assert stream.found is None
    stream.push(1)
    assert stream.found == found
