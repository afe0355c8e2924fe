"""What became of requests, as the HTTP process saw it. A sequence is one choice of an answer."""

import asyncio
from collections import Counter
from types import TracebackType
from typing import Any

from jaxserve.engine.stats import INTER_TOKEN_SECONDS, Histogram
from jaxserve.errors import EngineDied, InvalidRequest
from jaxserve.outputs import CompletionOutput, RequestOutput
from jaxserve.sampling_params import SamplingParams
from jaxserve.server.errors import ApiError

FIRST_TOKEN_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
REQUEST_SECONDS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
TOKENS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))
NUMBERS = (1, 2, 5, 10, 20)
BOUNDS = {
    "time_to_first_token_seconds": FIRST_TOKEN_SECONDS,
    "e2e_request_latency_seconds": REQUEST_SECONDS,
    "request_queue_time_seconds": REQUEST_SECONDS,
    "request_prefill_time_seconds": REQUEST_SECONDS,
    "request_decode_time_seconds": REQUEST_SECONDS,
    "request_inference_time_seconds": REQUEST_SECONDS,
    "request_time_per_output_token_seconds": INTER_TOKEN_SECONDS,
    "request_prompt_tokens": TOKENS,
    "request_generation_tokens": TOKENS,
    "request_max_num_generation_tokens": TOKENS,
    "request_params_n": NUMBERS,
    "request_params_max_tokens": TOKENS,
}
FAILURES = {
    "client_disconnected": "abort",
    "request_timeout": "abort",
    "queue_full": "error",
    "invalid_request": "error",
    "engine_error": "error",
    "engine_died": "error",
    "internal_error": "error",
}
"""Reason -> finished_reason."""


class Outcomes:
    """Counts and histograms of all requests that the engine was asked for."""

    def __init__(self) -> None:
        self.histograms = {name: Histogram(bounds) for name, bounds in BOUNDS.items()}
        self.finished = dict.fromkeys(("stop", "length", "abort", "error"), 0)
        self.failures = dict.fromkeys(FAILURES, 0)
        self.responses: Counter[tuple[str, str]] = Counter()
        """By path and status."""

    def watch(self, arrived: float, prompts: int, params: SamplingParams) -> "Watch":
        """Around the generation for one HTTP request that came then."""
        return Watch(self, arrived, prompts, params)

    def values(self) -> dict[str, Any]:
        """By the names of the definitions."""
        return {
            **{name: histogram.values() for name, histogram in self.histograms.items()},
            "request_success": self.finished,
            "request_failures": self.failures,
            "http_responses": self.responses,
        }


class Watch:
    """Sees the outputs of one HTTP request's prompts, and how they end."""

    def __init__(self, outcomes: Outcomes, arrived: float, prompts: int, params: SamplingParams):
        self._outcomes = outcomes
        self._arrived = arrived
        self._params = params
        self._unfinished = prompts * params.n
        self._begun: set[tuple[int, int]] = set()
        self._longest: dict[int, int] = {}

    def __enter__(self) -> "Watch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        refused = isinstance(error, InvalidRequest) and not self._begun
        if error is None or refused or not self._unfinished:
            return
        reason = _reason(error)
        self._outcomes.failures[reason] += self._unfinished
        self._outcomes.finished[FAILURES[reason]] += self._unfinished

    def saw(self, prompt: int, output: RequestOutput) -> None:
        """An output without an error of that prompt."""
        for sequence in output.outputs:
            at = prompt, sequence.index
            if at not in self._begun and sequence.metrics.first_token_ts:
                self._begun.add(at)
                first = sequence.metrics.first_token_ts - self._arrived
                self._outcomes.histograms["time_to_first_token_seconds"].observe(first)
            if sequence.finish_reason is not None:
                self._ended(prompt, len(output.prompt_token_ids), sequence)
        if output.finished:
            observe = self._outcomes.histograms
            observe["request_max_num_generation_tokens"].observe(self._longest.pop(prompt))
            observe["request_params_n"].observe(self._params.n)

    def _ended(self, prompt: int, prompt_tokens: int, sequence: CompletionOutput) -> None:
        times, histograms = sequence.metrics, self._outcomes.histograms
        tokens = times.num_generation_tokens
        decode = times.last_token_ts - times.first_token_ts
        seen = {
            "e2e_request_latency_seconds": times.last_token_ts - self._arrived,
            "request_queue_time_seconds": times.scheduled_ts - times.queued_ts,
            "request_prefill_time_seconds": times.first_token_ts - times.scheduled_ts,
            "request_decode_time_seconds": decode,
            "request_inference_time_seconds": times.last_token_ts - times.scheduled_ts,
            "request_time_per_output_token_seconds": decode / max(1, tokens - 1),
            "request_prompt_tokens": prompt_tokens,
            "request_generation_tokens": tokens,
        }
        if self._params.max_tokens is not None:
            seen["request_params_max_tokens"] = self._params.max_tokens
        for name, value in seen.items():
            histograms[name].observe(value)
        assert sequence.finish_reason is not None
        self._outcomes.finished[sequence.finish_reason] += 1
        self._unfinished -= 1
        self._longest[prompt] = max(self._longest.get(prompt, 0), tokens)


def _reason(error: BaseException) -> str:
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        return "client_disconnected"
    if isinstance(error, EngineDied):
        return "engine_died"
    if isinstance(error, InvalidRequest):
        return "invalid_request"
    code = error.body.error.code if isinstance(error, ApiError) else None
    return code if code in FAILURES else "internal_error"
