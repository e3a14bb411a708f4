"""The flush machinery of a hardware queue: what a write-back cache makes of preflush and FUA.

A request that wants more than its data written goes through steps: a flush before, the data, a flush after. It keeps its
tag through all of them. One FLUSH is on its way at a time, on the tag of the first request that waits for it; while it
is, others gather in a second list, and the next FLUSH serves all of these. The two lists swap roles with every FLUSH.

**Supported.** Flushes alone; preflush and FUA in all combinations, with and without the disk's own FUA (then it is a
flag, and only preflush takes a step); no FLUSH while data of a sequence is being written, unless that has been so for
five seconds; a FLUSH that fails fails all that wait for it.
**Rejected.** Nothing: without VOLATILE_CACHE `disk` sends nothing here.
**Differs from Linux.** A step begins at once, where Linux hands it to a worker.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Final

from ublk_trio.kernel_sim.block.request import Piece, Request
from ublk_trio.uapi import IoOp

if TYPE_CHECKING:
    from ublk_trio.kernel_sim.block.bio import Bio
    from ublk_trio.kernel_sim.block.tags import HardwareQueue
    from ublk_trio.kernel_sim.clock import SimClock

#: A flush has no place on the disk: the block layer leaves its sector at -1.
FLUSH_SECTOR: Final = (1 << 64) - 1
#: After so long a flush goes out although data is still being written.
PENDING_SECONDS: Final = 5.0
_FLUSH: Final = int(IoOp.FLUSH)
_EMPTY: Final = memoryview(b"")


class Step(IntEnum):
    """What a sequence consists of."""

    PREFLUSH = 0
    DATA = 1
    POSTFLUSH = 2


class SequencedRequest(Piece):
    """A request with steps. The driver sees it as its data is due, on its own tag."""

    __slots__ = ("queue", "steps")

    keeps_tag = True

    def __init__(
        self,
        bio: Bio,
        op_flags: int,
        start_sector: int,
        length: int,
        view: memoryview,
        *,
        queue: HardwareQueue,
        steps: tuple[Step, ...],
        metadata: memoryview | None = None,
    ) -> None:
        assert steps == tuple(sorted(set(steps)))
        super().__init__(bio, op_flags, start_sector, length, view, metadata=metadata)
        self.queue = queue
        #: Those that are not done.
        self.steps = list(steps)

    def end(self, error: int) -> None:
        """The driver is done with its data."""
        assert self.queue.flush is not None
        self.queue.flush.data_ended(self, error)

    def finish(self, error: int) -> None:
        """The sequence is over."""
        self.queue.give_back(self)
        super().end(error)


class FlushRequest(Request):
    """The FLUSH itself, on a tag that belongs to the first request that waits for it."""

    __slots__ = ("_flush",)

    keeps_tag = True

    def __init__(self, flush: FlushQueue, first: SequencedRequest) -> None:
        super().__init__(first.bio, _FLUSH, FLUSH_SECTOR, 0, _EMPTY)
        self.tag = first.tag
        self._flush = flush

    def end(self, error: int) -> None:
        self._flush.flush_ended(error)


class FlushQueue:
    """One hardware queue's sequences."""

    def __init__(self, queue: HardwareQueue, clock: SimClock) -> None:
        self._queue = queue
        self._clock = clock
        #: Two lists of those that wait for a FLUSH. Different `_pending` and `_running` mean that one is on its way.
        self._lists: tuple[list[SequencedRequest], list[SequencedRequest]] = ([], [])
        self._pending = 0
        self._running = 0
        self._pending_since = 0.0
        self._data_in_flight = 0
        #: What is to be issued as soon as the books are in order: FLUSHes go before data, data last in first out.
        self._flushes: list[FlushRequest] = []
        self._data: list[SequencedRequest] = []

    def issue(self, request: Request) -> None:
        """A sequence begins."""
        assert isinstance(request, SequencedRequest)
        self._next_step(request, 0)
        self._issue()

    def data_ended(self, request: SequencedRequest, error: int) -> None:
        """The driver is done with a sequence's data."""
        self._data_in_flight -= 1
        del request.steps[0]
        self._next_step(request, error)
        self._issue()

    def flush_ended(self, error: int) -> None:
        """The driver is done with the FLUSH."""
        served = self._lists[self._running]
        self._running ^= 1
        waiters = served.copy()
        served.clear()
        for request in waiters:
            del request.steps[0]
            self._next_step(request, error)
        self._issue()

    def _next_step(self, request: SequencedRequest, error: int) -> None:
        if error or not request.steps:
            request.finish(error)
        elif request.steps[0] is Step.DATA:
            self._data_in_flight += 1
            self._data.append(request)
        else:
            pending = self._lists[self._pending]
            if not pending:
                self._pending_since = self._clock.now
            pending.append(request)
        self._kick()

    def _kick(self) -> None:
        pending = self._lists[self._pending]
        if self._pending != self._running or not pending:
            return
        if self._data_in_flight and self._clock.now < self._pending_since + PENDING_SECONDS:
            return
        self._pending ^= 1
        self._flushes.append(FlushRequest(self, pending[0]))

    def _issue(self) -> None:
        # What the driver refuses at once ends here again: take the lists first.
        flushes, self._flushes = self._flushes, []
        data, self._data = self._data, []
        for flush in flushes:
            self._queue._dispatch(flush)
        for request in reversed(data):
            self._queue._dispatch(request)
