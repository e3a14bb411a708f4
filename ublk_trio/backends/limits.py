"""`Limited`: a disk that carries out no more than so many requests, or so many bytes, a second.

Facts of SPDK's QoS limits, whose counterpart this is, and what is different here:

- Four limits: requests, and megabytes (of 1,048,576 bytes), of reads and writes together; megabytes of reads; megabytes of
  writes. 0 is no limit. All others (flushes, discards, zeroing) are not limited and not counted.
- There a limit is rounded up to thousands of requests, or whole megabytes, and its budget comes in slices of a
  millisecond. A slice that is not used up is lost, and one that is overdrawn is paid off from the next ones; so a request
  may be larger than a slice. Here a limit is any whole number, and what is not used up is lost after 50 ms: a process that
  was busy with something else for a while has not lost its users' share. In 10 s that is half a percent too much at most.
- A new limit begins with a fresh budget: what waits does not pay off the old one's debts.

A bucket of tokens, as it is done here, is one number: the time at which it is not in debt any more. A request goes when
that has come for each bucket that it needs, and moves it on by what it costs. While requests wait, the times follow from
each other and not from when somebody woke up; so the rate is exact, however late the wakings. One of those that wait
keeps the time for all, and lets everybody go who is due: waking up one after the other, each in a pass of Trio's loop of
its own, was seen to end at 13,000 requests a second.
"""

from __future__ import annotations

from collections import deque
from itertools import count
from math import inf
from typing import Final

import attrs
import trio

from ublk_trio.backends.base import Backend
from ublk_trio.backends.passthru import Passthru
from ublk_trio.errors import UsageError

#: What a bucket holds at most, in seconds of its rate.
BURST_SECONDS: Final = 0.05
_MBYTE: Final = 1 << 20


@attrs.frozen(kw_only=True)
class Limits:
    """What `Limited` lets through in a second; 0 is no limit. Megabytes are of 1,048,576 bytes.

    Raises:
        UsageError: a limit is no whole number from 0 up.
    """

    #: Reads and writes.
    rw_ios_per_sec: int = 0
    #: Megabytes read and written.
    rw_mbytes_per_sec: int = 0
    #: Megabytes read.
    r_mbytes_per_sec: int = 0
    #: Megabytes written.
    w_mbytes_per_sec: int = 0

    def __attrs_post_init__(self) -> None:
        for name, value in attrs.asdict(self).items():
            if type(value) is not int or value < 0:
                raise UsageError(
                    f"limits: {name} {value!r} is not possible: use a whole number from 0 up, 0 for no limit"
                )


class _Bucket:
    """One limit. `rate` is tokens a second; a request costs one token, or with `of_bytes` its bytes."""

    def __init__(self, rate: int, *, of_bytes: bool, free_at: float) -> None:
        self.rate = rate
        self.of_bytes = of_bytes
        #: When it is not in debt any more.
        self.free_at = free_at

    def take(self, moment: float, length: int) -> None:
        """Pays for a request that goes, or could have gone, at `moment`."""
        cost = length if self.of_bytes else 1
        self.free_at = max(self.free_at, moment - BURST_SECONDS) + cost / self.rate


@attrs.define(eq=False, kw_only=True)
class _Waiter:
    """A request that waits for its turn."""

    #: In the order in which all came.
    number: int
    arrived: float
    length: int
    task: trio.lowlevel.Task
    paid: bool = False


class _Lane:
    """The reads, or the writes: they go in the order in which they came."""

    def __init__(self) -> None:
        #: What all of them need. None: they are not limited.
        self.buckets: list[_Bucket] = []
        self.waiting: deque[_Waiter] = deque()

    @property
    def due(self) -> float:
        """When the next one can go."""
        return max((bucket.free_at for bucket in self.buckets), default=-inf)

    def pay(self, arrived: float, length: int) -> None:
        """Pays for a request that goes now."""
        # As of when it could have gone: nobody woke up before now, but that must not cost those behind it.
        moment = max(arrived, self.due)
        for bucket in self.buckets:
            bucket.take(moment, length)


