"""Logprobs in OpenAI's two forms."""

from collections.abc import Iterator

from jaxserve.outputs import CompletionOutput, Logprob
from jaxserve.server.openai.responses import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob
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
        return TopLogprob(_shown(token, logprob, as_ids), _finite(logprob), list(spelled))

    content = []
    for token, chosen, likeliest in _positions(output, top):
        self = entry(token, chosen)
        alternatives = [entry(id, logprob) for id, logprob in likeliest]
        content.append(TokenLogprob(self.token, self.logprob, self.bytes, alternatives))
    return ChatLogprobs(content)


class TextOffsets:
    """Where in a choice's text each of its tokens begins, in characters."""

    def __init__(self, detokenizer: Detokenizer | None):
        self._detokenizer = detokenizer
        self._length = 0

    def place(self, token: int) -> int:
        """Of the next token. Tokens that share a character begin where it does."""
        begin = self._length
        if self._detokenizer:
            self._length += len(self._detokenizer.push(token))
        return begin


def completion_logprobs(
    output: CompletionOutput, top: int, offsets: TextOffsets, as_ids: bool = False
) -> CompletionLogprobs | None:
    """`offsets`: the choice's, over all of its outputs."""
    if output.logprobs is None:
        return None
    result = CompletionLogprobs([], [], [] if top else None, [])
    for token, chosen, likeliest in _positions(output, top):
        text = _shown(token, chosen, as_ids)
        result.tokens.append(text)
        result.token_logprobs.append(_finite(chosen))
        result.text_offset.append(offsets.place(token))
        if result.top_logprobs is not None:
            shown = {_shown(id, logprob, as_ids): _finite(logprob) for id, logprob in likeliest}
            own = {text: _finite(chosen)}  # two tokens may read the same
            result.top_logprobs.append(own | shown | own)
    return result


def _positions(
    output: CompletionOutput, top: int
) -> Iterator[tuple[int, Logprob, list[tuple[int, Logprob]]]]:
    """For each token: its id, its logprob, and the `top` likeliest with theirs."""
    for token, logprobs in zip(output.token_ids, output.logprobs or (), strict=True):
        likeliest = [(id, logprob) for id, logprob in logprobs.items() if (logprob.rank or 0) <= top]
        likeliest.sort(key=lambda pair: -pair[1].logprob)
        yield token, logprobs[token], likeliest[:top]


def _shown(token: int, logprob: Logprob, as_ids: bool) -> str:
    return f"token_id:{token}" if as_ids else logprob.decoded_token or ""


def _finite(logprob: Logprob) -> float:
    return max(logprob.logprob, LOWEST)
