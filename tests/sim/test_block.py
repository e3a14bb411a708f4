"""The block layer: what an application asks for, what reaches the server, and what comes back."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from trio.testing import wait_all_tasks_blocked

from tests.sim.mini import Served, Started, basic_params, live, machine, served
from ublk_trio.kernel_sim import SeededChoices, SimKernel
from ublk_trio.kernel_sim.linux_errno import SURVIVING, number
from ublk_trio.uapi import BasicAttr, IoFlag, IoOp, Params, ParamsDiscard

READ, WRITE, FLUSH, DISCARD, WRITE_ZEROES = IoOp.READ, IoOp.WRITE, IoOp.FLUSH, IoOp.DISCARD, IoOp.WRITE_ZEROES
RANGES = ParamsDiscard(
    discard_granularity=512, max_discard_sectors=64, max_write_zeroes_sectors=32, max_discard_segments=1
)


@asynccontextmanager
async def serving(
    params: Params | None = None, *, queues: int = 1, version: tuple[int, int] = (7, 3)
) -> AsyncIterator[Served]:
    kernel = SimKernel(version=version, partition_scan=False)
    async with machine(kernel) as m:
        async with served(m, params=params, queues=queues) as device:
            yield device
        kernel.check()
    assert kernel.leftovers() == []


@asynccontextmanager
async def answering(params: Params | None = None, *, version: tuple[int, int] = (7, 3)) -> AsyncIterator[Started]:
    """A live device of which the test is the server."""
    async with machine(SimKernel(version=version, partition_scan=False)) as m, live(m, params=params) as device:
        yield device


def raises_errno(code: int) -> pytest.RaisesExc[OSError]:
    return pytest.raises(OSError, check=lambda error: error.errno == code and error.filename == "/dev/ublkb0")


# ---------------------------------------------------------------------- data and splitting


async def test_data_round_trip() -> None:
    """What was written is read."""
    async with serving(queues=3) as device:
        data = bytes(range(256)) * 1000
        await device.disk.write(512 * 3, data[: 512 * 499])
        assert await device.disk.read(512 * 3, 512 * 499) == data[: 512 * 499]
        assert device.data[512 * 3 : 512 * 502] == data[: 512 * 499]


async def test_read_into_memory_of_the_caller() -> None:
    """A READ fills the memory that it is given, and nothing beyond what it moved."""
    async with answering() as device:
        memory = bytearray(b"\xee" * 1024)
        bio = device.disk.submit(READ, 0, memoryview(memory)[:512])
        event = device.queue.event()
        device.queue.buffer(event.tag)[:512] = b"r" * 512
        device.queue.commit(event.tag, 512)
        assert bio.result == 512
        assert memory == b"r" * 512 + b"\xee" * 512


async def test_split_at_max_sectors() -> None:
    """No READ or WRITE is longer than max_sectors; all but the first begin at a physical block; the parts are the whole."""
    async with serving(basic_params(max_sectors=16)) as device:
        await device.disk.write(512, bytes(512 * 40))
        assert device.seen == [(WRITE, 1, 15), (WRITE, 16, 16), (WRITE, 32, 9)]


async def test_split_at_chunks() -> None:
    """No READ or WRITE crosses a multiple of chunk_sectors."""
    async with serving(basic_params(max_sectors=16, chunk_sectors=24)) as device:
        await device.disk.read(512 * 20, 512 * 30)
        assert device.seen == [(READ, 20, 4), (READ, 24, 16), (READ, 40, 8), (READ, 48, 2)]


async def test_max_sectors_is_whole_blocks() -> None:
    """A limit that is no multiple of the block size is rounded down to one."""
    async with serving(basic_params(max_sectors=12, logical_bs_shift=12)) as device:
        assert device.disk.block_size == 4096
        await device.disk.read(0, 8192)
        assert device.seen == [(READ, 0, 8), (READ, 8, 8)]


async def test_ranges_split_at_their_own_limits() -> None:
    """Discards and write-zeroes have limits of their own and carry no data."""
    async with serving(basic_params(max_sectors=8, discard=RANGES)) as device:
        await device.disk.write(0, b"x" * 65536)
        device.servers[0].seen.clear()
        await device.disk.discard(0, 512 * 100)
        assert device.seen == [(DISCARD, 0, 64), (DISCARD, 64, 36)]
        device.servers[0].seen.clear()
        await device.disk.write_zeroes(512, 512 * 40)
        assert device.seen == [(WRITE_ZEROES, 1, 31), (WRITE_ZEROES, 32, 1), (WRITE_ZEROES, 33, 8)]
        assert device.data[:65536] == b"x" * 512 + bytes(512 * 40) + b"x" * (65536 - 512 * 41)


async def test_one_failed_part_fails_the_whole() -> None:
    """An operation ends when all its parts have, with the first error."""
    async with answering(basic_params(max_sectors=8)) as device:
        bio = device.disk.submit(READ, 0, 512 * 24)
        events = device.queue.events()
        assert len(events) == 3
        for event, result in zip(events, (4096, -errno.ENOSPC, -errno.EIO), strict=True):
            assert not bio.done
            device.queue.commit(event.tag, result)
        assert bio.result == -errno.ENOSPC


async def test_operations_of_one_application_use_all_queues() -> None:
    """On a calm machine the queues take turns; otherwise which queue is a choice."""
    async with serving(queues=4) as device:
        for _ in range(8):
            await device.disk.read(0, 512)
        assert [len(server.seen) for server in device.servers] == [2, 2, 2, 2]
    kernel = SimKernel(SeededChoices(1))
    async with machine(kernel) as m, served(m, queues=4) as device:
        for _ in range(8):
            await device.disk.read(0, 512)
        assert [len(server.seen) for server in device.servers] != [2, 2, 2, 2]


# ---------------------------------------------------------------------- what is refused


async def test_misaligned_operations_are_refused() -> None:
    """Offset and length are multiples of the block size, or the operation is EINVAL and reaches nobody."""
    async with serving(basic_params(logical_bs_shift=12, discard=RANGES)) as device:
        disk = device.disk
        for offset, length in ((512, 4096), (0, 512), (1, 4096), (-4096, 4096)):
            with raises_errno(errno.EINVAL):
                await disk.read(offset, length)
            with raises_errno(errno.EINVAL):
                await disk.write(offset, bytes(length))
            with raises_errno(errno.EINVAL):
                await disk.discard(offset, length)
            with raises_errno(errno.EINVAL):
                await disk.write_zeroes(offset, length)
        assert device.seen == []


async def test_the_end_of_the_disk() -> None:
    """A read across the end is short; a write there is ENOSPC, after the part that fits; a range EINVAL."""
    async with serving(basic_params(size=8192, discard=RANGES)) as device:
        disk = device.disk
        assert disk.size == 8192
        assert len(await disk.read(4096, 8192)) == 4096
        assert await disk.read(8192, 512) == b""
        assert await disk.read(1 << 40, 512) == b""
        with raises_errno(errno.ENOSPC):
            await disk.write(4096, bytes(8192))
        with raises_errno(errno.EINVAL):
            await disk.discard(4096, 8192)
        assert device.seen == [(READ, 8, 8), (WRITE, 8, 8)]


async def test_nothing_to_do() -> None:
    """Reading and writing nothing succeeds, a range of nothing is EINVAL; neither reaches anybody."""
    async with serving(basic_params(discard=RANGES)) as device:
        assert await device.disk.read(0, 0) == b""
        await device.disk.write(0, b"")
        with raises_errno(errno.EINVAL):
            await device.disk.discard(0, 0)
        with raises_errno(errno.EINVAL):
            await device.disk.write_zeroes(0, 0)
        assert device.seen == []


async def test_read_only_disk() -> None:
    """A read-only disk refuses with EPERM whatever would change it."""
    async with serving(basic_params(attrs=BasicAttr.READ_ONLY, discard=RANGES)) as device:
        disk = device.disk
        assert disk.read_only
        await disk.read(0, 512)
        for operation in (disk.write(0, bytes(512)), disk.discard(0, 512), disk.write_zeroes(0, 512)):
            with raises_errno(errno.EPERM):
                await operation
        assert device.seen == [(READ, 0, 1)]


async def test_no_disk() -> None:
    """Where there never was a disk it is ENXIO; where there was one, EIO."""
    kernel = SimKernel(partition_scan=False)
    disk = kernel.block_device(0)
    assert not disk.exists
    with raises_errno(errno.ENXIO):
        await disk.read(0, 512)
    with raises_errno(errno.ENXIO):
        _ = disk.size
    async with machine(kernel) as m, served(m) as device:
        assert device.disk.exists
        await disk.read(0, 512)
    with raises_errno(errno.EIO):
        await disk.read(0, 512)


# ---------------------------------------------------------------------- flush, FUA, discard, write-zeroes


async def test_flush_without_a_cache_never_arrives() -> None:
    """Without VOLATILE_CACHE a flush succeeds and the server hears nothing of it, nor of FUA."""
    async with serving(basic_params(attrs=BasicAttr.FUA)) as device:
        await device.disk.flush()
        assert device.seen == []
    async with answering(basic_params(attrs=BasicAttr.FUA)) as raw:
        raw.disk.submit(WRITE, 0, bytes(512), fua=True)
        assert raw.queue.event().op_flags == IoOp.WRITE


async def test_flush_with_a_cache_arrives() -> None:
    """A flush has no sectors, and no place on the disk."""
    async with answering(basic_params(attrs=BasicAttr.VOLATILE_CACHE)) as device:
        bio = device.disk.submit(FLUSH)
        event = device.queue.event()
        assert (event.op, event.nr_sectors, event.start_sector) == (FLUSH, 0, (1 << 64) - 1)
        device.queue.commit(event.tag, 0)
        assert bio.result == 0


async def test_fua_with_cache_and_fua_is_a_flag() -> None:
    """FUA reaches the server as the write's flag where the disk can do it."""
    async with answering(basic_params(attrs=BasicAttr.VOLATILE_CACHE | BasicAttr.FUA)) as device:
        device.disk.submit(WRITE, 0, bytes(512), fua=True)
        event = device.queue.event()
        assert event.op_flags == IoOp.WRITE | IoFlag.FUA


