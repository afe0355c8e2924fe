"""A tokenizer from a GGUF file's own metadata: byte-level BPE (`gpt2`) and SentencePiece BPE (`llama`)."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from jaxserve.errors import ModelError

CONTROL, USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type
SPACE = "▁"  # SentencePiece's spelling of a space


class Split(NamedTuple):
    """How a byte-level vocabulary cuts text before merging; `pattern` None is GPT-2's own."""

    pattern: str | None = None
    single_digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


def _words(digits: str, contractions: str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)") -> str:
    return (
        rf"{contractions}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


def _cased(suffix: str, digits: str) -> str:
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    lead = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{lead}{upper}*{lower}+{suffix}|{lead}{upper}+{lower}*{suffix}|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_GPT2 = Split()
_SMOLLM = Split(single_digits=True)
_LLAMA3 = Split(_words(r"\p{N}{1,3}"), ignore_merges=True, add_bos=True)
_QWEN2 = Split(_words(r"\p{N}"), nfc=True)
_TEKKEN = Split(_cased("", r"\p{N}"), ignore_merges=True, add_bos=True)
_GPT4O = Split(_cased(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?", r"\p{N}{1,3}"), ignore_merges=True)

SPLITS = {
    **dict.fromkeys(("default", "gpt-2", "gpt2", "phi-2", "olmo", "mpt", "roberta-bpe"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell", "command-r", "exaone"), _SMOLLM),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe"), Split(_LLAMA3.pattern)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2),
    "stablelm2": Split(_QWEN2.pattern),
    "tekken": _TEKKEN,
    **dict.fromkeys(("gpt-4o", "llama4"), _GPT4O),
}


def build(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that `tokenizer.ggml.*` describes, special tokens and begin-of-sequence included.

    Raises ModelError for a kind of tokenizer, or a way of splitting text, that is not known.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer, add_bos = _byte_level(metadata)
    elif kind == "llama":
        tokenizer, add_bos = _sentencepiece(metadata)
    else:
        raise ModelError(f"the GGUF file has a tokenizer of kind {kind!r}; supported are 'gpt2' and 'llama'")
    _add_special_tokens(tokenizer, metadata)
    _add_bos_eos(tokenizer, metadata, add_bos)
    return tokenizer


def _byte_level(metadata: Mapping[str, Any]) -> tuple[Tokenizer, bool]:
    name = metadata.get("tokenizer.ggml.pre", "default")
    split = SPLITS.get(name)
    if split is None:
        raise ModelError(
            f"the GGUF file splits text as {name!r} (tokenizer.ggml.pre), which is not known here; "
            "pass --tokenizer with the model's tokenizer.json"
        )
    vocab = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    tokenizer = Tokenizer(BPE(vocab, _pairs(metadata), ignore_merges=split.ignore_merges))
    if split.nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[pre_tokenizers.PreTokenizer] = []
    if split.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if split.pattern:
        steps.append(pre_tokenizers.Split(Regex(split.pattern), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.pattern is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, split.add_bos


def _sentencepiece(metadata: Mapping[str, Any]) -> tuple[Tokenizer, bool]:
    # Runs of spaces are stored as they look, but merging happens on SentencePiece's spelling of them.
    tokens = [SPACE * len(t) if t and not t.strip(" ") else t for t in metadata["tokenizer.ggml.tokens"]]
    merges = _pairs(metadata) if "tokenizer.ggml.merges" in metadata else _implied_merges(tokens, metadata)
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    tokenizer = Tokenizer(
        BPE(
            {token: i for i, token in enumerate(tokens)},
            merges,
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer, True


def _pairs(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]


def _implied_merges(tokens: list[str], metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    """SentencePiece joins the pair whose result scores highest: every cut of every token, best first."""
    scores = metadata["tokenizer.ggml.scores"]
    types = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    known = set(tokens)
    ranked = []
    for i, token in enumerate(tokens):
        # User-defined tokens have no score of their own; they come before all others.
        score = float("inf") if types[i] == USER_DEFINED else scores[i]
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in known and right in known:
                ranked.append((-score, i, left, right))
    ranked.sort(key=lambda merge: merge[:2])
    return [(left, right) for _, _, left, right in ranked]


def _add_special_tokens(tokenizer: Tokenizer, metadata: Mapping[str, Any]) -> None:
    special, plain = [], []
    types = metadata.get("tokenizer.ggml.token_type") or ()
    for token, kind in zip(metadata["tokenizer.ggml.tokens"], types, strict=False):
        if kind == CONTROL:
            special.append(AddedToken(token, normalized=False, special=True))
        elif kind == USER_DEFINED and tokenizer.token_to_id(token) is not None:
            plain.append(AddedToken(token, normalized=False, special=False))
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)


def _add_bos_eos(tokenizer: Tokenizer, metadata: Mapping[str, Any], add_bos: bool) -> None:
    before, after = [], []
    bos, eos = metadata.get("tokenizer.ggml.bos_token_id"), metadata.get("tokenizer.ggml.eos_token_id")
    if bos is not None and metadata.get("tokenizer.ggml.add_bos_token", add_bos):
        before = [(metadata["tokenizer.ggml.tokens"][bos], bos)]
    if eos is not None and metadata.get("tokenizer.ggml.add_eos_token", False):
        after = [(metadata["tokenizer.ggml.tokens"][eos], eos)]
    if before or after:
        template = [*(token for token, _ in before), "$A", *(token for token, _ in after)]
        tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=before + after)
