"""Each fault of the table happens when it is enabled and chosen, and never otherwise."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.sim.mini import Machine, RawQueue, basic_params, live, machine, opened
from ublk_trio.kernel_sim import DrawnChoices, SeededChoices, SimKernel
from ublk_trio.kernel_sim.faults import BY_NAME, FAULTS, ORDINARY, Layer, of_layers
from ublk_trio.uapi import ControlCommand, DevInfo, Feature, IoOp

SIMULATED = of_layers(Layer.RING, Layer.COMMANDS, Layer.PROCESS)


class Bad:
    """Choices that are calm, until they are to be bad: then they take the last option of one fault's questions."""

    def __init__(self, fault: str) -> None:
        self.questions = BY_NAME[fault].choices
        self.bad = False
        self.asked: set[str] = set()

    def choose(self, what: str, options: int) -> int:
        self.asked.add(what)
        return options - 1 if self.bad and what in self.questions else 0


Trial = Callable[[Machine, Bad], Awaitable[bool]]


async def completions_late(m: Machine, bad: Bad) -> bool:
    async with live(m) as device:
        device.disk.submit(IoOp.READ, 0, 512)
        bad.bad = True
        return device.queue.events() == []


async def completions_reordered(m: Machine, bad: Bad) -> bool:
    async with live(m) as device:
        for number in range(2):
            device.disk.submit(IoOp.READ, 512 * number, 512)
        bad.bad = True
        return [event.start_sector for event in device.queue.events()] == [1, 0]


async def spurious_wake_up(m: Machine, bad: Bad) -> bool:
    async with live(m) as device:
        bad.bad = True
        woke = trio.Event()

        async def wait() -> None:
            await device.queue.ring.wait()
            woke.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        return woke.is_set()


async def worker_late(m: Machine, bad: Bad) -> bool:
    worker = m.kernel.open_worker(0)
    info = await m.add(0, depth=1)
    assert await m.set_params(0, basic_params()) == 0
    char = await m.kernel.open_char_device(info, ioctl_encoded=True)
    queue = RawQueue(char.open_queue(0, buffers=1, worker=worker))
    bad.bad = True
    queue.fetch_all()
    untaken, fetched = queue.ring.untaken, m.kernel.devices[0].queues[0].fetched
    assert untaken + fetched == 1
    with trio.fail_after(30):
        while queue.ring.untaken:
            await queue.ring.wait()
    assert m.kernel.devices[0].queues[0].fetched == 1
    queue.ring.close()
    char.close()
    worker.close()
    assert await m.delete() == 0
    return untaken == 1


async def copy_short(m: Machine, bad: Bad) -> bool:
    async with live(m, flags=Feature.USER_COPY) as device:
        ring = device.queue.ring
        read = device.disk.submit(IoOp.READ, 0, 1024)
        write = device.disk.submit(IoOp.WRITE, 4096, b"w" * 1024)
        bad.bad = True
        of_read, of_write = device.queue.events()
        copied = ring.copy_in(of_write.tag)
        for event in (of_read, of_write):
            device.queue.commit(event.tag, 1024)
        assert write.result == 1024
        assert read.result == (copied or 1024)
        assert ring.statistics().copies_failed == (1 if copied else 0)
        return copied == -errno.EIO


async def late_cancel(m: Machine, bad: Bad) -> bool:
    async with live(m) as device:
        bad.bad = True
        with trio.CancelScope() as scope:
            scope.cancel()
            await m.stop()
        return not device.disk.exists


async def held_longer(m: Machine, bad: Bad) -> bool:
    await m.add()
    bad.bad = True
    passes = 0

    async def count() -> None:
        nonlocal passes
        while True:
            await trio.lowlevel.checkpoint()
            passes += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(count)
        await trio.lowlevel.checkpoint()
        before = passes
        assert await m.delete() == 0
        nursery.cancel_scope.cancel()
    return passes - before >= 3


