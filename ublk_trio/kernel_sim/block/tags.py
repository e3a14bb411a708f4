"""A hardware queue: its tags, and who waits for one.

**Supported.** As many requests in flight as the queue has tags; those that find none wait, and get one in the order of
their arrival unless Choices wakes another of the first eight; a request that the driver gives back for more goes before
all others and keeps its tag, unless the queue is the only one (then a scheduler may sit above it, and Choices has any
free tag for it); requests of a flush sequence keep theirs to the sequence's end.
**Rejected.** Nothing. **Differs from Linux.** No I/O scheduler: what waits is not sorted. A plugged request gets its tag
when the plug is let go. What is requeued is delivered again at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from ublk_trio.kernel_sim.block import merge
from ublk_trio.kernel_sim.block.request import NO_TAG

if TYPE_CHECKING:
    from ublk_trio.kernel_sim.block.flush import FlushQueue
    from ublk_trio.kernel_sim.block.limits import Limits
    from ublk_trio.kernel_sim.block.request import Request
    from ublk_trio.kernel_sim.choices import Choices
    from ublk_trio.kernel_sim.tag import SimTag

#: How many waiters may be woken first: Linux spreads them over so many wait queues.
_WAKEABLE: Final = 8


class HardwareQueue:
    """The block layer's side of a queue; the driver's side is its subclass."""

    #: The driver's, by number.
    tags: Sequence[SimTag]

    def __init__(self, depth: int, choices: Choices, *, only_one: bool) -> None:
        self.depth = depth
        #: Requests that found no free tag, behind those that were requeued.
        self.waiting: deque[Request] = deque()
        #: Of the disk, while there is one.
        self.limits: Limits | None = None
        self.flush: FlushQueue | None = None
        self._free = list(range(depth - 1, -1, -1))
        self._choices = choices
        self._only_one = only_one
        self._running = False

    def _dispatch(self, request: Request) -> None:
        """Give a request, which has its tag, to the driver."""
        raise NotImplementedError

    def attach(self, limits: Limits, flush: FlushQueue) -> None:
        """A disk starts to use the queue."""
        assert len(self._free) == self.depth, "a new disk finds all tags free"
        assert not self.waiting
        self.limits = limits
        self.flush = flush

    # ------------------------------------------------------------------ from the block layer

    def submit(self, request: Request) -> None:
        """A new request: give it a tag, or let it wait for one."""
        free = self._free
        if not free or self.waiting:
            self._wait(request)
            return
        if self._choices.calm or len(free) == 1:
            request.tag = free.pop()
        else:
            request.tag = free.pop(-1 - self._choices.choose("tag", len(free)))
        self.issue(request)

    def issue(self, request: Request) -> None:
        """Start a request that has its tag."""
        if request.keeps_tag:
            assert self.flush is not None
            self.flush.issue(request)
        else:
            self._dispatch(request)

    def _wait(self, request: Request) -> None:
        if not self._choices.calm and self.limits is not None:
            for index, waiter in enumerate(self.waiting):
                merged = merge.merged(waiter, request, self.limits)
                if merged is not None and self._choices.choose("merge-waiting", 2):
                    self.waiting[index] = merged
                    return
        self.waiting.append(request)

    # ------------------------------------------------------------------ from the driver

    def _release(self, tag: SimTag) -> None:
        """The driver is done with the tag's request, or puts it back into `waiting`."""
        request = tag.request
        assert request is not None
        tag.request = None
        if not request.keeps_tag:
            request.tag = NO_TAG
            self._free.append(tag.tag)
        if self.waiting:
            self._run()

    def _requeue(self, tag: SimTag) -> None:
        """The tag's request goes back to the head of the line."""
        request = tag.request
        assert request is not None
        if not request.keeps_tag and self._only_one and not self._choices.calm:
            self.waiting.appendleft(request)
            self._release(tag)
        else:
            tag.request = None
            self.waiting.appendleft(request)
            self._run()

    def give_back(self, request: Request) -> None:
        """A request that the driver does not have any more gives its tag back."""
        if request.tag != NO_TAG:
            self._free.append(request.tag)
            request.tag = NO_TAG
            if self.waiting:
                self._run()

    def _run(self) -> None:
        """Start what waits, as far as there are tags; bounded by what waits, and not entered twice."""
        if self._running:
            return
        self._running = True
        try:
            waiting, free = self.waiting, self._free
            while waiting:
                if waiting[0].tag != NO_TAG:
                    request = waiting.popleft()
                    self._dispatch(request)
                    continue
                if not free:
                    return
                index = 0 if self._choices.calm else self._choices.choose("waiter", min(len(waiting), _WAKEABLE))
                request = waiting[index]
                del waiting[index]
                if request.tag == NO_TAG:
                    request.tag = free.pop(-1 - self._choices.choose("tag", len(free)))
                    self.issue(request)
                else:
                    self._dispatch(request)
        finally:
            self._running = False
