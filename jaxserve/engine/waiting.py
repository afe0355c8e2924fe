"""Who waits to run, and who of them is next."""

import itertools
from bisect import insort
from collections.abc import Iterator

from jaxserve.engine.request import Request


class WaitingQueue:
    """A line per tenant, each ordered by rank; the tenant that was served least goes first.

    Served is counted in tokens computed (start-time fair queueing). A tenant that comes back is lifted to the
    level of those who wait: nobody saves up turns. `fair=False`: one line for all.
    """

    def __init__(self, fair: bool = False):
        self._fair = fair
        self._lines: dict[str, list[Request]] = {}
        self._served: dict[str, int] = {}
        self._level = 0
        """What the tenant of the last request that left had been served by then."""

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[Request]:
        """Line by line, each in order of rank."""
        return itertools.chain.from_iterable(self._lines.values())

    def in_line(self, tenant: str) -> int:
        """How many wait in the tenant's line."""
        return len(self._lines.get(tenant if self._fair else "", ()))

    def first(self) -> Request | None:
        """The one that is next; it stays in line."""

        def turn(tenant: str) -> tuple[int, tuple[float, ...]]:
            return self._served[tenant], self._lines[tenant][0].rank

        return self._lines[min(self._lines, key=turn)][0] if self._lines else None

    def push(self, request: Request) -> None:
        tenant = self._tenant(request)
        if tenant not in self._lines:
            level = min((self._served[other] for other in self._lines), default=self._level)
            self._served[tenant] = max(self._served.get(tenant, 0), level)
            self._lines[tenant] = []
        insort(self._lines[tenant], request, key=rank)

    def remove(self, request: Request) -> None:
        tenant = self._tenant(request)
        line = self._lines[tenant]
        line.remove(request)
        if not line:
            self._level = self._served[tenant]
            del self._lines[tenant]

    def charge(self, request: Request, tokens: int) -> None:
        """Tokens were computed for the request."""
        tenant = self._tenant(request)
        self._served[tenant] = self._served.get(tenant, 0) + tokens

    def compete(self, one: Request, other: Request) -> bool:
        """Whether rank decides between them, rather than whose turn it is."""
        return self._tenant(one) == self._tenant(other)

    def _tenant(self, request: Request) -> str:
        return request.spec.tenant if self._fair else ""


def rank(request: Request) -> tuple[float, ...]:
    return request.rank
