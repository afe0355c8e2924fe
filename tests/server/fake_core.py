"""A core without a model: it repeats the prompt, token by token. As a script, the engine process around it.

`FAKE_STEP_SECONDS` slows its steps; `FAKE_JOURNAL` names a file that gets a line for every request's begin
and end; `FAKE_FAILS` makes loading fail, with a reason ("told") or by a crash ("crash"); `FAKE_GATE` names
a file that loading waits for, and fails with what is in it.
"""

import os
import sys
import time
from functools import partial
from pathlib import Path

from jaxserve.engine.messages import CoreOutput, CoreRequest, Hello, TokenLogprobs
from jaxserve.engine.process import main
from jaxserve.engine.stats import StepStats
from jaxserve.errors import ModelError

HANGS_ON, FAILS_ON = 4, 5
"""The tokens (`<|tool|>`, `<|fails|>`) at which a step hangs, and at which a request fails in the engine."""


class FakeCore:
    state = "warm"

    def __init__(self, config, replica=0):
        match os.environ.get("FAKE_FAILS"):
            case "told":
                raise ModelError("the model is broken")
            case "crash":
                os._exit(9)
        if gate := os.environ.get("FAKE_GATE"):
            while not Path(gate).exists():
                time.sleep(0.01)
            if reason := Path(gate).read_text():
                raise ModelError(reason)
        limit = config.max_model_len or 512
        self.hello = Hello(max_model_len=limit, max_request_tokens=limit, vocab_size=288)
        self.steps = 0
        self.running: dict[str, CoreRequest] = {}
        self.done: dict[str, int] = {}
        self.came: dict[str, float] = {}
        self.pause = float(os.environ.get("FAKE_STEP_SECONDS", "0"))
        self.journal = os.environ.get("FAKE_JOURNAL", "").format(replica=replica)

    def add(self, request):
        self.running[request.id] = request
        self.done[request.id] = 0
        self.came[request.id] = time.monotonic()
        self.note("add", request.id)

    def abort(self, id, keep=None):
        if self.running.pop(id, None):
            self.note("end", id)

    def step(self):
        time.sleep(self.pause)
        self.steps += 1
        return [self.advance(request) for request in list(self.running.values())]

    def advance(self, request):
        token = request.prompt[self.done[request.id] % len(request.prompt)]
        if token == HANGS_ON:
            time.sleep(10**6)
        if token == FAILS_ON:
            return self.end(request, CoreOutput(id=request.id, finish_reason="error", error="a bad token"))
        self.done[request.id] += 1
        output = CoreOutput(id=request.id, token_ids=[token])
        if self.done[request.id] == 1:
            output.times = (self.came.pop(request.id), time.monotonic())
            if request.prompt_logprobs is not None:
                prompt = enumerate(request.prompt[1:], 1)
                output.prompt_logprobs = [self.told(t, -i / 8, request.prompt_logprobs) for i, t in prompt]
        if request.logprobs is not None:
            output.logprobs = [self.told(token, -0.5, request.logprobs)]
        if token in request.stop_token_ids:
            output.finish_reason, output.stop_token = "stop", token
        elif self.done[request.id] == request.max_tokens:
            output.finish_reason = "length"
        return output if output.finish_reason is None else self.end(request, output)

    def told(self, token, logprob, count):
        others = range(10, 10 + count)
        return TokenLogprobs([token, *others], [logprob, *(-float(i) for i in range(count))], rank=1)

    def end(self, request, output):
        del self.running[request.id]
        self.note("end", request.id)
        return output

    def has_unfinished(self):
        return bool(self.running)

    def stats(self):
        counted = ("waiting", "blocks_used", "preemptions", "programs", "compiles_on_request_path")
        counted += ("prefix_cache_queries", "prefix_cache_hits")
        counted += ("prompt_tokens", "generation_tokens", "forced_tokens", "padding_tokens")
        counted += ("compile_cache_hits", "compile_cache_misses")
        return dict.fromkeys(counted, 0) | {
            "running": len(self.running),
            "steps": self.steps,
            "blocks_total": 1,
            **StepStats().values(),
        }

    def reset_prefix_cache(self):
        self.note("reset_prefix_cache", "")

    def close(self):
        self.note("close", "")

    def note(self, event, id):
        if self.journal:
            with Path(self.journal).open("a") as file:
                file.write(f"{event} {id}\n")


if __name__ == "__main__":
    main(sys.argv[1:], factory=partial(FakeCore, replica=sys.argv[2]))
