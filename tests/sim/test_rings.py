"""Reap and wait lose nothing, whatever Choices has them do; and a run replays."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import assert_checkpoints, wait_all_tasks_blocked

from tests.sim.mini import live, machine, served
from ublk_trio.kernel_sim import (
    Choices,
    DrawnChoices,
    FirstChoice,
    RecordedChoices,
    ReplayDivergedError,
    SeededChoices,
    SimKernel,
    hypothesis_choices,
    scheduled_by,
)
from ublk_trio.ring import RingStatistics
from ublk_trio.uapi import Feature, IoOp


async def test_wait_returns_when_something_is_ready() -> None:
    """A completion before or during a wait ends it; a wait is a checkpoint either way."""
    kernel = SimKernel(partition_scan=False)
    async with machine(kernel) as m, live(m) as device, trio.open_nursery() as nursery:
        ring = device.queue.ring
        woke = trio.Event()

        async def wait() -> None:
            await ring.wait()
            woke.set()

        nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        assert not woke.is_set()
        device.disk.submit(IoOp.READ, 0, 512)
        await woke.wait()
        with assert_checkpoints():
            await ring.wait()
        assert len(device.queue.events()) == 1


async def test_a_reap_that_finds_nothing_of_something_is_followed_by_a_wake_up() -> None:
    """If a reap leaves everything behind, the next wait returns at once and the next reap finds something."""
    # The last option of "reap-left-behind" leaves everything.
    choices = DrawnChoices(lambda what, options: options - 1 if what == "reap-left-behind" else 0)
    async with machine(SimKernel(choices, partition_scan=False)) as m, live(m) as device:
        device.disk.submit(IoOp.READ, 0, 512)
        for _ in range(2):
            device.disk.submit(IoOp.READ, 0, 512)
            assert device.queue.events() == []
            with trio.fail_after(1):
                await device.queue.ring.wait()
            (event,) = device.queue.events()
            device.queue.commit(event.tag, 512)


async def test_a_wait_may_end_for_nothing() -> None:
    """Spurious wake-ups happen, but never twice in a row, so that a loop of wait and reap gets to sleep."""
    choices = DrawnChoices(lambda what, options: 1 if what == "spurious-wake-up" else 0)
    async with machine(SimKernel(choices, partition_scan=False)) as m, live(m) as device:
        ring = device.queue.ring
        await ring.wait()
        assert len(ring.reap()) == 0
        with trio.move_on_after(0) as scope:
            await ring.wait()
        assert scope.cancelled_caught


async def test_completions_come_in_any_order() -> None:
    """Which completions a reap finds, and in which order, is a choice; over the seeds every order is found."""
    orders = set()
    for seed in range(100):
        async with machine(SimKernel(SeededChoices(seed), partition_scan=False)) as m, live(m) as device:
            for i in range(3):
                device.disk.submit(IoOp.READ, 512 * i, 512)
            sectors: list[int] = []
            while len(sectors) < 3:
                sectors += [event.start_sector for event in device.queue.events()]
            orders.add(tuple(sectors))
    assert len(orders) == 6


async def test_a_reap_finds_all_that_is_ready() -> None:
    """There is no other bound than the number of tags."""
    async with machine(SimKernel(partition_scan=False)) as m, live(m, depth=128) as device:
        for number in range(128):
            device.disk.submit(IoOp.READ, 512 * (number % 100), 512)
        assert len(device.queue.events()) == 128


async def test_statistics_count() -> None:
    """The ring counts calls and what they moved."""
    async with machine(SimKernel(partition_scan=False)) as m, live(m) as device:
        for _ in range(2):
            device.disk.submit(IoOp.READ, 0, 512)
        for event in device.queue.events():
            device.queue.commit(event.tag, 512)
        assert device.queue.events() == []
        assert device.queue.ring.statistics() == RingStatistics(reaps=2, events=2, commits=3, answers=6, waits=0)


# ---------------------------------------------------------------------- whole runs


async def workload(kernel: SimKernel) -> None:
    """A server with two queues, an application with four tasks that check what they wrote; at the end nothing is left."""
    flags = Feature.NEED_GET_DATA if kernel.choices.choose("mode", 2) else Feature(0)
    async with machine(kernel) as m:
        async with served(m, queues=2, depth=2, flags=flags) as device:

            async def work(number: int) -> None:
                for i in range(3):
                    data = bytes([16 * number + i]) * 1536
                    await device.disk.write(number * 4096, data)
                    assert await device.disk.read(number * 4096, 1536) == data

            async with trio.open_nursery() as nursery:
                for number in range(4):
                    nursery.start_soon(work, number)
        kernel.check()
    assert kernel.leftovers() == []


def run(choices: Choices) -> list[tuple[Any, ...]]:
    kernel = SimKernel(choices, log=True)
    with scheduled_by(choices):
        trio.run(workload, kernel)
    assert kernel.log
    return kernel.log


@pytest.mark.parametrize("seed", range(5))
def test_a_recorded_trace_replays_the_same_run(seed: int) -> None:
    """The same choices give the same events, to the last; other choices do not."""
    original = SeededChoices(seed)
    log = run(original)
    replay = RecordedChoices(original.trace)
    assert run(replay) == log
    assert replay.remaining == 0
    assert replay.trace == original.trace
    assert run(SeededChoices(seed + 1000)) != log
    with pytest.raises((ReplayDivergedError, ExceptionGroup)):
        run(RecordedChoices(original.trace[:-5]))


def test_calm_is_all_first_choices() -> None:
    """The fast calm path does what answering every question with 0 does, but for the questions."""
    calm = run(FirstChoice())
    asked = run(FirstChoice(record=True))
    assert calm == [event for event in asked if event[0] != "choice"] != asked
    assert asked == run(DrawnChoices(lambda what, options: 0))


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_every_choice_leads_to_the_end(data: st.DataObject) -> None:
    """Whatever the kernel chooses, data comes back as it was written, and nothing is left behind."""
    choices = hypothesis_choices(lambda what, options: data.draw(st.integers(0, options - 1), label=what))
    run(choices)
