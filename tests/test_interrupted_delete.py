"""A DEL_DEV that a signal interrupts: the device is removed, and its id is nobody's, or another's."""

from __future__ import annotations

import errno
import logging

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from ublk_trio import DeviceOptions, Memory, open_target
from ublk_trio.control import open_control
from ublk_trio.errors import KernelError
from ublk_trio.kernel_sim import DrawnChoices, SimKernel
from ublk_trio.uapi import DevInfo

MIB = 1 << 20


def kernel_that_interrupts() -> SimKernel:
    """Each DEL_DEV that has to wait for somebody gets EINTR."""
    kernel = SimKernel(DrawnChoices(lambda what, options: int(what == "DEL_DEV wait")), partition_scan=False)
    kernel.control_faults = frozenset({"DEL_DEV wait"})
    return kernel


async def test_the_rest_of_the_wait_is_waited(autojump_clock: MockClock, caplog: pytest.LogCaptureFixture) -> None:
    """The stop ends when the last user closes the disk, not before, and without a complaint."""
    kernel = kernel_that_interrupts()
    async with open_target(kernel) as target:
        device = await target.start_device(Memory(MIB))
        disk = kernel.block_device(device.dev_id).open()
        device.ask_to_stop()
        with trio.move_on_after(4) as scope:
            await device.wait_closed()
        assert scope.cancelled_caught
        assert kernel.device_ids() == [0]
        disk.close()
        await device.wait_closed()
    assert kernel.leftovers() == []
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_the_wait_is_bounded(autojump_clock: MockClock, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever keeps the disk open holds up nobody for longer than DEL_DEV may take; the device goes with its last user."""
    kernel = kernel_that_interrupts()
    async with open_target(kernel) as target:
        device = await target.start_device(Memory(MIB))
        disk = kernel.block_device(device.dev_id).open()
    assert trio.current_time() >= 5
    assert "the kernel will delete it when the last program" in caplog.text
    assert kernel.device_ids() == [0]
    disk.close()
    assert kernel.leftovers() == []


@pytest.mark.parametrize("live", [False, True])
async def test_who_got_the_id_meanwhile_keeps_it(autojump_clock: MockClock, *, live: bool) -> None:
    """It is not asked to go a second time: by then the id may be another program's device, started or not yet."""
    kernel = kernel_that_interrupts()
    async with open_target(kernel) as theirs:
        async with open_target(kernel) as ours:
            device = await ours.start_device(Memory(MIB))
            disk = kernel.block_device(0).open()
            device.ask_to_stop()
            await wait_all_tasks_blocked()
            disk.close()
            assert kernel.device_ids() == []
            if live:
                other = await theirs.start_device(Memory(MIB), DeviceOptions(dev_id=0))
            else:
                async with open_control(kernel) as control:
                    await control.add_device(DevInfo(dev_id=0, nr_hw_queues=1, queue_depth=1, max_io_buf_bytes=4096))
            await device.wait_closed()
        assert kernel.device_ids() == [0]
        assert kernel.block_device(0).exists is live
        if live:
            other.ask_to_stop()
            await other.wait_closed()


async def test_another_error_is_an_error() -> None:
    """Only EINTR means that the device is removed."""
    kernel = SimKernel(privileged=False)
    async with open_control(kernel) as control:
        with pytest.raises(KernelError) as caught:
            await control.delete_device(0)
        assert caught.value.errno == errno.ENODEV
