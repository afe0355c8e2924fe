"""Texts that must not be generated, as the sequences of tokens that would write them."""

from collections.abc import Sequence

from jaxserve.errors import InvalidRequest
from jaxserve.text.tokenizer import Tokenizer


def token_sequences(words: Sequence[str], tokenizer: Tokenizer, vocab_size: int | None) -> list[list[int]]:
    """Each word as it is spelled at the beginning of a text and after a space.

    Raises InvalidRequest for a word without tokens, or with one that the model does not have.
    """
    found: dict[tuple[int, ...], None] = {}
    for i, word in enumerate(words):
        for text in (word.lstrip(), " " + word.lstrip()):
            tokens = tokenizer.encode(text, add_special_tokens=False)
            if not tokens or (vocab_size is not None and max(tokens) >= vocab_size):
                raise InvalidRequest(f"{word!r} is no text that this model can generate", f"bad_words[{i}]")
            found[tuple(tokens)] = None
    # one that ends with another never comes anyway
    lengths = {len(one) for one in found}
    return [list(one) for one in found if not any(one[-n:] in found for n in lengths if n < len(one))]
