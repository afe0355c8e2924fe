import json
import re
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers
from tokenizers import Tokenizer as Backend

from jaxserve.errors import InvalidRequest, ModelError
from jaxserve.text import gguf_tokenizer
from jaxserve.text import tokenizer as tokenizer_module
from jaxserve.text.tokenizer import Tokenizer, load_tokenizer

PIECES = [
    "Hello, world! I'm, you're, they'LL, it's",
    "naïve café Straße ŁÓDŹ ΑΒΓ Привет мир",
    "日本語のテキスト、中文 한국어 ไทย हिन्दी العربية עברית",
    "🎉🎊👩‍👩‍👧‍👦🏳️‍🌈 🇫🇷 ☃",
    "def f(x):\n\treturn {k: v**2 for k, v in x.items()}\n",
    'for (int i=0;i<10;++i) { printf("%d\\n", a[i]); } // done',
    "0 1 12 123 1234 3.14159 -1e-9 0xFF 1,000,000 ½ ² ٣ Ⅷ",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|><repo_name>x",
    "a\x00b\x01\x7f\x1b[0m\x85 \u200b\u00a0\u2028\ufeff\ufffd",
    "tab\tnew\nline\r\ncarriage\rform\x0c",
    "http://example.com/a?b=c&d=%20#e user@example.org",
    "_snake_case__ CamelCase kebab-case SCREAMING 'quoted' \"double\" `tick`",
    "$\\frac{a}{b}$ ∑∫√∞ ≤≥ ≠ ← → x² H₂O",
    "e\u0301 vs \u00e9, \u1e9b\u0323, ﬁ ligature",
]
STRINGS = [
    *PIECES,
    *(f"{a} {b}" for a, b in zip(PIECES, PIECES[3:] + PIECES[:3], strict=True)),
    *(a[i : i + 9] for a in PIECES for i in range(0, len(a), 5)),
    *(" " * n + "x" + " " * n + "\n" * n + "y" for n in range(12)),
    *("\n" * n for n in range(6)),
    *(" " * n + "7" for n in range(5)),
    *("9" * n for n in range(1, 12)),
    *(chr(c) for c in range(0, 128)),
    "",
    "word " * 300,
]


def test_there_are_enough_strings():
    assert len(STRINGS) >= 300


class TestDefaultModel:
    """SmolLM2's tokenizer out of its GGUF file."""

    @pytest.fixture(scope="class")
    @classmethod
    def tokenizer(cls, default_model) -> Tokenizer:
        return load_tokenizer(default_model)

    @pytest.fixture(scope="class")
    @classmethod
    def reference(cls, default_model):
        pytest.importorskip("torch", reason="transformers reads GGUF files with it")
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(default_model.parent, gguf_file=default_model.name)

    def test_ids_are_those_of_transformers(self, tokenizer, reference):
        # transformers leaves out that this vocabulary was learned on single digits. It shows only in
        # spaces before a number (`  7` is [two spaces][7], not [space][space][7]) and in ` ½`.
        for text in STRINGS:
            if not re.search(r"\s\s+\d", text) and not any(c.isnumeric() and c > "\x7f" for c in text):
                assert tokenizer.encode(text) == reference.encode(text), repr(text)

    def test_digits_are_split_off_first(self, tokenizer, reference):
        from tokenizers import pre_tokenizers

        backend = Backend.from_str(reference.backend_tokenizer.to_str())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        for text in STRINGS:
            assert tokenizer.encode(text) == backend.encode(text).ids, repr(text)
        assert [tokenizer.token_text(i) for i in tokenizer.encode("  42")] == ["  ", "4", "2"]

    def test_text_comes_back(self, tokenizer, reference):
        spelled = {tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)}
        for text in STRINGS:
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)
            if all(bytes([byte]) in spelled for byte in text.encode()):  # it lacks a few control characters
                assert tokenizer.decode(ids, skip_special_tokens=False) == text
                assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()

    def test_facts(self, tokenizer):
        assert tokenizer.vocab_size == 49152
        assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, [2])
        assert tokenizer.special_ids == set(range(17))
        assert tokenizer.encode("Hi") == tokenizer.encode("Hi", add_special_tokens=False)

    def test_a_directory_with_the_file_in_it(self, default_model, tmp_path, tokenizer):
        (tmp_path / "model.gguf").symlink_to(default_model)
        assert load_tokenizer(tmp_path).encode("Hi there") == tokenizer.encode("Hi there")

    def test_chat(self, tokenizer, reference):
        messages = [
            {"role": "user", "content": "What is the capital of France?"},
            {"role": "assistant", "content": "Paris."},
            {"role": "user", "content": "And of Italy?"},
        ]
        for prompt in (True, False):
            ours = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt)
            theirs = reference.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
            assert ours == theirs


def save(folder, backend: Backend, **config):
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_a_directory_gives_the_ids_of_transformers(tokenizer, tmp_path):
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend, **tokenizer.named).save_pretrained(tmp_path)
    reference, ours = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    assert ours.eos_ids == ([] if reference.eos_token_id is None else [reference.eos_token_id])
    for text in STRINGS:
        assert ours.encode(text) == reference.encode(text)
        assert ours.decode(ours.encode(text)) == reference.decode(ours.encode(text), skip_special_tokens=True)


