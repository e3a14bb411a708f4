"""The partition scan: what is read, in which order, and which partitions there are then."""

from __future__ import annotations

import errno
import struct
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.sim.mini import Started, basic_params, machine, opened
from ublk_trio.kernel_sim import SimKernel
from ublk_trio.kernel_sim.block import Partition
from ublk_trio.uapi import SECTOR_SIZE, Feature, IoOp

MIB = 1 << 20
LINUX = b"\xaf\x3d\xc6\x0f\x83\x84\x72\x47\x8e\x79\x3d\x69\xd8\x47\x7d\xe4"


def mbr(*entries: tuple[int, int, int], boot: int = 0) -> bytes:
    """A boot sector with entries of type, start and size."""
    table = b"".join(struct.pack("<B3xB3xII", boot, *entry) for entry in entries)
    return bytes(446) + table.ljust(64, b"\0") + b"\x55\xaa"


def gpt(*partitions: tuple[int, int, int], blocks: int, block: int = SECTOR_SIZE, alternate: bool = True) -> bytearray:
    """A disk of so many blocks with a GPT: partitions of number, first and last block."""
    entries = bytearray(128 * 128)
    for number, first, last in partitions:
        struct.pack_into("<16s16sQQQ72s", entries, (number - 1) * 128, LINUX, bytes(16), first, last, 0, b"")
    table_blocks = len(entries) // block

    def header(own: int, other: int, table: int) -> bytes:
        values = (92, 0, own, other, 2 + table_blocks, blocks - table_blocks - 2, bytes(16), table, 128, 128)
        bare = bytearray(
            struct.pack("<8sIIIIQQQQ16sQIII", b"EFI PART", 0x10000, 92, 0, 0, *values[2:], zlib.crc32(entries))
        )
        struct.pack_into("<I", bare, 16, zlib.crc32(bare))
        return bytes(bare)

    disk = bytearray(blocks * block)
    disk[:SECTOR_SIZE] = mbr((0xEE, 1, min(blocks - 1, 0xFFFFFFFF)))
    disk[block : block + 92] = header(1, blocks - 1, 2)
    disk[2 * block : 2 * block + len(entries)] = entries
    if alternate:
        disk[-block : -block + 92] = header(blocks - 1, 1, blocks - 1 - table_blocks)
        disk[-block * (1 + table_blocks) : -block] = entries
    return disk


@asynccontextmanager
async def scanned(
    data: bytes | bytearray, *, logical_bs_shift: int = 9, unreadable: frozenset[int] = frozenset()
) -> AsyncIterator[tuple[Started, list[tuple[int, int]]]]:
    """A disk of this content that was just started, and what the scan read of it: sector and sectors."""
    kernel = SimKernel()
    reads: list[tuple[int, int]] = []
    params = basic_params(size=len(data), logical_bs_shift=logical_bs_shift)
    async with machine(kernel) as m, opened(m, params=params) as device, trio.open_nursery() as nursery:
        queue = device.queue
        queue.fetch_all()

        async def serve() -> None:
            while True:
                for event in queue.events():
                    assert event.op is IoOp.READ
                    reads.append((event.start_sector, event.nr_sectors))
                    begin = event.start_sector * SECTOR_SIZE
                    queue.buffer(event.tag)[: event.length] = data[begin : begin + event.length]
                    fails = event.start_sector in unreadable
                    queue.commit(event.tag, -errno.EIO if fails else event.length)
                await queue.ring.wait()

        nursery.start_soon(serve)
        assert await m.start() == 0
        await wait_all_tasks_blocked()
        yield device, reads
        nursery.cancel_scope.cancel()


async def test_an_empty_disk_is_read_once() -> None:
    """Without a table only the first page is read."""
    async with scanned(bytes(MIB)) as (device, reads):
        assert reads == [(0, 8)]
        assert device.disk.partitions == []


@pytest.mark.parametrize("version", [(6, 12), (7, 3)])
async def test_a_disk_of_no_size_is_not_read(version: tuple[int, int]) -> None:
    """START_DEV does not wait for a scan where there is nothing to read."""
    kernel = SimKernel(version=version)
    async with machine(kernel) as m, opened(m, params=basic_params(size=0)) as device:
        device.queue.fetch_all()
        assert await m.start() == 0
        assert device.queue.events() == []


async def test_gpt() -> None:
    """The protective MBR, the header, the entries, then the alternate copy's; each page once."""
    disk = gpt((1, 34, 100), (3, 200, 1999), blocks=2048)
    async with scanned(disk) as (device, reads):
        assert device.disk.partitions == [
            Partition(1, 34 * 512, 67 * 512),
            Partition(3, 200 * 512, 1800 * 512),
        ]
        # The header at block 1 and entries at 2 to 33; the alternate header in the last page, its entries before it.
        assert reads == [(sector, 8) for sector in (0, 8, 16, 24, 32, 2040, 2008, 2016, 2024, 2032)]


async def test_gpt_with_large_blocks() -> None:
    """Places in the table count in logical blocks."""
    disk = gpt((1, 10, 19), blocks=256, block=4096)
    async with scanned(disk, logical_bs_shift=12) as (device, reads):
        assert device.disk.partitions == [Partition(1, 10 * 4096, 10 * 4096)]
        assert reads[:2] == [(0, 8), (8, 8)]


