"""What the grammars of a step's requests let come next."""

import os
from collections.abc import Callable, Sequence

import numpy as np

from jaxserve.engine.grammar.matcher import GrammarFailed, Masks, Matcher, Words
from jaxserve.engine.request import Request
from jaxserve.engine.shaping import is_shaped
from jaxserve.errors import InvalidRequest


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
        found = np.zeros((len(guided), masks.shape[1]), np.uint32)
        undecided: list[tuple[Matcher, int]] = []
        for i, (_, request, matcher) in enumerate(guided):
            if not request.rules and (forced := matcher.forced()):
                found[i, forced[0] // 32] = 1 << forced[0] % 32  # the token that would come by a jump
            else:
                undecided.append((matcher, i))
        if self._masks is None:
            self._masks = Masks(os.cpu_count() or 1)
        for i in self._masks.fill(undecided, found):
            _, request, matcher = guided[i]
            found[i] = 2**32 - 1  # its token is dropped
            try:
                matcher.check()
            except GrammarFailed as error:
                self._refuse(request, failure(request, error))
        masks[[row for row, _, _ in guided]] = found


def jumps(request: Request) -> bool:
    """Whether tokens that the grammar forces may come without a step that samples them."""
    spec = request.spec
    sampled = spec.logprobs is not None or spec.logits_processors or request.rules or is_shaped(spec)
    return request.matcher is not None and not sampled


def failure(request: Request, error: GrammarFailed) -> InvalidRequest:
    assert request.spec.grammar is not None
    param = request.spec.grammar.param
    return InvalidRequest(f"{param}: {error}", param)
