import numpy as np
import pytest

from jaxserve.engine.grammar.compiler import Compiler
from jaxserve.engine.grammar.constraint import from_structured_outputs
from jaxserve.engine.grammar.matcher import GrammarFailed, Masks, Matcher
from jaxserve.engine.grammar.source import grammar
from jaxserve.engine.grammar.vocabulary import SPECIAL, Vocabulary
from jaxserve.text.tokenizer import Tokenizer
from tests.engine.grammar.conftest import PADDED
from tests.engine.grammar.walks import allowed
from tests.text.conftest import NAMED, byte_fallback


def start(compiler: Compiler, **fields: object) -> Matcher:
    return compiler.compile(grammar(from_structured_outputs(fields), {}))


def test_masks_have_a_bit_for_each_token(
    compiler: Compiler, vocabulary: Vocabulary, tokenizer: Tokenizer
) -> None:
    mask = np.full(vocabulary.words, 0xFFFFFFFF, np.uint32)
    start(compiler, regex="(?s:.*)").mask(mask)
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    text = [not (token == b"" or token.startswith(SPECIAL)) for token in vocabulary.tokens]
    assert vocabulary.words == (tokenizer.vocab_size + PADDED + 31) // 32
    assert not bits[tokenizer.vocab_size :].any()
    for i in np.flatnonzero(bits[: tokenizer.vocab_size] != np.array(text[: tokenizer.vocab_size])):
        # an end of sequence is no text, and bytes that are no UTF-8 are not matched
        assert i in vocabulary.eos_ids or "�" in vocabulary.tokens[i].decode(errors="replace")


def test_accepting_goes_on_and_rolling_back_returns(compiler: Compiler, vocabulary: Vocabulary) -> None:
    matcher = start(compiler, choice=["abc", "abd"])
    (end,) = vocabulary.eos_ids
    a, b, c, z = (vocabulary.tokens.index(letter) for letter in (b"a", b"b", b"c", b"z"))
    before = allowed(matcher, vocabulary)
    assert not matcher.accept(z) and not matcher.accept(end) and not matcher.complete
    assert (allowed(matcher, vocabulary) == before).all()
    for token in (a, b, c):
        assert matcher.accept(token)
    assert matcher.complete and matcher.finished and matcher.forced() == []
    assert allowed(matcher, vocabulary).tolist() == [end]
    assert not matcher.accept(c)
    assert matcher.accept(end) and not matcher.accept(end)
    matcher.rollback(2)
    assert not matcher.complete and c in allowed(matcher, vocabulary)
    matcher.rollback(2)
    assert (allowed(matcher, vocabulary) == before).all()
    with pytest.raises(ValueError):
        matcher.rollback(1)


def test_an_end_where_more_may_follow_is_rolled_back_too(compiler: Compiler, vocabulary: Vocabulary) -> None:
    matcher = start(compiler, regex="a+")
    (end,) = vocabulary.eos_ids
    a = vocabulary.tokens.index(b"a")
    assert matcher.accept(a) and matcher.complete and not matcher.finished
    assert matcher.accept(end) and not matcher.accept(end) and not matcher.accept(a)
    matcher.rollback(1)
    assert matcher.accept(a) and matcher.complete


def test_copies_go_on_by_themselves(compiler: Compiler, vocabulary: Vocabulary) -> None:
    one = start(compiler, choice=["ab", "b"])
    other = one.copy()
    assert one.accept(vocabulary.tokens.index(b"b")) and one.finished
    assert other.accept(vocabulary.tokens.index(b"a")) and not other.finished


@pytest.mark.parametrize(
    "fields",
    [
        {
            "json": {
                "type": "object",
                "properties": {"first name": {"type": "string"}},
                "required": ["first name"],
            }
        },
        {"regex": "The answer is: [0-9]"},
        {"choice": ["one and only <|im_end|> text"]},
        {"choice": ["é日本語🎉!"]},
        {"grammar": 'start: "SELECT " ("a" | "b")'},
    ],
)
def test_forced_tokens_are_all_that_the_mask_allows(
    fields: dict[str, object], compiler: Compiler, vocabulary: Vocabulary
) -> None:
    matcher = start(compiler, **fields)
    forced = matcher.forced()
    rest = b"".join(vocabulary.tokens[i] for i in forced)
    assert rest
    for token in forced:
        # whatever else may come begins as what is forced does
        for other in allowed(matcher, vocabulary):
            text = vocabulary.tokens[other]
            assert rest.startswith(text) or text.startswith(rest)
        assert matcher.accept(token)
        rest = rest.removeprefix(vocabulary.tokens[token])
    assert not rest


def test_nothing_special_is_forced(compiler: Compiler, vocabulary: Vocabulary) -> None:
    forced = start(compiler, choice=["say <|im_end|> now"]).forced()
    assert not any(vocabulary.tokens[i].startswith(SPECIAL) for i in forced)
    assert b"".join(vocabulary.tokens[i] for i in forced) == b"say <|im_end|> now"


def test_a_batch_has_the_masks_of_its_sequences(compiler: Compiler, vocabulary: Vocabulary) -> None:
    matchers = [start(compiler, regex=r) for r in ("[a-z]+", "[0-9]+", "x|y", "(?s:.*)")]
    rows = np.zeros((6, vocabulary.words), np.uint32)
    assert Masks(2).fill([(matcher, 5 - i) for i, matcher in enumerate(matchers)], rows) == []
    for i, matcher in enumerate(matchers):
        alone = np.zeros(vocabulary.words, np.uint32)
        matcher.mask(alone)
        assert (rows[5 - i] == alone).all()
    assert not rows[:2].any()
    assert Masks(1).fill([], rows) == []


def test_a_grammar_that_grows_too_complex_fails_alone(compiler: Compiler, vocabulary: Vocabulary) -> None:
    bomb, fine = start(compiler, regex="(a{1,1000}){1,1000}"), start(compiler, regex="[a-z]+")
    a = vocabulary.tokens.index(b"a")
    mask = np.zeros(vocabulary.words, np.uint32)
    with pytest.raises(GrammarFailed, match="too complex"):
        for _ in range(1000):
            bomb.mask(mask)
            bomb.accept(a)
    rows = np.zeros((2, vocabulary.words), np.uint32)
    assert Masks(2).fill([(fine, 0), (bomb, 1)], rows) == [1]
    assert not bomb.complete
    with pytest.raises(GrammarFailed):
        bomb.accept(a)
    assert fine.accept(a)


def test_a_sentencepiece_vocabulary() -> None:
    spoken = Tokenizer(byte_fallback(), NAMED)
    vocabulary = Vocabulary.of(spoken, spoken.vocab_size)
    assert b"".join(vocabulary.tokens[i] for i in vocabulary.spell("ab é")) == b"ab \xc3\xa9"
    before, both = (spoken.encode(text, add_special_tokens=False) for text in ("\n", "\njumps over dogs"))
    assert vocabulary.spell("jumps over dogs") == both[len(before) :]
    matcher = start(Compiler(lambda: vocabulary), choice=["ab é", "ba"])
    for token in vocabulary.spell("ab é"):
        assert token in allowed(matcher, vocabulary)
        assert matcher.accept(token)
    assert matcher.finished and allowed(matcher, vocabulary).tolist() == spoken.eos_ids
