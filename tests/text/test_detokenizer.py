import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.text.detokenizer import new_detokenizer
from jaxserve.text.tokenizer import Tokenizer

TEXTS = [
    "日本語 and 🎉🎊 and 👩‍👩‍👧‍👦",
    " leading, trailing ",
    "   many   spaces\n\n\tand tabs",
    "",
    "a",
    "café naïve ñ ½ € ₿ 𐍈",
]


def stream(tokenizer: Tokenizer, ids: list[int], prompt: list[int] = (), skip: bool = True) -> list[str]:
    detokenizer = new_detokenizer(tokenizer, prompt, skip)
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


@pytest.mark.parametrize("skip", [True, False])
@given(data=st.data())
def test_deltas_join_to_the_whole_for_random_ids(tokenizer, skip, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    assert "".join(stream(tokenizer, ids, skip=skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


@given(data=st.data())
def test_deltas_join_for_runs_of_byte_tokens(byte_fallback_tokenizer, data):
    """Mostly byte tokens: whole characters, broken ones, and runs that never end."""
    tokenizer = byte_fallback_tokenizer
    byte = [tokenizer.backend.token_to_id(f"<0x{b:02X}>") for b in range(256)]
    chunks = st.one_of(
        st.text(max_size=3).map(lambda s: [byte[b] for b in s.encode("utf-8", "ignore")]),
        st.lists(st.sampled_from(byte), max_size=4),
        st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=3),
    )
    ids = [token for chunk in data.draw(st.lists(chunks, max_size=8)) for token in chunk]
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@given(text=st.text(max_size=60))
def test_text_is_never_cut_inside_a_character(byte_level_tokenizer, text):
    text = text.encode("utf-8", "ignore").decode().replace("\ufffd", "")
    pieces = stream(byte_level_tokenizer, byte_level_tokenizer.encode(text))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_waits_for_its_last_byte(byte_level_tokenizer):
    tokenizer = byte_level_tokenizer
    byte = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    ids = [byte[bytes([b])] for b in "€".encode()]
    assert stream(tokenizer, ids) == ["", "", "€", ""]
    assert stream(tokenizer, ids[:2]) == ["", "", "\ufffd"]


def test_bytes_that_never_become_a_character_are_not_held(byte_level_tokenizer):
    tokenizer = byte_level_tokenizer
    byte = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    assert stream(tokenizer, [byte[b"\xff"]] * 3) == ["\ufffd"] * 3 + [""]


def test_a_run_of_byte_tokens_is_shown_at_the_token_after_it(byte_fallback_tokenizer):
    tokenizer = byte_fallback_tokenizer
    bytes_of = [tokenizer.backend.token_to_id(f"<0x{b:02X}>") for b in "日".encode()]
    the = tokenizer.backend.token_to_id("▁the")
    assert stream(tokenizer, [the, *bytes_of, the]) == ["the", "", "", "", "日 the", ""]
    assert stream(tokenizer, [the, *bytes_of]) == ["the", "", "", "", "日"]


def test_the_space_after_a_prompt_is_kept(byte_fallback_tokenizer):
    """A decoder that trims the start of a text must not trim the start of an answer."""
    tokenizer = byte_fallback_tokenizer
    prompt, the = tokenizer.encode("quick brown"), tokenizer.backend.token_to_id("▁the")
    assert stream(tokenizer, [the], prompt) == [" the", ""]
    assert stream(tokenizer, [the]) == ["the", ""]


def test_special_tokens_are_skipped_or_shown(byte_level_tokenizer):
    tokenizer = byte_level_tokenizer
    ids = tokenizer.encode("the<|user|>the<think>")
    assert "".join(stream(tokenizer, ids)) == "thethe<think>"
    assert "".join(stream(tokenizer, ids, skip=False)) == "the<|user|>the<think>"


def test_ids_without_a_token_add_nothing(tokenizer):
    a = tokenizer.encode("a")
    assert "".join(stream(tokenizer, [*a, tokenizer.vocab_size + 7, *a])) == tokenizer.decode([*a, *a])


def test_memory_of_the_stream_stays_small(byte_fallback_tokenizer):
    """Tokens that show nothing by themselves must not pile up."""
    space = byte_fallback_tokenizer.backend.token_to_id("▁")
    detokenizer = new_detokenizer(byte_fallback_tokenizer)
    assert len("".join(detokenizer.push(space) for _ in range(500))) == 499
    assert len(detokenizer._context) <= 2


def test_spaces_between_special_tokens(tokenizer):
    """Those that a decoder puts there, and no others."""
    special = sorted(tokenizer.special_ids)[:2]
    word = tokenizer.encode("fox", add_special_tokens=False)
    ids = [*word, *special, *special, *word, special[0]]

    def shown(spaces: bool) -> str:
        detokenizer = new_detokenizer(tokenizer, (), False, spaces=spaces)
        return "".join([*map(detokenizer.push, ids), detokenizer.flush()])

    whole = tokenizer.decode(ids, skip_special_tokens=False)
    a, b = (tokenizer.spelled([token])[0] for token in special)
    assert shown(True) == whole
    assert shown(False) == whole.replace(f"{a} {b}", a + b).replace(f"{b} {a}", b + a)
    assert a + b + a + b in shown(False)
