"""Time that passes only while nobody can do anything, and then at once to the next deadline.

Trio asks its clock how long to sleep when no task is runnable. This one never lets it sleep: it jumps to the deadline.
Where there is none, nobody would ever run again, because a run does no input or output of its own: that is a hang,
known at once. Trio's own wake-up pipe is looked at a few times before that is said.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import trio

_IDLE_PASSES_MAX = 100


class HangError(Exception):
    """No task can run, and no deadline is to come."""


class VirtualClock(trio.abc.Clock):
    """Give it to `trio.run`.

    ``on_pass`` is told how many seconds pass, before anybody wakes up: the kernel's clock goes with this one.
    ``on_hang`` is called once in a hang, and may make a task runnable. If all hangs again, that comes out of `trio.run`
    as a `trio.TrioInternalError` whose cause is `HangError`.
    """

    def __init__(self, on_hang: Callable[[], None], on_pass: Callable[[float], None] = lambda seconds: None) -> None:
        self._now = 0.0
        self._on_pass = on_pass
        self._on_hang = on_hang
        self._idle_passes = 0
        self._hung = False

    def start_clock(self) -> None:
        pass

    def current_time(self) -> float:
        return self._now

    def deadline_to_sleep_time(self, deadline: float) -> float:
        if deadline < math.inf:
            if deadline > self._now:
                seconds, self._now = deadline - self._now, deadline
                self._on_pass(seconds)
            self._idle_passes = 0
            return 0.0
        self._idle_passes += 1
        if self._idle_passes > _IDLE_PASSES_MAX:
            if self._hung:
                raise HangError("no task can run, and no deadline is to come")
            self._hung = True
            self._idle_passes = 0
            self._on_hang()
        return 0.0
