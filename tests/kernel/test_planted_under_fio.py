"""A suite that cannot fail is no suite: disks and servers with a bug planted, which its checks must find."""

from __future__ import annotations

import pytest
import trio

from tests.kernel.leftovers import Leftovers
from tests.kernel.programs import fio_verify
from ublk_trio import DeviceOptions, Memory, RealKernel, open_target
from ublk_trio.control import open_control
from ublk_trio.uapi import DevInfo, Feature

MIB = 1 << 20


class FlipsABit(Memory):
    """One bit of each read of a certain block comes back wrong."""

    def read(self, offset: int, buffer: memoryview) -> int | None:
        done = super().read(offset, buffer)
        if offset <= 5 * MIB < offset + len(buffer):
            buffer[5 * MIB - offset] ^= 1
        return done


class ForgetsAWrite(Memory):
    """A write of a certain block is acknowledged and lost."""

    def write(self, offset: int, data: memoryview, *, fua: bool) -> int | None:
        return None if offset <= 5 * MIB < offset + len(data) else super().write(offset, data, fua=fua)


class OneBlockLate(Memory):
    """Every write goes one block too far."""

    def write(self, offset: int, data: memoryview, *, fua: bool) -> int | None:
        late = min(offset + self.block_size, self.size - len(data))
        return super().write(late, data, fua=fua)


@pytest.mark.any_kernel
@pytest.mark.parametrize("backend", [FlipsABit, ForgetsAWrite, OneBlockLate])
async def test_wrong_data_is_found(backend: type[Memory]) -> None:
    """fio's verification fails on a disk that loses, moves or changes what was written."""
    with trio.fail_after(300):
        async with open_target(RealKernel()) as target:
            device = await target.start_device(backend(64 * MIB), DeviceOptions(depth=64))
            with pytest.raises(AssertionError):
                await fio_verify(device.path)


@pytest.mark.any_kernel
async def test_forgotten_device_is_found() -> None:
    """A device that is added and never deleted is named by the check that every test here ends with."""
    before = Leftovers.look()
    with trio.fail_after(60):
        async with open_control(RealKernel()) as control:
            added = await control.add_device(
                DevInfo(nr_hw_queues=1, queue_depth=4, max_io_buf_bytes=65536, flags=Feature.URING_CMD_COMP_IN_TASK)
            )
            found = before.new()
            await control.delete_device(added.dev_id)
    assert any(f"ublkc{added.dev_id}" in thing for thing in found)
