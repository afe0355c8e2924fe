"""How much a grammar may take, when it is compiled and at every step."""

from functools import cache
from typing import Any

CPU_SECONDS = 2
"""Of compiling one, and of its first masks."""
MEMORY = 256 * 2**20
"""Bytes more than before."""
ANSWER_BYTES = 3000
"""Of the reason of a refusal."""
PLACE_BYTES = 500
"""Of where it is; a longer place is left out. Both in one answer are written at once, by PIPE_BUF."""


@cache
def limits() -> Any:
    """llguidance's own, below its defaults: a mask is late for every sequence of its step."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        max_items_in_row=1_000,
        step_lexer_fuel=100_000,
        step_max_items=20_000,
        max_lexer_states=100_000,
        verbose_errors=False,
    )


def matcher(vocabulary: Any, text: str) -> Any:
    """llguidance's matcher of a grammar; it tells its errors itself."""
    from llguidance import LLMatcher

    return LLMatcher(vocabulary, text, log_level=0, limits=limits())
