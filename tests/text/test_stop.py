import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.text.stop import StopChecker

SHORT = st.text("abc", min_size=1, max_size=4)


def run(stops: list[str], pieces: list[str], include: bool = False) -> tuple[str, str | None, list[str]]:
    checker, shown = StopChecker(stops, include), []
    for piece in pieces:
        visible, stop = checker.feed(piece)
        shown.append(visible)
        if stop:
            return "".join(shown), stop, shown
    return "".join(shown) + checker.flush(), None, shown


def expected(stops: list[str], text: str) -> tuple[str, str | None]:
    """By definition: the first end of any stop string, and of those ending there the longest."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end - len(stop)], stop
    return text, None


@given(stops=st.lists(SHORT, max_size=4), pieces=st.lists(st.text("abc", max_size=3), max_size=12))
def test_the_result_does_not_depend_on_the_pieces(stops, pieces):
    text, stop, _ = run(stops, pieces)
    assert (text, stop) == expected(stops, "".join(pieces))


@given(
    stops=st.lists(SHORT, min_size=1, max_size=4), pieces=st.lists(st.text("abc", max_size=3), max_size=12)
)
def test_only_what_may_become_a_stop_string_is_held(stops, pieces):
    checker, text, shown = StopChecker(stops), "", ""
    for piece in pieces:
        visible, stop = checker.feed(piece)
        if stop:
            return
        text, shown = text + piece, shown + visible
        held = text[len(shown) :]
        assert text.startswith(shown)
        starts = {stop[:n] for stop in stops for n in range(1, len(stop))}
        longest = max((start for start in starts if text.endswith(start)), key=len, default="")
        assert held == longest


@pytest.mark.parametrize("include", [False, True])
def test_across_pieces(include):
    text, stop, shown = run(["STOP"], ["go S", "T", "OP", " more"], include)
    assert stop == "STOP"
    assert text == ("go STOP" if include else "go ")
    assert shown[:2] == ["go ", ""]


def test_what_was_held_comes_when_it_turns_out_harmless():
    assert run(["STOP"], ["ST", "ART"])[2] == ["", "START"]
    assert run(["STOP"], ["ST"])[0] == "ST"


def test_without_stop_strings_everything_passes():
    assert run([], ["a", "", "b"]) == ("ab", None, ["a", "", "b"])
