"""Zoned disks: what the block layer itself sees to.

**Supported.** The report at START_DEV and for an application, in requests of as many zones as the largest request has
room for; opening, closing, finishing and resetting zones, one request a zone, all at once for a reset of the whole disk;
zone append, never split; one write on its way to a sequential zone at a time.
**Rejected.** ENOTTY on a disk without zones (EOPNOTSUPP for an append), EINVAL for a range that does not consist of zones
of the disk, EIO for managing a conventional zone and for an append that is too long or not at a zone's start; ENODEV,
which START_DEV returns, for a report that does not describe the disk.
**Differs from Linux.** Write pointers are not tracked: writes out of order reach the server, which must refuse them.
Appending is never emulated. Writes of a flush sequence do not wait for others to their zone.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Generator
from typing import TYPE_CHECKING, Final

from ublk_trio.kernel_sim.block.request import Piece, Request
from ublk_trio.kernel_sim.waits import Wait
from ublk_trio.uapi import SECTOR_SHIFT, BlkZone, IoOp, ZoneType

if TYPE_CHECKING:
    from ublk_trio.kernel_sim.block.bio import Bio
    from ublk_trio.kernel_sim.block.disk import SimDisk
    from ublk_trio.kernel_sim.block.tags import HardwareQueue
    from ublk_trio.kernel_sim.control import Steps

ZONE_BYTES: Final = BlkZone.LAYOUT.size
MANAGEMENT: Final = frozenset({IoOp.ZONE_OPEN, IoOp.ZONE_CLOSE, IoOp.ZONE_FINISH, IoOp.ZONE_RESET})
_REPORT: Final = int(IoOp.REPORT_ZONES)


class Zones:
    """A zoned disk's zones, as far as the block layer knows them."""

    def __init__(self, disk: SimDisk) -> None:
        self._disk = disk
        self._conventional: set[int] = set()
        #: Writes that wait for another to the same zone; a key is there while one is on its way.
        self._writes: dict[int, deque[tuple[HardwareQueue, ZoneWrite]]] = {}

    def is_sequential(self, offset: int) -> bool:
        return offset // self._disk.limits.chunk not in self._conventional

    def revalidate(self) -> Steps:
        """Learn of all zones, before the disk appears. Returns 0 or a negative errno."""
        disk = self._disk
        chunk = disk.limits.chunk >> SECTOR_SHIFT
        report = yield from self.report(0, -(-disk.sectors // chunk))
        if isinstance(report, int):
            return report
        expected = 0
        for number, zone in enumerate(report):
            last = zone.start + zone.len >= disk.sectors
            if zone.start != expected or (zone.len != chunk and not (last and zone.len < chunk)):
                return -errno.ENODEV
            if zone.type == ZoneType.CONVENTIONAL:
                self._conventional.add(number)
            expected += zone.len
        return 0 if expected == disk.sectors else -errno.ENODEV

    def report(self, sector: int, most: int) -> Generator[Wait, bool, list[BlkZone] | int]:
        """Up to ``most`` zones from the one of ``sector`` on; a negative errno when the server refuses.

        A server that answers with no zone is asked again, for ever.
        """
        disk = self._disk
        chunk = disk.limits.chunk >> SECTOR_SHIFT
        wanted = min(most, (disk.sectors // chunk) - sector // chunk)
        per_request = min(wanted * ZONE_BYTES, disk.max_hardware_bytes) // ZONE_BYTES
        zones: list[BlkZone] = []
        while len(zones) < wanted:
            number = min(wanted - len(zones), per_request)
            buffer = memoryview(bytearray(per_request * ZONE_BYTES))
            bio = disk.kernel.new_bio(_REPORT, sector << SECTOR_SHIFT, len(buffer), buffer)
            request = Request(bio, _REPORT, sector, len(buffer), buffer)
            request.nr_sectors = number
            disk.send(bio, request)
            yield Wait(f"a report of zones from sector {sector}", lambda bio=bio: bio.done)  # type: ignore[misc]
            assert bio.result is not None
            if bio.result < 0:
                return bio.result
            for index in range(number):
                zone = BlkZone.unpack(buffer[index * ZONE_BYTES : (index + 1) * ZONE_BYTES])
                if not zone.len:
                    break
                zones.append(zone)
                sector += chunk
        return zones

    def check_management(self, bio: Bio) -> int:
        """0, or what BLKRESETZONE and its kin fail with."""
        disk, chunk = self._disk, self._disk.limits.chunk
        end = bio.offset + bio.length
        if bio.length <= 0 or end > disk.size or bio.offset < 0:
            return -errno.EINVAL
        if bio.offset % chunk or (bio.length % chunk and end != disk.size):
            return -errno.EINVAL
        return 0

    def manage(self, bio: Bio) -> None:
        """Send the requests of a checked management operation."""
        disk, chunk = self._disk, self._disk.limits.chunk
        if bio.op == IoOp.ZONE_RESET and not bio.offset and bio.length == disk.size:
            disk.send(bio, Request(bio, int(IoOp.ZONE_RESET_ALL), 0, 0, memoryview(b"")))
            return
        offsets = range(bio.offset, bio.offset + bio.length, chunk)
        bio.expect(len(offsets))
        for offset in offsets:
            if self.is_sequential(offset):
                disk.send(bio, Request(bio, bio.op, offset >> SECTOR_SHIFT, 0, memoryview(b"")))
            else:
                bio.part_ended(errno.EIO)

    def check_append(self, bio: Bio) -> int:
        """0, or what an append fails with."""
        limits = self._disk.limits
        if bio.offset % limits.chunk or bio.length > limits.max_zone_append:
            return -errno.EIO
        return 0 if self.is_sequential(bio.offset) else -errno.EIO

    # ------------------------------------------------------------------ one write a zone

    def write(self, queue: HardwareQueue, request: ZoneWrite) -> None:
        """Submit a write, once none is on its way to its zone."""
        zone = (request.start_sector << SECTOR_SHIFT) // self._disk.limits.chunk
        request.zone = zone
        waiting = self._writes.get(zone)
        if waiting is None:
            self._writes[zone] = deque()
            queue.submit(request)
        else:
            waiting.append((queue, request))

    def write_ended(self, zone: int) -> None:
        """The zone's write is over: the next one's turn."""
        waiting = self._writes[zone]
        if waiting:
            queue, request = waiting.popleft()
            queue.submit(request)
        else:
            del self._writes[zone]


class ZoneWrite(Piece):
    """A write to a sequential zone."""

    __slots__ = ("zone", "zones")

    def __init__(self, request: Request, *, zones: Zones) -> None:
        super().__init__(
            request.bio,
            request.op_flags,
            request.start_sector,
            request.length,
            request.view,
            metadata=request.metadata,
            no_merge=True,
        )
        self.zones = zones
        self.zone = 0

    def end(self, error: int) -> None:
        self.zones.write_ended(self.zone)
        super().end(error)
