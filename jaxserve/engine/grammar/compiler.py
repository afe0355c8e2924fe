"""Grammars into matchers, away from the engine's thread, none waiting for one that is slow."""

from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock

from jaxserve.engine.grammar import limits
from jaxserve.engine.grammar.check import Checker
from jaxserve.engine.grammar.matcher import Matcher
from jaxserve.engine.grammar.source import Grammar
from jaxserve.engine.grammar.vocabulary import Vocabulary
from jaxserve.errors import InvalidRequest

AT_ONCE = 16
"""Grammars that are checked at the same time."""
KEPT = 64
"""Grammars that are remembered, each of at most `KEPT_BYTES`."""
KEPT_BYTES = 2**23


class Compiler:
    """One engine's. A grammar that was compiled lately is only copied."""

    def __init__(self, vocabulary: Vocabulary):
        self._vocabulary = vocabulary
        self._checker = Checker(vocabulary)
        self._threads = ThreadPoolExecutor(AT_ONCE, "grammar")
        self._known: OrderedDict[str, Matcher] = OrderedDict()
        self._lock = Lock()

    def submit(self, grammar: Grammar) -> "Future[Matcher]":
        """The matcher at its start, or InvalidRequest with the library's reason and a schema's pointer."""
        known = self._copy(grammar.text)
        if known is None:
            return self._threads.submit(self.compile, grammar)
        done: Future[Matcher] = Future()
        done.set_result(known)
        return done

    def compile(self, grammar: Grammar) -> Matcher:
        """`submit`, waited for."""
        if (known := self._copy(grammar.text)) is not None:
            return known
        error, pointer, taken = self._checker.check(grammar.text)
        if error is not None:
            raise _refused(grammar.param, error, pointer)
        # as it was compiled there within the limits, so it is here
        made = Matcher(limits.matcher(self._vocabulary.backend, grammar.text), self._vocabulary.eos_ids)
        if taken <= KEPT_BYTES:
            with self._lock:
                self._known[grammar.text] = made
                while len(self._known) > KEPT:
                    self._known.popitem(last=False)
            return made.copy()
        return made

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._checker.close()

    def _copy(self, text: str) -> Matcher | None:
        with self._lock:
            if (known := self._known.get(text)) is None:
                return None
            self._known.move_to_end(text)
            return known.copy()


def _refused(param: str, error: str, pointer: str | None) -> InvalidRequest:
    if pointer is None:
        return InvalidRequest(f"{param}: {error}", param)
    return InvalidRequest(f"{param}: {error} (at #{pointer})", f"{param}#{pointer}")
