"""An engine in this process, measured: what `throughput` and `latency` share."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from jaxserve.bench import metrics
from jaxserve.bench.client import Record
from jaxserve.bench.results import Run, Step
from jaxserve.bench.workload import Ask
from jaxserve.config import EngineConfig
from jaxserve.sampling_params import SamplingParams

if TYPE_CHECKING:
    from jaxserve.engine.stats import StepRecord

COUNTED = ("steps", "preemptions", "prefix_cache_hits", "padding_tokens", "compiles_on_request_path")


class Bench:
    """An engine with every program compiled, whose steps are recorded."""

    def __init__(self, config: EngineConfig):
        from jaxserve import Engine

        self.engine = Engine(**msgspec.structs.asdict(config))
        self.engine.wait_until_warm()
        self._steps: list[StepRecord] = []
        self.engine.record_steps(self._steps.append)

    def tokens(self, ask: Ask) -> list[int]:
        if isinstance(ask.prompt, str):
            return self.engine.tokenizer.encode(ask.prompt)
        return ask.prompt

    def run(self, asks: Sequence[Ask], temperature: float, setting: dict[str, Any], turn: int = 0) -> Run:
        """All of them at once, each with an output of full length."""
        prompts = [self.tokens(ask) for ask in asks]
        params = [
            SamplingParams(temperature=temperature, max_tokens=ask.output_tokens, ignore_eos=True)
            for ask in asks
        ]
        before = self.engine.stats()
        self._steps.clear()
        begin = time.monotonic()
        outputs = self.engine.generate(prompts, params, use_progress=False)
        duration = time.monotonic() - begin
        after = self.engine.stats()
        records = [_record(output, begin) for output in outputs]
        steps = [_step(step, begin) for step in self._steps]
        samples = metrics.of_requests(records, duration) | metrics.of_steps(steps)
        del samples["itl_ms"]  # only the first and the last token of each request are timed
        return Run(
            setting=setting,
            round=turn,
            duration=duration,
            counts={
                "completed": len(records),
                "failed": 0,
                "prompt_tokens": sum(map(len, prompts)),
                "output_tokens": sum(record.tokens for record in records),
                "device_idle_s": after["device_idle_seconds"] - before["device_idle_seconds"],
                **{name: after[name] - before[name] for name in COUNTED},
            },
            summary=metrics.summarise(samples),
            samples=samples,
            requests=records,
            steps=steps,
        )

    def close(self) -> None:
        self.engine.close()


def _record(output: Any, begin: float) -> Record:
    times = output.metrics
    first, last = times.first_token_ts - times.queued_ts, times.last_token_ts - times.queued_ts
    return Record(
        times.queued_ts - begin,
        last,
        [first, last],
        len(output.prompt_token_ids),
        times.num_generation_tokens,
    )


def _step(step: "StepRecord", begin: float) -> Step:
    rows = int(step.program.partition("[")[2].rstrip("]"))
    return Step(step.began - begin, step.ended - step.began, step.tokens, rows, step.program)
