"""The kernel's clock: it stands still until somebody lets time pass.

**Supported.** Timers that fire once, in the order of their deadlines and, at the same deadline, in the order in which
they were set; setting and cancelling timers while others fire.
**Rejected.** Time that runs backwards. **Differs from Linux.** Timers are exact; nothing else takes time.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

import attrs


@attrs.define(order=True)
class Timer:
    """Set by `SimClock.after`; `SimClock.cancel` ends it."""

    deadline: float
    number: int
    callback: Callable[[], None] | None = attrs.field(order=False)


class SimClock:
    """Seconds since the machine came up, and what is to happen when."""

    def __init__(self) -> None:
        self.now = 0.0
        self._timers: list[Timer] = []
        self._numbers = itertools.count()

    def after(self, seconds: float, callback: Callable[[], None]) -> Timer:
        """Call ``callback`` once so many seconds have passed."""
        timer = Timer(self.now + seconds, next(self._numbers), callback)
        heapq.heappush(self._timers, timer)
        return timer

    def cancel(self, timer: Timer) -> None:
        """It does not fire any more; nothing if it has fired."""
        timer.callback = None

    def advance(self, seconds: float) -> None:
        """Let so many seconds pass; timers fire with `now` at their deadline."""
        assert seconds >= 0, "time runs forwards"
        end = self.now + seconds
        while self._timers and self._timers[0].deadline <= end:
            timer = heapq.heappop(self._timers)
            self.now = max(self.now, timer.deadline)
            callback, timer.callback = timer.callback, None
            if callback is not None:
                callback()
        self.now = end
