"""EngineCore: tokens in, tokens out. Scheduler, programs and device state turned by one loop.

A turn plans and dispatches the next step, then reads the one before it: the device always has work
while the host thinks. Which tokens come next is known to the device; the host only needs their number.
"""

import logging
import random
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import numpy as np

from jaxserve.config import EngineConfig
from jaxserve.engine import compilation
from jaxserve.engine.arranging import Arranging
from jaxserve.engine.beams import Searches
from jaxserve.engine.blocks import BlockPool
from jaxserve.engine.certify import certify
from jaxserve.engine.choosing import Chooser
from jaxserve.engine.devices import make_mesh, memory_of, platform_of, weight_type
from jaxserve.engine.flight import Flight, asks_for_scores, keep_scores, logprobs_of
from jaxserve.engine.grammar.matcher import GrammarFailed, Matcher
from jaxserve.engine.guide import forced, refusal
from jaxserve.engine.held import Held, load_vocabulary
from jaxserve.engine.kernels import choose_kernels
from jaxserve.engine.memory import Budget, fit
from jaxserve.engine.messages import CoreOutput, CoreRequest, Hello
from jaxserve.engine.model import LoadedModel
from jaxserve.engine.plan import Plan, plan_of
from jaxserve.engine.programs import Programs
from jaxserve.engine.request import Request
from jaxserve.engine.rules import rules_of
from jaxserve.engine.sampling import Sampled
from jaxserve.engine.scheduler import Chunk, Schedule, Scheduler, policy_of
from jaxserve.engine.stats import StepRecord, StepStats
from jaxserve.errors import EngineDied, InvalidRequest, QueueFull
from jaxserve.loading.checkpoint import open_checkpoint
from jaxserve.loading.hub import resolve
from jaxserve.outputs import ErrorCode
from jaxserve.sampling_params import MAX_LOGPROBS

log = logging.getLogger(__name__)

MAX_FAILED_STEPS = 3
"""In a row: then it is not the requests that are wrong, and the engine gives up."""

HELD_SECONDS = 0.01
"""How long a step waits for a grammar at most, while messages wait for the step."""


