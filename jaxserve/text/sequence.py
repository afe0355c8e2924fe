"""One sequence on its way out: tokens become text, and end where a stop string says so."""

from collections.abc import Sequence

from jaxserve.engine.messages import CoreOutput, TokenLogprobs
from jaxserve.outputs import CompletionOutput, FinishReason, Logprob, SequenceMetrics
from jaxserve.sampling_params import SamplingParams
from jaxserve.text.detokenizer import Detokenizer, new_detokenizer
from jaxserve.text.reading import MakeParser, Reader
from jaxserve.text.stop import StopChecker
from jaxserve.text.tokenizer import Tokenizer


class OutputSequence:
    """Collects what one core request generated; `take` hands it out."""

    def __init__(
        self,
        index: int,
        prompt: Sequence[int],
        params: SamplingParams,
        tokenizer: Tokenizer | None,
        eos: frozenset[int],
        make_parser: MakeParser | None = None,
    ):
        """`eos`: end-of-sequence tokens, which give no `stop_reason` (empty when they are ignored);
        `make_parser`: for an output with reasoning or tool calls in it."""
        self.index = index
        self.finish_reason: FinishReason | None = None
        self.metrics = SequenceMetrics()
        self._params = params
        self._tokenizer = tokenizer
        self._eos = eos
        self._detokenizer: Detokenizer | None = None
        self._reader: Reader | None = None
        if tokenizer is not None and params.detokenize:
            if make_parser is not None:
                self._reader = Reader(make_parser(), tokenizer)
            tags = self._reader.tags if self._reader else ()
            self._detokenizer = new_detokenizer(
                tokenizer, prompt, params.skip_special_tokens, tags, params.spaces_between_special_tokens
            )
        self._stop = StopChecker(params.stop_strings, params.include_stop_str_in_output)
        self._stop_reason: int | str | None = None
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[dict[int, Logprob]] | None = None if params.logprobs is None else []
        scored = params.logprobs is not None or params.ranked or params.use_beam_search
        self._cumulative_logprob = 0.0 if scored else None

    def add(self, out: CoreOutput, now: float) -> bool:
        """Takes a step's tokens; True when a stop string ended the sequence, which the core must hear."""
        if out.times is not None:
            self.metrics.queued_ts, self.metrics.scheduled_ts = out.times
            self.metrics.first_token_ts = now
        self.metrics.last_token_ts = now
        stop_token = out.stop_token
        last = len(out.token_ids) - 1
        for i, token in enumerate(out.token_ids):
            self.metrics.num_generation_tokens += 1
            self._token_ids.append(token)
            if out.logprobs is not None and self._cumulative_logprob is not None:
                self._cumulative_logprob += out.logprobs[i].logprobs[0]
                self._add_logprobs(out.logprobs[i])
            silent = stop_token is not None and i == last and not self._params.include_stop_str_in_output
            if not silent and self._detokenizer and self._push(token):
                return out.finish_reason is None or i < last
        if out.finish_reason is not None:
            self._finish(out.finish_reason, stop_token)
        return False

    def fail(self) -> None:
        self.finish_reason = "error"

    @property
    def has_news(self) -> bool:
        """Whether there is text to show (or, where there never is text, a token), or an end."""
        return self.finish_reason is not None or bool(self._text if self._detokenizer else self._token_ids)

    def take(self, clear: bool) -> CompletionOutput:
        """All so far; with `clear` what is new since the last call."""
        text = "".join(self._text)
        events, reasoning_tokens = self._reader.take(clear) if self._reader else (None, 0)
        output = CompletionOutput(
            index=self.index,
            text=text,
            token_ids=self._token_ids.copy(),
            cumulative_logprob=self._cumulative_logprob,
            logprobs=None if self._logprobs is None else self._logprobs.copy(),
            finish_reason=self.finish_reason,
            stop_reason=self._stop_reason,
            events=events,
            reasoning_tokens=reasoning_tokens,
            metrics=self.metrics,
        )
        self._text = [] if clear or not text else [text]
        if clear:
            self._token_ids.clear()
            if self._logprobs is not None:
                self._logprobs.clear()
        return output

    def _push(self, token: int) -> bool:
        """Whether a stop string is complete with it."""
        assert self._detokenizer is not None
        piece = self._detokenizer.push(token)
        if self._reader:
            self._reader.came(token, piece)
        return self._show(piece)

    def _show(self, piece: str) -> bool:
        if not piece:
            return False
        early = self.metrics.num_generation_tokens <= self._params.min_tokens
        visible, stop = (piece, None) if early else self._stop.feed(piece)
        self._add_text(visible)
        if stop is None:
            return False
        self._end("stop", stop)
        return True

    def _add_text(self, text: str) -> None:
        if text:
            self._text.append(text)
            if self._reader:
                self._reader.show(text)

    def _end(self, reason: FinishReason, stop_reason: int | str | None) -> None:
        self.finish_reason, self._stop_reason = reason, stop_reason
        if self._reader:
            self._reader.finish(reason == "length")

    def _finish(self, reason: FinishReason, stop_token: int | None) -> None:
        if self._detokenizer and self._show(self._detokenizer.flush()):
            return
        self._add_text(self._stop.flush())
        self._end(reason, None if stop_token in self._eos else stop_token)

    def _add_logprobs(self, step: TokenLogprobs) -> None:
        if self._logprobs is not None:
            self._logprobs.append(logprob_entry(step, self._tokenizer))


def logprob_entry(step: TokenLogprobs, tokenizer: Tokenizer | None) -> dict[int, Logprob]:
    """By token: its own first, then the likeliest in order."""

    def of(token: int, logprob: float, rank: int) -> Logprob:
        return Logprob(logprob, rank, tokenizer.token_text(token) if tokenizer else None)

    entry = {step.token_ids[0]: of(step.token_ids[0], step.logprobs[0], step.rank)}
    for rank, (token, logprob) in enumerate(zip(step.token_ids[1:], step.logprobs[1:], strict=True), 1):
        if token not in entry:
            entry[token] = of(token, logprob, rank)
    return entry
