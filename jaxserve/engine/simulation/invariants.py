"""What must hold whatever comes: books of their own beside the scheduler's, compared after every step."""

from collections import Counter

from jaxserve.engine.blocks import DUMMY
from jaxserve.engine.request import Request
from jaxserve.engine.scheduler import Limits, Schedule, Scheduler
from jaxserve.engine.waiting import rank

ENTERED = -1
"""Stands for how far a request has come in the step that admits it."""


class Violation(Exception):
    """A promise was broken: its name, and how."""

    def __init__(self, rule: str, detail: str):
        super().__init__(rule, detail)
        self.rule = rule
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.rule}: {self.detail}"


class Invariants:
    """Told of everything that happens to a scheduler; raises `Violation` when it breaks a promise.

    `audit_every`: after how many steps to go through all requests and blocks too.
    """

    def __init__(self, scheduler: Scheduler, limits: Limits, audit_every: int):
        self._scheduler = scheduler
        self._limits = limits
        self._audit_every = audit_every
        self._running: dict[Request, int] = {}
        """Tokens of each that are computed."""
        self._waiting: Counter[str] = Counter()
        """Requests per tenant."""
        self._preempted: Counter[Request] = Counter()
        self._preemptions = 0
        self._auditing = True
        self._steps = 0
        self._silent = 0
        """Steps since a token was read or something arrived."""
        self._longest = 0
        self._entered: dict[str, tuple[float, ...]] = {}
        """Rank of the last newcomer that was admitted, by line."""
        self._head: Request | None = None
        """Who is next when a step is planned."""
        self._next: Request | None = None
        """Who was next in all steps until now."""
        self._patience = 0
        """The last step in which it may still be."""
        self._turns = _Turns()

    def added(self, request: Request) -> None:
        limit = self._scheduler.policy.max_queued
        waited = self._in_line(request.spec.tenant)
        if limit is not None and waited >= limit + self._limits.seqs - len(self._running):
            raise Violation("queue limit", f"request {request.id} is queued beside {waited} others")
        tokens = len(request.spec.prompt) + request.spec.max_tokens
        self._longest = max(self._longest, tokens)
        self._silent = 0
        self._wait(request)

    def refused(self, tenant: str) -> None:
        limit, waited = self._scheduler.policy.max_queued, self._in_line(tenant)
        if limit is None or waited < limit:
            raise Violation("queue limit", f"refused while {waited} wait")

    def _in_line(self, tenant: str) -> int:
        """How many wait in the line that a request of the tenant joins."""
        return self._waiting[tenant] if self._scheduler.policy.fair_share else self._waiting.total()

    def too_long(self, tokens: int) -> None:
        if self._scheduler.pool.blocks_for(tokens - 1) <= self._scheduler.pool.capacity:
            raise Violation("admission", f"a request of {tokens} tokens is refused and fits the pool")

    def ended(self, request: Request, wanted: int | None) -> None:
        """`wanted`: how many tokens it should have got; None if it was aborted."""
        if wanted is not None and len(request.output) != wanted:
            raise Violation("output", f"request {request.id} got {len(request.output)} of {wanted} tokens")
        if self._running.pop(request, None) is None:
            self._leave(request)
        del self._preempted[request]

    def read(self) -> None:
        """A token was read."""
        self._silent = 0

    def planning(self) -> None:
        """A step will be planned."""
        self._steps += 1
        self._auditing = self._steps % self._audit_every == 0
        self._head = self._scheduler.waiting.first()

    def planned(self, schedule: Schedule, inflight: bool) -> None:
        """A step was planned; `inflight`: while another one was unread."""
        preempted = self._scheduler.preemptions != self._preemptions
        if preempted:
            self._note_preempted()
        for request in schedule.admitted:
            self._enter(request)
        tokens = self._note_chunks(schedule)
        self._check_progress(schedule, inflight)
        if self._head is not None and not preempted and self._head is self._scheduler.waiting.first():
            self._check_room(self._head, tokens)
            self._check_patience(self._head)
        else:
            self._next = None
        if self._turns.ranges and self._scheduler.policy.fair_share:
            self._turns.check(self._bound)

    def turned(self) -> None:
        """A step was dispatched or read, or nothing could be done."""
        scheduler, pool = self._scheduler, self._scheduler.pool
        running, waiting = len(self._running), sum(self._waiting.values())
        found = (len(scheduler.running), len(scheduler.waiting), scheduler.unfinished)
        if found != (running, waiting, running + waiting):
            detail = f"{found} run, wait, are unfinished; not {running}, {waiting}, {running + waiting}"
            raise Violation("lost request", detail)
        if not running and pool.used:
            raise Violation("leaked block", f"{pool.used} blocks are in use and nothing runs")
        if self._auditing:
            self.audit()

    def audit(self) -> None:
        """Every request, every block."""
        scheduler, pool = self._scheduler, self._scheduler.pool
        if set(scheduler.running) != set(self._running):
            raise Violation("lost request", "others run than were admitted")
        if Counter(request.spec.tenant for request in scheduler.waiting) != self._waiting:
            raise Violation("lost request", "others wait than came")
        for request in scheduler.waiting:
            if request.blocks or request.slot is not None:
                raise Violation("leaked block", f"request {request.id} waits and holds {request.blocks}")
        slots = {request.slot for request in scheduler.running}
        if len(slots) != len(scheduler.running) or not slots <= set(range(self._limits.seqs)):
            raise Violation("slots", f"{len(scheduler.running)} run in slots {slots}")
        owned = Counter(block for request in scheduler.running for block in request.blocks)
        for block in range(pool.num_blocks):
            if pool.references(block) != owned[block]:
                detail = f"block {block} has {pool.references(block)} references, {owned[block]} use it"
                rule = "leaked block" if pool.references(block) > owned[block] else "shared block"
                raise Violation(rule, detail)
        if owned[DUMMY] or len(+owned) != pool.used:
            raise Violation("pool", f"{pool.used} blocks are in use, {len(+owned)} of them by requests")
        for request in scheduler.running:
            for i, block in enumerate(request.blocks):
                if owned[block] > 1 and (i + 1) * pool.block_size > request.computed:
                    raise Violation("shared block", f"block {block} of {owned[block]} owners is written to")

    def _note_preempted(self) -> None:
        self._preemptions = self._scheduler.preemptions
        first = min(self._running, key=rank)
        for request in [r for r in self._running if r.preemptions != self._preempted[r]]:
            if request is first and self._scheduler.policy.aging is None:
                raise Violation("preemption", f"request {request.id} ranks first and is preempted")
            del self._running[request]
            self._preempted[request] = request.preemptions
            self._wait(request)

    def _enter(self, request: Request) -> None:
        policy = self._scheduler.policy
        if request in self._running or request.finish_reason is not None:
            raise Violation("lost request", f"request {request.id} is admitted twice or after its end")
        self._leave(request)
        self._running[request] = ENTERED
        line = request.spec.tenant if policy.fair_share else ""
        if policy.aging is None and not request.preemptions:
            if request.rank < self._entered.get(line, request.rank):
                raise Violation("order", f"request {request.id} was overtaken by a later one")
            self._entered[line] = request.rank
        if self._auditing:
            for other in self._scheduler.waiting:
                if other.rank < request.rank and (not policy.fair_share or other.spec.tenant == line):
                    raise Violation("order", f"request {request.id} is admitted before {other.id}")

    def _note_chunks(self, schedule: Schedule) -> int:
        size, budget = self._scheduler.pool.block_size, 0
        running, served = self._running, self._turns.served
        for request, start, length, _, _ in schedule.chunks:
            computed = running.get(request)
            if computed != start and (computed != ENTERED or start % size):
                raise Violation("continuity", f"request {request.id} goes on at {start}, not at {computed}")
            if length < 1 or len(request.blocks) != -(-(start + length) // size):
                detail = f"{len(request.blocks)} blocks for {start} + {length} tokens"
                raise Violation("pool", f"request {request.id} has {detail}")
            running[request] = start + length
            served[request.spec.tenant] += length
            budget += length
        if budget > self._limits.tokens or len(self._running) > self._limits.seqs:
            raise Violation("budget", f"{budget} tokens of {len(self._running)} requests in {self._limits}")
        return budget

    def _check_progress(self, schedule: Schedule, inflight: bool) -> None:
        if not schedule.chunks and not inflight and self._scheduler.unfinished:
            raise Violation("lost wake-up", f"{self._scheduler.unfinished} are left and nothing runs")
        self._silent += 1
        if self._silent > 2 * self._longest + 10:
            raise Violation("starvation", f"no token for {self._silent} steps")
        if self._auditing:
            moved = {chunk.request for chunk in schedule.chunks}
            if len(moved) != len(schedule.chunks):
                raise Violation("budget", "a request is twice in a step")
            for request in self._running:
                if request.pending == 1 and request not in moved:
                    raise Violation("budget", f"request {request.id} decodes and is left out")

    def _check_room(self, head: Request, tokens: int) -> None:
        """Who is next could not have run in this step."""
        pool = self._scheduler.pool
        if tokens == self._limits.tokens or len(self._running) == self._limits.seqs or head.inflight:
            return
        needed = 0
        for request in self._running:
            needed += max(0, pool.blocks_for(request.computed + request.pending) - len(request.blocks))
        if pool.blocks_for(head.length) <= pool.free - needed:
            detail = f"{head.length} tokens, and has a slot, budget and {pool.free - needed} blocks"
            raise Violation("lost wake-up", f"request {head.id} waits, with {detail} of {pool.block_size}")

    def _check_patience(self, head: Request) -> None:
        """Nobody but those that run can keep the next one waiting, and each step brings one of those on."""
        if head is not self._next:
            left = sum(r.pending + r.spec.max_tokens - len(r.output) + 2 for r in self._running)
            self._next, self._patience = head, self._steps + left + 2
        elif self._steps > self._patience:
            raise Violation("starvation", f"request {head.id} is next for longer than all that run can take")

    @property
    def _bound(self) -> int:
        """Tokens by which the service of two tenants that both wait may change apart: a turn is given to who
        was served least, and what was admitted runs on."""
        return 2 * self._limits.seqs * (self._longest + 1)

    def _wait(self, request: Request) -> None:
        tenant = request.spec.tenant
        self._waiting[tenant] += 1
        if self._waiting[tenant] == 1:
            self._turns.begin(tenant, [other for other in self._waiting if other != tenant])

    def _leave(self, request: Request) -> None:
        tenant = request.spec.tenant
        self._waiting[tenant] -= 1
        if not self._waiting[tenant]:
            del self._waiting[tenant]
            self._turns.end(tenant)


class _Turns:
    """How far apart the service of tenants goes while both wait."""

    def __init__(self) -> None:
        self.served: Counter[str] = Counter()
        """Tokens computed per tenant."""
        self.ranges: dict[tuple[str, str], tuple[int, int]] = {}
        """Least and most tokens that the first of two was ahead."""

    def begin(self, tenant: str, others: list[str]) -> None:
        for other in others:
            one, two = sorted((tenant, other))
            ahead = self.served[one] - self.served[two]
            self.ranges[one, two] = ahead, ahead

    def end(self, tenant: str) -> None:
        for pair in [pair for pair in self.ranges if tenant in pair]:
            del self.ranges[pair]

    def check(self, bound: int) -> None:
        for (one, two), (least, most) in self.ranges.items():
            ahead = self.served[one] - self.served[two]
            if not least <= ahead <= most:
                least, most = min(least, ahead), max(most, ahead)
                self.ranges[one, two] = least, most
                if most - least > bound:
                    raise Violation(
                        "fair share",
                        f"both wait, and {one!r} and {two!r} were served {most - least} tokens apart",
                    )
