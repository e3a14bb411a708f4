"""``/dev/ublkbN``: what an application does with it, and the errnos that it gets.

**Supported.** Reading, writing (FUA, preflush), flushing, discarding, zeroing, zone operations, at once or with what
follows held back in a plug; opening, read-only and exclusively; reading the partition table again; what is left of a
removed disk for those who have it open: its end is at 0.
**Rejected.** Opening what is not there or is being removed ENXIO, exclusively what is held exclusively EBUSY; writing
through a read-only opening EBADF; all that `disk` refuses. ENXIO where there never was a disk. Opening an ordinary user's
disk as another one EPERM, and as anybody but root after TRY_STOP_DEV ENXIO.
**Differs from Linux.** Operations on a `SimBlockDevice` itself need no opening, count as none, and end with EIO where the
disk is gone: as if the removal had come between the check of the disk's size and the operation. Opening does not wait
for a partition scan. The device node's own owner and mode let everybody in.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import trio

from ublk_trio.kernel_sim.block.bio import Bio
from ublk_trio.kernel_sim.linux_errno import number as linux_errno
from ublk_trio.kernel_sim.waits import Wait
from ublk_trio.uapi import BlkZone, Feature, IoOp

if TYPE_CHECKING:
    from ublk_trio.kernel_sim.block.disk import SimDisk
    from ublk_trio.kernel_sim.block.merge import Plug
    from ublk_trio.kernel_sim.block.partitions import Partition
    from ublk_trio.kernel_sim.call import Caller
    from ublk_trio.kernel_sim.control import Steps
    from ublk_trio.kernel_sim.kernel import SimKernel

_READ: Final = int(IoOp.READ)
_WRITE: Final = int(IoOp.WRITE)
_EMPTY: Final = memoryview(b"")
_WITH_DATA: Final = frozenset({IoOp.WRITE, IoOp.ZONE_APPEND})


class _Operations:
    """What can be done with a disk, however one came by it. All sizes and offsets in bytes; errors are OSError."""

    def __init__(self, kernel: SimKernel, path: str) -> None:
        self._kernel = kernel
        self.path = path
        self._plug: Plug | None = None

    def _bio(self, op: IoOp, offset: int, data_or_length: int | bytes | bytearray | memoryview) -> Bio:
        if isinstance(data_or_length, int):
            assert op not in _WITH_DATA, f"a {op.name} takes data"
            length = data_or_length
            data = memoryview(bytearray(length)) if op is IoOp.READ else _EMPTY
        else:
            assert op in _WITH_DATA or op is IoOp.READ, f"{op.name} takes a length"
            data = memoryview(data_or_length)
            length = len(data)
        return self._kernel.new_bio(op.value, offset, length, data)

    def submit(
        self,
        op: IoOp,
        offset: int = 0,
        data_or_length: int | bytes | bytearray | memoryview = 0,
        *,
        fua: bool = False,
        preflush: bool = False,
        no_unmap: bool = False,
        no_fallback: bool = False,
        cpu: int | None = None,
        metadata: bytes | bytearray | memoryview | None = None,
    ) -> Bio:
        """Start an operation without waiting for its end: the bio, which may be done already.

        ``data_or_length`` is what a WRITE or ZONE_APPEND writes, a length for every other operation, or the memory that a READ
        is to fill. ``cpu`` is where the application runs (default: one after the other). ``metadata`` goes with the data where
        the disk has integrity.
        """
        bio = self._bio(op, offset, data_or_length)
        taker = self._taker(bio)
        if isinstance(taker, int):
            bio.finish(taker)
            return bio
        if metadata is not None:
            bio.metadata = memoryview(metadata)
        taker.submit(
            bio,
            fua=fua,
            preflush=preflush,
            no_unmap=no_unmap,
            no_fallback=no_fallback,
            cpu=cpu,
            plug=self._plug,
        )
        return bio

    def _taker(self, bio: Bio) -> SimDisk | int:
        """The disk that takes the operation, or what it ends with at once."""
        raise NotImplementedError

    def _live_disk(self) -> SimDisk:
        raise NotImplementedError

    def _error(self, result: int) -> OSError:
        return OSError(-result, os.strerror(-result), self.path)

    async def _run(self, bio: Bio) -> Bio:
        result = await bio.wait()
        if result < 0:
            raise self._error(result)
        return bio

    async def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes, fewer at the disk's end."""
        bio = await self._run(self.submit(IoOp.READ, offset, length))
        return bytes(bio.data)

    async def write(self, offset: int, data: bytes | bytearray | memoryview, *, fua: bool = False) -> None:
        """Write all of it; with ``fua`` it is durable when this returns. ENOSPC after the part that fits."""
        bio = await self._run(self.submit(IoOp.WRITE, offset, data, fua=fua))
        if bio.length < len(data):
            raise self._error(-errno.ENOSPC)

    async def flush(self) -> None:
        """What was written before is durable when this returns, as far as the disk admits to having a cache."""
        await self._run(self.submit(IoOp.FLUSH))

    async def discard(self, offset: int, length: int) -> None:
        """BLKDISCARD. It succeeds, too, when the server turns out not to know DISCARD."""
        await self._run(self.submit(IoOp.DISCARD, offset, length))

    async def write_zeroes(
        self, offset: int, length: int, *, no_unmap: bool = False, no_fallback: bool = False
    ) -> None:
        """``no_unmap``: BLKZEROOUT and fallocate's ZERO_RANGE; ``no_fallback``: PUNCH_HOLE, which is EOPNOTSUPP where zeroing
        is not offered; neither: how file systems zero."""
        await self._run(self.submit(IoOp.WRITE_ZEROES, offset, length, no_unmap=no_unmap, no_fallback=no_fallback))

    @contextmanager
    def plugged(self, *, cpu: int | None = None) -> Iterator[None]:
        """What is submitted inside is held back, adjacent operations are merged, and all goes out at the end, or when somebody
        waits for an operation."""
        disk = self._live_disk()
        plug = self._plug = disk.plug(cpu)
        try:
            yield
        finally:
            self._plug = None
            disk.plugs.remove(plug)
            plug.let_go()

    # ------------------------------------------------------------------ zones

    async def report_zones(self, sector: int = 0, most: int = 1 << 20) -> list[BlkZone]:
        """BLKREPORTZONE: the zones from the one of ``sector`` on. ENOTTY on a disk without zones."""
        disk = self._live_disk()
        if disk.zones is None:
            raise self._error(-errno.ENOTTY)
        if sector >= disk.sectors:
            await trio.lowlevel.checkpoint()
            return []
        report = disk.zones.report(sector, most)
        result: list[BlkZone] | int = 0

        def steps() -> Steps:
            nonlocal result
            result = yield from report
            return 0

        await self._work("report of zones", steps())
        if isinstance(result, int):
            raise self._error(result)
        return result

    async def manage_zones(self, op: IoOp, offset: int, length: int) -> None:
        """BLKOPENZONE, BLKCLOSEZONE, BLKFINISHZONE, BLKRESETZONE: each zone of the range."""
        await self._run(self.submit(op, offset, length))

    async def append(self, offset: int, data: bytes | bytearray | memoryview) -> int:
        """Append to the zone at ``offset``, as file systems do; returns where the data went."""
        bio = await self._run(self.submit(IoOp.ZONE_APPEND, offset, data))
        return bio.offset

    async def _work(self, name: str, steps: Steps) -> None:
        """Have the kernel do a piece of work. Cancelling gives up the wait, not the work."""
        done = trio.Event()
        self._kernel.run(f"{name} of {self.path}", steps, on_done=lambda result: done.set())
        await done.wait()


