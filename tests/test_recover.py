"""The engine takes over devices whose server is gone, on the simulated kernel; the real one's turn is tests/kernel/test_recovery.py."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from unittest import mock

import attrs
import pytest
import trio
import trio.testing

from tests.sim.mini import MIB, Machine, basic_params, live, machine
from ublk_trio import (
    Backend,
    DataMode,
    DeviceOptions,
    Memory,
    Recovery,
    SimKernel,
    Target,
    UsageError,
    open_target,
    recover_device,
)
from ublk_trio.control import Control
from ublk_trio.errors import KernelError
from ublk_trio.kernel_sim import Bio, SimBlockDevice
from ublk_trio.options import MODE_FLAGS, RECOVERY_FLAGS
from ublk_trio.recovery import NOTICE_SECONDS, RELEASE_SECONDS
from ublk_trio.uapi import DeviceState, DevInfo, Feature, IoOp

BLOCK = 4096
NONE = Feature(0)
#: The pid of no process: Linux's own bound.
NOBODY = 1 << 22


@attrs.frozen
class Dead:
    """A device whose server was killed with one WRITE in its hands, and on which a second one came since."""

    control: Machine
    disk: SimBlockDevice
    bios: list[Bio]
    #: Open, and without a device.
    target: Target

    async def results(self) -> list[int]:
        return [await bio.wait() for bio in self.bios]

    async def state(self) -> DeviceState:
        return (await self.control.info()).state


@asynccontextmanager
async def dead_device(kernel: SimKernel, recovery: Recovery, more: Feature = NONE) -> AsyncIterator[Dead]:
    async with machine(kernel) as control:
        async with live(control, queues=2, depth=4, flags=more | RECOVERY_FLAGS[recovery]) as device:
            held = device.disk.submit(IoOp.WRITE, 0, b"h" * BLOCK)
            assert sum(len(queue.events()) for queue in device.queues) == 1
            kernel.crash_server(device.info.dev_id)
            later = device.disk.submit(IoOp.WRITE, BLOCK, b"l" * BLOCK)
            async with open_target(kernel) as target:
                yield Dead(control, device.disk, [held, later], target)
        assert kernel.device_ids() == []
    assert kernel.leftovers() == []


def calm_kernel(version: tuple[int, int] = (7, 3)) -> SimKernel:
    return SimKernel(version=version, partition_scan=False)


@pytest.mark.parametrize("version", [(6, 14), (6, 16), (7, 3)])
@pytest.mark.parametrize(
    ("recovery", "of_held", "of_later"),
    [
        (Recovery.REQUEUE, -errno.EIO, BLOCK),
        (Recovery.REISSUE, BLOCK, BLOCK),
        (Recovery.FAIL, -errno.EIO, -errno.EREMOTEIO),
    ],
)
async def test_taken_over(recovery: Recovery, of_held: int, of_later: int, version: tuple[int, int]) -> None:
    """What was held and what came since end as the device's own recovery says; then the disk is like any other."""
    kernel = calm_kernel(version)
    with trio.fail_after(30):
        async with dead_device(kernel, recovery) as dead:
            device = await dead.target.recover_device(0, Memory(MIB))
            assert (device.dev_id, device.options.recovery, device.info.nr_hw_queues) == (0, recovery, 2)
            assert await dead.state() is DeviceState.LIVE
            assert await dead.results() == [of_held, of_later]
            await dead.disk.write(2 * BLOCK, b"n" * BLOCK)
            expected = [b"h" if of_held > 0 else b"\0", b"l" if of_later > 0 else b"\0", b"n"]
            for block, byte in enumerate(expected):
                assert await dead.disk.read(block * BLOCK, BLOCK) == byte * BLOCK


@pytest.mark.parametrize("mode", DataMode)
async def test_own_mode(mode: DataMode) -> None:
    """The device's own way of moving data is used, whatever the options say."""
    with trio.fail_after(30):
        async with dead_device(calm_kernel(), Recovery.REISSUE, MODE_FLAGS[mode]) as dead:
            device = await dead.target.recover_device(0, Memory(MIB), DeviceOptions(queues=1, depth=64))
            assert device.options.mode is mode
            assert (device.options.queues, device.options.depth) == (2, 4)
            assert await dead.results() == [BLOCK, BLOCK]


class Broken(Memory):
    """Cannot be opened."""

    async def open(self) -> None:
        raise OSError(errno.ENXIO, "gone")


