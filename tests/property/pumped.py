"""A Trio run that is pumped by hand: the test decides when tasks run, in which order, and when time passes.

Facts: `trio.lowlevel.start_guest_run` leaves it to its host when the next pass of Trio's loop happens. It moves to a thread
only where Trio would sleep; a system task that is always runnable keeps it from ever sleeping. One pass runs every task that
was runnable when it began, in an order that Trio draws from its own random generator.

So: `PumpedRun.run_pass` is one pass; the order comes from `choose`; time stands still until `let_time_pass`; and a run in which
nothing is runnable, nothing is timed and the main task has not ended is a **hang**, known at once, without a wall clock.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, MutableSequence, Sequence
from typing import Any

import outcome
import trio
import trio.testing
from trio._core import _run as trio_run

#: ``choose(what, options)``: a number from 0 to ``options`` - 1; 0 is the calm one.
Choose = Callable[[str, int], int]
#: How many orders of the same tasks are tried: as they were made, backwards, and some shuffled.
ORDERS = 6
#: Passes in which an abandoned run must have ended.
ABANDON_PASSES_MAX = 2_000
#: Passes that Trio takes from the end of the main task to the end of the run.
TIDY_PASSES_MAX = 20


class AbandonedError(BaseException):
    """Thrown into every task of a run that failed, so that the next one can start."""


class _TaskOrder(random.Random):
    """Stands in for Trio's random generator; Trio sorts the runnable tasks by age, then calls `shuffle`."""

    choose: Choose
    background: trio.lowlevel.Task | None = None

    def shuffle(self, x: MutableSequence[Any]) -> None:
        background = self.background
        tasks: list[Any] = [task for task in x if task is not background]
        if len(tasks) > 1:
            order = self.choose("task order", ORDERS)
            if order == 1:
                tasks.reverse()
            elif order > 1:
                random.Random(order).shuffle(tasks)
        if len(tasks) < len(x):
            tasks.append(background)
        # Trio takes them from the end.
        x[:] = tasks[::-1]


class AtStep(trio.abc.Instrument):
    """Calls back before the step with a given number: a step is one turn of one task."""

    def __init__(self, number: int, interrupt: Callable[[], None]) -> None:
        self.number = number
        self.steps = 0
        self._interrupt = interrupt

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if "_stay_runnable" in task.name or "<init>" in task.name:
            return
        self.steps += 1
        if self.steps == self.number:
            self._interrupt()


async def _stay_runnable() -> None:
    with contextlib.suppress(trio.Cancelled):
        while True:
            await trio.lowlevel.checkpoint()


class PumpedRun:
    """One Trio run. Use `run_pass` until `ended`, then `result`; or `abandon` it."""

    def __init__(
        self,
        main: Callable[[], Awaitable[object]],
        choose: Choose,
        *,
        instruments: Sequence[trio.abc.Instrument] = (),
    ) -> None:
        self.passes = 0
        self.clock = trio.testing.MockClock()
        self._calls: deque[Callable[[], object]] = deque()
        self._outcome: outcome.Outcome[object] | None = None
        self._order = _TaskOrder()
        self._order.choose = choose
        self._trios: tuple[Any, Any] = (trio_run._r, trio_run._ALLOW_DETERMINISTIC_SCHEDULING)
        _set_scheduler(self._order, True)
        self._main = main
        self._main_ended = False
        trio.lowlevel.start_guest_run(
            self._run_main,
            run_sync_soon_threadsafe=self._calls.append,
            done_callback=self._done,
            host_uses_signal_set_wakeup_fd=True,
            clock=self.clock,
            instruments=instruments,
        )
        self._order.background = trio.lowlevel.spawn_system_task(_stay_runnable)

    async def _run_main(self) -> None:
        try:
            await self._main()
        finally:
            self._main_ended = True

    def _done(self, result: outcome.Outcome[object]) -> None:
        self._outcome = result
        _set_scheduler(*self._trios)

    @property
    def ended(self) -> bool:
        """Whether the main task has ended and everything with it."""
        return self._outcome is not None

    @property
    def error(self) -> BaseException | None:
        """What the main task raised, once ended."""
        return self._outcome.error if isinstance(self._outcome, outcome.Error) else None

    @property
    def idle(self) -> bool:
        """Whether no task would run in the next pass."""
        # What trio.lowlevel.current_statistics() calls tasks_runnable; that counts much else, too, and this is asked all the time.
        return self.ended or len(trio_run.GLOBAL_RUN_CONTEXT.runner.runq) <= 1

    def run_pass(self) -> None:
        """One pass of Trio's loop; and when the main task ended with it, those that Trio needs to tidy up."""
        self._tick()
        if self._main_ended:
            self._tidy_up()

    def _tidy_up(self) -> None:
        for _ in range(TIDY_PASSES_MAX):
            if self.ended:
                return
            self._tick()
        raise AssertionError("harness: the main task has ended, but not the run")

    def _tick(self) -> None:
        assert self._calls, "harness: the run sleeps, its background task is gone"
        self.passes += 1
        self._calls.popleft()()

    def run_until_idle(self, *, passes_max: int) -> bool:
        """Run until nothing is runnable. False if that did not come about."""
        for _ in range(passes_max):
            if self.idle:
                return True
            self.run_pass()
        return self.idle

    def let_time_pass(self, seconds: float) -> None:
        """Advance the clock; what is due then runs with the next pass."""
        self.clock.jump(seconds)
        if not self.ended:
            self.run_pass()

    @property
    def seconds_to_next_deadline(self) -> float:
        """How far the next deadline is; infinite without one."""
        return math.inf if self.ended else trio.lowlevel.current_statistics().seconds_to_next_deadline

    def abandon(self) -> None:
        """End it by force, whatever state it is in: throw into every task that waits, over and over."""
        for _ in range(ABANDON_PASSES_MAX):
            if self.ended:
                return
            self.run_pass()
            if not self.ended:
                for task in _user_tasks():
                    if task._abort_func is not None:
                        task._attempt_abort(_raise_abandoned)
        raise AssertionError("harness: the run cannot even be abandoned")


def _set_scheduler(generator: random.Random, deterministic: bool) -> None:
    setattr(trio_run, "_r", generator)  # noqa: B010 - declared Final
    setattr(trio_run, "_ALLOW_DETERMINISTIC_SCHEDULING", deterministic)  # noqa: B010 - declared Final


def _raise_abandoned() -> None:
    raise AbandonedError


def _user_tasks() -> Iterator[trio.lowlevel.Task]:
    root = trio.lowlevel.current_root_task()
    assert root is not None
    # The root's first nursery holds the system tasks, its main task's tree hangs from the other.
    found = [task for nursery in root.child_nurseries for task in nursery.child_tasks]
    while found:
        task = found.pop()
        found += [child for nursery in task.child_nurseries for child in nursery.child_tasks]
        if "_stay_runnable" not in task.name and "TrioToken" not in task.name:
            yield task