class SimBlockDevice(_Operations):
    """``/dev/ublkbN``, for an application: all sizes and offsets in bytes. Errors are OSError, with what the application would see."""

    def __init__(self, kernel: SimKernel, dev_id: int) -> None:
        super().__init__(kernel, kernel.disk_path(dev_id))
        self.dev_id = dev_id
        self._was_there = self._disk is not None

    @property
    def _disk(self) -> SimDisk | None:
        device = self._kernel.devices.get(self.dev_id)
        return device.disk if device is not None else None

    def _live_disk(self) -> SimDisk:
        disk = self._disk
        if disk is None:
            raise self._error(-errno.ENXIO)
        self._was_there = True
        return disk

    @property
    def exists(self) -> bool:
        """Whether the disk is there; it may be going."""
        return self._disk is not None

    @property
    def size(self) -> int:
        return self._live_disk().size

    @property
    def block_size(self) -> int:
        return self._live_disk().block_size

    @property
    def read_only(self) -> bool:
        return self._live_disk().read_only

    @property
    def partitions(self) -> list[Partition]:
        """What the last scan found, by number."""
        return list(self._live_disk().partitions)

    def _taker(self, bio: Bio) -> SimDisk | int:
        disk = self._disk
        if disk is None:
            return -errno.EIO if self._was_there else -errno.ENXIO
        self._was_there = True
        return disk

    def open(self, *, read_only: bool = False, exclusive: bool = False, caller: Caller | None = None) -> SimBlockFile:
        """Open it, as open(2) does with O_DIRECT, O_RDONLY or O_RDWR, and O_EXCL. While it is open, TRY_STOP_DEV fails and
        DEL_DEV waits.

        ``caller`` is the process that does (default: the kernel's own `SimKernel.identity`). Raises OSError: ENXIO, EBUSY, and
        what the driver has against the caller: EPERM for another user's disk, ENXIO for one that TRY_STOP_DEV made root's.
        """
        disk = self._disk
        if disk is None or disk.dying:
            raise self._error(-errno.ENXIO)
        if exclusive and disk.holder is not None:
            raise self._error(-errno.EBUSY)
        refused = disk.device.open_disk(caller if caller is not None else self._kernel.identity)
        if refused:
            raise self._error(refused)
        return SimBlockFile(self._kernel, disk, self.path, read_only=read_only, exclusive=exclusive)

    async def reread_partitions(self) -> None:
        """BLKRRPART. Raises OSError: EINVAL where scanning is suppressed, EBUSY while somebody holds the disk exclusively, EIO when
        the table cannot be read."""
        disk = self._live_disk()
        if disk.device.info.flags & Feature.UNPRIVILEGED_DEV:
            raise self._error(-errno.EINVAL)
        if disk.holder is not None:
            raise self._error(-errno.EBUSY)
        scan = disk.scan_partitions()
        if scan is None:
            await trio.lowlevel.checkpoint()
            return

        def steps() -> Steps:
            yield Wait(f"the partition scan of {self.path}", lambda: scan.done)
            return 0

        await self._work("BLKRRPART", steps())
        if scan.error:
            raise self._error(-scan.error)


