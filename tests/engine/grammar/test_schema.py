"""What a schema becomes before the library has it."""

import re

import pytest

from jaxserve.engine.grammar.schema import BEFORE, begun

FREE = [
    "b",
    r"\d{4}-\d\d",
    "a|b",
    r"\^b",
    r"b\$",
    "[^a]b",
    r"[\]^$]b",
    "[]^]",
    "b$",
    r"b\\$",
    "[$|]b$",
    "(?:a|b)c",
]
BOUND = ["^b", "^b$", "^a|b", "a|^b", "(^b)", "a|b$", "(b$)", "(?:a|b)$"]
TEXTS = ["", "b", "ab", "b\nb", "a^b", "2024-12", "b$", "x]b", "^", "bc", "b\\", "$b", "bx"]


@pytest.mark.parametrize("pattern", FREE)
def test_only_so_much_comes_before_what_a_pattern_describes(pattern):
    found = re.compile(begun(pattern))
    for text in TEXTS:
        assert bool(found.search(text)) == bool(re.search(pattern, text)), text
        if re.match(pattern, text):
            assert found.search("x" * BEFORE + text)
            assert not found.search("x" * (BEFORE + 1) + text)


@pytest.mark.parametrize("pattern", BOUND)
def test_a_pattern_that_says_how_a_text_begins_stays(pattern):
    assert begun(pattern) == pattern
