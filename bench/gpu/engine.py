"""The real engine with random weights in the shape of Llama 3.1 8B, through its public interface."""

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from bench.gpu import timeline
from bench.gpu.job import Job, Model, shape

UNTIMED = 4
"""Steps between a prompt's last chunk and what is timed."""


class Sizes(NamedTuple):
    counts: tuple[int, ...]
    """Sequences that decode, and all decode programs there are: to compile as many as an engine has by itself
    takes longer than all of this may."""
    smallest_mixed: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    contexts: tuple[int, int]
    steps: int
    prefills: tuple[tuple[int, int], ...]
    """Prompts at once, and tokens of each."""
    balanced: tuple[int, int, int]
    """Requests, tokens in and out: as long in as out."""
    generating: tuple[int, int, int]
    """A short prompt and a long output."""
    longest: float
    """Seconds that a measurement of throughput may take."""


FULL = Sizes(
    (1, 8, 32, 64, 128, 256), 512, 8192, 256, 8192, (1024, 4096), 32, ((8, 2048), (1, 8000), (16, 512)),
    (256, 1024, 1024), (256, 128, 2048), 40.0,
)  # fmt: skip
DRY = Sizes((1, 4), 64, 128, 4, 64, (32, 64), 6, ((2, 50),), (6, 16, 16), (4, 8, 24), 5.0)


class Loaded:
    """An engine, and what is asked of it."""

    def __init__(self, job: Job):
        from jaxserve import Engine
        from jaxserve.engine import programs

        self.job, self.sizes, config = job, DRY if job.dry else FULL, shape(job.dry)
        programs.DECODE_RUNGS, programs.SMALLEST_MIXED = self.sizes.counts, self.sizes.smallest_mixed
        place = Path(job.home) / "model"
        place.mkdir(exist_ok=True)
        (place / "config.json").write_text(json.dumps(config))
        self.model = Model(config)
        portable = {"attention": "xla", "matmul": "xla", "sampler": "xla"}  # needs no C++ compiler
        self.llm = Engine(
            str(place), load_format="dummy", dtype="bfloat16", max_model_len=self.sizes.max_model_len,
            max_num_seqs=self.sizes.max_num_seqs, max_num_batched_tokens=self.sizes.max_num_batched_tokens,
            **(portable if job.dry else {"attention": job.attention}),
        )  # fmt: skip
        self._vocab = config["vocab_size"]
        self._random = np.random.default_rng(0)

    def event(self, name: str) -> None:
        """How long after its start the process came so far, and what it had compiled."""
        stats = self.stats()
        counts = {n: stats[n] for n in ("programs", "compile_cache_misses", "compile_cache_hits")}
        self.job.emit(event=name, seconds=time.time() - self.job.began, **counts)

    def add(self, count: int, given: int, made: int) -> list[str]:
        """Requests with prompts that no one has seen, for outputs of full length."""
        from jaxserve import SamplingParams

        params = SamplingParams(
            temperature=0.0, max_tokens=made, ignore_eos=True, detokenize=False, output_kind="final"
        )
        prompts = self._random.integers(self._vocab, size=(count, given)).tolist()
        return [self.llm.add_request(prompt, params) for prompt in prompts]

    def stats(self) -> dict[str, Any]:
        return self.llm.stats()

    def decoding(self, count: int, context: int) -> list[str]:
        """Sequences whose prompts are computed: the next steps give each of them a token."""
        end = self.stats()["prompt_tokens"] + count * context
        ids = self.add(count, context, self.sizes.max_model_len - context)
        while self.stats()["prompt_tokens"] < end and self.llm.has_unfinished():
            self.step()
        for _ in range(UNTIMED):
            self.step()
        return ids

    def step(self) -> list[Any]:
        """Raises what the engine tells the requests of a step that failed."""
        outputs = self.llm.step()
        if failed := [output.error for output in outputs if output.error]:
            raise RuntimeError(failed[0])
        return outputs

    def finish(self) -> float:
        """Seconds until all that was added is done."""
        begin = time.perf_counter()
        while self.llm.has_unfinished():
            self.step()
        return time.perf_counter() - begin

    def stop(self, ids: list[str]) -> None:
        self.llm.abort(ids)
        self.finish()


def start(job: Job, warm: float) -> Loaded:
    """An engine that has given a token, and has had so many seconds to compile all programs."""
    loaded = Loaded(job)
    loaded.event("ready")
    loaded.add(1, 16, 1)
    loaded.finish()
    loaded.event("first token")
    loaded.event("warm" if loaded.llm.wait_until_warm(warm) else "not warm yet")
    return loaded


def run(job: Job) -> None:
    loaded = start(job, 0.5 * job.left)
    short, long = loaded.sizes.contexts
    for row in decode(loaded, short):
        job.emit(**row)
    for count, rows in loaded.sizes.prefills:
        job.emit(**prefill(loaded, count, rows))
    job.emit(**offline(loaded, *loaded.sizes.balanced))
    for row in decode(loaded, long):
        job.emit(**row)
    job.emit(**under_load(loaded))
    job.emit(**offline(loaded, *loaded.sizes.generating))
    job.try_emit({"profile": "a step"}, lambda: profile(loaded))
    loaded.llm.close()


