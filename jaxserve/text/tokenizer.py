"""Strings to token ids and back, over the `tokenizers` package: never through transformers if avoidable."""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from jaxserve.errors import InvalidRequest, ModelError
from jaxserve.loading.gguf_file import GGUFFile
from jaxserve.text import gguf_tokenizer
from jaxserve.text.chat_template import ChatTemplate

NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
# Vocabularies that only transformers can turn into a tokenizer.
CONVERTIBLE = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "*.tiktoken")
COUNTED = 2**20
"""Longest text, in characters, whose tokens are always counted."""
GGUF_NAMES = {"unk_token": "unknown_token", "pad_token": "padding_token", "sep_token": "seperator_token"}
GGUF_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")


def load_tokenizer(path: Path | str, chat_template: str | None = None) -> "Tokenizer | None":
    """The tokenizer of a model directory, a .gguf file or a tokenizer.json; None where there is none.

    `chat_template` (Jinja text, or the name of a file with it) replaces the model's own.
    Raises ModelError for a tokenizer or a template that cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise ModelError(f"there is no tokenizer at {path}: it must be a directory or a file")
    tokenizer = _from_gguf(path) if path.suffix == ".gguf" else _from_directory(path)
    if tokenizer is None and len(files := sorted(path.glob("*.gguf"))) == 1:
        tokenizer = _from_gguf(files[0])
    if chat_template is not None:
        if tokenizer is None:
            raise ModelError(f"a chat template needs a tokenizer, and {path} has none")
        tokenizer.set_chat_template(_template_text(chat_template))
    return tokenizer


class Tokenizer:
    """One model's tokenizer. Cheap to ask again: texts of single tokens are remembered."""

    def __init__(
        self,
        backend: Backend,
        named: Mapping[str, str],
        eos_ids: Sequence[int] = (),
        chat_template: str | None = None,
    ):
        """`named` maps bos_token, eos_token, … to their texts; `eos_ids` adds more ends of sequence."""
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.named = dict(named)
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.vocab_size: int = max(backend.get_vocab_size(), *(i + 1 for i in added), 0)
        """One more than the largest id."""
        self.bos_id = self._named_id("bos_token")
        eos = self._named_id("eos_token")
        self.eos_ids = list(dict.fromkeys([*([] if eos is None else [eos]), *eos_ids]))
        self._bytes: dict[int, bytes] = {}
        self._template: ChatTemplate | None = None
        if chat_template is not None:
            self.set_chat_template(chat_template)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        try:
            # as a batch, because that lets other threads run meanwhile
            (encoding,) = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except TypeError:  # a str that is no valid Unicode
            raise InvalidRequest("the text holds half of a surrogate pair, which is no character") from None
        return encoding.ids

    def check_length(self, text: str, limit: int) -> None:
        """Refuse a text of megabytes that cannot have fewer than `limit` tokens, without counting them."""
        if len(text) > COUNTED and self._longest and (least := len(text) // self._longest) >= limit:
            raise InvalidRequest(
                f"the prompt has {len(text)} characters, which are at least {least} tokens, "
                f"and a request can have {limit}",
                "prompt",
                "context_length_exceeded",
            )

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes a token adds in the middle of a text: perhaps only a part of a character."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._token_bytes(token_id)
        return known

    def token_text(self, token_id: int) -> str:
        """`token_bytes` as text, with U+FFFD where they are no whole character."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def spelled(self, ids: Sequence[int]) -> list[str]:
        """The tokens as the vocabulary spells them."""
        return [self.backend.id_to_token(i) or "" for i in ids]

    def info(self) -> dict[str, Any]:
        """What `tokenizer_config.json` would say, in its names."""
        names = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
        added = {
            i: {name: getattr(token, name) for name in names}
            for i, token in sorted(self.backend.get_added_tokens_decoder().items())
        }
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "vocab_size": self.vocab_size,
            **self.named,
            "added_tokens_decoder": added,
            "chat_template": self.chat_template,
        }

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Ids by their texts."""
        return {self.spelled([i])[0]: i for i in sorted(self.special_ids)}

    @cached_property
    def byte_level(self) -> bool:
        """Tokens are plain byte strings, so that decoding is joining them."""
        return self._decoders == ["ByteLevel"]

    @cached_property
    def _longest(self) -> int | None:
        """Most characters of a text that become one token; None where that can be any number."""
        normalizer = json.loads(self.backend.normalizer.__getstate__()) if self.backend.normalizer else {}
        composed = {None: 1, "NFC": 4}.get(normalizer.get("type"))
        added = self.backend.get_added_tokens_decoder().values()
        if not self.byte_level or composed is None or any(token.lstrip or token.rstrip for token in added):
            return None
        return composed * max(map(len, self.backend.get_vocab()))

    @cached_property
    def raw_bytes(self) -> dict[int, bytes]:
        """The tokens of a byte-fallback vocabulary that are one byte each, such as `<0x0A>`."""
        if "ByteFallback" not in self._decoders:
            return {}
        ids = {self.backend.token_to_id(f"<0x{byte:02X}>"): bytes([byte]) for byte in range(256)}
        return {i: byte for i, byte in ids.items() if i is not None}

    @cached_property
    def _decoders(self) -> list[str]:
        if self.backend.decoder is None:
            return []
        state = json.loads(self.backend.decoder.__getstate__())
        return [step["type"] for step in state.get("decoders", [state])]

    def _token_bytes(self, token_id: int) -> bytes:
        token = self.backend.id_to_token(token_id)
        if token is None:
            return b""
        if self.byte_level:
            spelled = [_BYTE_OF[char] for char in token if char in _BYTE_OF]
            return bytes(spelled) if len(spelled) == len(token) else token.encode()
        if token_id in self.raw_bytes:
            return self.raw_bytes[token_id]
        if self.backend.decoder is None:
            return token.encode()
        # In the middle of a text, so that a decoder which trims its start keeps the token's own space.
        anchor = self.backend.decoder.decode(["a"])
        return self.backend.decoder.decode(["a", token])[len(anchor) :].encode()

    def _named_id(self, name: str) -> int | None:
        return self.backend.token_to_id(self.named[name]) if name in self.named else None

    @property
    def chat_template(self) -> str | None:
        return self._template.source if self._template else None

    def set_chat_template(self, source: str) -> None:
        self._template = ChatTemplate(source, self.named)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The conversation as one prompt; options as `ChatTemplate.render`.

        Raises InvalidRequest for messages the template refuses, or when the model has no template.
        """
        return self.template().render(messages, **options)

    def template(self, source: str | None = None) -> ChatTemplate:
        """The one that a request gives, or the model's own. Raises InvalidRequest where there is none."""
        if source is not None:
            return ChatTemplate(source, self.named, given=True)
        if self._template is None:
            raise InvalidRequest(
                "this model has no chat template; start it with --chat-template, or use plain completions",
                "messages",
            )
        return self._template

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """`render_chat` as token ids; the template itself writes the special tokens."""
        return self.encode(self.render_chat(messages, **options), add_special_tokens=False)


def _byte_alphabet() -> dict[str, int]:
    """How byte-level vocabularies spell bytes: printable ones as themselves, the rest from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _from_gguf(path: Path) -> Tokenizer:
    metadata = GGUFFile(path).metadata
    if "tokenizer.ggml.tokens" not in metadata:
        raise ModelError(f"{path} has no tokenizer in it; pass --tokenizer")
    backend = gguf_tokenizer.build(metadata)
    named_ids = {name: metadata.get(f"tokenizer.ggml.{GGUF_NAMES.get(name, name)}_id") for name in NAMED}
    named = {name: metadata["tokenizer.ggml.tokens"][i] for name, i in named_ids.items() if i is not None}
    ends = [metadata.get(f"tokenizer.ggml.{name}") for name in GGUF_ENDS]
    return Tokenizer(
        backend, named, [end for end in ends if end is not None], metadata.get("tokenizer.chat_template")
    )


def _from_directory(path: Path) -> Tokenizer | None:
    file = path if path.is_file() else path / "tokenizer.json"
    folder = file.parent
    if file.is_file():
        try:
            backend = Backend.from_file(str(file))
        except Exception as error:  # the package raises plain Exception
            raise ModelError(f"{file} is not a tokenizer.json that can be read: {error}") from error
    elif any(next(folder.glob(name), None) for name in CONVERTIBLE):
        backend = _converted(folder)
    else:
        return None
    config = _json(folder / "tokenizer_config.json")
    special = _json(folder / "special_tokens_map.json") | config
    named = {name: _content(special[name]) for name in NAMED if special.get(name)}
    ends = _json(folder / "generation_config.json").get("eos_token_id") or []
    return Tokenizer(
        backend, named, ends if isinstance(ends, list) else [ends], _directory_template(folder, config)
    )


def _converted(folder: Path) -> Backend:
    """For models that have no tokenizer.json: slow, but only transformers knows all the formats."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder).backend_tokenizer
    except Exception as error:
        raise ModelError(
            f"{folder} has no tokenizer.json, and transformers cannot make one: {error}"
        ) from error


def _directory_template(folder: Path, config: dict[str, Any]) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = _json(folder / "chat_template.json").get("chat_template") or config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _template_text(value: str) -> str:
    if "{" in value or "\n" in value:
        return value
    try:
        return Path(value).read_text(encoding="utf-8")
    except OSError as error:
        raise ModelError(f"cannot read the chat template {value}: {error.strerror}") from error


def _content(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} is not valid JSON: {error}") from error
