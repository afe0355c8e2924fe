"""A run in numbers."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from jaxserve.engine.simulation.run import Setup, Simulation, Visit

SERVED = ("stop", "length")
POINTS = (50, 90, 99)


def summary(simulation: Simulation, setup: Setup) -> dict[str, Any]:
    """Everything that a run shows; times in seconds. What is None was never measured."""
    meters, visits, cache = simulation.meters, simulation.visits, simulation.pool.cache
    seconds = max((visit.ended for visit in visits), default=0.0)
    busy, capacity = meters.busy, simulation.pool.capacity
    result: dict[str, Any] = {
        "seconds": seconds,
        "requests": _outcomes(visits),
        "device": {
            "busy": _share(busy, seconds),
            "steps": meters.steps,
            "rows_per_step": _share(meters.rows, meters.steps),
            "slots_in_use": _share(meters.rows, meters.steps * setup.limits.seqs),
            "prompt_tokens_per_second": _share(meters.prompt, seconds),
            "output_tokens_per_second": _share(meters.output, seconds),
            "output_tokens_per_busy_second": _share(meters.output, busy),
        },
        "pool": {
            "blocks": capacity,
            "used": _share(meters.block_seconds, busy * capacity),
            "used_at_most": _share(meters.most_blocks, capacity),
            "preemptions": simulation.scheduler.preemptions,
            "prefix_hits": _share(cache.hits, cache.queries),
        },
        "waiting_at_most": meters.most_waiting,
        "times": _times(visits) | {"between_tokens": _spread(np.frombuffer(meters.gaps))},
    }
    for name, key in _GROUPS.items():
        if len(values := sorted({key(visit) for visit in visits})) > 1:
            result[name] = {str(value): _group([v for v in visits if key(v) == value]) for value in values}
    return result


_GROUPS: dict[str, Callable[[Visit], Any]] = {
    "tenants": lambda visit: visit.arrival.tenant,
    "priorities": lambda visit: visit.arrival.priority,
}


def lines(result: dict[str, Any]) -> Iterable[str]:
    """The summary, to be read by people."""
    device, pool = result["device"], result["pool"]
    outcomes = [f"{count:,} {name}" for name, count in result["requests"].items()]
    yield f"requests   {', '.join(outcomes)}"
    yield (
        f"device     {device['busy']:.1%} busy in {result['seconds']:,.0f} s, {device['steps']:,} steps, "
        f"{device['rows_per_step']:.1f} rows each ({device['slots_in_use']:.0%} of the slots)"
    )
    yield (
        f"tokens/s   {device['prompt_tokens_per_second']:,.1f} prompt, "
        f"{device['output_tokens_per_second']:,.1f} output, "
        f"{device['output_tokens_per_busy_second']:,.1f} output while busy"
    )
    yield (
        f"pool       {pool['blocks']:,} blocks, {pool['used']:.1%} used while busy, "
        f"{pool['used_at_most']:.1%} at most, {pool['preemptions']:,} preemptions, "
        f"{pool['prefix_hits']:.1%} of prompts' tokens found"
    )
    yield f"queue      {result['waiting_at_most']:,} at most"
    yield ""
    yield _row("seconds", ["mean", *(f"p{point}" for point in POINTS), "max"])
    for name, spread in result["times"].items():
        yield _row(name.replace("_", " "), [] if spread is None else [f"{v:.3f}" for v in spread.values()])
    for name in _GROUPS:
        if name in result:
            yield ""
            spreads = [title for time in ("queued", "first", "total") for title in (f"{time} p50", "p99")]
            yield _row(name, ["requests", "output", *spreads])
            for value, group in result[name].items():
                counts = [f"{group['requests']:,}", f"{group['output_tokens']:,}"]
                yield _row(value, [*counts, *_middle_and_tail(group)])


def _outcomes(visits: Sequence[Visit]) -> dict[str, int]:
    outcomes = [visit.outcome for visit in visits]
    result = {"finished": sum(outcome in SERVED for outcome in outcomes)}
    for outcome, name in (("abort", "aborted"), ("queue_full", "refused"), ("too_long", "too long")):
        result[name] = outcomes.count(outcome)
    return result


def _group(visits: Sequence[Visit]) -> dict[str, Any]:
    served = [visit for visit in visits if visit.outcome in SERVED]
    return {
        "requests": len(visits),
        "output_tokens": sum(visit.arrival.output for visit in served),
        "preemptions": sum(visit.preemptions for visit in visits),
        "times": _times(visits),
    }


def _times(visits: Sequence[Visit]) -> dict[str, dict[str, float] | None]:
    return {
        "queued": _spread([v.started - v.arrival.arrival for v in visits if v.started is not None]),
        "first_token": _spread([v.first - v.arrival.arrival for v in visits if v.first is not None]),
        "total": _spread([v.ended - v.arrival.arrival for v in visits if v.outcome in SERVED]),
    }


def _spread(values: Any) -> dict[str, float] | None:
    if not len(values):
        return None
    points = np.percentile(values, POINTS).tolist()
    named = {f"p{point}": value for point, value in zip(POINTS, points, strict=True)}
    return {"mean": float(np.mean(values)), **named, "max": float(np.max(values))}


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _middle_and_tail(group: dict[str, Any]) -> Iterable[str]:
    for spread in group["times"].values():
        yield from (f"{spread[point]:.3f}" if spread else "-" for point in ("p50", "p99"))


def _row(name: str, cells: Iterable[str]) -> str:
    return f"{name:16}" + "".join(f"{cell:>12}" for cell in cells)
