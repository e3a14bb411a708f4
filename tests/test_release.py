"""A server hands a live disk over to the next one, on the simulated kernel; the real one's turn is tests/kernel/test_handover.py."""

from __future__ import annotations

import errno
import itertools
import math
from unittest import mock

import attrs
import pytest
import trio
import trio.testing

from tests.search import broken_invariant
from tests.sim.mini import machine
from ublk_trio import (
    Backend,
    DataMode,
    Device,
    DeviceOptions,
    Memory,
    Recovery,
    SimKernel,
    StuckError,
    UsageError,
    open_target,
)
from ublk_trio.handlers import Serve
from ublk_trio.kernel_sim import FirstChoice, SeededChoices
from ublk_trio.queue import Queue
from ublk_trio.uapi import DeviceState, Feature, IoOp
from ublk_trio.workload import Workload, WorkloadReport

MIB = 1 << 20
BLOCK = 4096
HANDOVERS = 4
#: Longer than a load takes from one answer to its next request.
BACKEND_SECONDS_MIN = 0.005
#: With QUIESCE, without it, and with the recovery of before 6.15.
VERSIONS = [(7, 3), (6, 16), (6, 15), (6, 12)]
WAYS = [
    pytest.param(version, recovery, serve, mode, id=f"{version[0]}.{version[1]}-{recovery.value}-{serve}-{mode.value}")
    for version, recovery, serve, mode in itertools.product(
        VERSIONS, (Recovery.REQUEUE, Recovery.REISSUE), ("inline", "async"), DataMode
    )
    if recovery is Recovery.REISSUE or version >= (6, 16)
]


class Slow(Backend):
    """Memory that takes a moment, another one for each request."""

    def __init__(self, memory: Memory, seconds_min: float = 0.0) -> None:
        self.memory = memory
        self.size = memory.size
        self.seconds_min = seconds_min
        self.calls = 0

    async def _wait(self) -> None:
        self.calls += 1
        await trio.sleep(self.seconds_min + self.calls % 4 * 0.001)

    async def read(self, offset: int, buffer: memoryview) -> None:
        await self._wait()
        self.memory.read(offset, buffer)

    async def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        await self._wait()
        self.memory.write(offset, data, fua=fua)


async def hand_over_under_load(
    kernel: SimKernel, options: DeviceOptions, *, backend_seconds_min: float = 0.0, seconds_max: float = 60.0
) -> None:
    """From one server to the next, several times, while a verified load runs; whatever goes wrong is an AssertionError."""
    memory = Memory(MIB)
    report = WorkloadReport(disk="disk")
    load = Workload(seed=3, seconds=math.inf, region_bytes=64 * 1024)

    def backend() -> Backend:
        return Slow(memory, backend_seconds_min) if options.serve == "async" else memory

    with trio.fail_after(seconds_max):
        async with trio.open_nursery() as nursery:
            for number in range(HANDOVERS + 1):
                async with open_target(kernel) as target:
                    if number == 0:
                        device = await target.start_device(backend(), options)
                        nursery.start_soon(load.run, kernel.block_device(0), report)
                    else:
                        device = await target.recover_device(0, backend(), options)
                    await _requests(device, 40)
                    if number == HANDOVERS:
                        nursery.cancel_scope.cancel()
                    else:
                        await target.release_device(device)
                        assert device.released
                        assert target.devices == ()
                if number < HANDOVERS and not kernel.version.release_ends_server:
                    # If the server held every tag these kernels find out only when it is dead, by a request's time limit.
                    kernel.crash_server(0)
                    kernel.let_time_pass(31.0)
    assert report.faults == []
    assert report.bytes_verified > 0
    kernel.check()
    assert kernel.leftovers() == []


async def _requests(device: Device, number: int) -> None:
    """Wait until so many more were answered."""
    before = device.statistics().requests
    while device.statistics().requests < before + number:  # noqa: ASYNC110 - there is no event to wait for
        await trio.sleep(0.001)


@pytest.mark.parametrize("seed", [None, 1])
@pytest.mark.parametrize(("version", "recovery", "serve", "mode"), WAYS)
async def test_under_load(
    version: tuple[int, int], recovery: Recovery, serve: Serve, mode: DataMode, seed: int | None
) -> None:
    """Who uses the disk sees a pause and no error, and every byte is right, however often it is handed over."""
    choices = FirstChoice() if seed is None else SeededChoices(seed)
    options = DeviceOptions(
        recovery=recovery, serve=serve, mode=mode, queues=2, depth=4, pool_buffers=2, max_io_bytes=16384
    )
    await hand_over_under_load(SimKernel(choices, version=version), options)


#: The wait between two looks is over at once, as if the machine had had something else to do meanwhile.
busy_machine = mock.patch("ublk_trio.device._LOOK_SECONDS", 0.0)


async def _hand_over_on_a_busy_machine() -> None:
    options = DeviceOptions(recovery=Recovery.REQUEUE, queues=2, depth=4, max_io_bytes=16384)
    with busy_machine:
        for seed in range(10):
            await hand_over_under_load(SimKernel(SeededChoices(seed), version=(6, 16)), options, seconds_max=5.0)


async def test_a_busy_machine() -> None:
    """What came just before the disk is let go is answered, although no time was left to take it."""
    await _hand_over_on_a_busy_machine()
    with mock.patch("ublk_trio.device._CALM_LOOKS", 0), broken_invariant():
        await _hand_over_on_a_busy_machine()


