"""`Delay`: a disk that is slower than the one it stands on.

Facts, and what they mean:

- SPDK's delay bdev, whose counterpart this is, adds to each read and write an average latency, and to one in a hundred,
  by chance, the 99th percentile's instead. So the mean of what is added is 0.99 average + 0.01 p99, more than the
  "average". It lets flushes, discards and zeroes go by; here a flush waits like a write, as on a disk whose cache is
  slow to empty.
- The wait comes after the base has answered: what it takes itself is not subtracted, and a write is done before it is
  late.
- Python's epoll waits whole milliseconds, rounded up, and a task wakes up when the machine has time: on a busy machine
  a sleep of 1 ms was seen to take 1.4. So what one request waited too long, the next ones wait less. Their mean is what
  was asked for, also far below a millisecond; the single wait is not: of ten waits of 100 µs one takes a millisecond
  and the others nothing. What no making up helps against is too much work: a process that answers 20,000 requests a
  second has 64 requests of 1 ms waiting for 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from types import MappingProxyType
from typing import Final, Literal, get_args

import trio

from ublk_trio.backends.base import Backend
from ublk_trio.backends.passthru import Passthru
from ublk_trio.errors import UsageError

#: What can be late, and by which of its two latencies.
LatencyKind = Literal["avg_read", "p99_read", "avg_write", "p99_write"]

#: One request in so many gets the 99th percentile's latency.
_ONE_IN: Final = 100
#: Of one wait that was too long, no more is made up for: after a pause of the whole process nobody would wait at all.
_MADE_UP_SECONDS_MAX: Final = 0.1


class Delay(Passthru):
    """Each read and write of `base` is answered later; a flush as late as a write.

    Requests wait side by side: a hundred at a time take as long as one. What fails in the base fails at once.
    *Cancellation*: while it waits, a request has been carried out.

    Args:
        base: another backend. It is opened and closed with this one, and belongs to it alone.
        avg_read_us, p99_read_us: microseconds that reads wait: 99 of 100 the first, one of 100 the second.
        avg_write_us, p99_write_us: the same for writes and flushes. 0 adds nothing, not even a checkpoint.
        random: draws the one in a hundred; a seeded one makes runs repeatable.

    Raises:
        UsageError: a latency is no whole number from 0 up, or a 99th percentile is less than its average.
    """

    def __init__(
        self,
        base: Backend,
        *,
        avg_read_us: int,
        p99_read_us: int,
        avg_write_us: int,
        p99_write_us: int,
        random: Random | None = None,
    ) -> None:
        super().__init__(base)
        self._latency_us: dict[LatencyKind, int] = {}
        self.update_latency("avg_read", avg_read_us)
        self.update_latency("p99_read", p99_read_us)
        self.update_latency("avg_write", avg_write_us)
        self.update_latency("p99_write", p99_write_us)
        for what, average, p99 in (("read", avg_read_us, p99_read_us), ("write", avg_write_us, p99_write_us)):
            if p99 < average:
                raise UsageError(f"delay: p99_{what}_us {p99} is less than avg_{what}_us {average}: give at least that")
        self._random = random if random is not None else Random()
        self._overslept = 0.0

    @property
    def latency_us(self) -> Mapping[LatencyKind, int]:
        """The four latencies, microseconds."""
        return MappingProxyType(self._latency_us)

    def update_latency(self, kind: LatencyKind, microseconds: int) -> None:
        """Changes one latency, for the requests that have not begun to wait.

        An average above its 99th percentile is not refused: whoever changes both has to begin with one. Raises
        `UsageError`, and changes nothing, for another kind or for what is no whole number from 0 up.
        """
        if kind not in get_args(LatencyKind):
            raise UsageError(f"delay: latency {kind!r} is unknown: use {', '.join(get_args(LatencyKind))}")
        if type(microseconds) is not int or microseconds < 0:
            raise UsageError(f"delay: {kind} {microseconds!r} is not possible: use a whole number of µs from 0 up")
        self._latency_us[kind] = microseconds

    async def read(self, offset: int, buffer: memoryview) -> None:
        """Reads, and waits."""
        await self.base.read(offset, buffer)
        await self._wait("avg_read", "p99_read")

    async def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        """Writes, and waits."""
        await self.base.write(offset, data, fua=fua)
        await self._wait("avg_write", "p99_write")

    async def flush(self) -> None:
        """Flushes, and waits as long as a write."""
        await self.base.flush()
        await self._wait("avg_write", "p99_write")

    async def _wait(self, average: LatencyKind, p99: LatencyKind) -> None:
        asked = self._latency_us[p99 if self._random.randrange(_ONE_IN) == 0 else average] / 1e6
        if not asked:
            return
        # Taken out before the wait: requests that wait at the same time must not make up for the same excess each.
        made_up = min(self._overslept, asked)
        self._overslept -= made_up
        due = trio.current_time() + asked - made_up
        await trio.sleep_until(due)
        self._overslept += min(trio.current_time() - due, _MADE_UP_SECONDS_MAX)
