"""Trio's own decisions, made by Choices as well: without them a run with tasks does not replay.

**Supported.** The order in which Trio runs the tasks that are ready at the same moment.
**Rejected.** Nothing. **Differs from Trio.** By default Trio reverses each batch of ready tasks at random; here option
0 is the order in which the tasks were made, and any other option runs one of them first.

It rests on two private names of `trio._core._run`, which Trio keeps for Hypothesis' sake; a test fails when they
change.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import trio._core._run

from ublk_trio.kernel_sim.choices import Choices


class _Scheduler:
    """Stands in for the `random.Random` that Trio shuffles with."""

    def __init__(self, choices: Choices) -> None:
        self._choices = choices
        #: What ended the choosing: a replay that diverged, Hypothesis giving up. Raised here it would break Trio itself.
        self.error: BaseException | None = None

    def shuffle(self, batch: list[object]) -> None:
        """``batch`` comes sorted by age, and is run from its end."""
        batch.reverse()
        if len(batch) > 1 and not self._choices.calm and self.error is None:
            try:
                first = self._choices.choose("task", len(batch))
            except BaseException as error:  # raised again at the end of `scheduled_by`
                self.error = error
            else:
                batch.append(batch.pop(-1 - first))

    def uniform(self, low: float, high: float) -> float:
        """Where Trio's clock starts: it must not matter."""
        return low


@contextmanager
def scheduled_by(choices: Choices) -> Iterator[None]:
    """Inside the block, and for `trio.run` called in it, tasks run in the order that ``choices`` says.

    For the whole process: not for two threads that run Trio at once. What ``choices`` raises when asked for a task's
    turn is raised at the end of the block.
    """
    from unittest import mock  # here: it brings asyncio, a twentieth of every program's start

    scheduler = _Scheduler(choices)
    with mock.patch.multiple(trio._core._run, _ALLOW_DETERMINISTIC_SCHEDULING=True, _r=scheduler):
        try:
            yield
        except BaseException as error:
            if scheduler.error is not None:
                raise scheduler.error from error
            raise
    if scheduler.error is not None:
        raise scheduler.error
