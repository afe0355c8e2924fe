"""What the grammars of a step's requests let come next."""

import os
from collections.abc import Callable, Sequence

import numpy as np

from jaxserve.engine.grammar.matcher import GrammarFailed, Masks, Words
from jaxserve.engine.request import Request
from jaxserve.engine.shaping import is_shaped
from jaxserve.errors import InvalidRequest

THREADS = min(8, max(1, (os.cpu_count() or 1) // 2))
"""That fill masks; the others have the forward pass."""
FEW = 256
"""Where more words of a mask have bits, nothing is forced."""


class Guide:
    """One core's. `refuse` ends a request whose grammar failed."""

    def __init__(self, refuse: Callable[[Request, InvalidRequest], None]):
        self._refuse = refuse
        self._masks: Masks | None = None

    def fill(self, rows: Sequence[tuple[int, Request]], masks: Words) -> None:
        """Write those rows of masks [rows, words] whose requests have a grammar."""
        guided = [(row, request, request.matcher) for row, request in rows if request.matcher is not None]
        if not guided:
            return
        if self._masks is None:
            self._masks = Masks(THREADS)
        found = np.zeros((len(guided), masks.shape[1]), np.uint32)
        self._masks.fill([(matcher, i) for i, (_, _, matcher) in enumerate(guided)], found)
        few = np.count_nonzero(found, axis=1) <= FEW
        for i, (_, request, matcher) in enumerate(guided):
            if error := matcher.failure:
                self._refuse(request, refusal(request, error))
                found[i] = 2**32 - 1  # its token is dropped
            elif few[i] and not request.rules and (forced := matcher.forced()):
                found[i] = 0  # but for what would come by a jump
                found[i, forced[0] // 32] = 1 << forced[0] % 32
        masks[[row for row, _, _ in guided]] = found


def forced(request: Request) -> list[int]:
    """The tokens that the grammar leaves no choice about, where they may come without being sampled."""
    spec = request.spec
    sampled = spec.logprobs is not None or spec.logits_processors or request.rules or is_shaped(spec)
    if request.matcher is None or sampled:
        return []
    return request.matcher.forced()


def refusal(request: Request, error: GrammarFailed) -> InvalidRequest:
    assert request.spec.grammar is not None
    param = request.spec.grammar.param
    return InvalidRequest(f"{param}: {error}", param)
