"""What `/metrics` shows: names, kinds and labels, once. Names that vLLM has too mean the same there."""

from collections.abc import Iterator
from typing import Literal, NamedTuple


class Family(NamedTuple):
    name: str
    kind: Literal["gauge", "counter", "histogram"]
    about: str
    key: str = ""
    """Where it stands in a replica's stats."""
    labels: tuple[str, ...] = ()
    """Besides the replica: the values are a mapping, by one label or a tuple of several."""
    vllm: tuple[str, ...] = ()
    """Names that vLLM has, or had, for it."""

    @property
    def sample(self) -> str:
        return f"{self.name}_total" if self.kind == "counter" else self.name


def _same(name: str, kind: Literal["gauge", "counter", "histogram"], about: str, key: str = "") -> Family:
    return Family(name, kind, about, key, vllm=(name,))


REPLICA = (
    _same("num_requests_running", "gauge", "sequences that are being computed", "running"),
    _same("num_requests_waiting", "gauge", "sequences that wait for room", "waiting"),
    Family(
        "kv_cache_usage_perc",
        "gauge",
        "part of the KV blocks in use, 0 to 1",
        "kv_cache_usage",
        vllm=("kv_cache_usage_perc", "gpu_cache_usage_perc"),
    ),
    Family("programs", "gauge", "compiled programs that are ready", "programs"),
    _same("prompt_tokens", "counter", "tokens of prompts, once their first token is out", "prompt_tokens"),
    _same("generation_tokens", "counter", "tokens generated", "generation_tokens"),
    Family("forced_tokens", "counter", "of these, those that a grammar forced", "forced_tokens"),
    _same("num_preemptions", "counter", "sequences that were put back to be recomputed", "preemptions"),
    Family(
        "prefix_cache_queries",
        "counter",
        "prompt tokens looked for in the prefix cache",
        "prefix_cache_queries",
        vllm=("prefix_cache_queries", "gpu_prefix_cache_queries"),
    ),
    Family(
        "prefix_cache_hits",
        "counter",
        "prompt tokens found in the prefix cache",
        "prefix_cache_hits",
        vllm=("prefix_cache_hits", "gpu_prefix_cache_hits"),
    ),
    Family("steps", "counter", "steps finished", "steps"),
    Family("program_steps", "counter", "steps finished, by their program", "program_steps", ("program",)),
    Family("padding_tokens", "counter", "rows of steps that held no token", "padding_tokens"),
    Family(
        "device_idle_seconds",
        "counter",
        "time in which there was work and the device had no step, as far as the host saw it",
        "device_idle_seconds",
    ),
    Family(
        "compiles_after_ready",
        "counter",
        "compilations that a request waited for",
        "compiles_on_request_path",
    ),
    Family("compile_cache_hits", "counter", "programs read from the compilation cache", "compile_cache_hits"),
    Family("compile_cache_misses", "counter", "programs that had to be compiled", "compile_cache_misses"),
    _same("iteration_tokens_total", "histogram", "tokens computed in a step", "step_tokens"),
    Family("step_time_seconds", "histogram", "how long a step kept the device", "step_seconds"),
    Family(
        "inter_token_latency_seconds",
        "histogram",
        "time between two tokens of a sequence",
        "inter_token_seconds",
        vllm=("inter_token_latency_seconds", "time_per_output_token_seconds"),
    ),
)
"""Counted by each engine process, and with it begun again at 0."""

SERVER = (
    Family("ready", "gauge", "1 when requests are let in"),
    Family("http_requests_in_flight", "gauge", "requests for the engine that are not answered to the end"),
    Family("engine_restarts", "counter", "how often a replica was started again", labels=("replica",)),
    Family(
        "http_responses",
        "counter",
        "responses, by path (`other` for those the server does not have) and status",
        labels=("path", "status"),
    ),
    Family(
        "request_success",
        "counter",
        "sequences by how they ended: stop, length, abort (the client left, or the time was up), error",
        labels=("finished_reason",),
        vllm=("request_success",),
    ),
    Family(
        "request_failures",
        "counter",
        "sequences that ended with abort or error, by the reason",
        labels=("reason",),
    ),
    _same("time_to_first_token_seconds", "histogram", "from the request's arrival to its first token"),
    _same("e2e_request_latency_seconds", "histogram", "from the request's arrival to its last token"),
    _same("request_queue_time_seconds", "histogram", "from the engine's receipt to the first step"),
    _same("request_prefill_time_seconds", "histogram", "from the first step to the first token"),
    _same("request_decode_time_seconds", "histogram", "from the first token to the last"),
    _same("request_inference_time_seconds", "histogram", "from the first step to the last token"),
    _same("request_time_per_output_token_seconds", "histogram", "mean time between a sequence's tokens"),
    _same("request_prompt_tokens", "histogram", "tokens of the prompt"),
    _same("request_generation_tokens", "histogram", "tokens generated"),
    _same("request_max_num_generation_tokens", "histogram", "the most tokens of a prompt's sequences"),
    _same("request_params_n", "histogram", "the parameter n of a prompt"),
    _same("request_params_max_tokens", "histogram", "the parameter max_tokens, where it is given"),
)
"""Counted by the HTTP process. Histograms are of sequences that ended with stop or length; the time to the
first token is of all that had one."""


def table() -> str:
    """The names as Markdown, for docs/metrics.md."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield "| name | kind | labels | vLLM's | what it is |"
    yield "|---|---|---|---|---|"
    for families, own in ((REPLICA, ("replica",)), (SERVER, ())):
        for family in families:
            labels = ", ".join((*own, *family.labels))
            same = "yes" if family.vllm else ""
            yield f"| `{family.sample}` | {family.kind} | {labels} | {same} | {family.about} |"


if __name__ == "__main__":
    print(table(), end="")