def test_special_tokens_and_templates_of_a_directory(byte_level_tokenizer, tmp_path):
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": "{{ bos_token }}old"}
    folder = save(tmp_path, byte_level_tokenizer.backend, **config)
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (0, [1, 2])
    assert tokenizer.render_chat([{"role": "user", "content": "x"}]) == "<s>old"
    (folder / "chat_template.jinja").write_text("new")
    assert load_tokenizer(folder).chat_template == "new"
    assert load_tokenizer(folder, chat_template="{{ 'mine' }}").chat_template == "{{ 'mine' }}"
    assert load_tokenizer(folder, chat_template=str(folder / "chat_template.jinja")).chat_template == "new"
    with pytest.raises(ModelError, match=r"gone\.jinja"):
        load_tokenizer(folder, chat_template="gone.jinja")


def test_several_templates_by_name(byte_level_tokenizer, tmp_path):
    templates = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    save(tmp_path, byte_level_tokenizer.backend, chat_template=templates)
    assert load_tokenizer(tmp_path).chat_template == "d"


def test_no_tokenizer_and_broken_ones(tmp_path):
    assert load_tokenizer(tmp_path) is None
    with pytest.raises(ModelError, match="has none"):
        load_tokenizer(tmp_path, chat_template="{{ x }}")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_without_tokenizer_json_transformers_helps(byte_level_tokenizer, tmp_path):
    byte_level_tokenizer.backend.model.save(str(tmp_path))  # vocab.json and merges.txt
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    text = "the quick brown 日本"
    assert load_tokenizer(tmp_path).encode(text) == byte_level_tokenizer.encode(text)


def test_token_bytes_join_to_the_text(tokenizer):
    for text in PIECES[:8]:
        ids = tokenizer.encode(text)
        joined = b"".join(map(tokenizer.token_bytes, ids)).decode()
        if tokenizer.backend.token_to_id("[UNK]") is None:
            assert joined.removeprefix(" ") == tokenizer.decode(ids, skip_special_tokens=False).removeprefix(
                " "
            )


def test_text_of_single_tokens(byte_level_tokenizer, byte_fallback_tokenizer):
    ids = byte_level_tokenizer.encode("🎉<|user|>")
    assert byte_level_tokenizer.token_text(ids[0]) == "\ufffd"
    assert byte_level_tokenizer.token_bytes(ids[-1]) == b"<|user|>"
    ids = byte_fallback_tokenizer.encode("the 日")
    assert byte_fallback_tokenizer.token_text(ids[0]) == " the"
    assert [byte_fallback_tokenizer.token_bytes(i) for i in ids[-3:]] == [b"\xe6", b"\x97", b"\xa5"]
    assert byte_fallback_tokenizer.token_bytes(byte_fallback_tokenizer.vocab_size + 5) == b""


def test_half_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(InvalidRequest, match="surrogate"):
        tokenizer.encode("a\ud800")


