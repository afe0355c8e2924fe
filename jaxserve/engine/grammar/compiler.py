"""Grammars into matchers, away from the engine's thread, none waiting for one that is slow."""

from collections import OrderedDict
from collections.abc import Callable
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
    """One engine's. A grammar that was compiled lately, or is just now, is not compiled again."""

    def __init__(self, load: Callable[[], Vocabulary]):
        """`load` is called by the thread that compiles the first grammar."""
        self._load = load
        self._checker: Checker | None = None
        self._loading = Lock()
        self._threads = ThreadPoolExecutor(AT_ONCE, "grammar")
        self._under_way: dict[Grammar, Future[Matcher]] = {}
        self._known: OrderedDict[Grammar, Future[Matcher]] = OrderedDict()
        self._lock = Lock()

    def submit(self, grammar: Grammar) -> "Future[Matcher]":
        """The matcher at its start, which others may get too: go on with a copy. Or InvalidRequest, with the
        library's reason and a schema's place."""
        with self._lock:
            if (known := self._known.get(grammar)) is not None:
                self._known.move_to_end(grammar)
                return known
            if grammar not in self._under_way:
                self._under_way[grammar] = self._threads.submit(self._compile, grammar)
            return self._under_way[grammar]

    def compile(self, grammar: Grammar) -> Matcher:
        """A matcher of one's own, waited for."""
        return self.submit(grammar).result().copy()

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        with self._loading:
            if self._checker is not None:
                self._checker.close()

    def _compile(self, grammar: Grammar) -> Matcher:
        keep = False
        try:
            checker = self._checked_by()
            error, place, taken = checker.check(grammar.text)
            if error is not None:
                raise _refused(grammar.param, error, place)
            keep = taken <= KEPT_BYTES
            # as it was compiled there within the limits, so it is here
            vocabulary = checker.vocabulary
            return Matcher(limits.matcher(vocabulary.backend, grammar.text), vocabulary.eos_ids)
        finally:
            with self._lock:
                made = self._under_way.pop(grammar)
                if keep:
                    self._known[grammar] = made
                while len(self._known) > KEPT:
                    self._known.popitem(last=False)

    def _checked_by(self) -> Checker:
        with self._loading:
            if self._checker is None:
                self._checker = Checker(self._load())
            return self._checker


def _refused(param: str, error: str, place: str | None) -> InvalidRequest:
    if place is None:
        return InvalidRequest(f"{param}: {error}", param)
    param, _, pointer = place.partition("#")
    return InvalidRequest(f"{param}: {error} (at #{pointer})", place)
