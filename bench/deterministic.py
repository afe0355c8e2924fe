"""The same bits, whatever surrounds a request: the default model with `deterministic=True`.

    python bench/deterministic.py [--requests 200] [--runs 10]

Requests (greedy and sampled, seeded and not, most with logprobs) are answered one by one, and then together
in each run: in a random order, some while others run, with other batch sizes, chunks and pools, the prefix
cache off, cold and warm. Each run is a process of its own. Prints how many tokens and logprobs were compared
with those of a request alone, and how many differ in a bit.
"""

import argparse
import json
import random
import struct
import subprocess
import sys
from itertools import zip_longest
from typing import Any

SHAPES: list[dict[str, Any]] = [
    {"max_num_seqs": 64, "max_num_batched_tokens": 1024, "num_blocks": 512},
    {"max_num_seqs": 16, "max_num_batched_tokens": 256, "num_blocks": 33},
    {"max_num_seqs": 5, "max_num_batched_tokens": 64, "num_blocks": 12},
]
VOCAB = 49152


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--run", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run is not None:
        print(json.dumps(answers(args.run, args.requests)))
        return
    alone, _ = in_new_process(0, args.requests)
    compared = different = 0
    for run in range(1, args.runs + 1):
        passes, stats = in_new_process(run, args.requests)
        wrong = [a != b for found in passes for a, b in zip_longest(bits(found), bits(alone[0]))]
        compared, different = compared + len(wrong), different + sum(wrong)
        shape, cache = options_of(run)
        facts = {
            name: stats[name] for name in ("preemptions", "prefix_cache_hits", "steps", "programs_refused")
        }
        print(f"run {run}: {shape} cache={cache} {facts}: {sum(wrong)} of {len(wrong)} differ", flush=True)
    print(f"\n{compared} tokens and logprobs compared in {args.runs} runs, {different} differ in a bit")
    sys.exit(different > 0)


def options_of(run: int) -> tuple[dict[str, Any], bool]:
    return SHAPES[run % len(SHAPES)], run % 4 != 3


def in_new_process(run: int, requests: int) -> tuple[list[Any], dict[str, Any]]:
    command = [sys.executable, __file__, "--run", str(run), "--requests", str(requests)]
    answer = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    return answer["passes"], answer["stats"]


def answers(run: int, count: int) -> dict[str, Any]:
    """All requests' answers, alone in run 0; else together, twice where there is a cache."""
    from jaxserve import Engine

    shape, cache = options_of(run)
    requests = make_requests(count)
    with Engine(deterministic=True, enable_prefix_caching=cache, **shape) as engine:
        if run == 0:
            passes = [[together(engine, [request], 0)[0] for request in requests]]
        else:
            passes = [together(engine, requests, run + 100 * turn) for turn in range(1 + cache)]
        return {"passes": passes, "stats": engine.stats()}


def make_requests(count: int) -> list[tuple[list[int], Any]]:
    from jaxserve import SamplingParams

    chance = random.Random(0)
    starts = [[chance.randrange(VOCAB) for _ in range(100)] for _ in range(4)]
    requests = []
    for i in range(count):
        own = [chance.randrange(VOCAB) for _ in range(chance.randrange(1, 40))]
        sampling = {"temperature": chance.choice([0.7, 1.0, 1.3]), "top_p": chance.choice([1.0, 0.9])}
        sampling |= {"top_k": chance.choice([0, 50]), "min_p": chance.choice([0.0, 0.05])}
        sampling |= {"seed": chance.choice([None, i])}
        params = SamplingParams(
            max_tokens=chance.randrange(2, 20),
            ignore_eos=True,
            logprobs=chance.choice([None, 0, 5, 5]),
            **(sampling if i % 2 else {"temperature": 0.0}),
        )
        requests.append((chance.choice(starts)[: chance.randrange(100)] + own, params))
    return requests


def together(engine: Any, requests: list[tuple[list[int], Any]], seed: int) -> list[Any]:
    """Answers in the order of the requests, which come in another, some while others run."""
    chance = random.Random(seed)
    waiting = chance.sample(range(len(requests)), len(requests))
    at, done = {}, {}
    while waiting or engine.has_unfinished():
        for i in [waiting.pop() for _ in range(min(len(waiting), chance.choice([0, 0, 0, 2, 20])))]:
            at[engine.add_request(*requests[i])] = i
        for output in engine.step():
            if output.finished:
                (sequence,) = output.outputs
                steps = [[(t, one.logprob) for t, one in step.items()] for step in sequence.logprobs or []]
                done[at[output.request_id]] = [sequence.token_ids, steps]
    return [done[i] for i in range(len(requests))]


def bits(found: list[Any]) -> list[Any]:
    """Every token, and every logprob with its token, to the last bit."""
    tokens = [token for ids, _ in found for token in ids]
    logprobs = [(t, struct.pack("<d", x)) for _, steps in found for step in steps for t, x in step]
    return tokens + logprobs


if __name__ == "__main__":
    main()
