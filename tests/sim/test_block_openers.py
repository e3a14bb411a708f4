"""Opening the disk, what an opening still sees of a removed one, and resizing and freezing while I/O runs."""

from __future__ import annotations

import errno
from collections.abc import Generator

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.sim.mini import basic_params, live, machine
from ublk_trio.kernel_sim import SimKernel
from ublk_trio.kernel_sim.waits import Wait
from ublk_trio.uapi import BasicAttr, ControlCommand, IoOp, ParamsDiscard

READ, WRITE, FLUSH, DISCARD, WRITE_ZEROES = IoOp.READ, IoOp.WRITE, IoOp.FLUSH, IoOp.DISCARD, IoOp.WRITE_ZEROES
RANGES = ParamsDiscard(discard_granularity=512, max_discard_sectors=64, max_discard_segments=1)
TRY_STOP, UPDATE_SIZE = ControlCommand.TRY_STOP_DEV, ControlCommand.UPDATE_SIZE


def raises_errno(code: int) -> pytest.RaisesExc[OSError]:
    return pytest.raises(OSError, check=lambda error: error.errno == code)


async def test_opening_what_is_not_there() -> None:
    """ENXIO: where there never was a disk, and where one is being removed."""
    kernel = SimKernel(partition_scan=False)
    with raises_errno(errno.ENXIO):
        kernel.block_device(0).open()
    async with machine(kernel) as m, live(m) as device, trio.open_nursery() as nursery:
        device.disk.submit(READ, 0, 512)
        event = device.queue.event()
        nursery.start_soon(m.stop)
        await wait_all_tasks_blocked()
        assert device.disk.exists
        with raises_errno(errno.ENXIO):
            device.disk.open()
        device.queue.commit(event.tag, 512)


async def test_one_exclusive_opener() -> None:
    """O_EXCL keeps out others with O_EXCL, and nobody else."""
    async with machine(SimKernel(partition_scan=False)) as m, live(m) as device:
        with device.disk.open(exclusive=True):
            with raises_errno(errno.EBUSY):
                device.disk.open(exclusive=True)
            device.disk.open().close()
        device.disk.open(exclusive=True).close()


async def test_openers_hold_off_try_stop() -> None:
    """TRY_STOP_DEV is EBUSY as long as anybody has it open, and a refused opening does not count."""
    async with machine(SimKernel(partition_scan=False)) as m, live(m) as device:
        first, second = device.disk.open(exclusive=True), device.disk.open(read_only=True)
        with raises_errno(errno.EBUSY):
            device.disk.open(exclusive=True)
        for opener in (first, second):
            assert await m.command(TRY_STOP) == -errno.EBUSY
            opener.close()
            opener.close()
        assert await m.command(TRY_STOP) == 0
        assert not device.disk.exists


async def test_a_read_only_opening_changes_nothing() -> None:
    """Writing, discarding and zeroing through O_RDONLY are EBADF; reading and flushing work."""
    params = basic_params(discard=RANGES, attrs=BasicAttr.VOLATILE_CACHE)
    async with machine(SimKernel(partition_scan=False)) as m, live(m, params=params) as device:
        with device.disk.open(read_only=True) as file:
            assert file.submit(WRITE, 0, bytes(512)).result == -errno.EBADF
            assert file.submit(DISCARD, 0, 512).result == -errno.EBADF
            assert file.submit(WRITE_ZEROES, 0, 512).result == -errno.EBADF
            assert device.queue.events() == []
            file.submit(READ, 0, 512)
            file.submit(FLUSH)
            for event in device.queue.events():
                device.queue.commit(event.tag, event.length)
        assert file.submit(READ, 0, 512).result == -errno.EBADF
    async with machine(SimKernel(partition_scan=False)) as m, live(m) as device:
        # BLKDISCARD looks at what the disk offers before it looks at the opening.
        with device.disk.open(read_only=True) as file:
            assert file.submit(DISCARD, 0, 512).result == -errno.EOPNOTSUPP


