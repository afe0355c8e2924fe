"""One workload under every combination of what must not change it.

`python lossless_report.py MODEL MESH MODE`: MODE is normal or deterministic.

Prints JSON: the workload's results, each request alone, and those of every combination of `AXES` by its name.
An engine is made once: the axes are turned inside it, so that the whole product takes seconds.
"""

import itertools
import json
import random
import sys
from typing import Any

from jaxserve import Engine, SamplingParams
from jaxserve.engine.programs import Programs
from jaxserve.engine.scheduler import Limits

AXES: dict[str, list[Any]] = {
    "prefix": [False, True],
    "chunk": [8, 24, 64],
    "overlap": [False, True],
    "starved": [False, True],
    "shuffled": [False, True],
}
OPTIONS = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "block_size": 8, "num_blocks": 200}
LONGEST = 90 + 10
SHAPED: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.4, "frequency_penalty": 0.5},
    {"presence_penalty": 1.0, "logit_bias": {70: 3.0, 71: -4.0}},
    {"allowed_token_ids": list(range(60, 160)), "typical_p": 0.8},
    {"stop_token_ids": list(range(6, 90)), "min_tokens": 6},
    {"structured_outputs": {"regex": "[a-f]{2}; so: [u-z]{9}"}},
    {"bad_words": ["ab", "ba", "aa", "b"], "allowed_token_ids": list(range(70, 76))},
]
"""What changes logits before a token is chosen."""


def workload() -> list[tuple[list[int], SamplingParams]]:
    """Prompts that begin alike and that do not, greedy and sampled, shaped, some several times (n > 1)."""
    rng = random.Random(5)
    shared = [rng.randrange(6, 250) for _ in range(48)]
    requests = []
    for i, length in enumerate([1, 90, 7, 33, 8, 48, 60, 16, 75, 49, 90, 20, 62, 33]):
        own = [rng.randrange(6, 250) for _ in range(length)]
        prompt = (shared + own)[:length] if i % 3 else own
        params = SamplingParams(
            n=3 if i % 4 == 3 else 1,
            temperature=0.0 if i % 2 and i % 4 != 3 else 0.8,
            top_k=[0, 40][i % 2],
            top_p=[1.0, 0.9, 0.7][i % 3],
            seed=i,
            logprobs=[None, 0, 3][i % 3],
            prompt_logprobs=[None, 0, None, None, 2][i % 5],
            max_tokens=10,
            ignore_eos=True,
            **SHAPED[i % len(SHAPED)],
        )
        requests.append((prompt, params))
    for length in (30, 70):
        params = SamplingParams(
            n=3, best_of=5, use_beam_search=True, temperature=0.0, logprobs=3, max_tokens=10, ignore_eos=True
        )
        requests.append((shared[: length // 2] + shared[: length // 2], params))
    return requests


def combinations() -> list[dict[str, Any]]:
    return [dict(zip(AXES, values, strict=True)) for values in itertools.product(*AXES.values())]


def name(axes: dict[str, Any]) -> str:
    return " ".join(f"{axis}={value}" for axis, value in axes.items())


def run(engine: Engine, requests: list[tuple[list[int], SamplingParams]], axes: dict[str, Any]) -> Any:
    """What each request gave: per sequence its tokens, and per token the logprobs by token; perhaps those of
    its prompt's too."""
    (core,) = engine._cores
    core._overlap = axes["overlap"]
    core._scheduler.prefix_cache = axes["prefix"]
    Programs.limits = property(lambda self: Limits(8, axes["chunk"]))
    engine.reset_prefix_cache()
    left = core._pool.blocks_for(LONGEST) + 2
    taken = core._pool.allocate(core._pool.free - left) if axes["starved"] else []
    order = list(range(len(requests)))
    if axes["shuffled"]:
        random.Random(name(axes)).shuffle(order)
    prompts, params = zip(*(requests[i] for i in order), strict=True)
    outputs = engine.generate(list(prompts), list(params), use_progress=False)
    core._pool.release(taken)
    assert core.stats()["blocks_used"] == 0
    results = dict(zip(order, outputs, strict=True))
    return [answer(results[i]) for i in range(len(requests))]


def answer(output: Any) -> Any:
    prompt = [[output.prompt_token_ids, steps(output.prompt_logprobs[1:])]] if output.prompt_logprobs else []
    return [[sequence.token_ids, steps(sequence.logprobs or [])] for sequence in output.outputs] + prompt


def steps(logprobs: Any) -> Any:
    return [{token: each.logprob for token, each in step.items()} for step in logprobs]


def report(model: str, mesh: str, **options: Any) -> dict[str, Any]:
    requests = workload()
    with Engine(model, mesh=mesh, dtype="float32", **OPTIONS, **options) as engine:
        assert engine.wait_until_warm(300)
        plain = {"prefix": False, "chunk": 64, "overlap": False, "starved": False, "shuffled": False}
        alone = [run(engine, [request], plain)[0] for request in requests]
        results, preemptions, hits = {}, {}, {}
        for axes in combinations():
            before = engine.stats()
            results[name(axes)] = run(engine, requests, axes)
            after = engine.stats()
            preemptions[name(axes)] = after["preemptions"] - before["preemptions"]
            hits[name(axes)] = after["prefix_cache_hits"] - before["prefix_cache_hits"]
    return {"alone": alone, "results": results, "preemptions": preemptions, "hits": hits}


if __name__ == "__main__":
    model, mesh, mode = sys.argv[1:]
    options = {"deterministic": True} if mode == "deterministic" else {}
    print(json.dumps(report(model, mesh, **options)))
