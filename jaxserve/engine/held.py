"""Requests that wait, outside of the scheduler's queue, until their grammar is compiled."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, NamedTuple

from jaxserve.config import EngineConfig
from jaxserve.engine.messages import CoreRequest
from jaxserve.errors import InvalidRequest

if TYPE_CHECKING:
    from jaxserve.engine.grammar.compiler import Compiler
    from jaxserve.engine.grammar.matcher import Matcher
    from jaxserve.engine.grammar.vocabulary import Vocabulary


class _Held(NamedTuple):
    request: CoreRequest
    since: float
    matcher: "Future[Matcher]"


class Held:
    """One engine's, by their ids. llguidance and the vocabulary are loaded with the first."""

    def __init__(self, load: "Callable[[], Vocabulary]"):
        self._load = load
        self._compiler: Compiler | None = None
        self._requests: dict[str, _Held] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, request: CoreRequest, now: float) -> None:
        """Hold a request that came at `now`."""
        if self._compiler is None:
            from jaxserve.engine.grammar.compiler import Compiler

            self._compiler = Compiler(self._load)
        assert request.grammar is not None
        self._requests[request.id] = _Held(request, now, self._compiler.submit(request.grammar))

    def abort(self, id: str) -> None:
        """Drop a request. Unknown ones are ignored."""
        self._requests.pop(id, None)

    def take(self) -> "Iterator[tuple[CoreRequest, float, Matcher | BaseException]]":
        """Those held no more: when each came, and its matcher, or why there is none."""
        for request, since, matcher in list(self._requests.values()):
            if not matcher.done():
                continue
            del self._requests[request.id]
            error = matcher.exception()
            if isinstance(error, InvalidRequest) and error.param is None:
                assert request.grammar is not None
                error = InvalidRequest(str(error), request.grammar.param)
            yield request, since, error or matcher.result().copy()

    def wait(self, seconds: float) -> None:
        """Sleep until there is one to take."""
        wait([held.matcher for held in self._requests.values()], seconds, "FIRST_COMPLETED")

    def close(self) -> None:
        self._requests.clear()
        if self._compiler is not None:
            self._compiler.close()


def load_vocabulary(config: EngineConfig, size: int, ends: Sequence[int]) -> "Vocabulary":
    """The tokens of the model's tokenizer, for masks of `size` logits; `ends` are the checkpoint's.

    Raises InvalidRequest for a model without what it takes.
    """
    from jaxserve.engine.grammar.vocabulary import Vocabulary
    from jaxserve.loading.hub import resolve
    from jaxserve.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(config.tokenizer or resolve(config.model))
    if tokenizer is None:
        raise InvalidRequest("structured output needs a tokenizer, and this model has none")
    return Vocabulary.of(tokenizer, size, ends)