def decode(loaded: Loaded, context: int) -> Iterator[dict[str, Any]]:
    """A row for each number of sequences: more join those that are there, whose contexts grow a little."""
    ids: list[str] = []
    try:
        for count in loaded.sizes.counts:
            row = {"decode": f"{count} x {context}", "sequences": count, "context": context}
            stats = loaded.stats()
            tokens = count * (context + 16 * loaded.sizes.steps)
            if tokens > stats["blocks_total"] * stats["block_size"]:
                yield row | {"absent": f"the pool has {stats['blocks_total'] * stats['block_size']} tokens"}
                continue
            ids += loaded.decoding(count - len(ids), context)
            yield row | timed_steps(loaded, count)
    finally:
        loaded.stop(ids)


def timed_steps(loaded: Loaded, count: int) -> dict[str, Any]:
    """Some steps in which all decode: median time, and how long the device had nothing to do."""
    programs, times = set(), []
    loaded.llm.record_steps(lambda step: programs.add(step.program))
    before = loaded.stats()
    for _ in range(loaded.sizes.steps):
        begin = time.perf_counter()
        loaded.step()
        times.append(time.perf_counter() - begin)
    after = loaded.stats()
    loaded.llm.record_steps(lambda step: None)
    if after["running"] != count or after["preemptions"] != before["preemptions"]:
        return {"absent": f"of {count} sequences {after['running']} run"}
    context = after["blocks_used"] * after["block_size"] / count  # up to half a block more than it is
    idle = after["device_idle_seconds"] - before["device_idle_seconds"]
    return {
        "ms": 1e3 * median(times),
        "tokens_per_s": count / median(times),
        "idle": idle / sum(times),
        "mean_context": context,
        "programs": sorted(programs),
        **loaded.model.decode(count, context),
    }


def prefill(loaded: Loaded, count: int, rows: int) -> dict[str, Any]:
    """Prompts, and one token after each: the median of three."""
    times = []
    for _ in range(3):
        loaded.add(count, rows, 1)
        times.append(loaded.finish())
    return {
        "prefill": f"{count} x {rows}",
        "ms": 1e3 * median(times),
        "tokens_per_s": count * rows / median(times),
        **loaded.model.prefill(count, rows),
    }


def offline(loaded: Loaded, count: int, given: int, made: int) -> dict[str, Any]:
    """All requests at once, until they are done or the time is over."""
    before, end = loaded.stats(), loaded.sizes.longest
    begin = time.perf_counter()
    ids, done = loaded.add(count, given, made), 0
    while loaded.llm.has_unfinished() and time.perf_counter() - begin < end:
        done += sum(output.finished for output in loaded.step())
    seconds, after = time.perf_counter() - begin, loaded.stats()
    loaded.stop(ids)
    tokens = after["generation_tokens"] - before["generation_tokens"]
    return {
        "offline": f"{given} in, {made} out",
        "requests": count,
        "finished": done,
        "seconds": seconds,
        "output_tokens_per_s": tokens / seconds,
        "idle": (after["device_idle_seconds"] - before["device_idle_seconds"]) / seconds,
        "steps": after["steps"] - before["steps"],
        "preemptions": after["preemptions"] - before["preemptions"],
    }


def under_load(loaded: Loaded, load: float = 0.7, seconds: float = 15.0) -> dict[str, Any]:
    """Requests that come at random times, at a part of the rate that the engine can do."""
    given, made = (16, 8) if loaded.job.dry else (1024, 128)
    count = loaded.sizes.counts[-2]
    loaded.add(count, given, made)
    rate, seconds = load * count / loaded.finish(), 1.0 if loaded.job.dry else seconds
    chance = random.Random(0)
    dues, due = [], chance.expovariate(rate)
    while due < seconds:
        dues.append(due)
        due += chance.expovariate(rate)
    begin, came, first, each = time.monotonic(), {}, [], []
    while dues or loaded.llm.has_unfinished():
        now = time.monotonic() - begin
        while dues and dues[0] <= now:
            came[loaded.add(1, given, made)[0]] = begin + dues.pop(0)
        if not loaded.llm.has_unfinished():
            time.sleep(max(0.0, dues[0] - now))
            continue
        for output in loaded.step():
            if output.finished:
                times = output.metrics
                first.append(times.first_token_ts - came[output.request_id])
                each.append((times.last_token_ts - times.first_token_ts) / (made - 1))
    p50, p90, p99 = 1e3 * np.percentile(first, (50, 90, 99))
    return {
        "load": f"{load:.0%} of capacity, {given} in, {made} out",
        "requests": len(first),
        "requests_per_s": rate,
        "ttft_p50_ms": p50,
        "ttft_p90_ms": p90,
        "ttft_p99_ms": p99,
        "tpot_p50_ms": 1e3 * median(each),
    }


def profile(loaded: Loaded) -> dict[str, Any]:
    """A profiler's view of steps in which many sequences decode: what is idle, and what takes the time."""
    count, context = loaded.sizes.counts[len(loaded.sizes.counts) // 2], loaded.sizes.contexts[0]
    ids = loaded.decoding(count, context)
    try:
        return {"decode": f"{count} x {context}", **timeline.steps(loaded.step, loaded.sizes.steps)}
    finally:
        loaded.stop(ids)
