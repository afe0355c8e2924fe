from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxserve.engine.grammar.compiler import Compiler
from jaxserve.engine.grammar.vocabulary import Vocabulary
from jaxserve.text.tokenizer import Tokenizer, load_tokenizer

PADDED = 100
"""Logits past the tokenizer's last token."""


@pytest.fixture(scope="session")
def tokenizer(default_model: Path) -> Tokenizer:
    tokenizer = load_tokenizer(default_model)
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="session")
def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    return Vocabulary.of(tokenizer, tokenizer.vocab_size + PADDED)


@pytest.fixture(scope="session")
def compiler(vocabulary: Vocabulary) -> Iterator[Compiler]:
    compiler = Compiler(lambda: vocabulary)
    yield compiler
    compiler.close()


@pytest.fixture(scope="session")
def special(tokenizer: Tokenizer) -> dict[str, int]:
    return {tokenizer.spelled([i])[0]: i for i in tokenizer.special_ids}
