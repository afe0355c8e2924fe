"""Stop strings in a stream of text, wherever the pieces happen to be cut."""

from collections.abc import Sequence


class StopChecker:
    """Shows text as soon as it can be no part of a stop string, and finds the first one complete.

    The result does not depend on how the text is cut into pieces: the stop string that is complete
    first wins, the longer one when two are complete at the same character.
    """

    def __init__(self, stops: Sequence[str], include: bool = False):
        """`include`: show the stop string itself too."""
        self._stops = stops
        self._include = include
        self._held = ""

    def feed(self, piece: str) -> tuple[str, str | None]:
        """The text that may be shown now, and the stop string if one is complete (feed no more then)."""
        if not self._stops:
            return piece, None
        text = self._held + piece
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            end, start, stop = min(found)
            self._held = ""
            return text[: end if self._include else start], stop
        cut = self._unsafe_from(text)
        self._held = text[cut:]
        return text[:cut], None

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held

    def _unsafe_from(self, text: str) -> int:
        """Where the longest suffix begins that some stop string begins with."""
        cut = len(text)
        for stop in self._stops:
            at = text.find(stop[0], max(0, len(text) - len(stop) + 1), cut)
            while at >= 0:
                if stop.startswith(text[at:]):
                    cut = at
                    break
                at = text.find(stop[0], at + 1, cut)
        return cut
