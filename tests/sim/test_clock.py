"""Time passes only when a test says so."""

from __future__ import annotations

from functools import partial

import pytest

from ublk_trio.kernel_sim import SimKernel


def test_timers_fire_in_the_order_of_their_deadlines() -> None:
    """A timer fires once, at its deadline; of two with the same one the first that was set comes first."""
    kernel = SimKernel(log=True)
    fired: list[tuple[str, float]] = []

    def fire(name: str) -> None:
        fired.append((name, kernel.clock.now))

    for name, seconds in (("late", 30), ("first", 5), ("second", 5)):
        kernel.clock.after(seconds, partial(fire, name))
    kernel.let_time_pass(4.5)
    assert fired == []
    kernel.let_time_pass(0.5)
    assert fired == [("first", 5.0), ("second", 5.0)]
    kernel.let_time_pass(100)
    assert fired[2:] == [("late", 30.0)]
    assert kernel.clock.now == 105
    assert kernel.log == [("time", 4.5), ("time", 0.5), ("time", 100)]


def test_a_timer_may_set_and_cancel_timers() -> None:
    """What is set by a timer that fires counts from its deadline, and fires in the same stretch of time if that is over."""
    kernel = SimKernel()
    fired: list[float] = []
    cancelled = kernel.clock.after(2, lambda: fired.append(-1))

    def tick() -> None:
        fired.append(kernel.clock.now)
        kernel.clock.cancel(cancelled)
        kernel.clock.after(1, tick)

    kernel.clock.after(1, tick)
    kernel.let_time_pass(3.5)
    assert fired == [1.0, 2.0, 3.0]
    with pytest.raises(AssertionError, match="forwards"):
        kernel.let_time_pass(-1)