@pytest.mark.parametrize("cache", [False, True])
async def test_what_is_left_of_a_removed_disk(cache: bool) -> None:
    """Its size is 0: reads find the end, writes ENOSPC, ranges EINVAL; a flush fails where there was a cache."""
    params = basic_params(discard=RANGES, attrs=BasicAttr.VOLATILE_CACHE if cache else BasicAttr(0))
    kernel = SimKernel(partition_scan=False)
    async with machine(kernel) as m, live(m, params=params) as device:
        assert device.disk.size
        with device.disk.open() as file:
            assert await m.stop() == 0
            assert file.size == 0
            assert await file.read(0, 512) == b""
            with raises_errno(errno.ENOSPC):
                await file.write(0, bytes(512))
            for operation in (file.discard(0, 512), file.write_zeroes(0, 512)):
                with raises_errno(errno.EINVAL):
                    await operation
            assert file.submit(FLUSH).result == (-errno.EIO if cache else 0)
            with raises_errno(errno.EIO):
                await device.disk.read(0, 512)
            device.close()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(m.delete)
                await wait_all_tasks_blocked()
                assert kernel.device_ids() == [0]
                file.close()
        assert kernel.device_ids() == []


async def test_resizing_while_operations_are_under_way() -> None:
    """What was submitted before the size shrank is still served; what comes then finds the new end."""
    async with machine(SimKernel(partition_scan=False)) as m, live(m, params=basic_params(size=1 << 20)) as device:
        old = device.disk.submit(READ, 1 << 19, 4096)
        event = device.queue.event()
        assert await m.command(UPDATE_SIZE, data=8) == 0
        assert device.disk.size == 4096
        assert device.disk.submit(READ, 1 << 19, 4096).result == 0
        assert device.disk.submit(WRITE, 1 << 19, bytes(512)).result == -errno.ENOSPC
        device.queue.commit(event.tag, event.length)
        assert old.result == 4096
        assert await m.command(UPDATE_SIZE, data=1 << 12) == 0
        device.disk.submit(READ, 1 << 19, 4096)
        assert device.queue.event().nr_sectors == 8


async def test_a_size_that_ends_inside_a_block() -> None:
    """A read that is cut off at the disk's end inside a logical block is EINVAL."""
    params = basic_params(size=4096 + 512, logical_bs_shift=12)
    async with machine(SimKernel(partition_scan=False)) as m, live(m, params=params) as device:
        assert device.disk.submit(READ, 0, 8192).result == -errno.EINVAL
        device.disk.submit(READ, 0, 4096)
        assert device.queue.event().nr_sectors == 8


async def test_a_frozen_disk_lets_nothing_in() -> None:
    """While it freezes it waits for what is under way; new operations wait until it thaws, and then go in order."""
    kernel = SimKernel(partition_scan=False)
    async with machine(kernel) as m, live(m) as device:
        disk = kernel.devices[0].disk
        assert disk is not None
        before = device.disk.submit(READ, 0, 512)
        event = device.queue.event()
        frozen = []

        def freeze() -> Generator[Wait, bool, int]:
            yield from disk.freeze()
            frozen.append(True)
            return 0

        kernel.run("freeze", freeze())
        bios = [device.disk.submit(READ, sector * 512, 512) for sector in (1, 3)]
        assert device.disk.submit(READ, 1, 512).result == -errno.EINVAL
        assert not frozen
        device.queue.commit(event.tag, 512)
        assert frozen
        assert before.done
        assert device.queue.events() == []
        disk.unfreeze()
        assert [event.start_sector for event in device.queue.events()] == [1, 3]
        assert not any(bio.done for bio in bios)


async def test_stopping_a_frozen_disk_fails_what_waits() -> None:
    """What waits before a frozen disk ends with EIO when the disk goes."""
    kernel = SimKernel(partition_scan=False)
    async with machine(kernel) as m, live(m) as device:
        disk = kernel.devices[0].disk
        assert disk is not None
        for _ in disk.freeze():
            pass
        bio = device.disk.submit(READ, 0, 512)
        assert await m.stop() == 0
        assert bio.result == -errno.EIO
