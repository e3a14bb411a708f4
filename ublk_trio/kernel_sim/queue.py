"""The driver's side of a hardware queue: the requests on its tags, and the rules for every per-tag command.

**Supported.** FETCH_REQ, COMMIT_AND_FETCH_REQ, NEED_GET_DATA, REGISTER_IO_BUF and UNREGISTER_IO_BUF with their checks in the
order of the release; the rules for addresses and tasks; AUTO_BUF_REG; requests that end only when nobody uses their data
any more; the rest of a short READ delivered again before all others; ABORT;
requests that fail, are held or are reissued when the server goes.
**Rejected.** EINVAL, EBUSY, ENODEV, EOPNOTSUPP as the checks have it; an unknown number, batch commands among them: EINVAL.
**Differs from Linux.** A command never blocks: FETCH_REQ and PREP_IO_CMDS do not wait for a control command that holds the
device, as they do on 7.3. Where that command is a STOP_DEV that waits for the same task, neither ever ends on Linux, and no
signal helps: `SimKernel.notes` says so. The data of a WRITE is copied to the server when it reaps the completion: the latest
moment that Linux allows. A word for AUTO_BUF_REG that is wrong is refused before anything happens, as since 7.0. To 6.15
each request is delivered in the task of its own tag's command, where Linux may deliver several in the first one's.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Protocol

from ublk_trio.kernel_sim import checks, server_end
from ublk_trio.kernel_sim.batch import BatchQueue
from ublk_trio.kernel_sim.block.tags import HardwareQueue
from ublk_trio.kernel_sim.checks import SimulatedOopsError
from ublk_trio.kernel_sim.linux_errno import through_block_status
from ublk_trio.kernel_sim.registered import RequestBuffer
from ublk_trio.kernel_sim.tag import ACTIVE, AUTO_BUF_REG, CANCELED, NEED_GET_DATA, OWNED_BY_SRV, SimTag
from ublk_trio.uapi import (
    IO_RES_ABORT,
    SECTOR_SHIFT,
    SECTOR_SIZE,
    AutoBufRegFlag,
    Feature,
    IoCommand,
    IoDesc,
    IoFlag,
    IoOp,
)

if TYPE_CHECKING:
    from ublk_trio.kernel_sim.block import Request
    from ublk_trio.kernel_sim.device import SimDevice

_READ = int(IoOp.READ)
_WRITE = int(IoOp.WRITE)
_ZONE_APPEND = int(IoOp.ZONE_APPEND)
_SHMEM_ZC = int(IoFlag.SHMEM_ZC)
_NEED_REG_BUF = int(IoFlag.NEED_REG_BUF)
_AUTO_FALLBACK = int(AutoBufRegFlag.FALLBACK)
_FETCH_REQ = int(IoCommand.FETCH_REQ)
_COMMIT_AND_FETCH_REQ = int(IoCommand.COMMIT_AND_FETCH_REQ)
_NEED_GET_DATA = int(IoCommand.NEED_GET_DATA)
_REGISTER_IO_BUF = int(IoCommand.REGISTER_IO_BUF)
_UNREGISTER_IO_BUF = int(IoCommand.UNREGISTER_IO_BUF)
#: The operations that carry data: the server fills it, or reads it.
FILLED_BY_SERVER: Final = frozenset({int(IoOp.READ), int(IoOp.REPORT_ZONES)})
READ_BY_SERVER: Final = frozenset({int(IoOp.WRITE), int(IoOp.ZONE_APPEND)})

#: In place of a command's number: one that no driver knows, and one that is refused for its encoding.
UNKNOWN_COMMAND: Final = -1
BAD_OPCODE: Final = -2


class CommandRing(Protocol):
    """Where a queue's commands come from and are completed: an engine's packed ring, or one queue's share of a raw ring."""

    #: Who issues: the thread that opened the ring.
    task: object
    #: Whether the server's buffers are watched; then `buffers` and `kernel_holds` are there, and an address is a slot + 1.
    paranoid: bool
    buffers: Sequence[memoryview]
    kernel_holds: dict[int, int]

    def post(self, tag: int) -> None:
        """The tag's request is on its way to the task, which will `SimQueue.deliver` it."""

    def post_later(self, tag: int) -> None:
        """The same, after a delay: the request could not be delivered just now."""

    def post_result(self, tag: int, result: int) -> None:
        """The tag's command ends without a request."""

    def copy_to(self, address: int, data: memoryview) -> int:
        """Copy to the server's memory as much as is there, and return how much that was."""

    def copy_from(self, address: int, data: memoryview) -> int:
        """The same in the other direction."""

    def register_buffer(self, index: int, buffer: RequestBuffer) -> int:
        """Put it into the ring's table of buffers: 0 or a negative errno."""

    def unregister_buffer(self, index: int) -> int:
        """Take one out: 0 or a negative errno."""

    def is_same_ring(self, other: CommandRing) -> bool:
        """Whether both are the same io_uring."""


