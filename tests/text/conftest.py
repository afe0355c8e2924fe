"""Small tokenizers of each kind, trained on the spot."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from jaxserve.text.tokenizer import Tokenizer as Ours

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "Der schnelle braune Fuchs springt über den faulen Hund",
    "def add(a, b):\n    return a + b\n",
    "numbers 1 22 333 4444, and 3.14159",
    "日本語のテキスト と 中文文本",
    "emoji 🎉🎊 👩‍👩‍👧‍👦 café naïve",
    "  two  spaces   three\n\n\tand tabs",
] * 4


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=400,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<s>", "</s>", "<|user|>"],
            show_progress=False,
        ),
    )
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    return tokenizer


def byte_fallback(prefix: bool = True) -> Tokenizer:
    """As Llama 2's: SentencePiece BPE with byte tokens, and a space put before the text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    latin = [text for text in CORPUS if max(map(ord, text)) < 0x250]
    tokenizer.train_from_iterator(
        (word for text in latin for word in text.replace(" ", " ▁").split(" ")),
        trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False),
    )
    return _only_special(tokenizer, ["<unk>", "<s>", "</s>"])


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.WordPieceTrainer(
            vocab_size=300, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False
        ),
    )
    return tokenizer


def _only_special(tokenizer: Tokenizer, special: list[str]) -> Tokenizer:
    """The trainer makes every given token special; byte tokens must be plain ones."""
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in special]
    return Tokenizer.from_str(json.dumps(state))


NAMED = {"bos_token": "<s>", "eos_token": "</s>"}
KINDS = {
    "byte_level": lambda: Ours(byte_level(), NAMED),
    "byte_fallback": lambda: Ours(byte_fallback(), NAMED),
    "byte_fallback_no_prefix": lambda: Ours(byte_fallback(prefix=False), NAMED),
    "word_piece": lambda: Ours(word_piece(), {}),
}


@pytest.fixture(params=KINDS, scope="session")
def tokenizer(request: pytest.FixtureRequest) -> Ours:
    return KINDS[request.param]()


@pytest.fixture(scope="session")
def byte_level_tokenizer() -> Ours:
    return KINDS["byte_level"]()


@pytest.fixture(scope="session")
def byte_fallback_tokenizer() -> Ours:
    return KINDS["byte_fallback"]()