class Limited(Passthru):
    """`base`, with limits. Reads and writes wait for their turn; everything else goes by.

    Reads go in the order in which they came, and so do writes. Where both need the same limit, the older one goes first;
    one that waits for its own limit does not hold up the others. A request may be larger than what a second allows: it
    goes when it is its turn, and those behind it wait so much the longer. Where nothing is limited, there is no
    checkpoint that the base has not.

    *Cancellation*: one that waits gives up its place, and has used up nothing.

    Args:
        base: another backend. It is opened and closed with this one, and belongs to it alone.
        limits: to begin with; by default none.
    """

    def __init__(self, base: Backend, limits: Limits | None = None) -> None:
        super().__init__(base)
        self._lanes = self._reads, self._writes = _Lane(), _Lane()
        self._arrivals = count()
        #: The one of those that wait that sleeps until somebody is due; the others are woken up.
        self._timekeeper: _Waiter | None = None
        self._changed = trio.Event()
        self._limits = Limits()
        self._buckets: dict[str, _Bucket] = {}
        # Nobody waits yet, so the buckets may be full; and there may be no clock yet.
        self._apply(limits if limits is not None else Limits(), -inf)

    @property
    def limits(self) -> Limits:
        """The limits that are in force."""
        return self._limits

    def set_limits(self, limits: Limits) -> None:
        """Puts other limits in force, at once and for those that wait, too. One that stays the same is not begun anew.

        To be called within Trio.
        """
        self._apply(limits, trio.current_time())
        self._look_again()

    async def read(self, offset: int, buffer: memoryview) -> None:
        """Reads when it is its turn."""
        if self._reads.buckets or self._reads.waiting:
            await self._pass(self._reads, len(buffer))
        await self.base.read(offset, buffer)

    async def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        """Writes when it is its turn."""
        if self._writes.buckets or self._writes.waiting:
            await self._pass(self._writes, len(data))
        await self.base.write(offset, data, fua=fua)

    def _apply(self, limits: Limits, free_at: float) -> None:
        buckets: dict[str, _Bucket] = {}
        for name, limit in attrs.asdict(limits).items():
            of_bytes = name != "rw_ios_per_sec"
            rate = limit * (_MBYTE if of_bytes else 1)
            old = self._buckets.get(name)
            if old is not None and old.rate == rate:
                buckets[name] = old
            elif rate:
                buckets[name] = _Bucket(rate, of_bytes=of_bytes, free_at=free_at)
        self._limits, self._buckets = limits, buckets
        self._reads.buckets = [bucket for name, bucket in buckets.items() if name != "w_mbytes_per_sec"]
        self._writes.buckets = [bucket for name, bucket in buckets.items() if name != "r_mbytes_per_sec"]

    async def _pass(self, lane: _Lane, length: int) -> None:
        """Returns when it is this one's turn, and has paid."""
        now = trio.current_time()
        if not lane.waiting and lane.due <= now and not any(one.waiting and one.due <= now for one in self._lanes):
            lane.pay(now, length)
            return
        waiter = _Waiter(number=next(self._arrivals), arrived=now, length=length, task=trio.lowlevel.current_task())
        lane.waiting.append(waiter)
        if self._timekeeper is None:
            self._timekeeper = waiter
        else:
            if len(lane.waiting) == 1:
                # Nobody of its lane waited, so the timekeeper sleeps for as long as suits the other one.
                self._look_again()
            # Returns when it may go, or is to keep the time.
            await trio.lowlevel.wait_task_rescheduled(lambda _: self._give_up(lane, waiter))
        if waiter is self._timekeeper:
            await self._keep_time(lane, waiter)

    def _look_again(self) -> None:
        """Wakes up the timekeeper: who is due has changed."""
        self._changed.set()
        self._changed = trio.Event()

    def _give_up(self, lane: _Lane, waiter: _Waiter) -> trio.lowlevel.Abort:
        lane.waiting.remove(waiter)
        return trio.lowlevel.Abort.SUCCEEDED

    async def _keep_time(self, lane: _Lane, waiter: _Waiter) -> None:
        """Lets everybody go when it is time, until it is this one's own; then another one does that."""
        try:
            self._let_go()
            while not waiter.paid:
                with trio.move_on_at(min(one.due for one in self._lanes if one.waiting)):
                    await self._changed.wait()
                self._let_go()
        finally:
            if not waiter.paid:
                lane.waiting.remove(waiter)
            waiting = [one.waiting[0] for one in self._lanes if one.waiting]
            self._timekeeper = min(waiting, key=lambda one: one.number, default=None)
            if self._timekeeper is not None:
                trio.lowlevel.reschedule(self._timekeeper.task)

    def _let_go(self) -> None:
        """Whoever is due goes, the oldest first."""
        now = trio.current_time()
        while due := [one for one in self._lanes if one.waiting and one.due <= now]:
            lane = min(due, key=lambda one: one.waiting[0].number)
            waiter = lane.waiting.popleft()
            lane.pay(waiter.arrived, waiter.length)
            waiter.paid = True
            if waiter is not self._timekeeper:
                trio.lowlevel.reschedule(waiter.task)