class SimQueue(HardwareQueue):
    """One of a device's queues, kernel side."""

    def __init__(self, device: SimDevice, queue_id: int, depth: int) -> None:
        super().__init__(depth, device.kernel.choices, only_one=device.info.nr_hw_queues == 1)
        self.device = device
        self.queue_id = queue_id
        self.tags = [SimTag(tag) for tag in range(depth)]
        self.need_get_data = bool(device.info.flags & Feature.NEED_GET_DATA)
        #: The driver copies data between requests and the server's buffers.
        flags = device.info.flags
        self.copies = not flags & (Feature.USER_COPY | Feature.SUPPORT_ZERO_COPY | Feature.AUTO_BUF_REG)
        self.zero_copy = bool(flags & Feature.SUPPORT_ZERO_COPY)
        self.auto_buf_reg = bool(flags & Feature.AUTO_BUF_REG)
        version = device.kernel.version
        self._fails_read_from_nowhere = version.fails_read_from_nowhere
        self.short_is_whole = version.short_write_is_whole
        self._checks_as_until_6_16 = version < (6, 17)
        self._has_tag_daemons = version >= (6, 16)
        self._minds_time = server_end.minds_time(device)
        #: Shared memory that the server registered, where requests' data may lie.
        self.shmem = device.shmem if flags & Feature.SHMEM_ZC else None
        self.batch = BatchQueue(self) if flags & Feature.BATCH_IO else None
        #: What raw rings delivered, by tag: what a mapping of the descriptors shows.
        self.descriptors: dict[int, bytes] = {}
        #: Before each tag had its own: the task that sent the queue's last FETCH_REQ.
        self.daemon: object = None
        self.fetched = 0
        #: The server is going or gone.
        self.canceling = False
        #: The device has no server and fails requests (FAIL_IO).
        self.fails_all = False
        #: The disk is being removed: requests that a next server would get are failed.
        self.aborts_all = False
        #: None of these: what comes goes to the server. Kept by `SimDevice.update_delivery`, from START_DEV on at the latest.
        self.delivering: bool
        #: Requests that wait for a server.
        self.held: deque[Request] = deque()
        self._log = device.kernel.log

    @property
    def ready(self) -> bool:
        return self.fetched == self.depth

    # ------------------------------------------------------------------ from the block layer

    def _dispatch(self, request: Request) -> None:
        tag = self.tags[request.tag]
        if not self.delivering:
            self._turn_away(request)
            return
        if tag.flags == ACTIVE | CANCELED:
            raise SimulatedOopsError(
                f"queue {self.queue_id}: a request for a command that has ended: {request} on {tag!r}"
            )
        assert tag.flags == ACTIVE, f"queue {self.queue_id}: a free tag is not fetched: {tag!r}"
        assert tag.ring is not None
        tag.request = request
        if self._minds_time:
            self.device.request_started(tag)
        if self._log is not None:
            self._log.append(("request", self.device.dev_id, self.queue_id, tag.tag, request.bio.number))
        tag.ring.post(tag.tag)

    # ------------------------------------------------------------------ per-tag commands

    def command(
        self, ring: CommandRing, command: int, tag_number: int, result: int, address: int, auto_buffer: int = 0
    ) -> int:
        """Check and carry out one command: a negative errno when it is refused, else 0: then it is pending, but one about buffers has ended.

        ``address`` is the index for REGISTER_IO_BUF and UNREGISTER_IO_BUF; ``auto_buffer`` the entry's own address word.
        """
        if self._checks_as_until_6_16:
            return self._command_until_6_16(ring, command, tag_number, result, address, auto_buffer)
        if command == _UNREGISTER_IO_BUF:
            return self.unregister(ring, address)
        if tag_number >= self.depth:
            return -errno.EINVAL
        tag = self.tags[tag_number]
        if command == _FETCH_REQ:
            self.note_wait("FETCH_REQ")
            return self._address_refused(address, auto_buffer) or self.fetch(ring, tag, address, auto_buffer)
        if tag.task != ring.task:
            return self.register(ring, tag, address) if command == _REGISTER_IO_BUF else -errno.EINVAL
        if not tag.flags & OWNED_BY_SRV:
            return -errno.EBUSY
        if bool(tag.flags & NEED_GET_DATA) != (command == _NEED_GET_DATA):
            return -errno.EINVAL
        if command == _COMMIT_AND_FETCH_REQ:
            return self._commit(ring, tag, result, address, auto_buffer)
        if command == _NEED_GET_DATA:
            return self._get_data(ring, tag, address)
        if command == _REGISTER_IO_BUF:
            return self.register(ring, tag, address)
        return -errno.EINVAL

    def _command_until_6_16(
        self, ring: CommandRing, command: int, tag_number: int, result: int, address: int, auto_buffer: int
    ) -> int:
        """Another order of checks: what is pending comes first, whatever the command."""
        if self.daemon is not None and self.daemon != ring.task:
            return -errno.EINVAL
        if tag_number >= self.depth:
            return -errno.EINVAL
        tag = self.tags[tag_number]
        if self._has_tag_daemons and tag.task is not None and tag.task != ring.task:
            return -errno.EINVAL
        if tag.flags & ACTIVE:
            return -errno.EBUSY
        if bool(tag.flags & NEED_GET_DATA) != (command == _NEED_GET_DATA):
            return -errno.EINVAL
        if command == BAD_OPCODE:
            return -errno.EOPNOTSUPP
        if command == _FETCH_REQ:
            if self.ready:
                return -errno.EBUSY
            return self._address_refused(address, auto_buffer) or self.fetch(ring, tag, address, auto_buffer)
        if not tag.flags & OWNED_BY_SRV:
            return -errno.EINVAL
        if command == _COMMIT_AND_FETCH_REQ:
            return self._commit(ring, tag, result, address, auto_buffer)
        if command == _NEED_GET_DATA:
            return self._get_data(ring, tag, address)
        if command == _REGISTER_IO_BUF:
            return self.register(ring, tag, address)
        if command == _UNREGISTER_IO_BUF:
            return self.unregister(ring, address)
        return -errno.EINVAL

    def _address_refused(self, address: int, auto_buffer: int) -> int:
        """FETCH_REQ's address rules: a negative errno, or 0."""
        refused = not address and not self.need_get_data if self.copies else address
        return -errno.EINVAL if refused or self._auto_buffer_refused(auto_buffer) else 0

    def _auto_buffer_refused(self, auto_buffer: int) -> bool:
        """Whether the word has bits that mean nothing: all above the index but FALLBACK."""
        return self.auto_buf_reg and bool(auto_buffer >> 16 & ~_AUTO_FALLBACK)

    def note_wait(self, command: str) -> None:
        """On Linux the command sleeps now, not interruptibly, until the control command that holds the device is through."""
        device = self.device
        if device.mutex.locked:
            device.kernel.notes.append(
                f"{command} waits for the control command that holds device {device.dev_id}; "
                "if that waits for the same task, neither ever ends"
            )

    def fetch(self, ring: CommandRing, tag: SimTag, address: int, auto_buffer: int) -> int:
        """FETCH_REQ behind the address rules: 0 when it is pending, else a negative errno."""
        device = self.device
        if device.stopping:
            return -errno.ENODEV
        if device.all_fetched:
            return -errno.EBUSY
        if tag.flags & ACTIVE:
            return -errno.EINVAL
        tag.flags = ACTIVE
        tag.ring = ring
        tag.task = ring.task
        tag.address = address
        tag.auto_buffer = auto_buffer
        if ring.paranoid and not self.need_get_data:
            self._take_buffer(ring, tag, 0)
        self.fetched += 1
        if self.ready:
            if not self._has_tag_daemons:
                self.daemon = ring.task
            device.queue_became_ready(self)
        return 0

    def _commit(self, ring: CommandRing, tag: SimTag, result: int, address: int, auto_buffer: int) -> int:
        request = tag.request
        assert request is not None
        if self.copies:
            if not address and (not self.need_get_data or request.op == _READ):
                return -errno.EINVAL
        elif (address and request.op != _ZONE_APPEND) or self._auto_buffer_refused(auto_buffer):
            return -errno.EINVAL
        self.accept_commit(ring, tag, request, result, address, auto_buffer, zone_lba=address)
        return 0

    def accept_commit(
        self,
        ring: CommandRing,
        tag: SimTag,
        request: Request,
        result: int,
        address: int,
        auto_buffer: int,
        *,
        zone_lba: int,
    ) -> None:
        """The commit was checked: the tag is the driver's again, and the request ends, or its rest comes once more."""
        registered = tag.flags & AUTO_BUF_REG
        tag.flags = ACTIVE
        # First: a READ's data comes from this address.
        tag.ring = ring
        tag.address = address
        if not self.copies:
            before, tag.auto_buffer = tag.auto_buffer, auto_buffer
            if registered and ring.is_same_ring(tag.auto_ring):
                ring.unregister_buffer(before & 0xFFFF)
            if request.op == _ZONE_APPEND:
                request.start_sector = zone_lba
            if tag.uses:
                tag.committed = True
                tag.result = result
                return
        if ring.paranoid:
            self._check_commit(tag, request, result)
        self._end_request(ring, tag, request, result)

    def _end_request(self, ring: CommandRing, tag: SimTag, request: Request, result: int) -> None:
        """Nothing uses the request's data any more: make of the result what the application sees."""
        moved = 0
        end: int | None
        if result < 0:
            end = through_block_status(result)
        elif request.op == _READ and not result:
            end = errno.EIO
        elif self.copies and request.op == _READ and not tag.shared:
            moved = ring.copy_from(tag.address, request.view[: min(result, request.length)])
            end = errno.EIO if not moved and self._fails_read_from_nowhere else request.advance(moved)
        elif not self.short_is_whole and (request.op == _READ or request.op == _WRITE):
            moved = min(result, request.length)
            end = request.advance(moved)
        else:
            moved = request.length if request.op == _WRITE else 0
            # All of a READ counts as done: what the server has moved is handed on to the parts that it was merged from.
            end = request.advance(request.length) if request.op == _READ else 0
        if ring.paranoid and not self.need_get_data:
            self._take_buffer(ring, tag, moved)
        if end is None:
            self._requeue(tag)
        else:
            self._release(tag)
            request.end(end)
            if self.device.quiesced:
                # Somebody may wait for the server to have nothing left, and the operation may have other requests to come.
                self.device.kernel.changed()

    def _get_data(self, ring: CommandRing, tag: SimTag, address: int) -> int:
        tag.flags = ACTIVE | NEED_GET_DATA
        tag.ring = ring
        tag.address = address
        # The descriptor gets this address, even if it is flagged as one of shared memory.
        tag.shared_address = None
        if ring.paranoid:
            self._take_buffer(ring, tag, 0)
        ring.post(tag.tag)
        return 0

    # ------------------------------------------------------------------ who uses a request's data

    def has_data(self, tag: SimTag) -> bool:
        """Whether the tag's request carries data."""
        request = tag.request
        return request is not None and (request.op in FILLED_BY_SERVER or request.op in READ_BY_SERVER)

    def hold(self, tag: SimTag) -> bool:
        """Take a reference to the data of a delivered request; False when there is none to be had.

        That is possible even after the commit, as long as there are other references.
        """
        if not (tag.flags & OWNED_BY_SRV or tag.uses) or not self.has_data(tag):
            return False
        tag.uses += 1
        return True

    def let_go(self, tag: SimTag) -> None:
        """Give a reference back; a request that was committed ends with the last one."""
        assert tag.uses > 0
        tag.uses -= 1
        if tag.committed and not tag.uses:
            tag.committed = False
            assert tag.request is not None
            assert tag.ring is not None
            self._end_request(tag.ring, tag, tag.request, tag.result)
        self.device.kernel.changed()

    def _buffer_of(self, tag: SimTag) -> RequestBuffer:
        request = tag.request
        assert request is not None
        return RequestBuffer(request.view, fills=request.op in FILLED_BY_SERVER, release=lambda: self.let_go(tag))

    def register(self, ring: CommandRing, tag: SimTag, index: int) -> int:
        """REGISTER_IO_BUF; since 6.17 from any task, even for a tag that was committed while other references remain."""
        if not self.zero_copy or not self.hold(tag):
            return -errno.EINVAL
        refused = ring.register_buffer(index & 0xFFFF_FFFF, self._buffer_of(tag))
        if refused:
            self.let_go(tag)
        return refused

    def unregister(self, ring: CommandRing, index: int) -> int:
        """UNREGISTER_IO_BUF: of whatever tag, or another device's."""
        if not self.zero_copy:
            return -errno.EINVAL
        return ring.unregister_buffer(index & 0xFFFF_FFFF)

    # ------------------------------------------------------------------ delivery

    def deliver(self, ring: CommandRing, tag_number: int) -> int | None:
        """Complete the tag's pending command with its request.

        0, or 1 when a WRITE's data is still to be fetched; None when it did not work out and the command stays pending.
        """
        tag = self.tags[tag_number]
        request = tag.request
        assert request is not None, f"queue {self.queue_id}: nothing to deliver on {tag!r}"
        if self.shmem is not None and not tag.flags & NEED_GET_DATA:
            tag.shared_address = self.shmem.match(request) if self.has_data(tag) else None
            tag.shared = tag.shared_address is not None
        if request.op == _WRITE and self.copies:
            if self.need_get_data and not tag.flags & NEED_GET_DATA:
                tag.flags = OWNED_BY_SRV | NEED_GET_DATA
                return 1
            if tag.poisoned_bytes:
                self._give_back_buffer(ring, tag)
            if not tag.shared:
                copied = ring.copy_to(tag.address, request.view)
                if not copied:
                    # It comes again, and so for ever.
                    tag.flags = ACTIVE
                    ring.post_later(tag.tag)
                    return None
                # Perhaps not all: then that much is delivered.
                tag.sectors_copied = copied >> SECTOR_SHIFT
        elif tag.poisoned_bytes:
            self._give_back_buffer(ring, tag)
        elif self.auto_buf_reg and self.has_data(tag):
            return self._deliver_registered(ring, tag, request)
        tag.flags = OWNED_BY_SRV
        return 0

    def _deliver_registered(self, ring: CommandRing, tag: SimTag, request: Request) -> int | None:
        """Register the request's buffer where the command said. Failing that: FALLBACK, or the request fails."""
        if ring.register_buffer(tag.auto_buffer & 0xFFFF, self._buffer_of(tag)):
            if not tag.auto_buffer >> 16 & _AUTO_FALLBACK:
                self._release(tag)
                request.end(errno.EIO)
                return None
            tag.delivered_flags = _NEED_REG_BUF
            tag.flags = OWNED_BY_SRV
        else:
            tag.flags = OWNED_BY_SRV | AUTO_BUF_REG
            tag.uses += 1
            tag.auto_ring = ring
        return 0

    def abort(self, tag: SimTag) -> None:
        """The tag's request cannot be delivered by this server; its command stays pending."""
        request = tag.request
        assert request is not None
        tag.request = None
        if self.device.holds:
            self.held.append(request)
        else:
            self._fail(request, errno.EIO)

    def descriptor(self, tag: SimTag) -> bytes:
        """What the driver wrote for the server when it delivered the tag's request."""
        request = tag.request
        assert request is not None
        return IoDesc(
            op_flags=request.op_flags | tag.delivered_flags | (_SHMEM_ZC if tag.shared else 0),
            nr_sectors=request.nr_sectors if tag.sectors_copied < 0 else tag.sectors_copied,
            start_sector=request.start_sector,
            addr=self._shown_address(tag),
        ).pack()

    def _shown_address(self, tag: SimTag) -> int:
        if tag.shared_address is not None:
            return tag.shared_address
        # The driver has one word for both: the buffer's address, or what says where to register it.
        return tag.auto_buffer if self.auto_buf_reg else tag.address

    # ------------------------------------------------------------------ the end of a server

    def cancel_idle(self) -> None:
        """Complete every idle command with ABORT (STOP_DEV and its kin; the disk is gone, so nothing is on its way)."""
        if self.batch is not None:
            self.batch.cancel()
            return
        for tag in self.tags:
            if tag.flags & ACTIVE and not tag.flags & CANCELED and tag.request is None:
                tag.flags |= CANCELED
                assert tag.ring is not None
                if tag.poisoned_bytes:
                    self._give_back_buffer(tag.ring, tag)
                tag.ring.post_result(tag.tag, IO_RES_ABORT)

    def has_pending(self, ring: CommandRing) -> bool:
        """Whether a command of the ring is pending: cancelling it tells that the server goes."""
        return any(tag.ring is ring and tag.flags & (ACTIVE | CANCELED) == ACTIVE for tag in self.tags)

    @property
    def in_flight(self) -> int:
        """How many requests the server has, or will have: they are on their way."""
        return sum(tag.request is not None for tag in self.tags)

    @property
    def in_use(self) -> bool:
        """Whether somebody, besides the server's own right to it, has a request's data in hand."""
        return any(tag.uses for tag in self.tags)

    @property
    def all_idle(self) -> bool:
        """Every tag waits for a request."""
        return all(tag.flags == ACTIVE for tag in self.tags)

    def ring_closed(self, ring: CommandRing) -> None:
        """The ring's pending commands end, and what was not delivered goes back; what was, waits for the server's end."""
        undelivered = []
        for tag in self.tags:
            if tag.ring is not ring:
                continue
            if tag.poisoned_bytes:
                self._give_back_buffer(ring, tag)
            if tag.flags & ACTIVE:
                tag.flags |= CANCELED
                if tag.request is not None and not tag.committed:
                    undelivered.append(tag)
        for tag in undelivered:
            request, tag.request = tag.request, None
            assert request is not None
            self._turn_away(request)

    def abort_owned(self) -> None:
        """The server is gone: what it still held fails, or goes to the next one, at the head of the line."""
        assert not self.delivering
        reissued = []
        for tag in self.tags:
            request = tag.request
            # In batches what nobody fetched is the server's, too.
            if request is None or not (tag.flags & OWNED_BY_SRV or self.batch is not None):
                continue
            if tag.uses:
                # Only before 6.15, where nobody waits for those who copy: the last of them ends the request.
                tag.committed, tag.result = True, -errno.EIO
                continue
            tag.request = None
            if self.device.reissues:
                reissued.append(request)
            else:
                self._fail(request, errno.EIO)
        self.held.extendleft(reversed(reissued))

    def _turn_away(self, request: Request) -> None:
        """The request cannot be delivered: it fails, or is held, with its tag, until it can be."""
        error = self.device.refusal(self)
        if error is None:
            self.held.append(request)
        else:
            self._fail(request, error)

    def _fail(self, request: Request, error: int) -> None:
        if not request.keeps_tag:
            self.give_back(request)
        request.end(error)

    def redispatch(self) -> None:
        """What is held tries again, before all that waits for a tag."""
        self.waiting.extendleft(reversed(self.held))
        self.held.clear()
        self._run()

    def reset(self) -> None:
        """Ready for a new server's FETCH_REQs; until they have come nothing is delivered."""
        for tag in self.tags:
            assert tag.request is None, f"queue {self.queue_id}: {tag!r} still in use at reset"
            tag.reset()
        self.fetched = 0
        self.daemon = None
        if self.batch is not None:
            self.batch.reset()

    # ------------------------------------------------------------------ who may touch which buffer

    def _take_buffer(self, ring: CommandRing, tag: SimTag, moved_bytes: int) -> None:
        if not tag.address:
            return
        slot = tag.address - 1
        holder = ring.kernel_holds.get(slot)
        if holder is not None:
            self._violation("shared-buffer", tag.tag, f"buffer {slot} already belongs to tag {holder}'s command")
        ring.kernel_holds[slot] = tag.tag
        tag.poisoned_bytes = checks.poison(ring.buffers[slot], moved_bytes)

    def _give_back_buffer(self, ring: CommandRing, tag: SimTag) -> None:
        slot = tag.address - 1
        offset = checks.damage(ring.buffers[slot], tag.poisoned_bytes)
        tag.poisoned_bytes = 0
        ring.kernel_holds.pop(slot, None)
        if offset is not None:
            self._violation(
                "touched-kernel-buffer",
                tag.tag,
                f"buffer {slot} was written to at byte {offset} while the kernel owned it",
            )

    def _check_commit(self, tag: SimTag, request: Request, result: int) -> None:
        if result < 0:
            return
        length = request.length
        if result > length:
            self._violation("result-too-long", tag.tag, f"{result} committed of a request of {length} bytes")
        elif request.op == _WRITE and result < length:
            self._violation("short-write", tag.tag, f"{result} bytes committed of a WRITE of {length}")
        elif request.op == _READ and 0 < result < length and not self.copies:
            self._violation(
                "short-read", tag.tag, f"{result} bytes committed of a READ of {length} that the server fills"
            )
        elif request.op == _READ and result % SECTOR_SIZE:
            self._violation("ragged-read", tag.tag, f"{result} bytes are no whole number of sectors")

    def _violation(self, kind: str, tag: int, text: str) -> None:
        self.device.kernel.violation(kind, self.device.dev_id, self.queue_id, tag, text)

    def refused(self, command: int, tag: int, result: int) -> None:
        """Record a refusal that only a wrong server can get."""
        if result == -errno.ENODEV:
            return
        name = IoCommand(command).name if command in IoCommand._value2member_map_ else f"command {command:#x}"
        if tag >= self.depth:
            self._violation("no-such-tag", tag, f"{name} for a tag of a queue of depth {self.depth}")
        elif result == -errno.EBUSY and command != IoCommand.FETCH_REQ:
            self._violation("not-owned", tag, f"{name} for a tag that the server does not own")
        else:
            self._violation("refused", tag, f"{name} got {errno.errorcode.get(-result, result)}; {self.tags[tag]!r}")
