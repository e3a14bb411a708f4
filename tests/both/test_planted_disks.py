"""A suite that cannot fail is no suite: disks with a bug planted, which the checks of `tests/both` must find."""

from __future__ import annotations

from unittest import mock

import pytest
import trio

from tests.both.arms import Arm
from ublk_trio import DataMode, DeviceOptions, Memory, open_target
from ublk_trio.control import open_control
from ublk_trio.queue import Queue
from ublk_trio.uapi import DevInfo, Feature
from ublk_trio.workload import Workload, WorkloadReport

MIB = 1 << 20


class FlipsABit(Memory):
    """One bit of each long read comes back wrong."""

    def read(self, offset: int, buffer: memoryview) -> int | None:
        done = super().read(offset, buffer)
        buffer[len(buffer) // 2] ^= 1 if len(buffer) > 8192 else 0
        return done


class ForgetsZeroing(Memory):
    """Zeroing is acknowledged and not done."""

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        pass


class OneBlockLate(Memory):
    """Every write goes one block too far."""

    def write(self, offset: int, data: memoryview, *, fua: bool) -> int | None:
        return super().write(min(offset + self.block_size, self.size - len(data)), data, fua=fua)


@pytest.mark.parametrize("backend", [FlipsABit, ForgetsZeroing, OneBlockLate])
async def test_wrong_data_is_found(arm: Arm, backend: type[Memory]) -> None:
    """The workload reports a fault on a disk that loses, moves or changes what was written."""
    with trio.fail_after(60):
        async with open_target(arm.kernel) as target:
            device = await target.start_device(backend(8 * MIB), DeviceOptions(depth=16))
            async with arm.open_disk(device) as disk:
                report = WorkloadReport(disk=device.path)
                await Workload(seed=1, seconds=50.0, operations=40, region_bytes=256 * 1024).run(disk, report)
    assert any("wrong byte" in fault for fault in report.faults)


async def test_data_that_was_not_copied_is_found(arm: Arm) -> None:
    """The workload reports a fault where the data of writes is left in the kernel."""
    options = DeviceOptions(mode=DataMode.USER_COPY, depth=16)
    with trio.fail_after(60), mock.patch.object(Queue, "_copy_in", return_value=True):
        async with open_target(arm.kernel) as target:
            device = await target.start_device(Memory(8 * MIB), options)
            async with arm.open_disk(device) as disk:
                report = WorkloadReport(disk=device.path)
                await Workload(seed=1, seconds=50.0, operations=40, region_bytes=256 * 1024).run(disk, report)
    assert any("wrong byte" in fault for fault in report.faults)


async def test_forgotten_device_is_found(arm: Arm) -> None:
    """A device that is added and never deleted is named by the check that every test here ends with."""
    with trio.fail_after(60):
        async with open_control(arm.kernel) as control:
            added = await control.add_device(
                DevInfo(nr_hw_queues=1, queue_depth=4, max_io_buf_bytes=65536, flags=Feature.URING_CMD_COMP_IN_TASK)
            )
            assert any(str(added.dev_id) in thing for thing in arm.leftovers())
            await control.delete_device(added.dev_id)