async def test_a_bad_alternate_is_no_matter() -> None:
    """The primary copy counts."""
    disk = gpt((1, 34, 100), blocks=2048, alternate=False)
    async with scanned(disk) as (device, _):
        assert device.disk.partitions == [Partition(1, 34 * 512, 67 * 512)]


@pytest.mark.parametrize("place", [512, 512 + 16, 512 + 24, 1024, 512 + 80])
async def test_a_damaged_gpt_has_no_partitions(place: int) -> None:
    """Signature, checksums, own place, entries: one flipped bit, and there are none; nor does the MBR's entry count."""
    disk = gpt((1, 34, 100), blocks=2048)
    disk[place] ^= 1
    async with scanned(disk) as (device, _):
        assert device.disk.partitions == []


async def test_gpt_without_a_protective_mbr_is_none() -> None:
    """The entry of type 0xEE must be there, and start at 1."""
    for boot_sector in (bytes(512), mbr((0xEE, 2, 2047))):
        disk = gpt((1, 34, 100), blocks=2048)
        disk[:512] = boot_sector
        async with scanned(disk) as (device, reads):
            assert device.disk.partitions == []
            assert reads == [(0, 8)]


async def test_mbr_with_logical_partitions() -> None:
    """Primary ones by their slot, logical ones from 5, and of the extended one no more than a boot loader needs."""
    disk = bytearray(MIB)
    disk[:512] = mbr((0x83, 8, 100), (0, 0, 0), (0x0F, 400, 800))
    disk[400 * 512 : 401 * 512] = mbr((0x83, 8, 92), (0x05, 100, 300))
    disk[500 * 512 : 501 * 512] = mbr((0x82, 10, 200))
    async with scanned(disk) as (device, reads):
        assert device.disk.partitions == [
            Partition(1, 8 * 512, 100 * 512),
            Partition(3, 400 * 512, 1024),
            Partition(5, 408 * 512, 92 * 512),
            Partition(6, 510 * 512, 200 * 512),
        ]
        assert reads == [(0, 8), (400, 8), (496, 8)]


async def test_a_chain_that_goes_in_circles_ends() -> None:
    """An extended partition whose link leads to itself is given up after a hundred links."""
    disk = bytearray(MIB)
    disk[:512] = mbr((0x05, 400, 800))
    disk[400 * 512 : 401 * 512] = mbr((0x05, 0, 800))
    async with scanned(disk) as (device, _):
        assert [partition.number for partition in device.disk.partitions] == [1]


async def test_partitions_past_the_end_are_cut_off_or_dropped() -> None:
    """Nobody can read behind the disk through a partition."""
    disk = bytearray(MIB)
    disk[:512] = mbr((0x83, 8, 100), (0x83, 2000, 100), (0x83, 2048, 8))
    async with scanned(disk) as (device, _):
        assert device.disk.partitions == [Partition(1, 8 * 512, 100 * 512), Partition(2, 2000 * 512, 48 * 512)]


async def test_a_boot_sector_that_is_no_table() -> None:
    """A boot indicator that is neither 0 nor 0x80 makes it a file system's."""
    disk = bytearray(MIB)
    disk[:512] = mbr((0x83, 8, 100), boot=0x41)
    async with scanned(disk) as (device, _):
        assert device.disk.partitions == []


async def test_an_unreadable_page_is_read_by_each_who_asks() -> None:
    """What failed is not in the page cache: the next parser reads it again. The disk starts all the same."""
    async with scanned(bytes(MIB), unreadable=frozenset({0})) as (device, reads):
        assert reads == [(0, 8), (0, 8)]
        with pytest.raises(OSError, check=lambda error: error.errno == errno.EIO):
            await device.disk.reread_partitions()


async def test_a_disk_that_is_no_whole_number_of_pages_is_read_in_blocks() -> None:
    """The page cache's blocks are the largest that the disk's size is a multiple of."""
    async with scanned(bytes(MIB + 1024)) as (_, reads):
        assert reads == [(0, 2), (2, 2), (4, 2), (6, 2)]
    async with scanned(bytes(512 * 3)) as (_, reads):
        assert reads == [(0, 1), (1, 1), (2, 1)]


async def test_reading_the_table_again() -> None:
    """BLKRRPART finds what was written since; it is EBUSY while somebody holds the disk exclusively."""
    disk = bytearray(MIB)
    async with scanned(disk) as (device, _):
        assert device.disk.partitions == []
        disk[:512] = mbr((0x83, 8, 100))
        with (
            device.disk.open(exclusive=True),
            pytest.raises(OSError, check=lambda error: error.errno == errno.EBUSY),
        ):
            await device.disk.reread_partitions()
        assert device.disk.partitions == []
        with device.disk.open():
            await device.disk.reread_partitions()
        assert device.disk.partitions == [Partition(1, 8 * 512, 100 * 512)]


async def test_no_automatic_scan_but_by_hand() -> None:
    """NO_AUTO_PART_SCAN reads nothing by itself; BLKRRPART does."""
    kernel = SimKernel()
    async with machine(kernel) as m, opened(m, flags=Feature.NO_AUTO_PART_SCAN) as device:
        device.queue.fetch_all()
        assert await m.start() == 0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(device.disk.reread_partitions)
            await wait_all_tasks_blocked()
            event = device.queue.event()
            device.queue.buffer(event.tag)[:512] = mbr((0x83, 8, 16))
            device.queue.commit(event.tag, event.length)
        assert device.disk.partitions == [Partition(1, 8 * 512, 16 * 512)]