class EngineCore:
    """One replica of the engine: loads the model, and serves as soon as the first programs are ready.

    Raises ConfigError or ModelError when it cannot. Not thread-safe: one thread adds, aborts and steps.
    """

    def __init__(self, config: EngineConfig, replica: int = 0):
        self._compiles = compilation.Counts()
        self._load(config, replica)

    def _load(self, config: EngineConfig, replica: int) -> None:
        self._config = config
        mesh = make_mesh(config, replica)
        device = mesh.devices.flat[0]
        platform, memory = platform_of(device), memory_of(config, device)
        dummy = config.load_format == "dummy"
        checkpoint = open_checkpoint(resolve(config.model), tensors=not dummy)
        dtype = weight_type(config.dtype, checkpoint.config, platform)
        kernels = choose_kernels(config, mesh, dtype)
        self.model = LoadedModel(checkpoint.config, mesh, dtype, kernels, config.quantization)
        if not dummy:
            self.model.check(checkpoint)  # before anything is compiled
        self.budget = fit(config, self.model, memory)
        self.shapes = self.budget.shapes
        self.hello = _hello(self.budget)
        smallest_decode = kernels.smallest_decode(platform)
        self._programs = Programs(
            self.model, self.shapes, smallest_decode, self._compiles, config.deterministic
        )
        with self._programs.start():
            if dummy:
                self.model.fill(config.seed)
            else:
                self.model.load(checkpoint)
        self._held = Held(partial(load_vocabulary, config, self.shapes.vocab, checkpoint.eos_token_ids))
        del checkpoint  # and with it the files that are mapped
        self._on_host = platform.name == "cpu"
        self._chooser = Chooser(self._programs, self._refuse, self._on_host)
        self._kv, self._slots, self._chooser.shaping = self._programs.empty_state()
        self.steps = 0
        self._left_out: list[str] = []
        if config.deterministic:
            self._programs.wait_until_warm()
            self._kv, self._slots, self._chooser.shaping, self._left_out = certify(
                self._programs, self.model.weights, self._kv, self._slots, self._chooser.shaping
            )
        self._pool = BlockPool(self.shapes.pool.num_blocks, self.shapes.pool.block_size)
        self._scheduler = Scheduler(
            self._pool, self.shapes.max_num_seqs, config.enable_prefix_caching, policy_of(config)
        )
        self._searches = Searches(self._scheduler)
        self._flights: deque[Flight] = deque()
        self._overlap = config.overlap
        self._failed_steps = 0
        self._random = random.Random(config.seed + replica)
        self._seed = config.seed if config.deterministic else None
        """Of requests without one, whatever their order; None: each gets another."""
        self._refused: list[CoreOutput] = []
        self._tokens = {"prompt": 0, "generation": 0, "forced": 0, "padding": 0}
        self._step_stats = StepStats()
        self._arrange_memory()

    def _arrange_memory(self) -> None:
        """That of weights and pools as they are now, where this process holds it."""
        self._arranging: Arranging | None = None
        if self._on_host and self.model.mesh.size == 1:
            held = self.model.weights, self._kv
            self._arranging = Arranging(*held, self._programs.wait_until_warm, lambda: self.unfinished)

    @property
    def state(self) -> Literal["ready", "warm"]:
        """warm: every program of the ladder is compiled."""
        return "warm" if self._programs.warm.is_set() else "ready"

    def wait_until_warm(self, timeout: float | None = None) -> bool:
        """Wait for the background compilation to end; whether every program is ready."""
        return self._programs.wait_until_warm(timeout)

    def add(self, request: CoreRequest) -> None:
        """Queue a sequence. One that can never run is answered with an error by the next step."""
        if request.seed is None:
            request.seed = self._random.getrandbits(64) if self._seed is None else self._seed
        now = time.monotonic()
        most = self._scheduler.policy.max_queued
        if request.grammar is None:
            self._queue(request, now)
        elif most is None or request.follows or len(self._held) < most + self.shapes.max_num_seqs:
            self._held.add(request, now)
        else:
            told = f"{len(self._held)} sequences wait for their grammars, and no more may"
            self._refused.append(_refusal(request.id, QueueFull(told)))

    def _queue(self, request: CoreRequest, came: float, matcher: Matcher | None = None) -> None:
        if matcher is not None:  # an end that the grammar allows is one, whatever `ignore_eos` says
            request.stop_token_ids = list(dict.fromkeys([*request.stop_token_ids, *matcher.eos_ids]))
        rules = rules_of(request, self.shapes.vocab)
        try:
            add = self._scheduler.add if request.beams is None else self._searches.add
            added = add(request, came)
            added.queued_at, added.rules, added.matcher = came, rules, matcher
        except (ValueError, QueueFull) as error:
            self._refused.append(_refusal(request.id, error))
        else:
            if self._scheduler.unfinished == 1:
                self._step_stats.idle(None)  # those before it are gone
            self._note_idle(time.monotonic())

    def abort(self, id: str, keep: int | None = None) -> None:
        """End a sequence; its blocks are free at once. Nothing happens for an unknown id."""
        self._held.abort(id)
        self._searches.abort(id)
        if request := self._scheduler.get(id):
            self._scheduler.finish(request, "abort" if keep is None else "stop")

    @property
    def unfinished(self) -> int:
        """Sequences that wait or run."""
        return self._scheduler.unfinished + len(self._held)

    def has_unfinished(self) -> bool:
        return bool(self.unfinished or self._flights or self._refused)

    def step(self) -> list[CoreOutput]:
        """Dispatch the next step and read the one before it; what that one added to its sequences.

        Raises EngineDied when `MAX_FAILED_STEPS` in a row have failed, and what the device raises when not
        even an empty pool can be made.
        """
        self._release()
        outputs = self._take_refused()
        with self._compiles.request_path():
            schedule = self._scheduler.schedule(self._programs.limits)
            if schedule.chunks:
                self._flights.append(self._launch(schedule))
                if any(chunk.samples and chunk.request.late for chunk in schedule.chunks):
                    while len(self._flights) > 1:
                        outputs += self._collect()
                if self._flights:  # or a failed step took them all
                    self._flights.append(self._choose(self._flights.pop()))
                outputs += self._take_refused()
            ahead = 1 if schedule.chunks and self._overlap else 0
            while len(self._flights) > ahead or (self._flights and self._flights[-1].error):
                outputs += self._collect()
            self._note_idle(time.monotonic())
        return outputs

    def _take_refused(self) -> list[CoreOutput]:
        refused, self._refused = self._refused, []
        return refused

    def _release(self) -> None:
        """Queue those whose grammar is there; wait a moment for one while there is nothing else to do."""
        if len(self._held) and not (self._scheduler.unfinished or self._flights or self._refused):
            self._held.wait(HELD_SECONDS)
        for request, came, matcher in self._held.take():
            if isinstance(matcher, BaseException):
                self._refused.append(_refusal(request.id, matcher))
            else:
                self._queue(request, came, matcher)

    def stats(self) -> dict[str, Any]:
        """Counters and gauges since start."""
        return {
            "running": len(self._scheduler.running),
            "waiting": len(self._scheduler.waiting) + len(self._held),
            "blocks_used": self._pool.used,
            "blocks_total": self._pool.capacity,
            "block_size": self._pool.block_size,
            "steps": self.steps,
            "preemptions": self._scheduler.preemptions,
            "prefix_cache_queries": self._pool.cache.queries,
            "prefix_cache_hits": self._pool.cache.hits,
            "prompt_tokens": self._tokens["prompt"],
            "generation_tokens": self._tokens["generation"],
            "forced_tokens": self._tokens["forced"],
            "padding_tokens": self._tokens["padding"],
            "programs": self._programs.count,
            "programs_certified": 0 if self._seed is None else self._programs.count,
            "programs_refused": len(self._left_out),
            **self._step_stats.values(),
            "warm": self._programs.warm.is_set(),
            "compiles_on_request_path": self._compiles.on_request_path,
            "compile_cache_hits": self._compiles.cache_hits,
            "compile_cache_misses": self._compiles.cache_misses,
        }

    def record_steps(self, record: Callable[[StepRecord], None]) -> None:
        """From now on, call `record` with every step that is done."""
        self._step_stats.record = record

    def plan(self) -> Plan:
        """What the engine takes and holds."""
        return plan_of(self._config, self.model, self.budget, self._programs)

    def reset_prefix_cache(self) -> None:
        """Forget what finished and running sequences left for others."""
        self._pool.cache.clear()

    def close(self) -> None:
        """Stop compiling and let go of the device's memory."""
        if self._arranging:
            self._arranging.end()
        self._held.close()
        self._programs.close()
        self._flights.clear()
        self._kv, self.model.weights = [], []
        self._slots = self._chooser.shaping = None  # type: ignore[assignment]

    def _launch(self, schedule: Schedule) -> Flight:
        """Dispatch a step. One that cannot be is read in its turn too: an earlier one may be the cause."""
        try:
            return self._dispatch(schedule)
        except Exception as error:
            return Flight(schedule.chunks, error=error)

    def _note_idle(self, now: float) -> None:
        """See whether the device has nothing to do; that counts while there are requests."""
        last = self._flights[-1].done if self._flights else None
        if last is None or last.is_ready():  # type: ignore[attr-defined]
            self._step_stats.idle(now if self._scheduler.unfinished else None)

    def _dispatch(self, schedule: Schedule) -> Flight:
        now = time.monotonic()
        self._note_idle(now)
        for request in schedule.admitted:
            request.scheduled_at = request.scheduled_at or now
            assert request.slot is not None and request.spec.seed is not None
            layout = self._programs.admit_layout
            packed = layout.pack(request.slot, request.spec, request.spec.seed, request.blocks)
            self._slots = self._programs.admit(self._slots, packed)
            self._chooser.enter(request)
        chunks = schedule.chunks
        tokens = sum(chunk.length for chunk in chunks)
        scores = asks_for_scores(chunks)
        bucket = self._programs.bucket(tokens, len(chunks), scores)
        self._tokens["padding"] += bucket.tokens - tokens
        step = self._programs.layout(bucket)
        packed = step.pack(chunks, self.shapes.max_num_seqs)
        forward = self._programs.forward(bucket)
        weights = self.model.weights
        self._kv, self._slots, logits, targets, hidden = forward(weights, self._kv, self._slots, packed)
        dispatched = time.monotonic()
        self._step_stats.dispatched(dispatched)
        scored = None
        if scores:
            scored = self._programs.score(bucket)(weights, hidden, step.followers(chunks))
        return Flight(
            chunks, tokens, logits, targets, scored=scored, program=bucket.name, dispatched=dispatched
        )

    def _choose(self, flight: Flight) -> Flight:
        """Dispatch what chooses the tokens of a step whose forward pass is dispatched."""
        if flight.error:
            return flight
        assert flight.logits is not None and flight.targets is not None
        try:
            self._slots, sampled = self._chooser.choose(
                self._slots, flight.chunks, flight.logits, flight.targets
            )
        except Exception as error:
            return flight._replace(error=error)
        return flight._replace(sampled=sampled, logits=None)

    def _refuse(self, request: Request, error: InvalidRequest) -> None:
        """End a request that cannot go on as it is."""
        self._refused.append(_refusal(self._end(request), error))

    def _end(self, request: Request) -> str:
        """End a request that failed, with all beams of its search; the id that is told so."""
        if request.beam is None:
            self._scheduler.finish(request, "error")
            return request.id
        self._searches.end(request.beam.search, "error")
        return request.beam.search.spec.id

    def _collect(self) -> list[CoreOutput]:
        """Read the oldest step in flight. The first that cannot be read is the one that failed: an error
        spoils all that was dispatched after it."""
        flight = self._flights[0]
        try:
            host = self._read(flight)
            scored = None if flight.scored is None else Sampled.unpack(np.asarray(flight.scored))
        except Exception as error:
            return self._recover(flight.chunks, error)
        self._flights.popleft()
        self.steps += 1
        self._failed_steps = 0
        now = time.monotonic()
        self._step_stats.finished(flight.program, flight.tokens, flight.dispatched, now)
        if scored:
            keep_scores(flight.chunks, scored)
        return self._advance(flight, host, now) if host else []

    def _read(self, flight: Flight) -> Sampled | None:
        """What a step sampled, once it is done. Raises what the device or the dispatch raised."""
        if flight.error:
            raise flight.error
        if flight.sampled is None:
            jax.block_until_ready(flight.targets)
            return None
        return Sampled.unpack(np.asarray(flight.sampled))

    def _advance(self, flight: Flight, host: Sampled, now: float) -> list[CoreOutput]:
        tokens = host.tokens.tolist()
        outputs = []
        gaps = []
        append = self._scheduler.append
        # a step that computes what is forced takes longer: not where that holds up a row without a grammar
        jumping = all(request.matcher is not None for request in self._scheduler.running)
        for row, (request, _, _, _, samples) in enumerate(flight.chunks):
            if not samples:
                continue
            if request.finish_reason is not None:  # its extra token is dropped
                request.inflight -= 1
                continue
            token, spec = tokens[row], request.spec
            if request.beam is not None:
                if not request.output:
                    self._tokens["prompt"] += len(spec.prompt)
                (candidates,) = logprobs_of(host, row, 1, MAX_LOGPROBS)
                outputs += self._searches.take(request, candidates)
                continue
            try:
                reason = append(request, token)
                taken = [token, *self._jump(request)] if jumping and reason is None else [token]
            except GrammarFailed as error:
                self._refuse(request, refusal(request, error))
                continue
            output = CoreOutput(id=spec.id, token_ids=taken, finish_reason=request.finish_reason)
            if spec.logprobs is not None:
                output.logprobs = logprobs_of(host, row, 1, spec.logprobs)
            if taken[-1] in spec.stop_token_ids:
                output.stop_token = taken[-1]
            if len(request.output) == len(taken):
                self._tokens["prompt"] += len(spec.prompt)
                output.cached_tokens = request.cached
                output.times = (request.queued_at, request.scheduled_at or now)
                if spec.prompt_logprobs is not None:
                    output.prompt_logprobs = request.scores
            else:
                gaps.append(now - request.last_token_at)
            request.last_token_at = now
            outputs.append(output)
        self._tokens["generation"] += sum(len(output.token_ids) for output in outputs)
        self._step_stats.gaps(gaps)
        return outputs

    def _jump(self, request: Request) -> list[int]:
        """Take what the request's grammar leaves no choice about; the step under way that would sample the
        first of these tokens does not."""
        tokens = forced(request)
        if not tokens:
            return []
        taken = self._scheduler.extend(request, tokens)
        self._tokens["forced"] += len(taken)
        for flight in self._flights:
            for row, chunk in enumerate(flight.chunks):
                if chunk.request is request and chunk.samples:
                    flight.chunks[row] = chunk._replace(samples=False)
                    request.inflight -= 1
        return taken

    def _recover(self, failed: list[Chunk], error: Exception) -> list[CoreOutput]:
        """After a failed step: its donated buffers are gone. Its requests end with the error, pool and
        slots are made anew, and all others are recomputed from the tokens the host has."""
        reason = f"{type(error).__name__}: {error}"
        self._failed_steps += 1
        if self._failed_steps >= MAX_FAILED_STEPS:
            raise EngineDied(f"{MAX_FAILED_STEPS} steps in a row failed, the last with {reason}") from error
        log.error("a step failed", exc_info=error)
        outputs = []
        for request in [chunk.request for chunk in failed]:
            if request.finish_reason is None:
                told = f"a step failed: {reason}"
                outputs.append(CoreOutput(id=self._end(request), finish_reason="error", error=told))
        for chunk in [chunk for flight in self._flights for chunk in flight.chunks]:
            chunk.request.inflight = 0
        self._flights.clear()
        self._pool.cache.clear()
        for request in list(self._scheduler.running):
            self._scheduler.preempt(request)
        if self._arranging:
            self._arranging.end()
        for array in jax.tree.leaves((self._kv, self._slots, self._chooser.shaping)):
            array.delete()  # or the traceback keeps what was not donated
        state = jax.block_until_ready(self._programs.empty_state())
        self._kv, self._slots, self._chooser.shaping = state
        self._arrange_memory()
        return outputs


def _refusal(id: str, error: BaseException) -> CoreOutput:
    """The answer to a request that is not served."""
    code: ErrorCode | None = None
    if isinstance(error, QueueFull):
        code = "queue_full"
    elif isinstance(error, InvalidRequest):
        code = "invalid_request"
    param = getattr(error, "param", None)
    return CoreOutput(id=id, finish_reason="error", error=str(error), error_code=code, error_param=param)


def _hello(budget: Budget) -> Hello:
    return Hello(
        max_model_len=budget.max_model_len,
        max_request_tokens=budget.max_request_tokens,
        vocab_size=budget.shapes.vocab,
    )
