"""Whom `jaxserve chat` talks to: an engine in this process, or an OpenAI-compatible server."""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any, Protocol

import msgspec

from jaxserve.config import EngineConfig
from jaxserve.errors import InvalidRequest, JaxserveError

Message = dict[str, str]


class Talk(Protocol):
    name: str

    def answer(self, messages: Sequence[Message]) -> Generator[str, None, None]:
        """The next message, piece by piece; closing the iterator stops it."""

    def stats(self) -> dict[str, Any]: ...

    def close(self) -> None: ...


class LocalModel:
    """An engine in this process."""

    def __init__(self, config: EngineConfig, options: dict[str, Any]):
        """`options`: fields of SamplingParams; without them the model's own, and answers of any length."""
        from jaxserve import Engine, SamplingParams

        self.name = config.model
        wanted = {"max_tokens": None, "output_kind": "delta"} | options
        SamplingParams(**wanted)  # what is wrong is said before the model is loaded
        self.engine = Engine(**msgspec.structs.asdict(config))
        self.params = self.engine.default_params(**wanted)
        self.meter = Meter()
        if self.engine.tokenizer is None:
            raise InvalidRequest(f"{config.model} has no tokenizer, so it cannot chat")

    def answer(self, messages: Sequence[Message]) -> Generator[str, None, None]:
        prompt = self.engine.tokenizer.apply_chat_template(messages)
        self.meter = Meter(len(prompt))
        for output in self.engine.stream({"prompt_token_ids": prompt}, self.params):
            if output.error:
                raise JaxserveError(output.error)
            new = output.outputs[0]
            self.meter.count(len(new.token_ids))
            yield new.text

    def stats(self) -> dict[str, Any]:
        return {**self.meter.report(), **self.engine.stats()}

    def close(self) -> None:
        self.engine.close()


class RemoteModel:
    """A server, over `/v1/chat/completions` with server-sent events."""

    def __init__(self, url: str, model: str | None, key: str | None, options: dict[str, Any]):
        """`options`: fields to send along with each request."""
        self.base = url.rstrip("/").removesuffix("/v1")
        self.headers = {"Content-Type": "application/json"}
        if key:
            self.headers["Authorization"] = f"Bearer {key}"
        self.model = model or self._only_model()
        self.name = f"{self.model} at {self.base}"
        self.options = options
        self.meter = Meter()

    def answer(self, messages: Sequence[Message]) -> Generator[str, None, None]:
        body = {
            "model": self.model,
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.options,
        }
        self.meter = Meter()
        with self._open("/v1/chat/completions", body) as response:
            for event in _events(response):
                if error := event.get("error"):
                    raise JaxserveError(f"{self.base}: {_message(error)}")
                if usage := event.get("usage"):
                    self.meter.prompt_tokens = usage["prompt_tokens"]
                    self.meter.tokens = usage["completion_tokens"]
                for choice in event.get("choices", ()):
                    if text := choice.get("delta", {}).get("content"):
                        self.meter.count(1)
                        yield text

    def stats(self) -> dict[str, Any]:
        return self.meter.report()

    def close(self) -> None:
        """Every answer has its own connection."""

    def _only_model(self) -> str:
        with self._open("/v1/models") as response:
            models = [model["id"] for model in json.load(response)["data"]]
        if not models:
            raise JaxserveError(f"{self.base} serves no model")
        return models[0]

    def _open(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self.base + path, data, self.headers)
            return urllib.request.urlopen(request)
        except urllib.error.HTTPError as error:
            raise JaxserveError(f"{self.base} answered {error.code}: {_explain(error.read())}") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise JaxserveError(f"cannot reach {self.base}: {reason}") from None


class Meter:
    """Tokens and times of one answer."""

    def __init__(self, prompt_tokens: int = 0):
        self.prompt_tokens = prompt_tokens
        self.tokens = 0
        self.begin = time.perf_counter()
        self.first = self.last = self.begin

    def count(self, tokens: int) -> None:
        self.last = time.perf_counter()
        if self.tokens == 0:
            self.first = self.last
        self.tokens += tokens

    def report(self) -> dict[str, Any]:
        if self.tokens == 0:
            return {"answer": "none yet"}
        seconds = self.last - self.first
        rate = (self.tokens - 1) / seconds if seconds > 0 else 0.0
        return {
            "prompt": f"{self.prompt_tokens} tokens",
            "answer": f"{self.tokens} tokens",
            "first token": f"{self.first - self.begin:.3f} s",
            "then": f"{rate:.1f} tokens/s",
        }


def _events(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The JSON of each `data:` line, up to `[DONE]`."""
    for line in lines:
        field, _, value = line.strip().partition(b":")
        if field == b"data":
            if value.strip() == b"[DONE]":
                return
            yield json.loads(value)


def _explain(body: bytes) -> str:
    try:
        return _message(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode(errors="replace").strip() or "no explanation"


def _message(error: Any) -> str:
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)