@pytest.mark.parametrize(
    "plant",
    [
        # What the backend works on is not waited for.
        mock.patch.object(Queue, "is_done", True),
        # The disk is let go without a word to the kernel.
        mock.patch.object(Device, "_quiesce", mock.AsyncMock(return_value=True)),
    ],
    ids=["not waited for", "not quiesced"],
)
async def test_planted_bugs_are_caught(plant: mock._patch[object]) -> None:
    """A server that lets go too early leaves requests to nobody, which is noticed."""
    options = DeviceOptions(recovery=Recovery.REQUEUE, serve="async", queues=2, depth=4, max_io_bytes=16384)

    async def hand_over(seconds_max: float) -> None:
        # Whenever a disk is let go, the backend has something under way.
        await hand_over_under_load(
            SimKernel(SeededChoices(0)), options, backend_seconds_min=BACKEND_SECONDS_MIN, seconds_max=seconds_max
        )

    with plant, busy_machine, broken_invariant():
        await hand_over(5.0)
    await hand_over(60.0)


@attrs.define
class Gated(Backend):
    """Reads when it is told to."""

    size: int = MIB
    go_on: trio.Event = attrs.Factory(trio.Event)

    async def read(self, offset: int, buffer: memoryview) -> None:
        await self.go_on.wait()
        buffer[:] = bytes(len(buffer))


def test_backend_that_does_not_answer() -> None:
    """After the grace time it is let go all the same; what was not answered goes to the next server, and is named."""

    async def main() -> None:
        kernel = SimKernel(partition_scan=False)
        options = DeviceOptions(recovery=Recovery.REISSUE, grace_seconds=1.0)
        async with open_target(kernel) as target:
            device = await target.start_device(Gated(), options)
            bio = kernel.block_device(0).submit(IoOp.READ, 0, BLOCK)
            await trio.testing.wait_all_tasks_blocked()
            begin = trio.current_time()
            with pytest.raises(StuckError, match=r"reissue says: queue 0 tag 0: READ of 4096 bytes at 0"):
                await target.release_device(device)
            assert 1.0 <= trio.current_time() - begin < 2.0
            assert kernel.devices[0].info.state is DeviceState.QUIESCED
            assert not bio.done
            await target.recover_device(0, Memory(MIB))
            assert await bio.wait() == BLOCK
        assert kernel.leftovers() == []

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


#: Seconds between two requests of each of some programs.
PAUSES = (0.02, 0.04, 0.06)


def _held_when_let_go() -> int:
    """How many of the requests of programs that pause now and then the old server has when its rings are closed."""
    held: list[int] = []
    close_rings = Device._close_rings

    def noted(device: Device) -> None:
        held.append(sum(len(queue.unanswered()) for queue in device._queues))
        close_rings(device)

    async def read(kernel: SimKernel, pause: float) -> None:
        while True:
            await kernel.block_device(0).read(0, BLOCK)
            await trio.sleep(pause)

    async def main() -> None:
        kernel = SimKernel(partition_scan=False, version=(6, 12))
        async with trio.open_nursery() as nursery, open_target(kernel) as target:
            device = await target.start_device(Memory(MIB), DeviceOptions(recovery=Recovery.REISSUE))
            for pause in PAUSES:
                nursery.start_soon(read, kernel, pause)
            await trio.sleep(1.0)
            with mock.patch.object(Device, "_close_rings", noted):
                await target.release_device(device)
            await target.recover_device(0, Memory(MIB))
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    return held[0]


def test_nothing_is_on_its_way_when_it_is_let_go() -> None:
    """Where the kernel cannot hold requests back, rings are closed when all who use the disk wait: Linux 6.12 may crash else."""
    assert _held_when_let_go() == len(PAUSES)
    with mock.patch("ublk_trio.device._CALM_LOOKS", 0):
        assert _held_when_let_go() < len(PAUSES)


async def test_what_cannot_be_released() -> None:
    """A disk without recovery, one that is being stopped, one whose requests would fail: refused with a word why, and it goes on."""
    with trio.fail_after(30):
        kernel = SimKernel(version=(6, 12), partition_scan=False)
        async with open_target(kernel) as target:
            for recovery, why in ((Recovery.OFF, "without recovery"), (Recovery.REQUEUE, r"came with Linux 6\.16")):
                device = await target.start_device(Memory(MIB), DeviceOptions(recovery=recovery))
                with pytest.raises(UsageError, match=why):
                    await target.release_device(device)
                await kernel.block_device(device.dev_id).write(0, bytes(BLOCK))
            device.ask_to_stop()
            with pytest.raises(UsageError, match="is being stopped"):
                await target.release_device(device)


async def test_fail_mode() -> None:
    """With recovery `fail` nothing waits: errors until the next server, as that mode promises."""
    kernel = SimKernel(partition_scan=False)
    with trio.fail_after(30):
        async with open_target(kernel) as target:
            device = await target.start_device(Memory(MIB), DeviceOptions(recovery=Recovery.FAIL))
            await target.release_device(device)
            assert await kernel.block_device(0).submit(IoOp.READ, 0, BLOCK).wait() == -errno.EREMOTEIO
            await target.recover_device(0, Memory(MIB))
            assert await kernel.block_device(0).submit(IoOp.READ, 0, BLOCK).wait() == BLOCK


async def test_stop_and_release_meet() -> None:
    """Whoever asked for the other end of a disk is told which one it was."""
    kernel = SimKernel(partition_scan=False)
    with trio.fail_after(30):
        async with machine(kernel) as control, open_target(kernel) as target:
            device = await target.start_device(Memory(MIB), DeviceOptions(recovery=Recovery.REQUEUE))
            assert Feature.QUIESCE in device.info.flags
            device.ask_to_release()
            with pytest.raises(UsageError, match="was released before"):
                await target.stop_device(device)
            device = await target.recover_device(0, Memory(MIB))
            device.ask_to_release()
            assert await control.stop() == 0
            with pytest.raises(UsageError, match="was stopped by another program"):
                await target.release_device(device)
    assert kernel.leftovers() == []
