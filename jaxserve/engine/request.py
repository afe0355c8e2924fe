"""The state of one sequence from arrival to its last token."""

from typing import TYPE_CHECKING

from jaxserve.engine.messages import CoreRequest, TokenLogprobs
from jaxserve.engine.prefix_cache import Node
from jaxserve.outputs import FinishReason

if TYPE_CHECKING:
    from jaxserve.engine.beams import Beam
    from jaxserve.engine.grammar.matcher import Matcher
    from jaxserve.engine.rules import Rule


class Request:
    """One sequence: its tokens, and how far the device has come with them."""

    __slots__ = (
        *("beam", "blocks", "cached", "chain", "committed", "computed", "finish_reason", "inflight"),
        *("last_token_at", "matcher", "output", "preemptions", "queued_at", "rank", "rules"),
        *("scheduled_at", "scores", "slot", "spec"),
    )

    def __init__(self, spec: CoreRequest, rank: tuple[float, ...]):
        self.spec = spec
        self.rank = rank
        """Its place in the order of all requests, the lowest first; no two have the same."""
        self.output: list[int] = []
        self.inflight = 0
        """Tokens sampled by dispatched steps that the host has not read yet."""
        self.computed = 0
        """Tokens whose keys and values are in the pool once all dispatched steps are done."""
        self.scores: list[TokenLogprobs] = []
        """Of its prompt's tokens from the second on, as far as they were read."""
        self.slot: int | None = None
        """Its place in the device's request state while it runs."""
        self.blocks: list[int] = []
        self.cached: int | None = None
        """Tokens of the prompt that the prefix cache had when it first ran; None before."""
        self.committed = 0
        """Its first blocks that the prefix cache knows."""
        self.chain: Node = spec.cache_salt
        """Where the cache's next entry for it belongs."""
        self.rules: list[Rule] = []
        """Which tokens may not come."""
        self.matcher: Matcher | None = None
        """Its place in its grammar, after all of `output`."""
        self.beam: Beam | None = None
        """Its part in a beam search."""
        self.finish_reason: FinishReason | None = None
        self.preemptions = 0
        self.queued_at = 0.0
        self.scheduled_at: float | None = None
        """When it first ran."""
        self.last_token_at = 0.0

    @property
    def id(self) -> str:
        return self.spec.id

    @property
    def late(self) -> bool:
        """Whether its next token can be chosen only once the host knows the last one."""
        spec = self.spec
        return bool(spec.grammar or spec.logits_processors) or any(rule.late for rule in self.rules)

    @property
    def parked(self) -> bool:
        """Whether it waits, on the device or off it, for the other beams of its search."""
        return self.beam is not None and self.beam.candidates is not None

    @property
    def known(self) -> int:
        """Tokens whose ids the host knows."""
        return len(self.spec.prompt) + len(self.output)

    @property
    def length(self) -> int:
        """Tokens so far, those still in flight included."""
        return len(self.spec.prompt) + self.generated

    @property
    def generated(self) -> int:
        """Tokens of the output, those still in flight included."""
        return len(self.output) + self.inflight

    @property
    def pending(self) -> int:
        """Tokens to compute before the next one can be sampled; 0 when its last one has been dispatched, or
        when it is a beam whose next token has not been chosen."""
        if self.beam is not None and (self.inflight or self.parked):
            return 0
        output = self.generated
        return 0 if output >= self.spec.max_tokens else len(self.spec.prompt) + output - self.computed

    def unscored(self, start: int, count: int) -> range:
        """Of these positions, those that tell a logprob of the prompt that is asked for and not there yet."""
        if self.spec.prompt_logprobs is None:
            return range(0)
        return range(max(start, len(self.scores)), min(start + count, len(self.spec.prompt) - 1))

    def tokens(self, start: int, count: int) -> list[int]:
        """Token ids at these positions, which the host must know."""
        prompt = self.spec.prompt
        split = len(prompt)
        if start >= split:
            return self.output[start - split : start - split + count]
        return prompt[start : start + count] + self.output[: max(0, start + count - split)]
