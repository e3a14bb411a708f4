"""The partition scan: what the kernel reads of a disk that appears, and what it makes of it.

**Supported.** GPT (protective and hybrid MBR, checksums, the alternate table is read and not needed) and MBR with
extended partitions, in the kernel's order; every page is read once through the page cache, in one piece or, where the
disk's size is no multiple of a page, in smaller blocks; a page that could not be read is read again when another parser
asks; partitions that begin past the disk's end are dropped, those that reach over it are cut off.
**Rejected.** ``reread`` (BLKRRPART): EBUSY while a partition is open, EINVAL where scanning is suppressed, EIO when the
table cannot be read.
**Differs from Linux.** A kernel built with other formats (Acorn, LDM, Amiga, …) reads some more sectors. BSD and Solaris
labels inside of MBR partitions, and AIX, are not looked for. Partitions are listed, but are no block devices.
"""

from __future__ import annotations

import errno
import struct
import zlib
from collections.abc import Generator
from typing import TYPE_CHECKING, Final

import attrs

from ublk_trio.kernel_sim.waits import Wait
from ublk_trio.uapi import SECTOR_SHIFT, SECTOR_SIZE, IoOp

if TYPE_CHECKING:
    from ublk_trio.kernel_sim.block.disk import SimDisk
    from ublk_trio.kernel_sim.control import Steps

_PAGE_BYTES: Final = 4096
_PARTITIONS_MAX: Final = 256
_LINKS_MAX: Final = 100
_ENTRIES_BYTES_MAX: Final = 4 << 20
_MBR_MAGIC: Final = b"\x55\xaa"
_PROTECTIVE: Final = 0xEE
_EXTENDED: Final = frozenset({0x05, 0x0F, 0x85})
#: Boot indicator, type, start and size of an MBR entry.
_MBR_ENTRY: Final = struct.Struct("<B3xB3xII")
#: Signature, revision, size, checksum, own and other place, first and last usable block, id, entries: place, number,
#: size, checksum.
_GPT_HEADER: Final = struct.Struct("<8sIII4xQQQQ16sQIII")
_GPT_SIGNATURE: Final = b"EFI PART"
#: Type, id, first block, last block, attributes, name.
_GPT_ENTRY: Final = struct.Struct("<16s16sQQQ72s")
_NO_TYPE: Final = bytes(16)


@attrs.frozen
class Partition:
    """``/dev/ublkbNpM``, in bytes."""

    number: int
    offset: int
    size: int


class UnreadableError(Exception):
    """The table could not be read."""


class PartitionScan:
    """A scan under way; at its end it is `done` and has an ``error``, an errno or 0."""

    def __init__(self, disk: SimDisk) -> None:
        self.disk = disk
        self.done = False
        self.error = 0
        self._pages: dict[int, bytes] = {}

    def run(self) -> Steps:
        """The scan, from the first sector to the list of partitions."""
        disk = self.disk
        disk.partitions = []
        try:
            found = yield from _partitions(self)
        except UnreadableError:
            self.error = errno.EIO
        else:
            if not disk.zoned and not disk.dying:
                disk.partitions = [
                    _cut_off(partition, disk.size) for partition in found if partition.offset < disk.size
                ]
        self.done = True
        return 0

    def sector(self, number: int) -> Generator[Wait, bool, bytes | None]:
        """The sector's bytes, read with its page unless that is known; None past the disk's end or when it cannot be read."""
        disk = self.disk
        if number >= disk.sectors:
            return None
        page, within = divmod(number << SECTOR_SHIFT, _PAGE_BYTES)
        if page not in self._pages:
            data = yield from self._read(page * _PAGE_BYTES)
            if data is None:
                return None
            self._pages[page] = data
        return self._pages[page][within : within + SECTOR_SIZE]

    def _read(self, begin: int) -> Generator[Wait, bool, bytes | None]:
        disk, kernel = self.disk, self.disk.kernel
        block = disk.limits.logical_block
        while block < _PAGE_BYTES and not disk.size & block:
            block <<= 1
        buffer = memoryview(bytearray(_PAGE_BYTES))
        # What the disk's end cuts off of a block is not read, and is zeroes.
        whole = min(_PAGE_BYTES, disk.size - begin) // block * block
        bios = []
        for offset in range(0, whole, block):
            bio = kernel.new_bio(int(IoOp.READ), begin + offset, block, buffer[offset : offset + block])
            bios.append(bio)
            disk.submit(bio)
        yield Wait(f"the partition table of {kernel.disk_path(disk.device.dev_id)}", lambda: all(b.done for b in bios))
        return bytes(buffer) if all(bio.result == block for bio in bios) else None

    def blocks(self, block: int, length: int) -> Generator[Wait, bool, bytes | None]:
        """So many bytes from a logical block on, or None."""
        per_block = self.disk.limits.logical_block >> SECTOR_SHIFT
        if block > self.last_block:
            return None
        data = bytearray()
        number = block * per_block
        while len(data) < length:
            sector = yield from self.sector(number)
            if sector is None:
                return None
            data += sector
            number += 1
        return bytes(data[:length])

    @property
    def last_block(self) -> int:
        return self.disk.size // self.disk.limits.logical_block - 1


