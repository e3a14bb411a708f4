"""The bounded buffer pool of the GET_DATA and USER_COPY modes: memory only for the requests in flight.

In COPY mode every tag has a buffer of its own, posted ahead. In the others a queue has fewer buffers than tags: a
READ or WRITE takes one when it arrives and gives it back when its commit was **submitted** (a READ's data is copied
out during the submit, so not before). A request that finds none waits; waiters are served in the order in
which they came.
"""

from __future__ import annotations

from collections import deque

import attrs


@attrs.frozen(kw_only=True)
class PoolStatistics:
    """A buffer pool's state. Counts of buffers, and of requests."""

    buffers: int
    free: int
    waiting: int
    waited_total: int


class BufferPool:
    """Which slots of a queue's arena are free, and which tags wait for one."""

    def __init__(self, buffers: int) -> None:
        assert buffers > 0
        self._buffers = buffers
        # The last one freed is the next one taken: its pages are warm, and memory in use stays near what is in flight.
        self._free = list(reversed(range(buffers)))
        self._waiting: deque[int] = deque()
        self._waited_total = 0

    def take(self, tag: int) -> int | None:
        """A free slot; or None, and then the tag stands in line for `next_waiter`."""
        if self._free and not self._waiting:
            return self._free.pop()
        self._waiting.append(tag)
        self._waited_total += 1
        return None

    def give_back(self, slot: int) -> None:
        """The slot is free again."""
        assert slot not in self._free, f"slot {slot} was given back twice"
        self._free.append(slot)

    def next_waiter(self) -> tuple[int, int] | None:
        """The tag that waited longest, with the slot that it gets now; None when nobody waits or nothing is free."""
        if not self._waiting or not self._free:
            return None
        return self._waiting.popleft(), self._free.pop()

    def statistics(self) -> PoolStatistics:
        return PoolStatistics(
            buffers=self._buffers, free=len(self._free), waiting=len(self._waiting), waited_total=self._waited_total
        )
