"""The block layer above the driver: what an application sees of ``/dev/ublkbN``.

**Supported.** read, write (FUA), flush, discard, write_zeroes, each split at the disk's limits; one hardware queue per
operation, chosen by Choices; the block statuses that survive; flush and FUA only as far as the disk advertises them;
the partition scan.
**Rejected.** Misaligned operations and discards past the end EINVAL, writes past the end ENOSPC, writes to a read-only
disk EPERM (as write(2) on ``/dev/ublkbN`` has it; open(2) succeeds), discards that the disk does not offer EOPNOTSUPP,
everything ENXIO where there is no disk and EIO once it is being removed.
**Differs from Linux.** No page cache: every operation is direct. A read past the end is short. No merging, no plugging,
no I/O scheduler, flushes are not combined, discards are not aligned to their granularity; no limit on segments, nor
Linux's own cap on the size of a request. write_zeroes falls back to writes even without NOUNMAP (fallocate's PUNCH_HOLE
would not). Cancelling a wait does not stop the operation, and the application is free at once: a real one would sleep
on.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

import trio

from ublk_trio.kernel_sim.params import has_attr
from ublk_trio.uapi import SECTOR_SHIFT, SECTOR_SIZE, BasicAttr, IoFlag, IoOp

if TYPE_CHECKING:
    from ublk_trio.kernel_sim.device import SimDevice
    from ublk_trio.kernel_sim.kernel import SimKernel
    from ublk_trio.uapi import Params

_READ: Final = int(IoOp.READ)
_WRITE: Final = int(IoOp.WRITE)
_FLUSH: Final = int(IoOp.FLUSH)
_DISCARD: Final = int(IoOp.DISCARD)
_WRITE_ZEROES: Final = int(IoOp.WRITE_ZEROES)
_FUA: Final = int(IoFlag.FUA)
_NOUNMAP: Final = int(IoFlag.NOUNMAP)

#: A flush has no place on the disk: the block layer leaves its sector at -1.
FLUSH_SECTOR: Final = (1 << 64) - 1
_PARTITION_SCAN_BYTES: Final = 4096
_EMPTY: Final = memoryview(b"")


class Request:
    """A part of a `Bio` that fits into one ublk request."""

    __slots__ = ("bio", "length", "metadata", "nr_sectors", "op", "op_flags", "start_sector", "view")

    def __init__(self, bio: Bio, op_flags: int, start_sector: int, length: int, view: memoryview) -> None:
        self.bio = bio
        self.op = op_flags & 0xFF
        self.op_flags = op_flags
        self.start_sector = start_sector
        self.nr_sectors = length >> SECTOR_SHIFT
        self.length = length
        self.view = view
        #: Integrity data.
        self.metadata: memoryview | None = None

    def advance(self, moved_bytes: int) -> int | None:
        """So many bytes are done: 0 when that was all, None when a rest remains to be delivered."""
        if moved_bytes == self.length:
            return 0
        self.view = self.view[moved_bytes:]
        self.length -= moved_bytes
        self.start_sector += moved_bytes >> SECTOR_SHIFT
        self.nr_sectors = self.length >> SECTOR_SHIFT
        return None

    def end(self, error: int) -> None:
        """It is over, with an errno or 0."""
        self.bio.part_ended(error)

    def __repr__(self) -> str:
        return f"<{IoOp(self.op).name} sector {self.start_sector}+{self.nr_sectors} of {self.bio}>"


class Bio:
    """One operation of an application. ``result`` is bytes, or a negative errno; None until ``done``."""

    __slots__ = (
        "_error",
        "_event",
        "_on_end",
        "_parts",
        "data",
        "disk",
        "done",
        "length",
        "number",
        "offset",
        "op",
        "result",
    )

    def __init__(self, number: int, op: int, offset: int, length: int, data: memoryview) -> None:
        self.number = number
        self.op = op
        self.offset = offset
        self.length = length
        self.data = data
        self.done = False
        self.result: int | None = None
        self.disk: SimDisk | None = None
        self._parts = 0
        self._error = 0
        self._event: trio.Event | None = None
        self._on_end: Callable[[int], bool] | None = None

    def __repr__(self) -> str:
        return f"<bio {self.number} {IoOp(self.op).name} {self.offset}+{self.length} {self.result}>"

    async def wait(self) -> int:
        """Wait for the end and return `result`; a checkpoint. Cancelling gives up the wait, not the operation."""
        if self.done:
            await trio.lowlevel.checkpoint()
        else:
            if self._event is None:
                self._event = trio.Event()
            await self._event.wait()
        assert self.result is not None
        return self.result

    def part_ended(self, error: int) -> None:
        self._parts -= 1
        if error and not self._error:
            self._error = error
        if not self._parts:
            on_end, self._on_end = self._on_end, None
            if on_end is None or not on_end(self._error):
                self.finish(-self._error if self._error else self.length)

    def start(self, requests: list[Request], on_end: Callable[[int], bool] | None = None) -> list[Request]:
        """Expect these parts; ``on_end(error)`` may start more of them and then returns True."""
        self._parts = len(requests)
        self._error = 0
        self._on_end = on_end
        return requests

    def finish(self, result: int) -> None:
        assert not self.done
        self.done = True
        self.result = result
        if self._event is not None:
            self._event.set()
        if self.disk is not None:
            self.disk.bio_finished(self)


class SimDisk:
    """The gendisk of a started device, with its limits."""

    def __init__(self, device: SimDevice, params: Params) -> None:
        assert params.basic is not None
        basic = params.basic
        self.device = device
        self.kernel = device.kernel
        self.sectors = basic.dev_sectors
        self.block_size = 1 << basic.logical_bs_shift
        self.max_bytes = (basic.max_sectors << SECTOR_SHIFT) // self.block_size * self.block_size
        self.chunk_bytes = basic.chunk_sectors << SECTOR_SHIFT
        self.max_discard_bytes = self.max_write_zeroes_bytes = 0
        if params.discard is not None:
            self.max_discard_bytes = params.discard.max_discard_sectors << SECTOR_SHIFT
            self.max_write_zeroes_bytes = params.discard.max_write_zeroes_sectors << SECTOR_SHIFT
        self.read_only = has_attr(params, BasicAttr.READ_ONLY)
        self.volatile_cache = has_attr(params, BasicAttr.VOLATILE_CACHE)
        self.fua = has_attr(params, BasicAttr.FUA)
        #: Being removed: new operations fail, those under way must still be answered.
        self.dying = False
        self.openers = 0
        #: The operations that have not ended.
        self.bios: set[Bio] = set()
        self._zeroes = _EMPTY

    @property
    def size(self) -> int:
        return self.sectors << SECTOR_SHIFT

    def bio_finished(self, bio: Bio) -> None:
        self.bios.discard(bio)
        kernel = self.kernel
        if kernel.log is not None:
            kernel.log.append(("bio-done", bio.number, bio.result))
        kernel.changed()

    def submit(self, bio: Bio, *, fua: bool = False, no_unmap: bool = False) -> None:
        """Start the operation, or finish it at once."""
        refusal = self._check(bio)
        if refusal is not None:
            bio.finish(refusal)
            return
        bio.disk = self
        self.bios.add(bio)
        op = bio.op
        if op == _READ:
            self._send(bio.start(self._split(bio, _READ, bio.data, self.max_bytes)))
        elif op == _WRITE:
            self._write(bio, bio.data, fua=fua)
        elif op == _FLUSH:
            self._send(bio.start([Request(bio, _FLUSH, FLUSH_SECTOR, 0, _EMPTY)]))
        elif op == _DISCARD:
            self._send(bio.start(self._split(bio, _DISCARD, None, self.max_discard_bytes)))
        else:
            self._write_zeroes(bio, no_unmap=no_unmap)

    def _check(self, bio: Bio) -> int | None:
        """What the operation ends with at once, or None when it goes on."""
        op = bio.op
        if self.dying:
            return -errno.EIO
        if op == _FLUSH:
            return None if self.volatile_cache else 0
        if op != _READ and self.read_only:
            return -errno.EPERM
        if op == _DISCARD and not self.max_discard_bytes:
            return -errno.EOPNOTSUPP
        if (bio.offset | bio.length) % self.block_size or bio.offset < 0:
            return -errno.EINVAL
        if bio.offset + bio.length > self.size:
            if op == _READ:
                bio.length = max(0, self.size - bio.offset)
                bio.data = bio.data[: bio.length]
            else:
                return -errno.ENOSPC if op == _WRITE else -errno.EINVAL
        return None if bio.length else 0

    def _write(self, bio: Bio, data: memoryview | None, *, fua: bool) -> None:
        flush_after = fua and self.volatile_cache and not self.fua
        requests = self._split(bio, _WRITE | (_FUA if fua and self.fua else 0), data, self.max_bytes)
        self._send(bio.start(requests, (lambda error: self._flush_after(bio, error)) if flush_after else None))

    def _flush_after(self, bio: Bio, error: int) -> bool:
        """FUA for a disk that cannot do it: a flush follows the write, as a part of the same operation."""
        if error:
            return False
        self._send(bio.start([Request(bio, _FLUSH, FLUSH_SECTOR, 0, _EMPTY)]))
        return True

    def _write_zeroes(self, bio: Bio, *, no_unmap: bool) -> None:
        if not self.max_write_zeroes_bytes:
            self._write(bio, None, fua=False)
            return

        def fall_back(error: int) -> bool:
            if error != errno.EOPNOTSUPP or self.dying:
                return False
            self._write(bio, None, fua=False)
            return True

        flags = _WRITE_ZEROES | (_NOUNMAP if no_unmap else 0)
        self._send(bio.start(self._split(bio, flags, None, self.max_write_zeroes_bytes), fall_back))

    def _split(self, bio: Bio, op_flags: int, data: memoryview | None, max_bytes: int) -> list[Request]:
        """The operation's parts, none longer than ``max_bytes`` nor, with data, across a chunk's boundary."""
        op = op_flags & 0xFF
        has_data = op in (_READ, _WRITE)
        if has_data and data is None:
            data = self._zero_view(min(bio.length, max_bytes))
            zeroes = True
        else:
            zeroes = False
        start = bio.offset
        if bio.length <= max_bytes and not (has_data and self.chunk_bytes):
            return [Request(bio, op_flags, start >> SECTOR_SHIFT, bio.length, data if data is not None else _EMPTY)]
        requests = []
        for offset, length in self._pieces(start, bio.length, max_bytes, self.chunk_bytes if has_data else 0):
            if data is None:
                view = _EMPTY
            else:
                view = data[:length] if zeroes else data[offset - start : offset - start + length]
            requests.append(Request(bio, op_flags, offset >> SECTOR_SHIFT, length, view))
        return requests

    @staticmethod
    def _pieces(offset: int, length: int, max_bytes: int, chunk_bytes: int) -> Iterator[tuple[int, int]]:
        end = offset + length
        while offset < end:
            piece = min(end - offset, max_bytes)
            if chunk_bytes:
                piece = min(piece, chunk_bytes - offset % chunk_bytes)
            yield offset, piece
            offset += piece

    def _zero_view(self, length: int) -> memoryview:
        if len(self._zeroes) < length:
            self._zeroes = memoryview(bytes(length))
        return self._zeroes[:length]

    def _send(self, requests: list[Request]) -> None:
        queues = self.device.queues
        choices = self.kernel.choices
        queue = queues[0]
        if len(queues) > 1:
            # Even a calm machine uses all of its CPUs, or the other queues would never be tried.
            queue = queues[(self.kernel.next_cpu() + choices.choose("queue", len(queues))) % len(queues)]
        for request in requests:
            queue.submit(request)

    def scan_partitions(self) -> Bio | None:
        """Look for a partition table, as the kernel does when a disk appears. None when there is nothing to read."""
        length = min(max(_PARTITION_SCAN_BYTES, self.block_size), self.size) // self.block_size * self.block_size
        if not length:
            return None
        bio = self.kernel.new_bio(_READ, 0, length, memoryview(bytearray(length)))
        self.submit(bio)
        return bio


class SimBlockDevice:
    """``/dev/ublkbN``, for an application: all sizes and offsets in bytes. Errors are OSError, with what the application would see."""

    def __init__(self, kernel: SimKernel, dev_id: int) -> None:
        self._kernel = kernel
        self.dev_id = dev_id
        self.path = kernel.disk_path(dev_id)
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

    def _error(self, result: int) -> OSError:
        return OSError(-result, os.strerror(-result), self.path)

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

    def submit(
        self, op: IoOp, offset: int = 0, data_or_length: bytes | bytearray | memoryview | int = 0, *,
        fua: bool = False, no_unmap: bool = False,
    ) -> Bio:  # fmt: skip
        """Start an operation and return at once. A WRITE takes data, which must not change until it is done; others a length."""
        if isinstance(data_or_length, int):
            assert op is not IoOp.WRITE, "a WRITE takes data"
            length = data_or_length
            data = memoryview(bytearray(length)) if op is IoOp.READ else _EMPTY
        else:
            assert op is IoOp.WRITE, f"{op.name} takes a length"
            data = memoryview(data_or_length)
            length = len(data)
        bio = self._kernel.new_bio(int(op), offset, length, data)
        disk = self._disk
        if disk is None:
            bio.finish(-errno.EIO if self._was_there else -errno.ENXIO)
        else:
            self._was_there = True
            disk.submit(bio, fua=fua, no_unmap=no_unmap)
        return bio

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
        """Write all of it; with ``fua`` it is durable when this returns."""
        await self._run(self.submit(IoOp.WRITE, offset, data, fua=fua))

    async def flush(self) -> None:
        """What was written before is durable when this returns, as far as the disk admits to having a cache."""
        await self._run(self.submit(IoOp.FLUSH))

    async def discard(self, offset: int, length: int) -> None:
        await self._run(self.submit(IoOp.DISCARD, offset, length))

    async def write_zeroes(self, offset: int, length: int, *, no_unmap: bool = False) -> None:
        await self._run(self.submit(IoOp.WRITE_ZEROES, offset, length, no_unmap=no_unmap))

    def opened(self) -> _Opened:
        """A context manager that keeps the disk open, as a mount does: TRY_STOP_DEV fails and DEL_DEV waits meanwhile."""
        return _Opened(self._live_disk())


class _Opened:
    """See `SimBlockDevice.opened`."""

    def __init__(self, disk: SimDisk) -> None:
        self._disk = disk

    def __enter__(self) -> None:
        self._disk.openers += 1

    def __exit__(self, *error: object) -> None:
        self._disk.openers -= 1
        self._disk.device.disk_closed(self._disk)
        self._disk.kernel.changed()


assert SECTOR_SIZE == 512