@pytest.mark.parametrize("write_result", [512, -errno.EIO])
async def test_fua_with_cache_only_is_a_flush_after(write_result: int) -> None:
    """Where it cannot, a flush follows the write; after a failed write it does not."""
    async with answering(basic_params(attrs=BasicAttr.VOLATILE_CACHE)) as device:
        bio = device.disk.submit(WRITE, 0, bytes(512), fua=True)
        event = device.queue.event()
        assert event.op_flags == IoOp.WRITE
        device.queue.commit(event.tag, write_result)
        if write_result > 0:
            assert not bio.done
            event = device.queue.event()
            assert event.op is FLUSH
            device.queue.commit(event.tag, 0)
        assert bio.result == write_result


async def test_discard_must_be_offered() -> None:
    """Without discard limits a discard is EOPNOTSUPP."""
    async with serving() as device:
        with raises_errno(number("EOPNOTSUPP")):
            await device.disk.discard(0, 512)
        assert device.seen == []


async def test_write_zeroes_falls_back_to_writes() -> None:
    """Write-zeroes always works: where it is not offered, or refused with EOPNOTSUPP, zeroes are written."""
    async with serving(basic_params(max_sectors=8)) as device:
        await device.disk.write(0, b"x" * 8192)
        device.servers[0].seen.clear()
        await device.disk.write_zeroes(0, 8192)
        assert device.seen == [(WRITE, 0, 8), (WRITE, 8, 8)]
        assert device.data[:8192] == bytes(8192)
    async with answering(basic_params(discard=RANGES)) as raw:
        bio = raw.disk.submit(WRITE_ZEROES, 0, 512)
        raw.queue.commit(raw.queue.event().tag, -number("EOPNOTSUPP"))
        event = raw.queue.event()
        assert event.op is WRITE
        raw.queue.commit(event.tag, 512)
        assert bio.result == 512


