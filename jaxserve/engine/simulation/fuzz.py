"""Small random engines under small random traffic, and the fewest requests that break one."""

import random
from collections.abc import Sequence
from typing import NamedTuple

from jaxserve.engine.scheduler import Limits, Policy
from jaxserve.engine.simulation.cost import Cost
from jaxserve.engine.simulation.invariants import Violation
from jaxserve.engine.simulation.run import Setup, Simulation
from jaxserve.engine.simulation.traffic import Arrival

Numbered = tuple[int, Arrival]
MOST_RUNS = 2000
"""Simulations that shrinking may take."""


class Failure(NamedTuple):
    violation: Violation
    requests: list[int]
    """Numbers of the fewest requests that were found to break the same rule."""


def scenario(seed: int) -> tuple[Setup, list[Numbered]]:
    """A tiny engine, and what comes to it: bursts, aborts, tenants, priorities, shared prefixes."""
    rng = random.Random(seed)
    size, seqs = rng.choice([1, 2, 4, 16]), rng.choice([1, 2, 3, 6])
    num_blocks = rng.choice([rng.randint(2, 10), rng.randint(4, 24), 200])
    policy = Policy(
        aging=rng.choice([None, None, 0.1, 5.0]),
        fair_share=rng.random() < 0.6,
        prompt_share=rng.choice([0.01, 0.3, 0.5, 1.0]),
        max_queued=rng.choice([None, None, None, 0, 3, 8]),
    )
    limits = Limits(seqs, seqs + rng.choice([0, 1, 3, 8, 64]))
    cost = Cost(rng.choice([0.0, 1.0, 5.0]), 0.1, rng.choice([0.01, 0.5]), 0.0, 0.01)
    room = (num_blocks - 1) * size + 1
    longest = min(room, rng.choice([4, 12, 30]))
    gap = rng.choice([0.0, 0.5, 3.0, 30.0])
    arrivals, now = [], 0.0
    for number in range(rng.randint(1, 30)):
        now += rng.choice([0.0, gap * rng.random()])
        arrivals.append((number, _request(rng, now, room, longest)))
    return Setup(num_blocks, size, limits, policy, cost, rng.random() < 0.7), arrivals


def _request(rng: random.Random, now: float, room: int, longest: int) -> Arrival:
    prompt, output = rng.randint(1, longest), rng.randint(1, longest)
    if prompt + output > room and rng.random() < 0.9:
        prompt, output = room // 2, room - room // 2
    return Arrival(
        arrival=now,
        prompt=max(1, prompt),
        output=output,
        max_tokens=rng.choice([None, None, output, output + rng.randint(0, 8)]),
        tenant=rng.choice("aaab"),
        priority=rng.randint(-2, 2),
        prefix=rng.choice("xxy"),
        prefix_tokens=rng.randint(0, max(1, prompt)),
        abort=now + rng.choice([0.0, 1.0, 20.0]) * rng.random() if rng.random() < 0.1 else None,
    )


def shrink(setup: Setup, requests: Sequence[Numbered], violation: Violation, audit_every: int) -> Failure:
    """Leave out requests, by halves and then ever fewer at once, as long as the same rule is broken
    (delta debugging, Zeller 1999)."""
    found, kept, runs = violation, list(requests), 0
    part = max(1, len(kept) // 2)
    while runs < MOST_RUNS:
        before = len(kept)
        at = 0
        while at < len(kept) and runs < MOST_RUNS:
            fewer = kept[:at] + kept[at + part :]
            runs += 1
            again = broken(setup, fewer, audit_every)
            if again is not None and again.rule == found.rule:
                found, kept = again, fewer
            else:
                at += part
        if part == 1 and len(kept) == before:
            break
        part = max(1, part // 2)
    return Failure(found, [number for number, _ in kept])


def broken(setup: Setup, requests: Sequence[Numbered], audit_every: int = 1) -> Violation | None:
    """What a run violates."""
    try:
        Simulation(setup, requests, audit_every).run()
    except Violation as violation:
        return violation
    return None
