"""A disk is stopped only if nobody has it open, on the simulated kernel; the real one's turn is tests/kernel/test_try_stop.py."""

from __future__ import annotations

import errno
from functools import partial
from unittest import mock

import pytest
import trio
import trio.testing

from ublk_trio import (
    Backend,
    DeviceOptions,
    KernelError,
    Memory,
    SimKernel,
    StuckError,
    UsageError,
    open_target,
)
from ublk_trio.control import Control
from ublk_trio.uapi import DeviceState, IoOp

MIB = 1 << 20
BLOCK = 512


def calm_kernel(version: tuple[int, int] = (7, 3)) -> SimKernel:
    return SimKernel(version=version, partition_scan=False)


async def _check_used_and_unused() -> None:
    kernel = calm_kernel()
    async with open_target(kernel) as target:
        device = await target.start_device(Memory(MIB))
        disk = kernel.block_device(device.dev_id)
        with disk.open():
            with pytest.raises(KernelError, match="device 0 is in use: 1 simulated programs") as caught:
                await target.stop_device(device, only_if_unused=True)
            assert caught.value.errno == errno.EBUSY
            assert kernel.devices[device.dev_id].info.state is DeviceState.LIVE
            await disk.write(0, b"x" * BLOCK)
            assert await disk.read(0, BLOCK) == b"x" * BLOCK
        await target.stop_device(device, only_if_unused=True)
        assert kernel.device_ids() == []
    assert kernel.leftovers() == []


async def test_used_and_unused() -> None:
    """A disk that somebody has open goes on, and the error says who has it; closed, it is stopped like any other."""
    with trio.fail_after(10):
        await _check_used_and_unused()


async def test_planted_bug_is_caught() -> None:
    """A stop that does not ask who uses the disk is noticed."""
    with trio.fail_after(10):
        await _check_used_and_unused()
        with (
            mock.patch.object(Control, "try_stop_device", Control.stop_device),
            pytest.raises(BaseException, match=r"DID NOT RAISE|closed"),
        ):
            await _check_used_and_unused()


@pytest.mark.parametrize("version", [(6, 1), (6, 12), (6, 17)])
async def test_kernel_that_cannot(version: tuple[int, int]) -> None:
    """A kernel without the command is told so in words, and nothing is stopped: asking first would be a race."""
    kernel = calm_kernel(version)
    with trio.fail_after(10):
        async with open_target(kernel) as target:
            device = await target.start_device(Memory(MIB))
            with pytest.raises(UsageError, match=r"SAFE_STOP_DEV, which came with Linux 7\.0"):
                await target.stop_device(device, only_if_unused=True)
            await kernel.block_device(device.dev_id).write(0, bytes(BLOCK))


async def test_twice_and_together_with_a_stop() -> None:
    """Several at once, and one for a disk that is being stopped already: each returns when it is gone."""
    kernel = calm_kernel()
    with trio.fail_after(10):
        async with open_target(kernel) as target:
            for others in (True, False):
                device = await target.start_device(Memory(MIB))
                async with trio.open_nursery() as nursery:
                    for only_if_unused in (True, others, True):
                        nursery.start_soon(partial(target.stop_device, device, only_if_unused=only_if_unused))
                assert kernel.device_ids() == []


class Hangs(Backend):
    """Answers nothing."""

    size = MIB

    async def read(self, offset: int, buffer: memoryview) -> None:
        await trio.sleep_forever()


def test_backend_that_does_not_answer() -> None:
    """The kernel waits for what is under way, but nobody waits for the kernel without a bound; a plain stop then helps."""
    kernel = calm_kernel()

    async def main() -> None:
        async with open_target(kernel) as target:
            device = await target.start_device(Hangs(), DeviceOptions(grace_seconds=1.0))
            bio = kernel.block_device(device.dev_id).submit(IoOp.READ, 0, BLOCK)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(StuckError, match="queue 0 tag 0: READ of 512 bytes at 0"):
                await target.stop_device(device, only_if_unused=True)
            await target.stop_device(device)
            assert await bio.wait() == -errno.EIO

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert kernel.leftovers() == []


async def test_cancelled() -> None:
    """Cancelled at any moment it either went on or was stopped; a stop brings it to its end, and nothing is left."""
    for passes in range(30):
        kernel = calm_kernel()
        with trio.fail_after(10):
            async with open_target(kernel) as target:
                device = await target.start_device(Memory(MIB))
                with trio.CancelScope() as scope:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(partial(target.stop_device, device, only_if_unused=True))
                        for _ in range(passes):
                            await trio.lowlevel.checkpoint()
                        scope.cancel()
                await target.stop_device(device)
        assert kernel.leftovers() == []
