"""Answers to the last bit: `python deterministic_report.py MODEL MESH` prints those of a few requests.

Of each alone, and of all together.
"""

import json
import random
import struct
import sys
from typing import Any

from jaxserve import Engine, SamplingParams

ENGINES: dict[str, dict[str, Any]] = {
    "wide": {"max_num_seqs": 4, "max_num_batched_tokens": 128, "num_blocks": 256},
    "starved": {
        "max_num_seqs": 3,
        "max_num_batched_tokens": 40,
        "num_blocks": 14,
        "enable_prefix_caching": False,
    },
}
Answer = list[tuple[list[int], list[str]]]
"""Of each sequence the tokens, and its logprobs: numbers of tokens and the bits of their float32."""


def options(**more: Any) -> dict[str, Any]:
    return {"deterministic": True, "max_model_len": 128, "block_size": 8} | more


def make_requests(count: int, vocab: int) -> list[tuple[list[int], SamplingParams]]:
    """Prompts of which many begin alike; greedy and sampled, seeded and not, with logprobs and without."""
    chance = random.Random(0)
    starts = [[chance.randrange(vocab) for _ in range(40)] for _ in range(3)]
    requests = []
    for i in range(count):
        own = [chance.randrange(vocab) for _ in range(chance.randrange(1, 30))]
        sampled = {"temperature": chance.choice([0.7, 1.0, 1.5]), "top_p": chance.choice([1.0, 0.9])}
        sampled |= {"top_k": chance.choice([0, 40]), "min_p": chance.choice([0.0, 0.02])}
        sampled |= {"seed": chance.choice([None, i]), "n": chance.choice([1, 1, 2])}
        params = SamplingParams(
            max_tokens=chance.randrange(1, 16),
            ignore_eos=True,
            logprobs=chance.choice([None, 0, 5]),
            **(sampled if i % 3 else {"temperature": 0.0}),
        )
        requests.append((chance.choice(starts)[: chance.randrange(40)] + own, params))
    return requests


def alone(engine: Engine, requests: list[tuple[list[int], SamplingParams]]) -> list[Answer]:
    """Each request with the engine for itself."""
    return [together(engine, [request], 0)[0] for request in requests]


def together(engine: Engine, requests: list[tuple[list[int], SamplingParams]], seed: int) -> list[Answer]:
    """The requests in a random order, some at once and some later, in the order they were given."""
    chance = random.Random(seed)
    waiting = chance.sample(range(len(requests)), len(requests))
    at, done = {}, {}
    while waiting or engine.has_unfinished():
        for i in [waiting.pop() for _ in range(min(len(waiting), chance.choice([0, 0, 1, 7])))]:
            at[engine.add_request(*requests[i])] = i
        for output in engine.step():
            if output.finished:
                done[at[output.request_id]] = [answer(sequence) for sequence in output.outputs]
    return [done[i] for i in range(len(requests))]


def answer(sequence: Any) -> tuple[list[int], list[str]]:
    steps = sequence.logprobs or []
    bits = [
        f"{token}:{struct.pack('<f', one.logprob).hex()}" for step in steps for token, one in step.items()
    ]
    return list(sequence.token_ids), bits


def main(model: str, mesh: str) -> None:
    report: dict[str, Any] = {}
    for name, shape in ENGINES.items():
        with Engine(model, mesh=mesh, dtype="bfloat16", **options(**shape)) as engine:
            requests = make_requests(24, 259)
            report[name] = {
                "alone": alone(engine, requests),
                "together": [together(engine, requests, seed) for seed in range(2)],
                "stats": engine.stats(),
            }
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
