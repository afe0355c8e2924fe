"""A model's tokens as llguidance needs them: their bytes, and which are special or end a sequence."""

from collections.abc import Sequence
from typing import Any

from jaxserve.errors import InvalidRequest
from jaxserve.text.tokenizer import Tokenizer

SPECIAL = b"\xff"
"""Begins tokens that are never part of a text."""
ALONE = "\n"
"""A token of its own, after which a SentencePiece vocabulary puts no space before the next."""


class Vocabulary:
    """`tokens`: each token's bytes, as many as the model has logits; one that no text has is empty.

    Masks have `words` 32-bit words; bits past the tokenizer's tokens are 0.
    """

    def __init__(self, tokens: Sequence[bytes], eos_ids: Sequence[int], tokenizer: Tokenizer | None = None):
        """`tokenizer` says how it would spell a text; without one that is the longest tokens first."""
        from llguidance import LLTokenizer

        self.tokens = list(tokens)
        self.eos_ids = list(eos_ids)
        self.words = (len(tokens) + 31) // 32
        self.tokenizer = tokenizer
        wrapper: Any = _Wrapper(self)
        self.backend: Any = LLTokenizer(wrapper, eos_token=self.eos_ids)

    @classmethod
    def of(cls, tokenizer: Tokenizer, size: int, ends: Sequence[int] = ()) -> "Vocabulary":
        """`size`: the model's logits, often some more than the tokenizer has tokens; `ends`: what ends a
        sequence besides the tokenizer's own.

        Raises InvalidRequest for a tokenizer without an end of sequence: nothing could end.
        """
        eos_ids = [i for i in dict.fromkeys([*tokenizer.eos_ids, *ends]) if i < size]
        if not eos_ids:
            raise InvalidRequest("structured output needs a tokenizer with an end-of-sequence token")
        special = tokenizer.special_ids | set(eos_ids)
        known = [
            SPECIAL + tokenizer.spelled([i])[0].encode() if i in special else tokenizer.token_bytes(i)
            for i in range(min(size, tokenizer.vocab_size))
        ]
        return cls(known + [b""] * (size - len(known)), eos_ids, tokenizer)

    def spell(self, text: str) -> list[int]:
        """Tokens whose bytes are exactly the text's, as the tokenizer would choose them if it can."""
        if self.tokenizer is not None:
            lead = "" if self.tokenizer.byte_level else ALONE
            ids = self.tokenizer.encode(lead + text, add_special_tokens=False)
            if lead:
                first = self.tokenizer.encode(lead, add_special_tokens=False)
                ids = ids[len(first) :] if ids[: len(first)] == first else []
            # a text may hold what looks like a special token, which it must not become
            if b"".join(self.tokens[i] for i in ids if i < len(self.tokens)) == text.encode():
                return ids
        found: list[int] = self.backend.greedy_tokenize(text)
        return found


class _Wrapper:
    """What LLTokenizer asks for."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary):
        self.eos_token_id = vocabulary.eos_ids[0]
        self.tokens = vocabulary.tokens
        self.special_token_ids = [i for i, token in enumerate(vocabulary.tokens) if token[:1] == SPECIAL]
        self.spell = vocabulary.spell

    def __call__(self, text: str) -> list[int]:
        return self.spell(text)
