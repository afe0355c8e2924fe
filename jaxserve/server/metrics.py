"""`GET /metrics`: the engine's counters and gauges for Prometheus, under vLLM's names with our prefix.

One sample per replica: a counter begins at 0 again when its replica does, which Prometheus understands of a
counter but not of a sum.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from jaxserve.server.state import ServerState

PREFIX = "jaxserve:"
LABELS = ["replica"]
GAUGES = {
    "num_requests_running": ("running", "sequences that are being computed"),
    "num_requests_waiting": ("waiting", "sequences that wait for room"),
    "programs": ("programs", "compiled programs that are ready"),
}
COUNTERS = {
    "prompt_tokens": ("prompt_tokens", "tokens of the prompts whose first token of output is out"),
    "generation_tokens": ("generation_tokens", "tokens generated"),
    "padding_tokens": ("padding_tokens", "rows of steps that held no token"),
    "num_preemptions": ("preemptions", "sequences that were put back to be recomputed"),
    "prefix_cache_queries": ("prefix_cache_queries", "prompt tokens looked for in the prefix cache"),
    "prefix_cache_hits": ("prefix_cache_hits", "prompt tokens found in the prefix cache"),
    "steps": ("steps", "steps finished"),
    "compiles_after_ready": ("compiles_on_request_path", "compilations that a request waited for"),
    "compile_cache_hits": ("compile_cache_hits", "programs read from the compilation cache"),
    "compile_cache_misses": ("compile_cache_misses", "programs that had to be compiled"),
}


def routes(state: ServerState) -> list[Route]:
    async def metrics(request: Request) -> Response:
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        stats = await state.engine.replica_stats()
        families = _Families(stats, state.engine.restarts, state.unready_reason() is None)
        return Response(generate_latest(families), media_type=CONTENT_TYPE_LATEST)

    return [Route("/metrics", metrics)]


class _Families:
    """What prometheus_client expects of a registry. An unready replica has only its restarts."""

    def __init__(self, stats: Mapping[int, Mapping[str, Any]], restarts: Sequence[int], ready: bool):
        self._stats = stats
        self._restarts = restarts
        self._ready = ready

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        yield GaugeMetricFamily(f"{PREFIX}ready", "1 when requests are let in", int(self._ready))
        restarts = dict(enumerate(self._restarts))
        yield _fill(CounterMetricFamily, "engine_restarts", "how often it was started again", restarts)
        used = {i: each["blocks_used"] / each["blocks_total"] for i, each in self._stats.items()}
        yield _fill(GaugeMetricFamily, "kv_cache_usage_perc", "part of the KV blocks in use", used)
        for kind, families in ((GaugeMetricFamily, GAUGES), (CounterMetricFamily, COUNTERS)):
            for name, (key, about) in families.items():
                yield _fill(kind, name, about, {i: each[key] for i, each in self._stats.items()})


def _fill(kind: Any, name: str, about: str, values: Mapping[int, float]) -> Any:
    family = kind(PREFIX + name, about, labels=LABELS)
    for replica, value in values.items():
        family.add_metric([str(replica)], value)
    return family
