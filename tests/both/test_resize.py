"""A disk changes its size while it is in use, on both kernels."""

from __future__ import annotations

import errno

import pytest
import trio

from tests.both.arms import Arm
from tests.both.test_serve import WAYS
from ublk_trio import Backend, DataMode, Device, DeviceOptions, UsageError, open_target
from ublk_trio.control import open_control
from ublk_trio.handlers import Serve
from ublk_trio.uapi import Feature
from ublk_trio.workload import Workload, WorkloadReport

BLOCK = 4096
MIB = 1 << 20


class Rubber(Backend):
    """A memory disk of any size; it says so when it is asked for what it does not have."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._data = bytearray(size)

    def resize(self, size: int) -> None:
        self._data = self._data[:size].ljust(size, b"\0")
        self.size = size

    def _check(self, offset: int, length: int) -> None:
        # As a careless backend does: not an OSError.
        assert offset + length <= self.size

    def read(self, offset: int, buffer: memoryview) -> None:
        self._check(offset, len(buffer))
        buffer[:] = self._data[offset : offset + len(buffer)]

    def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        self._check(offset, len(data))
        self._data[offset : offset + len(data)] = data


async def can_resize(arm: Arm) -> bool:
    """Whether the kernel can; where it cannot, what the engine says of that is all that there is to see."""
    async with open_control(arm.kernel) as control:
        if control.features is not None and Feature.UPDATE_SIZE in control.features:
            return True
    with trio.fail_after(30):
        async with open_target(arm.kernel) as target:
            device = await target.start_device(Rubber(MIB))
            with pytest.raises(UsageError, match=r"UPDATE_SIZE, which came with Linux 6\.16"):
                await device.update_size()
    return False


async def resize(device: Device, backend: Rubber, size: int) -> None:
    backend.resize(size)
    await device.update_size()
    assert device.size == size


async def test_grows_and_shrinks(arm: Arm) -> None:
    """A disk has the size that its backend has; what lies beyond the end cannot be reached, what was within is kept."""
    if not await can_resize(arm):
        return
    backend = Rubber(MIB)
    with trio.fail_after(120):
        async with open_target(arm.kernel) as target:
            device = await target.start_device(backend)
            async with arm.open_disk(device) as disk:
                await disk.write(MIB - BLOCK, b"a" * BLOCK)
            await resize(device, backend, 2 * MIB)
            async with arm.open_disk(device) as disk:
                assert disk.size == 2 * MIB
                await disk.write(2 * MIB - BLOCK, b"z" * BLOCK)
                assert await disk.read(2 * MIB - BLOCK, BLOCK) == b"z" * BLOCK
                assert await disk.read(MIB - BLOCK, BLOCK) == b"a" * BLOCK
            await resize(device, backend, MIB // 2)
            async with arm.open_disk(device) as disk:
                assert disk.size == MIB // 2
                with pytest.raises(OSError, match=r".") as caught:
                    await disk.write(MIB // 2, bytes(BLOCK))
                assert caught.value.errno in (errno.EIO, errno.ENOSPC)
                assert await disk.read(0, BLOCK) == bytes(BLOCK)


@pytest.mark.parametrize(("serve", "mode", "queues"), WAYS)
async def test_resized_under_load(arm: Arm, serve: Serve, mode: DataMode, queues: int) -> None:
    """An application that keeps within the smallest size notices nothing."""
    if not await can_resize(arm):
        return
    backend = Rubber(4 * MIB)
    options = DeviceOptions(serve=serve, mode=mode, queues=queues, depth=8, max_io_bytes=64 * 1024, pool_buffers=2)
    with trio.fail_after(120):
        async with open_target(arm.kernel) as target:
            device = await target.start_device(backend, options)
            async with arm.open_disk(device) as disk:
                report = WorkloadReport(disk=device.path)
                # A multiple of what it works on in any case: its last blocks are within the smallest size.
                load = Workload(seed=7, seconds=100.0, operations=20, region_bytes=64 * 1024)
                ended = trio.Event()

                async def run_load() -> None:
                    await load.run(disk, report)
                    ended.set()

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(run_load)
                    for size in (8, 4, 16, 5):
                        await resize(device, backend, size * MIB)
                        await trio.lowlevel.checkpoint()
                    await ended.wait()
            assert report.faults == []
            assert device.statistics().failed == 0


async def test_impossible_size(arm: Arm) -> None:
    """A size that no disk has is refused in words, and the disk keeps the one that it had."""
    if not await can_resize(arm):
        return
    backend = Rubber(MIB)
    with trio.fail_after(120):
        async with open_target(arm.kernel) as target:
            device = await target.start_device(backend)
            backend.resize(MIB + 100)
            with pytest.raises(UsageError, match="is not a multiple of block_size 512: use"):
                await device.update_size()
            async with arm.open_disk(device) as disk:
                assert disk.size == MIB
            backend.resize(MIB)
            device.ask_to_stop()
            with pytest.raises(UsageError, match="is being stopped"):
                await device.update_size()