async def test_no_unmap_is_a_flag() -> None:
    """NOUNMAP tells the server that the blocks must stay allocated."""
    async with answering(basic_params(discard=RANGES)) as device:
        device.disk.submit(WRITE_ZEROES, 0, 512, no_unmap=True)
        assert device.queue.event().op_flags == WRITE_ZEROES | IoFlag.NOUNMAP


# ---------------------------------------------------------------------- results


@pytest.mark.parametrize("code", sorted({*SURVIVING, errno.EIO, errno.EPERM, errno.EROFS, 4095, 1 << 31}))
async def test_only_block_statuses_survive(code: int) -> None:
    """An errno with a block status reaches the application; any other is EIO."""
    async with answering() as device:
        bio = device.disk.submit(READ, 0, 512)
        device.queue.commit(device.queue.event().tag, -code)
        assert bio.result == (-code if code in SURVIVING else -errno.EIO)


async def test_read_of_nothing_is_an_error() -> None:
    """A READ that is answered with 0 fails with EIO."""
    async with answering() as device:
        bio = device.disk.submit(READ, 0, 512)
        device.queue.commit(device.queue.event().tag, 0)
        assert bio.result == -errno.EIO


async def test_rest_of_a_short_read_comes_first() -> None:
    """The rest of a short READ is delivered again, with an advanced sector, before all that waits."""
    kernel = SimKernel(partition_scan=False)
    async with machine(kernel) as m, live(m, depth=1) as device:
        bio = device.disk.submit(READ, 512, 512 * 8)
        later = device.disk.submit(READ, 0, 512)
        for sector, sectors in ((1, 8), (3, 6), (8, 1)):
            event = device.queue.event()
            assert (event.op, event.start_sector, event.nr_sectors) == (READ, sector, sectors)
            done = {1: 2, 3: 5, 8: 1}[sector] * 512
            device.queue.buffer(event.tag)[:done] = bytes([sector]) * done
            device.queue.commit(event.tag, done)
        assert bio.result == 512 * 8
        assert bytes(bio.data) == b"\1" * 1024 + b"\3" * 2560 + b"\x08" * 512
        assert not later.done
        assert device.queue.event().start_sector == 0
    kernel.check()