def metadata(backend: Backend, kind: str, control: list[str] = (), **more) -> dict:
    """What a GGUF file would say about a tokenizer."""
    vocab = sorted(backend.get_vocab(with_added_tokens=False).items(), key=lambda item: item[1])
    tokens = [token for token, _ in vocab]
    state = json.loads(backend.to_str())
    return {
        "tokenizer.ggml.model": kind,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(i) for i in range(len(tokens))],
        "tokenizer.ggml.token_type": [3 if token in control else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in state["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": backend.token_to_id("<s>"),
        "tokenizer.ggml.eos_token_id": backend.token_to_id("</s>"),
        **{f"tokenizer.ggml.{name}": value for name, value in more.items()},
    }


class TestGguf:
    def test_byte_level(self, byte_level_tokenizer):
        backend = byte_level_tokenizer.backend
        facts = metadata(backend, "gpt2", ["<s>", "</s>", "<|user|>"], pre="gpt-2")
        built = gguf_tokenizer.build(facts)
        for text in STRINGS:
            assert built.encode(text).ids == backend.encode(text).ids

    @pytest.mark.parametrize("with_merges", [True, False])
    def test_sentencepiece(self, byte_fallback_tokenizer, with_merges):
        backend = byte_fallback_tokenizer.backend
        facts = metadata(backend, "llama", ["<unk>", "<s>", "</s>"], unknown_token_id=0)
        if not with_merges:
            del facts["tokenizer.ggml.merges"]
        built = gguf_tokenizer.build(facts)
        for text in STRINGS:
            assert built.encode(text, add_special_tokens=False).ids == backend.encode(text).ids
            assert built.encode(text).ids[0] == backend.token_to_id("<s>")
            assert built.decode(built.encode(text).ids) == backend.decode(backend.encode(text).ids)

    def test_user_defined_tokens_are_kept_whole(self, byte_fallback_tokenizer):
        facts = metadata(byte_fallback_tokenizer.backend, "llama", ["<s>"], unknown_token_id=0)
        tokens, types = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"]
        for token in ("<tool>", "    "):
            tokens.append(token)
            types.append(4)
        facts["tokenizer.ggml.scores"] += [-1000.0] * 2
        del facts["tokenizer.ggml.merges"]
        built = Tokenizer(gguf_tokenizer.build(facts), {})
        ids = built.encode("the<tool>the", add_special_tokens=False)
        assert [built.token_text(i) for i in ids if i == len(tokens) - 2] == ["<tool>"]
        assert built.decode(ids) == "the<tool> the"
        assert len(tokens) - 2 not in built.special_ids

    @pytest.mark.parametrize("add", [True, False])
    def test_begin_and_end_of_sequence(self, byte_level_tokenizer, add):
        backend = byte_level_tokenizer.backend
        facts = metadata(backend, "gpt2", ["<s>", "</s>"], add_bos_token=add, add_eos_token=add)
        ids = gguf_tokenizer.build(facts).encode("the").ids
        assert ids == ([0, *backend.encode("the").ids, 1] if add else backend.encode("the").ids)

    @pytest.mark.parametrize("name", sorted(gguf_tokenizer.SPLITS))
    @given(text=st.text(max_size=40))
    def test_every_split_keeps_the_text(self, name, text, byte_level_tokenizer):
        backend = byte_level_tokenizer.backend
        built = gguf_tokenizer.build(metadata(backend, "gpt2", pre=name, add_bos_token=False))
        text = text.encode("utf-8", "ignore").decode()
        if built.normalizer is not None:
            text = built.normalizer.normalize_str(text)
        assert built.decode(built.encode(text).ids, skip_special_tokens=False) == text

    @pytest.mark.parametrize(
        ("name", "pieces"),
        [
            ("gpt-2", ["it", "'s", " 1234", "  ", " IT", "'", "S"]),
            ("smollm", ["it", "'s", " ", "1", "2", "3", "4", "  ", " IT", "'", "S"]),
            ("llama-bpe", ["it", "'s", " ", "123", "4", "  ", " IT", "'S"]),
            ("qwen2", ["it", "'s", " ", "1", "2", "3", "4", "  ", " IT", "'S"]),
            ("tekken", ["it", "'s", " ", "1", "2", "3", "4", "  ", " IT", "'S"]),
            ("gpt-4o", ["it's", " ", "123", "4", "  ", " IT'S"]),
        ],
    )
    def test_how_text_is_split(self, name, pieces, byte_level_tokenizer):
        built = gguf_tokenizer.build(metadata(byte_level_tokenizer.backend, "gpt2", pre=name))
        cuts = [span for _, span in built.pre_tokenizer.pre_tokenize_str("it's 1234   IT'S")]
        assert ["it's 1234   IT'S"[a:b] for a, b in cuts] == pieces

    def test_unknown_kinds_are_refused_by_name(self, byte_level_tokenizer):
        backend = byte_level_tokenizer.backend
        with pytest.raises(ModelError, match="'klingon'"):
            gguf_tokenizer.build(metadata(backend, "gpt2", pre="klingon"))
        with pytest.raises(ModelError, match="'rwkv'"):
            gguf_tokenizer.build(metadata(backend, "rwkv"))


def test_a_path_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ModelError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "nothing")


class TestLength:
    @pytest.fixture(autouse=True)
    def _check_short_ones_too(self, monkeypatch):
        monkeypatch.setattr(tokenizer_module, "COUNTED", 0)

    @pytest.mark.parametrize("normalizer", [None, normalizers.NFC()], ids=["as it is", "NFC"])
    def test_no_text_that_fits_is_refused(self, default_model, normalizer):
        tokenizer = load_tokenizer(default_model)
        tokenizer.backend.normalizer = normalizer
        longest = max(tokenizer.backend.get_vocab(), key=len)
        decomposed = "\u03b1\u0313\u0300\u0345" * 40 + "\u1112\u1161\u11ab" * 40
        for text in (*STRINGS, longest * 50, " " * 5000, decomposed, "<|im_start|>" * 90):
            tokenizer.check_length(text, len(tokenizer.encode(text)) + 1)

    def test_one_that_cannot_fit_is_refused_with_the_numbers(self, default_model):
        with pytest.raises(InvalidRequest, match=r"100000 characters, .* at least 1234 tokens") as told:
            load_tokenizer(default_model).check_length("a" * 100_000, 512)
        assert told.value.code == "context_length_exceeded"

    def test_where_a_token_may_swallow_any_text_it_is_counted(self, default_model):
        tokenizer = load_tokenizer(default_model)
        tokenizer.backend.add_special_tokens([AddedToken("<end>", rstrip=True)])
        assert len(tokenizer.encode("<end>" + " " * 100_000)) == 1
        tokenizer.check_length("<end>" + " " * 100_000, 512)


def test_others_run_while_a_long_text_is_encoded(default_model):
    tokenizer = load_tokenizer(default_model)
    encoding = threading.Thread(target=tokenizer.encode, args=("hello world " * 80_000,))
    encoding.start()
    turns = 0
    while encoding.is_alive():
        time.sleep(0.001)
        turns += 1
    assert turns > 10
