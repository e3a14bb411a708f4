"""Back-pressure: the requests of a queue that the backend had no resources for (ENOMEM) wait in line and are tried again.

Some facts:

- A backend that is out of memory, slots or credits today has some when a request that it works on is done, or a moment later.
- The block layer promises no order between queues, and whatever order there is between requests that are under way at
  the same time is the application's to make.

What follows: each queue has a line of its own, which needs no lock and no word with another queue. A request that waits is
not overtaken: a new one is not shown to the backend while one that came before it stands in line. The first in line is tried
**alone** (the probe): when a request of this queue was answered, or `RETRY_SECONDS` after it was refused, since other queues
and the backend itself free resources too. When the backend takes it, the others follow in the order in which they
came, until one is refused again. So nothing can starve: whatever else the backend was given ends before the probe is tried for the
last time.

A request that waits keeps its tag and its buffer; it never gets another one.
"""

from __future__ import annotations

import heapq
import math

import trio

from ublk_trio.request import Request

#: Seconds from a refusal to the next try, when nothing of the queue is answered meanwhile.
RETRY_SECONDS = 0.005


class WaitingLine:
    """Who waits, in the order of arrival, and when the next one is tried."""

    def __init__(self) -> None:
        # By the number of arrival. A heap: a request that the backend refuses late comes before younger ones that it refused at once.
        self._line: list[tuple[int, Request]] = []
        # Of the tags that wait, or whose request the backend is working on.
        self._arrivals: dict[int, int] = {}
        self._arrived = 0
        self._waited: set[int] = set()
        self._probe: Request | None = None
        self._refused = False
        #: Nobody is tried any more.
        self.held = False
        self._due = -math.inf
        self.waited_total = 0

    def __len__(self) -> int:
        return len(self._line)

    @property
    def closed_to_new(self) -> bool:
        """Whether a new request has to stand in line."""
        return bool(self._line) or self._probe is not None or self.held

    @property
    def under_way(self) -> int:
        """How many requests the backend works on."""
        return len(self._arrivals) - len(self._line)

    def hold(self) -> None:
        """From now on nobody is tried any more, and who comes has to wait."""
        self.held = True

    def began(self, request: Request) -> None:
        """The backend took a request and works on it."""
        if request.tag not in self._arrivals:
            self._arrived += 1
            self._arrivals[request.tag] = self._arrived

    def join(self, request: Request) -> None:
        """The backend refused a request for now, or others wait already."""
        tag = request.tag
        self.began(request)
        heapq.heappush(self._line, (self._arrivals[tag], request))
        if tag not in self._waited:
            self._waited.add(tag)
            self.waited_total += 1

    def refused(self, request: Request) -> None:
        """The backend has no resources: what is in line waits for an answer, or a moment."""
        if request is self._probe:
            self._probe = None
        self._refused = True
        self._due = trio.current_time() + RETRY_SECONDS
        self.join(request)

    def answered(self, request: Request) -> None:
        """A request that was `began`, or taken out of the line, has its answer: now is the time for another try."""
        self._arrivals.pop(request.tag, None)
        self._waited.discard(request.tag)
        if request is self._probe:
            self._probe = None
            self._refused = False
        self._due = -math.inf

    def take(self) -> Request | None:
        """Who is to be tried now, if anybody; it must become `refused` or `answered`."""
        if not self._line or self._probe is not None or self.held or trio.current_time() < self._due:
            return None
        request = heapq.heappop(self._line)[1]
        if self._refused:
            self._probe = request
        return request

    @property
    def deadline(self) -> float:
        """When `take` will have somebody, on Trio's clock, if nothing is answered meanwhile; infinite if that is not known."""
        return self._due if self._line and self._probe is None and not self.held else math.inf

    def clear(self) -> None:
        """Forget all who wait: their answers come from elsewhere."""
        self._line.clear()
        self._arrivals.clear()
        self._waited.clear()
        self._probe = None