class SimBlockFile(_Operations):
    """``/dev/ublkbN``, opened. Made by `SimBlockDevice.open`; a context manager that closes it.

    Keeps the disk that it opened, even when that is removed and another started in its place. An operation ends with EBADF
    once it is closed, and so does a change through a read-only opening.
    """

    def __init__(self, kernel: SimKernel, disk: SimDisk, path: str, *, read_only: bool, exclusive: bool) -> None:
        super().__init__(kernel, path)
        if exclusive:
            disk.holder = self
        self.read_only = read_only
        self._disk = disk
        self._closed = False
        disk.openers += 1

    def __enter__(self) -> SimBlockFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close it; a second time does nothing."""
        if self._closed:
            return
        self._closed = True
        disk = self._disk
        if disk.holder is self:
            disk.holder = None
        disk.openers -= 1
        disk.device.disk_closed(disk)
        disk.kernel.changed()

    def _live_disk(self) -> SimDisk:
        if self._closed:
            raise self._error(-errno.EBADF)
        return self._disk

    @property
    def size(self) -> int:
        """0 once the disk was removed."""
        disk = self._live_disk()
        return 0 if disk.dying else disk.size

    def _taker(self, bio: Bio) -> SimDisk | int:
        disk, op = self._disk, bio.op
        if self._closed:
            return -errno.EBADF
        if op == IoOp.DISCARD and not disk.limits.max_discard:
            return -linux_errno("EOPNOTSUPP")
        if self.read_only and op not in (_READ, IoOp.FLUSH):
            return -errno.EBADF
        if not disk.dying:
            return disk
        if op == _READ:
            bio.length, bio.data = 0, bio.data[:0]
            return 0
        if op == IoOp.FLUSH:
            return -errno.EIO if disk.limits.volatile_cache else 0
        if disk.read_only:
            return -errno.EPERM
        if op == _WRITE:
            return -errno.ENOSPC if bio.length else 0
        return -errno.EINVAL
