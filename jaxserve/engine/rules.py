"""What a request forbids from the host: rules that clear bits in a row's mask of tokens that may come."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from jaxserve.engine.messages import CoreRequest, Thoughts

Words = NDArray[np.uint32]
"""A mask: bit i of word w is set where token 32 w + i may come."""


OPENING = 4
"""Tokens of an output of which one may begin its thoughts."""


class Rule(Protocol):
    late: bool
    """It depends on the tokens before, which must be read first."""

    def narrow(self, mask: Words, output: Sequence[int], place: int) -> None:
        """Clear the bits of what may not be the output's token number `place`. `output` are the tokens that
        the host knows: for a late rule all before that place."""


def rules_of(spec: CoreRequest, vocab: int) -> list[Rule]:
    """Those of a request of a model with `vocab` logits."""
    rules: list[Rule] = []
    if spec.allowed_token_ids:
        rules.append(Only(_words(spec.allowed_token_ids, vocab)))
    if spec.min_tokens and spec.stop_token_ids:
        stops = _words(spec.stop_token_ids, vocab)
        rules.append(NotBefore(stops, spec.min_tokens, yields=spec.grammar is not None))
    if single := [words[0] for words in spec.bad_words if len(words) == 1]:
        rules.append(Not(_words(single, vocab)))
    if longer := [words for words in spec.bad_words if len(words) > 1]:
        rules.append(NotAfter(longer))
    if spec.thoughts:
        rules.append(EndOfThoughts(spec.thoughts, vocab))
    return rules


class Only:
    """`allowed_token_ids`."""

    late = False

    def __init__(self, allowed: Words):
        self._allowed = allowed

    def narrow(self, mask: Words, output: Sequence[int], place: int) -> None:
        mask &= self._allowed


class Not:
    """`bad_words` of one token."""

    late = False

    def __init__(self, tokens: Words):
        self._others = ~tokens

    def narrow(self, mask: Words, output: Sequence[int], place: int) -> None:
        mask &= self._others


class NotBefore:
    """`min_tokens`. It `yields` where nothing but an end may come: a grammar's text may be shorter."""

    late = False

    def __init__(self, tokens: Words, count: int, yields: bool):
        self._others = ~tokens
        self._count = count
        self._yields = yields

    def narrow(self, mask: Words, output: Sequence[int], place: int) -> None:
        if place < self._count and not (self._yields and not np.any(mask & self._others)):
            mask &= self._others


class _Ban(NamedTuple):
    before: list[int]
    token: int


class NotAfter:
    """`bad_words` of several tokens: the last may not come after the others."""

    late = True

    def __init__(self, sequences: Iterable[list[int]]):
        self._bans: defaultdict[int, list[_Ban]] = defaultdict(list)
        for *before, token in sequences:
            self._bans[before[-1]].append(_Ban(before, token))

    def narrow(self, mask: Words, output: Sequence[int], place: int) -> None:
        for ban in self._bans.get(output[-1], ()) if output else ():
            if output[-len(ban.before) :] == ban.before:
                mask[ban.token // 32] &= ~np.uint32(1 << ban.token % 32)


class EndOfThoughts:
    """`thinking_token_budget`: then nothing but the token that ends them may come, once."""

    def __init__(self, thoughts: Thoughts, vocab: int):
        self._thoughts = thoughts
        self._close = _words([thoughts.close], vocab)
        self.late = True  # until there are no thoughts to end

    def narrow(self, mask: Words, output: Sequence[int], place: int) -> None:
        if not self.late:
            return
        begin = self._begin(output)
        if begin is None:
            self.late = len(output) < OPENING
        elif self._thoughts.close in output[begin:]:
            self.late = False
        elif place - begin >= self._thoughts.budget and (mask & self._close).any():
            mask &= self._close  # or a grammar wants a character whole first

    def _begin(self, output: Sequence[int]) -> int | None:
        if self._thoughts.open is None:
            return 0
        first = output[:OPENING]
        return first.index(self._thoughts.open) + 1 if self._thoughts.open in first else None


def _words(tokens: Sequence[int], vocab: int) -> Words:
    """The mask of these tokens; one that has no logit is left out."""
    words = np.zeros((vocab + 31) // 32, np.uint32)
    ids = np.array([token for token in tokens if token < vocab], np.int64)
    np.bitwise_or.at(words, ids // 32, np.uint32(1) << (ids % 32).astype(np.uint32))
    return words