#: A parser asks for sectors and returns the partitions, or None when the table is none of its kind.
Parser = Generator[Wait, bool, "list[Partition] | None"]


def _cut_off(partition: Partition, size: int) -> Partition:
    return attrs.evolve(partition, size=min(partition.size, size - partition.offset))


def _partitions(scan: PartitionScan) -> Generator[Wait, bool, list[Partition]]:
    found = yield from _gpt(scan)
    if found is None:
        found = yield from _mbr(scan)
    return [partition for partition in found or [] if partition.size]


def _mbr_entries(sector: bytes) -> list[tuple[int, int, int, int]]:
    return [_MBR_ENTRY.unpack_from(sector, 446 + 16 * slot) for slot in range(4)]


def _gpt(scan: PartitionScan) -> Parser:
    mbr = yield from scan.blocks(0, SECTOR_SIZE)
    if mbr is None or mbr[510:] != _MBR_MAGIC:
        return None
    if not any(kind == _PROTECTIVE and start == 1 for _, kind, start, _ in _mbr_entries(mbr)):
        return None
    table = yield from _gpt_table(scan, 1)
    if table is None:
        return None
    alternate, entries = table
    # The other copy is read and compared; a bad one is only worth a warning.
    yield from _gpt_table(scan, alternate)
    block = scan.disk.limits.logical_block
    found = []
    for number, (kind, _, first, last, _, _) in enumerate(_GPT_ENTRY.iter_unpack(entries), 1):
        if number >= _PARTITIONS_MAX:
            break
        if kind != _NO_TYPE and first <= scan.last_block and last <= scan.last_block and first <= last:
            found.append(Partition(number, first * block, (last - first + 1) * block))
    return found


def _gpt_table(scan: PartitionScan, place: int) -> Generator[Wait, bool, tuple[int, bytes] | None]:
    """Where the alternate header is, and the entries; None when anything of it is wrong."""
    block = scan.disk.limits.logical_block
    header = yield from scan.blocks(place, block)
    if header is None:
        return None
    (signature, _, header_bytes, checksum, own, other, first, last, _, entries_at, number, entry_bytes, entries_sum) = (
        _GPT_HEADER.unpack_from(header)
    )
    if signature != _GPT_SIGNATURE or not _GPT_HEADER.size <= header_bytes <= block:
        return None
    if zlib.crc32(header[:16] + bytes(4) + header[20:header_bytes]) != checksum or own != place:
        return None
    if not first <= last <= scan.last_block or entry_bytes != _GPT_ENTRY.size:
        return None
    length = number * entry_bytes
    if not 0 < length <= _ENTRIES_BYTES_MAX:
        return None
    entries = yield from scan.blocks(entries_at, length)
    if entries is None or zlib.crc32(entries) != entries_sum:
        return None
    return other, entries


def _mbr(scan: PartitionScan) -> Parser:
    sector = yield from scan.sector(0)
    if sector is None:
        raise UnreadableError
    if sector[510:] != _MBR_MAGIC:
        return None
    entries = _mbr_entries(sector)
    if any(boot not in (0, 0x80) for boot, _, _, _ in entries):
        # The boot sector of a FAT without a table, or nothing known: no partitions either way.
        return None
    if any(kind == _PROTECTIVE for _, kind, _, _ in entries):
        return None
    block = scan.disk.limits.logical_block
    found = []
    logical: list[Partition] = []
    for number, (_, kind, start, count) in enumerate(entries, 1):
        if not count:
            continue
        if kind in _EXTENDED:
            # Room for a boot loader, no more: nobody shall make a file system of all of it.
            found.append(Partition(number, start * block, min(count * block, max(block, 2 * SECTOR_SIZE))))
            yield from _extended(scan, start * block, count * block, logical)
        else:
            found.append(Partition(number, start * block, count * block))
    return found + logical


def _extended(scan: PartitionScan, begin: int, size: int, found: list[Partition]) -> Generator[Wait, bool, None]:
    """Follow the chain of an extended partition; its logical partitions are numbered from 5 on."""
    block = scan.disk.limits.logical_block
    here, here_size = begin, size
    links = 0
    while links < _LINKS_MAX and len(found) + 5 < _PARTITIONS_MAX:
        links += 1
        sector = yield from scan.sector(here >> SECTOR_SHIFT)
        if sector is None or sector[510:] != _MBR_MAGIC:
            return
        entries = _mbr_entries(sector)
        for slot, (_, kind, start, count) in enumerate(entries):
            if not count or kind in _EXTENDED:
                continue
            offset, length = here + start * block, count * block
            # The third and fourth entry may be garbage.
            inside = start * block + length <= here_size and begin <= offset and offset + length <= begin + size
            if slot >= 2 and not inside:
                continue
            found.append(Partition(len(found) + 5, offset, length))
            links = 0
            if len(found) + 5 >= _PARTITIONS_MAX:
                return
        link = next(((start, count) for _, kind, start, count in entries if count and kind in _EXTENDED), None)
        if link is None:
            return
        here, here_size = begin + link[0] * block, link[1] * block
