"""Token ids to text as they come, never half a character, at a constant cost per token.

What the pieces join to is what decoding all the ids at once gives, but for spaces that are not wanted.
"""

import codecs
from collections.abc import Collection, Sequence
from typing import Protocol

from jaxserve.text.tokenizer import Tokenizer

CONTEXT = 8  # tokens of the prompt that tell a decoder it is not at the start of a text


class Detokenizer(Protocol):
    def push(self, token_id: int) -> str:
        """The text this token completes; "" while a character is still incomplete."""

    def flush(self) -> str:
        """The rest, once no more tokens come."""


def new_detokenizer(
    tokenizer: Tokenizer,
    prompt: Sequence[int] = (),
    skip_special_tokens: bool = True,
    shown: Collection[int] = (),
    spaces: bool = True,
) -> Detokenizer:
    """For the text that follows `prompt`; the text of `prompt` itself is not given out.

    `shown`: special tokens that are not skipped in any case; `spaces`: those stay that a decoder puts between
    special tokens, as WordPiece's does, and byte-level ones don't.
    """
    skip = tokenizer.special_ids.difference(shown) if skip_special_tokens else frozenset()
    if tokenizer.byte_level:
        return ByteLevel(tokenizer, skip)
    return Windowed(tokenizer, skip, prompt, frozenset() if spaces else tokenizer.special_ids)


class ByteLevel:
    """Tokens are bytes: an incremental UTF-8 decoder is all it takes."""

    def __init__(self, tokenizer: Tokenizer, skip: frozenset[int]):
        self._bytes = tokenizer.token_bytes
        self._skip = skip
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return "" if token_id in self._skip else self._utf8.decode(self._bytes(token_id))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class Windowed:
    """Any other decoder: decode a few tokens of context with the new ones, and give what they add.

    A byte-fallback decoder judges a whole run of byte tokens at once (one bad byte spoils all of
    them), so a run is held until the token after it.
    """

    def __init__(
        self, tokenizer: Tokenizer, skip: frozenset[int], prompt: Sequence[int], tight: frozenset[int]
    ):
        """`tight`: tokens with no space between them."""
        self._tokenizer = tokenizer
        self._skip = skip
        self._tight = tight
        self._last = prompt[-1] if prompt else None
        self._context = [token for token in prompt[-CONTEXT:] if token not in tokenizer.special_ids]
        self._shown = self._decode(self._context)
        self._run: list[int] = []

    def push(self, token_id: int) -> str:
        if token_id in self._skip or self._tokenizer.backend.id_to_token(token_id) is None:
            return ""
        tight = token_id in self._tight and self._last in self._tight
        self._last = token_id
        self._run.append(token_id)
        if token_id in self._tokenizer.raw_bytes:
            return ""
        added = self.flush()
        if tight:
            added = added.lstrip(" ")
        # The context must show something: a decoder that trims its start would trim the next token.
        for context in (self._context[-1:], self._context[-2:]):
            if shown := self._decode(context):
                self._context, self._shown = context, shown
                break
        return added

    def flush(self) -> str:
        self._context += self._run
        self._run = []
        text = self._decode(self._context)
        added, self._shown = text[len(self._shown) :], text
        return added

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False) if ids else ""