async def _refused_with(m: Machine, bad: Bad, number: int) -> bool:
    """ADD_DEV and START_DEV: both or neither; whoever is refused can try again."""
    bad.bad = True
    buffer = bytearray(DevInfo(dev_id=7, nr_hw_queues=1, queue_depth=1, max_io_buf_bytes=4096).pack())
    added = await m.command(ControlCommand.ADD_DEV, 7, buffer=buffer)
    assert m.kernel.device_ids() == ([] if added else [7])
    bad.bad = False
    if not added:
        assert await m.delete(7) == 0
    async with opened(m) as device:
        assert await m.set_params(0, basic_params()) == 0
        device.queue.fetch_all()
        bad.bad = True
        started = await m.start()
        assert device.disk.exists == (started == 0)
        bad.bad = False
        if started:
            assert await m.start() == 0
    assert added == started
    return added == -number


async def no_memory(m: Machine, bad: Bad) -> bool:
    return await _refused_with(m, bad, errno.ENOMEM)


async def interrupted(m: Machine, bad: Bad) -> bool:
    if not await _refused_with(m, bad, errno.EINTR):
        return False
    bad.bad = False
    async with live(m) as device:
        bad.bad = True
        # Its server has the char device open: there is something to wait for.
        assert await m.delete() == -errno.EINTR
        device.close()
        return m.kernel.device_ids() == []


async def server_killed(m: Machine, bad: Bad) -> bool:
    async with live(m) as device:
        bio = device.disk.submit(IoOp.READ, 0, 512)
        bad.bad = True
        try:
            device.queue.events()
        except trio.ClosedResourceError:
            assert bio.result == -errno.EIO
            with pytest.raises(trio.ClosedResourceError):
                await m.info()
            bad.bad = False
            async with machine(m.kernel) as another:
                assert await another.delete() == 0
            return True
        device.queue.commit(0, 512)
        return False


TRIALS: dict[str, Trial] = {
    "completions-late": completions_late,
    "completions-reordered": completions_reordered,
    "spurious-wake-up": spurious_wake_up,
    "worker-late": worker_late,
    "copy-short": copy_short,
    "late-cancel": late_cancel,
    "held-longer": held_longer,
    "no-memory": no_memory,
    "interrupted": interrupted,
    "server-killed": server_killed,
}


def test_every_fault_of_the_simulator_is_tried() -> None:
    """The table has no fault that nobody has seen happen."""
    assert set(TRIALS) == SIMULATED


@pytest.mark.parametrize("enabled", [True, False], ids=["enabled", "not-enabled"])
@pytest.mark.parametrize("fault", TRIALS)
async def test_fault(fault: str, enabled: bool) -> None:
    """It happens if it is enabled and chosen; if it is not enabled it is not even asked about."""
    bad = Bad(fault)
    kernel = SimKernel(DrawnChoices(bad.choose), partition_scan=False, faults={fault} if enabled else set())
    with trio.fail_after(30):
        async with machine(kernel) as m:
            assert await TRIALS[fault](m, bad) is enabled
    assert (bad.asked & set(bad.questions) != set()) is enabled
    assert kernel.leftovers() == []
    kernel.check()


def test_faults_can_stop() -> None:
    """The set of what is enabled may be emptied at any time: from then on nothing goes wrong."""
    kernel = SimKernel(SeededChoices(1), faults={"no-memory"})
    assert True in {kernel.strikes("no-memory") for _ in range(50)}
    kernel.faults.clear()
    assert {kernel.strikes("no-memory") for _ in range(50)} == {False}


def test_default_is_a_healthy_machine() -> None:
    """Without a set, what is enabled is what any kernel does; and nobody else's set is changed."""
    kernel = SimKernel()
    assert kernel.faults == ORDINARY == {fault.name for fault in FAULTS if fault.ordinary}
    assert not ORDINARY & {"no-memory", "interrupted", "server-killed", "lying-flush"}
    kernel.faults.clear()
    assert SimKernel().faults == ORDINARY


def test_unknown_fault() -> None:
    """A misspelt fault is refused: a run without it would prove nothing."""
    with pytest.raises(ValueError, match="there is no fault no-memroy: known are completions-late, "):
        SimKernel(faults={"no-memroy"})
