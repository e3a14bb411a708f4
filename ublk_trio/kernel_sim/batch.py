"""Batch commands: one command prepares, commits or delivers many tags of a queue (7.0).

**Supported.** PREP_IO_CMDS, all or nothing; COMMIT_IO_CMDS, which handles what it can; FETCH_IO_CMDS, a multishot command
that writes the tags of what came into the server's provided buffers, several on a queue, one of them at work at a time;
REGISTER_IO_BUF and UNREGISTER_IO_BUF as ever. Any task may send any of them.
**Rejected.** EOPNOTSUPP: the other per-tag commands. EINVAL: no such queue, flags or an element's size that do not
belong together or to the device. E2BIG: more elements than tags. ENOBUFS ends a FETCH_IO_CMDS that finds no buffer, or no
room for its completion: what it would have delivered is delivered by another. ENODEV: one that comes while the queue's
server is being cancelled, or is there then.
**Differs from Linux.** PREP_IO_CMDS is checked whole before anything changes.
"""

from __future__ import annotations

import errno
from collections import deque
from typing import TYPE_CHECKING, Final

from ublk_trio.kernel_sim.tag import ACTIVE, AUTO_BUF_REG, OWNED_BY_SRV
from ublk_trio.uapi import (
    BATCH_TAG_LAYOUT,
    IO_RES_ABORT,
    AutoBufReg,
    AutoBufRegFlag,
    BatchFlag,
    BatchIo,
    Feature,
    batch_elem_layout,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ublk_trio.kernel_sim.queue import SimQueue
    from ublk_trio.kernel_sim.uring import SimUring
    from ublk_trio.kernel_sim.uring_commands import BatchCommands

_MAX_TAGS: Final = 128
#: A commit's elements are read in pieces of so many bytes.
_PIECE_BYTES: Final = 480
#: A plain number: of a flag type's complement unknown bits are no part.
_KNOWN_FLAGS: Final = int(BatchFlag.HAS_ZONE_LBA | BatchFlag.HAS_BUF_ADDR | BatchFlag.AUTO_BUF_REG_FALLBACK)
_NO_LBA: Final = (1 << 64) - 1


class FetchCommand:
    """A FETCH_IO_CMDS that is pending."""

    def __init__(self, commands: BatchCommands, user_data: int, group: int) -> None:
        self.commands = commands
        self.user_data = user_data
        self.group = group

    @property
    def ring(self) -> SimUring:
        return self.commands.ring

    def end(self, result: int) -> None:
        """Its last completion."""
        self.ring.post_cqe(self.user_data, result)
        self.commands.fetch_ended()


class _Element:
    """One element of a PREP_IO_CMDS or COMMIT_IO_CMDS."""

    def __init__(self, queue: SimQueue, flags: int, data: memoryview) -> None:
        self.tag, index, self.result, *rest = batch_elem_layout(flags).unpack(data)
        self.address = rest.pop(0) if flags & BatchFlag.HAS_BUF_ADDR else 0
        self.zone_lba = rest.pop(0) if flags & BatchFlag.HAS_ZONE_LBA else _NO_LBA
        self.auto_buffer = 0
        if queue.auto_buf_reg:
            fallback = AutoBufRegFlag.FALLBACK if flags & BatchFlag.AUTO_BUF_REG_FALLBACK else AutoBufRegFlag(0)
            self.auto_buffer = AutoBufReg(index=index, flags=fallback).to_sqe_addr()


def refused(queue: SimQueue, io: BatchIo) -> int:
    """PREP_IO_CMDS' and COMMIT_IO_CMDS' checks of the command itself: a negative errno, or 0."""
    if io.nr_elem > queue.depth:
        return -errno.E2BIG
    flags = io.flags
    if flags & BatchFlag.HAS_ZONE_LBA and not queue.device.info.flags & Feature.ZONED:
        return -errno.EINVAL
    if flags & BatchFlag.HAS_BUF_ADDR and not queue.copies:
        return -errno.EINVAL
    # With HAS_BUF_ADDR it is wrong, too: but a queue that registers buffers copies nothing, and has refused that flag.
    if flags & BatchFlag.AUTO_BUF_REG_FALLBACK and not queue.auto_buf_reg:
        return -errno.EINVAL
    if flags & ~_KNOWN_FLAGS or io.elem_bytes != batch_elem_layout(flags).size:
        return -errno.EINVAL
    return 0


def fetch_refused(io: BatchIo, *, multishot: bool) -> int:
    """FETCH_IO_CMDS' checks: a negative errno, or 0."""
    return 0 if multishot and io.elem_bytes == BATCH_TAG_LAYOUT.size and not io.flags else -errno.EINVAL


def prepare(queue: SimQueue, commands: BatchCommands, io: BatchIo, address: int) -> int:
    """PREP_IO_CMDS: its result."""
    data = commands.memory.view(address, io.nr_elem * io.elem_bytes) if io.nr_elem else memoryview(b"")
    if data is None:
        return -errno.EFAULT
    queue.note_wait("PREP_IO_CMDS")
    elements = list(_elements(queue, io, data))
    seen: set[int] = set()
    fetched_before = queue.fetched
    for element in elements:
        error = _prepare_refused(queue, element, seen)
        if error:
            if seen and fetched_before + len(seen) == queue.depth:
                # It was ready for a moment.
                queue.canceling = True
                queue.device.update_delivery()
            return error
        seen.add(element.tag)
    for element in elements:
        result = queue.fetch(commands, queue.tags[element.tag], element.address, element.auto_buffer)
        assert not result
    return 0


def _elements(queue: SimQueue, io: BatchIo, data: memoryview) -> Iterator[_Element]:
    for start in range(0, len(data), io.elem_bytes):
        yield _Element(queue, io.flags, data[start : start + io.elem_bytes])


def _prepare_refused(queue: SimQueue, element: _Element, seen: set[int]) -> int:
    device = queue.device
    if element.tag >= queue.depth:
        return -errno.EINVAL
    if queue.copies and not element.address:
        return -errno.EINVAL
    if device.stopping:
        return -errno.ENODEV
    if all(other.ready or (other is queue and queue.fetched + len(seen) == queue.depth) for other in device.queues):
        return -errno.EBUSY
    if queue.tags[element.tag].flags & ACTIVE or element.tag in seen:
        return -errno.EINVAL
    return 0


def commit(queue: SimQueue, commands: BatchCommands, io: BatchIo, address: int) -> int:
    """COMMIT_IO_CMDS: the bytes of the elements that were handled, or an error when that is none."""
    total = io.nr_elem * io.elem_bytes
    done = 0
    while done < total:
        data = commands.memory.view(address + done, min(_PIECE_BYTES, total - done))
        if data is None:
            return done or -errno.EFAULT
        # What is handled may change the memory that the elements stand in.
        for element in list(_elements(queue, io, data)):
            error = _commit_one(queue, commands, element)
            if error:
                return done or error
            done += io.elem_bytes
    return done


def _commit_one(queue: SimQueue, commands: BatchCommands, element: _Element) -> int:
    if element.tag >= queue.depth:
        return -errno.EINVAL
    tag = queue.tags[element.tag]
    if not tag.flags & OWNED_BY_SRV:
        return -errno.EBUSY
    if queue.copies and not element.address:
        return -errno.EINVAL
    request = tag.request
    assert request is not None
    queue.accept_commit(
        commands, tag, request, element.result, element.address, element.auto_buffer, zone_lba=element.zone_lba
    )
    return 0


class BatchQueue:
    """What a queue delivers in batches, and to whom."""

    def __init__(self, queue: SimQueue) -> None:
        self._queue = queue
        #: The tags whose requests nobody fetched yet.
        self._arrived: deque[int] = deque()
        self._fetches: list[FetchCommand] = []
        #: The one that is to deliver, or is doing so.
        self._active: FetchCommand | None = None
        #: STOP_DEV came: no FETCH_IO_CMDS any more.
        self.stopped = False

    def post(self, tag: int) -> None:
        """A request came."""
        self._arrived.append(tag)
        self._acquire()

    def _acquire(self) -> None:
        if self._active is None and self._fetches and self._arrived:
            fetch = self._active = self._fetches[0]
            fetch.ring.add_work(lambda: self._dispatch(fetch))

    def attach(self, fetch: FetchCommand) -> None:
        """FETCH_IO_CMDS: it is pending from now on, or ends at once."""
        if self.stopped or self._queue.canceling:
            fetch.end(-errno.ENODEV)
        else:
            self._fetches.append(fetch)
            self._acquire()

    def _dispatch(self, fetch: FetchCommand) -> None:
        if self._active is not fetch:
            return  # cancelled meanwhile
        error = 0
        while self._arrived and not error:
            error = self._deliver(fetch)
        self._active = None
        if error:
            self._fetches.remove(fetch)
            fetch.end(error)
            self._acquire()

    def _deliver(self, fetch: FetchCommand) -> int:
        """One buffer full of tags: 0 or a negative errno."""
        ring = fetch.ring
        buffer = ring.select_buffer(fetch.group)
        if buffer is None:
            return -errno.ENOBUFS
        buffer_id, address, length = buffer
        most = min(length // BATCH_TAG_LAYOUT.size, _MAX_TAGS, len(self._arrived))
        tags = [self._arrived.popleft() for _ in range(most)]
        delivered = [tag for tag in tags if fetch.commands.prepare_delivery(tag)]
        if tags and not delivered:
            return 0
        data = b"".join(BATCH_TAG_LAYOUT.pack(tag) for tag in delivered)
        target = ring.task.process.memory.view(address, len(data))
        if not data or target is None or not ring.post_more(fetch.user_data, len(data), fetch.group, buffer_id):
            self._take_back(fetch, delivered)
            return -errno.ENOBUFS
        target[:] = data
        return 0

    def _take_back(self, fetch: FetchCommand, tags: list[int]) -> None:
        """The server never heard of these: they wait for another command, behind what came meanwhile."""
        for number in tags:
            tag = self._queue.tags[number]
            registered = tag.flags & AUTO_BUF_REG
            tag.flags = ACTIVE
            if registered:
                fetch.ring.table.unregister(tag.auto_buffer & 0xFFFF)
        self._arrived.extend(tags)

    def ring_closed(self, commands: BatchCommands) -> None:
        """The commands of a ring are cancelled. What nobody fetched stays, until the server's end."""
        # One of them that was to deliver never will: its ring does no work any more, and none takes its place before `reset`.
        self._fetches = [fetch for fetch in self._fetches if fetch.commands is not commands]

    def cancel(self) -> None:
        """STOP_DEV and its kin: end all that wait."""
        self.stopped = True
        fetches, self._fetches = self._fetches, []
        self._active = None
        for fetch in fetches:
            fetch.end(IO_RES_ABORT)

    def reset(self) -> None:
        """For the next server."""
        assert not self._fetches, "a pending command keeps the char device open"
        self._arrived.clear()
        self._active = None
        self.stopped = False