@pytest.mark.parametrize(
    ("backend", "why"),
    [
        (Memory(MIB // 2), "is a disk of 1048576 bytes"),
        (Memory(MIB, block_size=4096), "has blocks of 512 bytes"),
        (Broken(MIB), "gone"),
    ],
)
async def test_refused_and_left_as_it_was(backend: Backend, why: str) -> None:
    """A backend that does not fit is refused; the device, and what waits for it, go on waiting for one that does."""
    with trio.fail_after(30):
        async with dead_device(calm_kernel(), Recovery.REISSUE) as dead:
            with pytest.raises((UsageError, OSError), match=why):
                await dead.target.recover_device(0, backend)
            assert await dead.state() is DeviceState.QUIESCED
            assert not any(bio.done for bio in dead.bios)
            await dead.target.recover_device(0, Memory(MIB))
            assert await dead.results() == [BLOCK, BLOCK]


class _AfterSteps(trio.abc.Instrument):
    """Calls back when tasks took so many steps."""

    def __init__(self, steps: int, call: Callable[[], None]) -> None:
        self._left = steps
        self._call = call

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._left -= 1
        if self._left == 0:
            self._call()


async def test_cancelled_at_every_step() -> None:
    """A take-over that is cancelled, at whatever moment, leaves a device that can be taken over."""
    for steps in range(1, 100):
        scope = trio.CancelScope()
        instrument = _AfterSteps(steps, scope.cancel)
        with trio.fail_after(30):
            async with dead_device(calm_kernel(), Recovery.REISSUE) as dead:
                trio.lowlevel.add_instrument(instrument)
                with scope:
                    await dead.target.recover_device(0, Memory(MIB))
                trio.lowlevel.remove_instrument(instrument)
                if scope.cancelled_caught:
                    await dead.target.recover_device(0, Memory(MIB))
                assert await dead.results() == [BLOCK, BLOCK]
        if not scope.cancel_called:
            assert steps > 10, "there were steps to be cancelled at"
            return
    pytest.fail("it never came to an end")


@pytest.mark.parametrize(("seconds", "in_time"), [(NOTICE_SECONDS - 5, True), (NOTICE_SECONDS + 5, False)])
def test_a_server_s_end_that_the_kernel_has_not_noticed(seconds: float, in_time: bool) -> None:
    """That is waited for, but not for ever; then it is said, and the disk is as it was."""
    usual = Control.device_info

    async def main() -> None:
        began = trio.current_time()

        async def device_info(control: Control, dev_id: int) -> DevInfo:
            info = await usual(control, dev_id)
            if trio.current_time() < began + seconds:
                return attrs.evolve(info, state=DeviceState.LIVE, ublksrv_pid=NOBODY)
            return info

        async with dead_device(calm_kernel(), Recovery.REISSUE) as dead:
            with mock.patch.object(Control, "device_info", device_info):
                if in_time:
                    await dead.target.recover_device(0, Memory(MIB))
                    assert seconds <= trio.current_time() - began < NOTICE_SECONDS
                    return
                with pytest.raises(UsageError, match="has not noticed in 45 s"):
                    await dead.target.recover_device(0, Memory(MIB))
            await dead.target.recover_device(0, Memory(MIB))

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.mark.parametrize(("seconds", "in_time"), [(RELEASE_SECONDS - 1, True), (RELEASE_SECONDS + 1, False)])
def test_a_server_s_end_that_lasts(seconds: float, in_time: bool) -> None:
    """While the kernel still takes the last server's files apart the take-over is tried again, but not for ever."""
    usual = Control.start_recovery

    async def main() -> None:
        began = trio.current_time()

        async def start_recovery(control: Control, dev_id: int) -> None:
            if trio.current_time() < began + seconds:
                raise KernelError(errno.EBUSY, "busy")
            await usual(control, dev_id)

        async with dead_device(calm_kernel(), Recovery.REISSUE) as dead:
            with mock.patch.object(Control, "start_recovery", start_recovery):
                if not in_time:
                    with pytest.raises(KernelError, match="busy"):
                        await dead.target.recover_device(0, Memory(MIB))
                    await trio.sleep(seconds)
                await dead.target.recover_device(0, Memory(MIB))

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


async def test_what_is_no_device_to_recover() -> None:
    """A live device, one without recovery, a stopped one, none at all: each is refused with a word why."""
    kernel = calm_kernel()
    with trio.fail_after(60):
        async with machine(kernel) as control, open_target(kernel) as target:
            own = await target.start_device(Memory(MIB), DeviceOptions(recovery=Recovery.REISSUE))
            with pytest.raises(UsageError, match="this target serves it"):
                await target.recover_device(own.dev_id, Memory(MIB))
            plain = await target.start_device(Memory(MIB))
            async with trio.open_nursery() as nursery:
                with pytest.raises(UsageError, match="without recovery"):
                    await recover_device(kernel, plain.dev_id, Memory(MIB))
                nursery.cancel_scope.cancel()
            info = await control.add(flags=RECOVERY_FLAGS[Recovery.REISSUE])
            assert await control.set_params(info.dev_id, basic_params()) == 0
            with pytest.raises(UsageError, match="is stopped"):
                await target.recover_device(info.dev_id, Memory(MIB))
            assert await control.delete(info.dev_id) == 0
            with pytest.raises(KernelError) as caught:
                await target.recover_device(99, Memory(MIB))
            assert caught.value.errno == errno.ENODEV
