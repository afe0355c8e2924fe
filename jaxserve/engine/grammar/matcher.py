"""Which tokens may follow in one sequence, and the same for a batch at once."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jaxserve.errors import JaxserveError

if TYPE_CHECKING:
    from llguidance import LLMatcher

Words = NDArray[np.uint32]
"""A mask: bit i of word w is set where token 32 w + i may follow."""


class GrammarFailed(JaxserveError):
    """A grammar that became too complex for the text so far: its request cannot go on."""


class Matcher:
    """One sequence's place in its grammar. The engine's own thread only."""

    def __init__(self, inner: "LLMatcher", eos_ids: Sequence[int]):
        self.inner = inner
        self.eos_ids = eos_ids
        # by an end of sequence after all that the grammar allows, which `inner` does not count
        self._ended = False

    def copy(self) -> "Matcher":
        """At the same place, going on by itself."""
        return Matcher(self.inner.deep_copy(), self.eos_ids)

    def mask(self, out: Words) -> None:
        """Fill `out` [words], contiguous. An end of sequence may follow exactly where the text is complete.

        Raises GrammarFailed.
        """
        self.inner.unsafe_compute_mask_ptr(out.ctypes.data, out.nbytes)
        self.check()

    @property
    def failure(self) -> GrammarFailed | None:
        """Why a mask could not be computed: it allows but the end."""
        if not self.inner.is_error():
            return None
        told = self.inner.get_error().partition("\n")[0]
        return GrammarFailed(f"the grammar became too complex: {told}")

    def check(self) -> None:
        """Raises GrammarFailed after a mask that could not be computed."""
        if failure := self.failure:
            raise failure

    def accept(self, token: int) -> bool:
        """Go on by a token; False, and nothing changes, where the grammar does not allow it.

        Raises GrammarFailed.
        """
        self.check()
        if self.inner.is_stopped():
            if self._ended or token not in self.eos_ids or self.inner.stop_reason() == "EndOfSentence":
                return False
            self._ended = True
            return True
        taken = self.inner.try_consume_tokens([token]) == 1
        self.check()
        return bool(taken)

    def take(self, token: int) -> None:
        """Go on by a token that was sampled, or forced. Raises GrammarFailed."""
        if not self.accept(token):
            raise GrammarFailed(f"token {token} came, which the grammar does not allow")

    def rollback(self, n: int) -> None:
        """Take back the last n tokens. Raises ValueError for more than were accepted."""
        if n and self._ended:
            self._ended = False
            n -= 1
        if n and not self.inner.rollback(n):
            raise ValueError(f"cannot take back {n} tokens")

    def forced(self) -> list[int]:
        """The tokens that come next whatever is sampled; never an end of sequence."""
        found: list[int] = [] if self.inner.is_stopped() else self.inner.compute_ff_tokens()
        return found

    @property
    def complete(self) -> bool:
        """The text so far is one that the grammar describes."""
        return bool(self.inner.is_accepting()) and not self.inner.is_error()

    @property
    def finished(self) -> bool:
        """Complete, and nothing but an end of sequence may follow."""
        return bool(self.inner.is_stopped()) and self.complete


class Masks:
    """Fills the rows of many sequences at once, on so many threads that need no Python."""

    def __init__(self, threads: int):
        self._executor: Any = None
        if threads > 1:  # else waking one costs more than it does
            from llguidance import LLExecutor

            self._executor = LLExecutor(num_threads=threads)

    def fill(self, rows: Sequence[tuple[Matcher, int]], out: Words) -> list[int]:
        """Row i of `out` [rows, words], contiguous, for each (matcher, i); the rows whose grammar failed."""
        if self._executor is None:
            for matcher, row in rows:
                matcher.inner.unsafe_compute_mask_ptr(out[row].ctypes.data, out.shape[1] * 4)
        elif rows:
            pairs = [(matcher.inner, row) for matcher, row in rows]
            self._executor.unsafe_compute_mask_ptr(pairs, out.ctypes.data, out.shape[1] * 4, out.shape[0])
        return [row for matcher, row in rows if matcher.failure]
