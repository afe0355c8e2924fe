"""`GET /metrics`: counters, gauges and histograms for Prometheus, under vLLM's names with our prefix.

A replica's have its label: a counter begins at 0 again when its replica does, which Prometheus understands of
a counter but not of a sum.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from jaxserve.server.metrics.definitions import REPLICA, SERVER, Family
from jaxserve.server.state import ServerState

PREFIX, VLLM = "jaxserve:", "vllm:"


def routes(state: ServerState) -> list[Route]:
    async def metrics(request: Request) -> Response:
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        replicas = await state.engine.replica_stats()
        return Response(generate_latest(_Page(state, replicas)), media_type=CONTENT_TYPE_LATEST)

    return [Route("/metrics", metrics)]


class _Page:
    """What prometheus_client expects of a registry. A replica that is not ready has only its restarts."""

    def __init__(self, state: ServerState, replicas: Mapping[int, Mapping[str, Any]]):
        self._model = state.model_names[0] if state.vllm_metrics else None
        self._replicas = {str(i): stats | _derived(stats) for i, stats in replicas.items()}
        self._server = state.outcomes.values() | {
            "ready": int(state.unready_reason() is None),
            "http_requests_in_flight": state.in_flight,
            "engine_restarts": {str(i): count for i, count in enumerate(state.engine.restarts)},
        }
        self._engine = "0" if len(state.engine.restarts) == 1 else "all"

    def collect(self) -> Iterator[Any]:
        for family in REPLICA:
            values = [((i,), stats[family.key]) for i, stats in self._replicas.items()]
            yield _metric(PREFIX + family.name, family, ("replica",), values)
            yield from self._vllm(family, values)
        for family in SERVER:
            value = self._server[family.name]
            yield _metric(PREFIX + family.name, family, (), [((), value)])
            yield from self._vllm(family, [((self._engine,), value)])

    def _vllm(self, family: Family, values: Iterable[tuple[tuple[str], Any]]) -> Iterator[Any]:
        if self._model is not None:
            samples = [((self._model, *engine), value) for engine, value in values]
            for name in family.vllm:
                yield _metric(VLLM + name, family, ("model_name", "engine"), samples)


def _derived(stats: Mapping[str, Any]) -> dict[str, float]:
    return {"kv_cache_usage": stats["blocks_used"] / stats["blocks_total"]}


def _metric(name: str, family: Family, labels: Sequence[str], samples: Iterable[Any]) -> Any:
    from prometheus_client import core

    kinds = {
        "gauge": core.GaugeMetricFamily,
        "counter": core.CounterMetricFamily,
        "histogram": core.HistogramMetricFamily,
    }
    metric: Any = kinds[family.kind](name, family.about, labels=[*labels, *family.labels])
    for common, value in samples:
        if family.kind == "histogram":
            buckets = [(bound, count) for bound, count in value.items() if bound != "sum"]
            metric.add_metric(common, buckets, value["sum"])
        elif family.labels:
            for own, count in value.items():
                metric.add_metric([*common, *([own] if isinstance(own, str) else own)], count)
        else:
            metric.add_metric(common, value)
    return metric
