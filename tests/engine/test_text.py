"""Streaming text: nothing is taken back, stop strings never show."""

from hypothesis import given, settings
from hypothesis import strategies as st

from service.embedded.text import TextStream


def decode(ids: list[int]) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


def stream(data: bytes, stop=()) -> tuple[list[str], bool]:
    text = TextStream(decode, stop)
    pieces = []
    for byte in data:
        pieces.append(text.push(byte))
        if text.stopped:
            return pieces, True
    return [*pieces, text.finish()], False


def test_a_character_appears_whole():
    pieces, _ = stream("é–x".encode())
    assert pieces == ["", "é", "", "", "–", "x", ""]


def test_a_stop_string_over_many_tokens_never_shows():
    pieces, stopped = stream(b"left lung END right", ["END"])
    assert ("".join(pieces), stopped) == ("left lung ", True)


def test_the_earliest_of_several_stop_strings_counts():
    assert "".join(stream(b"abcdef", ["def", "bc"])[0]) == "a"


def test_a_mere_beginning_of_a_stop_string_is_given_out():
    assert stream(b"ENENX", ["END"]) == (["", "", "EN", "", "ENX", ""], False)
    assert "".join(stream(b"the EN", ["END"])[0]) == "the EN"


@settings(deadline=None)
@given(st.text(max_size=40))
def test_pieces_join_to_the_text(text):
    assert "".join(stream(text.encode())[0]) == text


@settings(deadline=None)
@given(
    st.text(alphabet="abé", max_size=30),
    st.lists(st.text(alphabet="abé", min_size=1, max_size=4), min_size=1),
)
def test_what_is_given_out_ends_before_the_first_stop_string(text, stop):
    given_out = "".join(stream(text.encode(), stop)[0])
    assert text.startswith(given_out)
    assert not any(s in given_out for s in stop)
    if not any(s in text for s in stop):
        assert given_out == text
