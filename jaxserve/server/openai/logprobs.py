"""Logprobs in OpenAI's two forms, and those of prompts as vLLM gives them."""

from collections.abc import Sequence

from msgspec.structs import replace

from jaxserve.outputs import CompletionOutput, Logprob
from jaxserve.server.openai.responses import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprobs,
    TokenLogprob,
    TopLogprob,
)
from jaxserve.text.detokenizer import Detokenizer
from jaxserve.text.tokenizer import Tokenizer

LOWEST = -9999.0
"""Stands for minus infinity, which JSON cannot say."""


def chat_logprobs(
    output: CompletionOutput, top: int, tokenizer: Tokenizer | None, as_ids: bool = False
) -> ChatLogprobs | None:
    """`as_ids`: tokens are shown by their numbers, not by their texts; their bytes are shown in any case."""
    if output.logprobs is None:
        return None

    def entry(token: int, logprob: Logprob) -> TopLogprob:
        spelled = tokenizer.token_bytes(token) if tokenizer else b""
        return TopLogprob(_shown(token, logprob.decoded_token, as_ids), _finite(logprob), list(spelled))

    content = []
    for token, logprobs in zip(output.token_ids, output.logprobs, strict=True):
        self, likeliest = entry(token, logprobs[token]), _likeliest(logprobs, top)
        alternatives = [entry(id, logprob) for id, logprob in likeliest]
        content.append(TokenLogprob(self.token, self.logprob, self.bytes, alternatives))
    return ChatLogprobs(content)


class TextOffsets:
    """Where in a choice's text each of its tokens begins, in characters."""

    def __init__(self, detokenizer: Detokenizer | None, begin: int = 0):
        """`begin`: of the first."""
        self._detokenizer = detokenizer
        self._length = begin

    def take(self, tokens: Sequence[int]) -> list[int]:
        """Of the next ones. Tokens that share a character begin where it does."""
        offsets = []
        for token in tokens:
            offsets.append(self._length)
            if self._detokenizer:
                self._length += len(self._detokenizer.push(token))
        return offsets


def completion_logprobs(
    tokens: Sequence[int],
    logprobs: PromptLogprobs,
    top: int,
    offsets: list[int],
    tokenizer: Tokenizer | None,
    as_ids: bool = False,
) -> CompletionLogprobs:
    result = CompletionLogprobs([], [], [] if top else None, offsets)
    for token, entry in zip(tokens, logprobs, strict=True):
        text = _shown(token, tokenizer.token_text(token) if tokenizer else None, as_ids)
        own, likeliest = None, None
        if entry is not None:
            own = _finite(entry[token])
            shown = {_shown(id, x.decoded_token, as_ids): _finite(x) for id, x in _likeliest(entry, top)}
            likeliest = {text: own} | shown | {text: own}  # two tokens may read the same
        result.tokens.append(text)
        result.token_logprobs.append(own)
        if result.top_logprobs is not None:
            result.top_logprobs.append(likeliest)
    return result


def prompt_logprobs(tokens: Sequence[int], logprobs: PromptLogprobs, top: int) -> PromptLogprobs:
    """Of each token its own and the `top` likeliest, in numbers that JSON has."""
    shown: PromptLogprobs = []
    for token, entry in zip(tokens, logprobs, strict=True):
        if entry is not None:
            entry = {token: entry[token]} | dict(_likeliest(entry, top))
            entry = {id: replace(logprob, logprob=_finite(logprob)) for id, logprob in entry.items()}
        shown.append(entry)
    return shown


def _likeliest(entry: dict[int, Logprob], top: int) -> list[tuple[int, Logprob]]:
    """The `top` likeliest tokens, in order."""
    likeliest = [(id, logprob) for id, logprob in entry.items() if (logprob.rank or 0) <= top]
    likeliest.sort(key=lambda pair: -pair[1].logprob)
    return likeliest[:top]


def _shown(token: int, text: str | None, as_ids: bool) -> str:
    return f"token_id:{token}" if as_ids else text or ""


def _finite(logprob: Logprob) -> float:
    return max(logprob.logprob, LOWEST)