async def test_short_write_is_silently_whole_on_new_kernels() -> None:
    """7.3 takes a short WRITE for a whole one: the application is told that all is well."""
    async with answering() as device:
        bio = device.disk.submit(WRITE, 0, bytes(1024))
        device.queue.commit(device.queue.event().tag, 512)
        assert bio.result == 1024
        kinds = [violation.kind for violation in device.machine.kernel.violations]
        assert kinds == ["short-write"]


async def test_short_write_is_requeued_on_old_kernels() -> None:
    """To 7.1 the rest of a short WRITE is delivered again, with the rest of its data; one of 0 as it was, for ever."""
    async with answering(version=(7, 1)) as device:
        bio = device.disk.submit(WRITE, 0, b"a" * 512 + b"b" * 512)
        for done in (0, 0, 512, 0):
            device.queue.commit(device.queue.event().tag, done)
            assert not bio.done
        event = device.queue.event()
        assert (event.start_sector, event.nr_sectors) == (1, 1)
        assert device.queue.buffer(event.tag)[:512] == b"b" * 512
        device.queue.commit(event.tag, 512)
        assert bio.result == 1024


async def test_too_long_a_read_is_clamped() -> None:
    """More bytes than were asked for do not reach the application."""
    async with answering() as device:
        bio = device.disk.submit(READ, 0, 512)
        device.queue.commit(device.queue.event().tag, 1024)
        assert bio.result == 512
        assert [violation.kind for violation in device.machine.kernel.violations] == ["result-too-long"]


async def test_waiting_for_a_bio() -> None:
    """A bio can be waited for before and after its end."""
    async with answering() as device:
        bio = device.disk.submit(READ, 0, 512)
        device.queue.commit(device.queue.event().tag, 512)
        assert await bio.wait() == 512
        bio = device.disk.submit(FLUSH)
        assert await bio.wait() == 0
        await wait_all_tasks_blocked()
