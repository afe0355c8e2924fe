"""Outputs by chance: whatever the mask allows may come next."""

import random

import numpy as np

from jaxserve.engine.grammar.matcher import Matcher
from jaxserve.engine.grammar.vocabulary import SPECIAL, Vocabulary

LONG = 40
"""Tokens after which a walk looks for the end."""
LONGEST = 600
CLOSING = ('"', "}", "]", '"}', "]}", "}}", "]]", ":", ")", "</", "\n", "0", "null")


def allowed(matcher: Matcher, vocabulary: Vocabulary) -> np.ndarray:
    """Ids of the tokens that may follow."""
    mask = np.zeros(vocabulary.words, np.uint32)
    matcher.mask(mask)
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))


def walk(matcher: Matcher, vocabulary: Vocabulary, seed: int) -> list[int]:
    """Tokens up to the end of sequence, without it."""
    rng, found = random.Random(seed), []
    closing = [
        vocabulary.tokens.index(text.encode()) for text in CLOSING if text.encode() in vocabulary.tokens
    ]
    while len(found) < LONGEST:
        ids = allowed(matcher, vocabulary)
        ends = [end for end in vocabulary.eos_ids if end in ids[:50]]  # they come first in this vocabulary
        assert bool(ends) == matcher.complete, "an end of sequence exactly where the text is complete"
        assert len(ids), "something may always follow"
        assert ids[-1] < len(vocabulary.tokens) and all(vocabulary.tokens[i] for i in ids[-50:])
        if ends and (matcher.finished or len(ids) == len(ends) or len(found) > LONG or rng.random() < 0.3):
            assert matcher.accept(ends[0])
            return found
        ids = ids[~np.isin(ids, vocabulary.eos_ids)]
        quick = [i for i in closing if ids[np.searchsorted(ids, i) % len(ids)] == i]
        hurried = quick and rng.random() < (0.95 if len(found) > LONG else 0.2)
        token = quick[0] if hurried else int(ids[rng.randrange(len(ids))])
        assert matcher.accept(token)
        found.append(token)
    raise AssertionError(f"no end after {LONGEST} tokens: {text_of(found[-30:], vocabulary)!r}")


def text_of(ids: list[int], vocabulary: Vocabulary) -> str:
    return b"".join(vocabulary.tokens[i].removeprefix(SPECIAL) for i in ids).decode()
