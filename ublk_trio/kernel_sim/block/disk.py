"""The gendisk of a started device: from an operation to its requests.

**Supported.** Reads, writes, flushes, discards, write-zeroes and zone operations, checked as the kernel checks them for a
direct operation of an application; splitting, plugging and the flush machinery on the way to the hardware queue of the
application's CPU; write-zeroes that fall back to writing zeroes; a frozen queue, before which new operations wait;
removal, which lets what is under way end and fails the rest.
**Rejected.** EINVAL misaligned, ENOSPC for a write at the disk's end or behind it, EPERM for writing to a read-only
disk, EOPNOTSUPP for a discard that the disk does not offer, EIO once it is being removed.
**Differs from Linux.** No page cache: every operation is direct, and none is refused for its buffer's alignment. A disk
with integrity gives every read and write metadata; the kernel's own checksums in it are neither made nor checked.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Generator, Iterable
from typing import TYPE_CHECKING, Final

from ublk_trio.kernel_sim.block import split
from ublk_trio.kernel_sim.block.flush import FLUSH_SECTOR, FlushQueue, SequencedRequest, Step
from ublk_trio.kernel_sim.block.limits import limits_of
from ublk_trio.kernel_sim.block.mapping import queue_of_cpu, spread
from ublk_trio.kernel_sim.block.merge import Plug
from ublk_trio.kernel_sim.block.partitions import Partition, PartitionScan
from ublk_trio.kernel_sim.block.request import Piece, Request
from ublk_trio.kernel_sim.block.zones import MANAGEMENT, Zones, ZoneWrite
from ublk_trio.kernel_sim.linux_errno import number as linux_errno
from ublk_trio.kernel_sim.params import has_attr
from ublk_trio.kernel_sim.waits import Wait
from ublk_trio.uapi import SECTOR_SHIFT, SECTOR_SIZE, BasicAttr, IoFlag, IoOp

if TYPE_CHECKING:
    from ublk_trio.kernel_sim.block.bio import Bio
    from ublk_trio.kernel_sim.block.tags import HardwareQueue
    from ublk_trio.kernel_sim.device import SimDevice
    from ublk_trio.uapi import Params

_READ: Final = int(IoOp.READ)
_WRITE: Final = int(IoOp.WRITE)
_FLUSH: Final = int(IoOp.FLUSH)
_DISCARD: Final = int(IoOp.DISCARD)
_WRITE_ZEROES: Final = int(IoOp.WRITE_ZEROES)
_APPEND: Final = int(IoOp.ZONE_APPEND)
_FUA: Final = int(IoFlag.FUA)
_NOUNMAP: Final = int(IoFlag.NOUNMAP)
_NOT_SUPPORTED: Final = linux_errno("EOPNOTSUPP")
_DATA: Final = frozenset({_READ, _WRITE})
_EMPTY: Final = memoryview(b"")


class SimDisk:
    """A disk, from START_DEV until its removal, and for those who have it open until they close it."""

    def __init__(self, device: SimDevice, params: Params) -> None:
        assert params.basic is not None
        limits = limits_of(params, device.kernel.version)
        assert limits is not None, "START_DEV refuses such parameters"
        kernel = device.kernel
        self.device = device
        self.kernel = kernel
        self.limits = limits
        self.sectors = params.basic.dev_sectors
        self.block_size = limits.logical_block
        self.max_hardware_bytes = params.basic.max_sectors << SECTOR_SHIFT
        self.read_only = has_attr(params, BasicAttr.READ_ONLY)
        self.partitions: list[Partition] = []
        self.openers = 0
        #: Whoever opened it exclusively.
        self.holder: object = None
        #: The operations that have not ended.
        self.bios: set[Bio] = set()
        #: What applications hold back.
        self.plugs: list[Plug] = []
        self.zones = Zones(self) if params.zoned is not None else None
        self._dying = False
        self._freezes = 0
        self._at_the_gate: list[tuple[Bio, Callable[[], None]]] = []
        self._zeroes = _EMPTY
        self._queues: list[HardwareQueue] = list(device.queues)
        self._queue_of_cpu = queue_of_cpu(cpus=kernel.cpus, queues=len(self._queues), version=kernel.version)
        # One CPU of each queue after the other: a calm machine shall use all of its queues.
        self._cpus = spread(self._queue_of_cpu)
        for queue in self._queues:
            queue.attach(limits, FlushQueue(queue, kernel.clock))

    @property
    def size(self) -> int:
        return self.sectors << SECTOR_SHIFT

    @property
    def zoned(self) -> bool:
        return self.zones is not None

    @property
    def dying(self) -> bool:
        """Being removed: new operations fail, those under way must still be answered."""
        return self._dying

    @dying.setter
    def dying(self, value: bool) -> None:
        assert value, "no disk comes back"
        self._dying = True
        self.partitions = []
        self.unplug()
        held, self._at_the_gate = self._at_the_gate, []
        for bio, _ in held:
            bio.finish(-errno.EIO)

    def bio_finished(self, bio: Bio) -> None:
        """An operation ended."""
        self.bios.discard(bio)
        kernel = self.kernel
        if kernel.log is not None:
            kernel.log.append(("bio-done", bio.number, bio.result))
        kernel.changed()

    # ------------------------------------------------------------------ operations

    def submit(
        self,
        bio: Bio,
        *,
        fua: bool = False,
        preflush: bool = False,
        no_unmap: bool = False,
        no_fallback: bool = False,
        cpu: int | None = None,
        plug: Plug | None = None,
    ) -> None:
        """Start the operation, or finish it at once."""
        op = bio.op
        refusal = self._check_data(bio) if op in _DATA else self._check_other(bio, no_fallback=no_fallback)
        if refusal is not None:
            bio.finish(refusal)
            return
        if self._freezes:
            again = {"fua": fua, "preflush": preflush, "no_unmap": no_unmap, "no_fallback": no_fallback}
            self._at_the_gate.append((bio, lambda: self.submit(bio, **again, cpu=cpu, plug=plug)))
            return
        bio.disk = self
        self.bios.add(bio)
        limits = self.limits
        queue = self._queues[0]
        if plug is not None:
            queue = plug.queue
        elif len(self._queues) > 1:
            queue = self._queue_for(cpu)
        if op == _READ:
            if bio.length <= limits.never_split and plug is None and not limits.integrity_interval:
                queue.submit(Request(bio, _READ, bio.offset >> SECTOR_SHIFT, bio.length, bio.data))
            else:
                self._send(queue, self._data_requests(bio, _READ, bio.data), plug)
        elif op == _WRITE:
            self._write(queue, bio, fua=fua, preflush=preflush, plug=plug)
        elif op == _FLUSH:
            bio.expect(1, lambda error: self._is_not_supported(bio, error))
            steps = (Step.PREFLUSH,)
            queue.submit(SequencedRequest(bio, _FLUSH, FLUSH_SECTOR, 0, _EMPTY, queue=queue, steps=steps))
        elif op == _DISCARD:
            requests: list[Request] = [
                Piece(bio, _DISCARD, offset >> SECTOR_SHIFT, length, _EMPTY, no_merge=cut_off)
                for offset, length, cut_off in split.discards(limits, bio.offset, bio.length)
            ]
            bio.expect(len(requests), lambda error: self._is_not_supported(bio, error))
            self._send_together(queue, requests, plug)
        elif op == _WRITE_ZEROES:
            self._write_zeroes(queue, bio, no_unmap=no_unmap, no_fallback=no_fallback)
        elif op == _APPEND:
            self._append(queue, bio)
        else:
            assert self.zones is not None
            self.zones.manage(bio)

    def _check_other(self, bio: Bio, *, no_fallback: bool) -> int | None:
        """As `_check_data`, for an operation without data."""
        op, offset = bio.op, bio.offset
        if self._dying:
            return -errno.EIO
        if op == _FLUSH:
            return None if self.limits.volatile_cache else 0
        if op == _DISCARD and not self.limits.max_discard:
            return -_NOT_SUPPORTED
        if op in MANAGEMENT or op == _APPEND:
            return self._check_zone(bio)
        if op == _DISCARD and self.read_only:
            return -errno.EPERM
        if offset < 0 or bio.length <= 0 or offset + bio.length > self.size or (offset | bio.length) % self.block_size:
            return -errno.EINVAL
        if self.read_only:
            return -errno.EPERM
        if op == _WRITE_ZEROES and no_fallback and not self.limits.max_write_zeroes:
            return -_NOT_SUPPORTED
        return None

    def _check_data(self, bio: Bio) -> int | None:
        """What a read or write ends with at once, or None when it goes on."""
        if self._dying:
            return -errno.EIO
        offset, length = bio.offset, bio.length
        if offset < 0:
            return -errno.EINVAL
        if bio.op == _WRITE and self.read_only:
            return -errno.EPERM
        if not length:
            return 0
        size = self.sectors << SECTOR_SHIFT
        if offset + length > size:
            bio.length = length = max(0, size - offset)
            bio.data = bio.data[:length]
            if not length:
                return 0 if bio.op == _READ else -errno.ENOSPC
        if (offset | length) & (self.block_size - 1):
            return -errno.EINVAL
        return None

    def _check_zone(self, bio: Bio) -> int | None:
        if self.zones is None:
            return -_NOT_SUPPORTED if bio.op == _APPEND else -errno.ENOTTY
        if self.read_only:
            return -errno.EPERM
        return (self.zones.check_append(bio) if bio.op == _APPEND else self.zones.check_management(bio)) or None

    @staticmethod
    def _is_not_supported(bio: Bio, error: int) -> bool:
        """A discard or flush that the server turns out not to know is as good as done."""
        if error != _NOT_SUPPORTED:
            return False
        bio.finish(bio.length)
        return True

    def _write(self, queue: HardwareQueue, bio: Bio, *, fua: bool, preflush: bool, plug: Plug | None) -> None:
        limits = self.limits
        flags = _WRITE
        steps: tuple[Step, ...] = ()
        if limits.volatile_cache and (fua or preflush):
            if fua and limits.fua:
                flags |= _FUA
            if preflush:
                steps += (Step.PREFLUSH,)
            if fua and not limits.fua:
                steps += (Step.POSTFLUSH,)
        if bio.length <= limits.never_split and not steps and plug is None and not limits.integrity_interval:
            queue.submit(Request(bio, flags, bio.offset >> SECTOR_SHIFT, bio.length, bio.data))
            return
        requests = self._data_requests(bio, flags, bio.data)
        if steps:
            steps = tuple(sorted((*steps, Step.DATA)))
            requests = [self._sequenced(queue, request, steps) for request in requests]
        self._send(queue, requests, plug)

    @staticmethod
    def _sequenced(queue: HardwareQueue, request: Request, steps: tuple[Step, ...]) -> Request:
        return SequencedRequest(
            request.bio,
            request.op_flags,
            request.start_sector,
            request.length,
            request.view,
            queue=queue,
            steps=steps,
            metadata=request.metadata,
        )

    def _write_zeroes(self, queue: HardwareQueue, bio: Bio, *, no_unmap: bool, no_fallback: bool) -> None:
        limits = self.limits
        if not limits.max_write_zeroes:
            self._write_pages_of_zeroes(queue, bio)
            return

        def fall_back(error: int) -> bool:
            if error != _NOT_SUPPORTED or no_fallback or self._dying:
                return False
            self._write_pages_of_zeroes(queue, bio)
            return True

        flags = _WRITE_ZEROES | (_NOUNMAP if no_unmap else 0)
        requests = self._range_requests(bio, flags, split.write_zeroes(limits, bio.offset, bio.length))
        bio.expect(len(requests), fall_back)
        self._send(queue, requests, None)

    def _write_pages_of_zeroes(self, queue: HardwareQueue, bio: Bio) -> None:
        requests: list[Request] = []
        for offset, length, cut_off in split.zero_pages(self.limits, bio.offset, bio.length):
            metadata = memoryview(bytes(self.limits.metadata_of(length))) or None
            sector, zeroes = offset >> SECTOR_SHIFT, self._zero_view(length)
            requests.append(Piece(bio, _WRITE, sector, length, zeroes, metadata=metadata, no_merge=cut_off))
        bio.expect(len(requests))
        self._send_together(queue, requests, None)

    def _append(self, queue: HardwareQueue, bio: Bio) -> None:
        sector = bio.offset >> SECTOR_SHIFT
        request = Piece(bio, _APPEND, sector, bio.length, bio.data, metadata=self._metadata(bio), no_merge=True)

        def appended(error: int) -> bool:
            # The driver put the place that the server chose into the request.
            if not error:
                bio.offset = request.start_sector << SECTOR_SHIFT
            return False

        bio.expect(1, appended)
        queue.submit(request)

    # ------------------------------------------------------------------ requests

    def _data_requests(self, bio: Bio, op_flags: int, data: memoryview) -> list[Request]:
        metadata = self._metadata(bio)
        requests: list[Request] = []
        begin, end = bio.offset, bio.offset + bio.length
        for offset, length in split.reads_and_writes(self.limits, begin, bio.length):
            view = data[offset - begin : offset - begin + length]
            before = self.limits.metadata_of(offset - begin)
            mine = metadata[before : before + self.limits.metadata_of(length)] if metadata is not None else None
            cut_off = offset + length < end
            sector = offset >> SECTOR_SHIFT
            requests.append(Piece(bio, op_flags, sector, length, view, metadata=mine, no_merge=cut_off))
        bio.expect(len(requests))
        return requests

    def _range_requests(self, bio: Bio, op_flags: int, pieces: Iterable[split.Piece]) -> list[Request]:
        return [Request(bio, op_flags, offset >> SECTOR_SHIFT, length, _EMPTY) for offset, length in pieces]

    def _metadata(self, bio: Bio) -> memoryview | None:
        length = self.limits.metadata_of(bio.length)
        if length and bio.metadata is None:
            bio.metadata = memoryview(bytearray(length))
        return bio.metadata

    def _zero_view(self, length: int) -> memoryview:
        if len(self._zeroes) < length:
            self._zeroes = memoryview(bytes(length))
        return self._zeroes[:length]

    def _send(self, queue: HardwareQueue, requests: list[Request], plug: Plug | None) -> None:
        for request in requests:
            if self.zones is not None and self._is_zone_write(request):
                self.zones.write(queue, ZoneWrite(request, zones=self.zones))
            elif plug is not None and not request.keeps_tag:
                plug.add(request)
            else:
                queue.submit(request)

    def _send_together(self, queue: HardwareQueue, requests: list[Request], plug: Plug | None) -> None:
        """The bios of one call: held back together, so that those that touch become one request again."""
        held = Plug(queue) if plug is None else plug
        self._send(queue, requests, held)
        if plug is None:
            held.let_go()

    def _is_zone_write(self, request: Request) -> bool:
        assert self.zones is not None
        writes = request.op in (_WRITE, _WRITE_ZEROES) and not request.keeps_tag
        return writes and self.zones.is_sequential(request.start_sector << SECTOR_SHIFT)

    def send(self, bio: Bio, request: Request) -> None:
        """Submit a request that is made already; nothing is checked but that the disk is still there."""
        if bio.disk is None:
            bio.disk = self
            self.bios.add(bio)
        if self._dying:
            request.end(errno.EIO)
        else:
            self._queue_for(None).submit(request)

    def _queue_for(self, cpu: int | None) -> HardwareQueue:
        if cpu is None:
            # Applications run on one CPU after the other.
            cpus = self._cpus
            turn = self.kernel.next_cpu()
            if len(self._queues) > 1:
                turn += self.kernel.choices.choose("cpu", len(cpus))
            cpu = cpus[turn % len(cpus)]
        return self._queues[self._queue_of_cpu[cpu]]

    # ------------------------------------------------------------------ plugs, freezing, partitions

    def plug(self, cpu: int | None) -> Plug:
        """Begin to hold back what an application submits with this plug."""
        if cpu is None:
            cpu = self._cpus[self.kernel.next_cpu()]
        plug = Plug(self._queues[self._queue_of_cpu[cpu]])
        self.plugs.append(plug)
        return plug

    def unplug(self) -> None:
        """Let go of all that is held back."""
        for plug in self.plugs:
            plug.let_go()

    def freeze(self) -> Generator[Wait, bool, None]:
        """Let nothing new in, and wait until what is under way has ended."""
        self._freezes += 1
        self.unplug()
        yield Wait(f"{self.kernel.disk_path(self.device.dev_id)} to be frozen", lambda: not self.bios)

    def unfreeze(self) -> None:
        """Let in what waited, in the order in which it came."""
        assert self._freezes, "it is not frozen"
        self._freezes -= 1
        if not self._freezes:
            held, self._at_the_gate = self._at_the_gate, []
            for _, resubmit in held:
                resubmit()

    def scan_partitions(self) -> PartitionScan | None:
        """Look for a partition table, as the kernel does when a disk appears. None when there is nothing to read."""
        if not self.sectors:
            return None
        scan = PartitionScan(self)
        self.kernel.run(f"partition scan of {self.kernel.disk_path(self.device.dev_id)}", scan.run())
        return scan


assert SECTOR_SIZE == 1 << SECTOR_SHIFT
