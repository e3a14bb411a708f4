"""A hardware queue: its tags, the requests on them, and the rules for every per-tag command.

**Supported.** FETCH_REQ, COMMIT_AND_FETCH_REQ and NEED_GET_DATA with their checks in the driver's order; requests that
wait for a tag in FIFO order; the rest of a short READ delivered again before all others; ABORT; server death without
recovery.
**Rejected.** REGISTER_IO_BUF (EINVAL) and UNREGISTER_IO_BUF (EINVAL, as without ZERO_COPY), batch commands
(EOPNOTSUPP).
**Differs from Linux.** A command never blocks: FETCH does not wait for a STOP_DEV that holds the device. The requeued
rest of a READ waits for a tag at the head of the line, and in calm runs gets the one that it had. The data of a WRITE
is copied to the server when it reaps the completion: the latest moment that Linux allows.
"""

from __future__ import annotations

import errno
from collections import deque
from typing import TYPE_CHECKING

from ublk_trio.kernel_sim import checks
from ublk_trio.kernel_sim.linux_errno import through_block_status
from ublk_trio.kernel_sim.tag import ACTIVE, CANCELED, NEED_GET_DATA, OWNED_BY_SRV, SimTag
from ublk_trio.ring import NO_SLOT
from ublk_trio.uapi import IO_RES_ABORT, Feature, IoCommand, IoOp

if TYPE_CHECKING:
    from ublk_trio.kernel_sim.block import Request
    from ublk_trio.kernel_sim.device import SimDevice
    from ublk_trio.kernel_sim.ring import SimQueueRing

_READ = int(IoOp.READ)
_WRITE = int(IoOp.WRITE)


class SimQueue:
    """One of a device's queues, kernel side."""

    def __init__(self, device: SimDevice, queue_id: int, depth: int) -> None:
        self.device = device
        self.queue_id = queue_id
        self.depth = depth
        self.tags = [SimTag(tag) for tag in range(depth)]
        self.need_get_data = bool(device.info.flags & Feature.NEED_GET_DATA)
        self.short_write_is_whole = device.kernel.version.short_write_is_whole
        self.fetched = 0
        #: The server is going or gone: requests are not delivered any more.
        self.canceling = False
        #: Requests that found no free tag.
        self.waiting: deque[Request] = deque()
        self._free = list(range(depth - 1, -1, -1))
        self._choices = device.kernel.choices
        self._log = device.kernel.log

    @property
    def ready(self) -> bool:
        return self.fetched == self.depth

    # ------------------------------------------------------------------ from the block layer

    def submit(self, request: Request) -> None:
        """A new request: give it a tag, or let it wait for one."""
        if self._free:
            self._dispatch(request)
        else:
            self.waiting.append(request)

    def _dispatch(self, request: Request) -> None:
        free = self._free
        if self.canceling:
            # Without recovery; with it (later) the request would be held here.
            request.end(errno.EIO)
            return
        if self._choices.calm or len(free) == 1:
            tag = self.tags[free.pop()]
        else:
            tag = self.tags[free.pop(-1 - self._choices.choose("tag", len(free)))]
        assert tag.flags == ACTIVE, f"queue {self.queue_id}: a free tag is not fetched: {tag!r}"
        assert tag.ring is not None
        tag.request = request
        if self._log is not None:
            self._log.append(("request", self.device.dev_id, self.queue_id, tag.tag, request.bio.number))
        tag.ring.post(tag.tag)

    def _release(self, tag: SimTag) -> None:
        """The tag's request is over, or goes back to the line."""
        tag.request = None
        self._free.append(tag.tag)
        while self.waiting and self._free:
            self._dispatch(self.waiting.popleft())

    # ------------------------------------------------------------------ per-tag commands

    def command(self, ring: SimQueueRing, command: int, tag_number: int, result: int, slot: int) -> int:
        """Check and carry out one command; 0 when it is pending now, else the negative errno that it completes with."""
        if command >= IoCommand.PREP_IO_CMDS:
            return -errno.EOPNOTSUPP
        if command == IoCommand.UNREGISTER_IO_BUF or tag_number >= self.depth:
            return -errno.EINVAL
        tag = self.tags[tag_number]
        if command == IoCommand.FETCH_REQ:
            return self._fetch(ring, tag, slot)
        if tag.ring is not ring:  # another task is not the tag's daemon
            return -errno.EINVAL
        if not tag.flags & OWNED_BY_SRV:
            return -errno.EBUSY
        if bool(tag.flags & NEED_GET_DATA) != (command == IoCommand.NEED_GET_DATA):
            return -errno.EINVAL
        if command == IoCommand.COMMIT_AND_FETCH_REQ:
            return self._commit(ring, tag, result, slot)
        if command == IoCommand.NEED_GET_DATA:
            return self._get_data(ring, tag, slot)
        return -errno.EINVAL

    def _fetch(self, ring: SimQueueRing, tag: SimTag, slot: int) -> int:
        device = self.device
        if slot == NO_SLOT and not self.need_get_data:
            return -errno.EINVAL
        if device.stopping:
            return -errno.ENODEV
        if device.all_fetched:
            return -errno.EBUSY
        if tag.flags & ACTIVE:
            return -errno.EINVAL
        tag.flags = ACTIVE
        tag.ring = ring
        tag.slot = slot
        if not self.need_get_data:
            self._take_buffer(ring, tag, 0)
        self.fetched += 1
        if self.ready:
            device.queue_became_ready(self)
        return 0

    def _commit(self, ring: SimQueueRing, tag: SimTag, result: int, slot: int) -> int:
        request = tag.request
        assert request is not None
        if slot == NO_SLOT and (not self.need_get_data or request.op == _READ):
            return -errno.EINVAL
        tag.flags = ACTIVE
        tag.slot = slot
        if ring.paranoid:
            self._check_commit(tag, request, result)
        end: int | None
        moved = 0
        if result < 0:
            end = through_block_status(result)
        elif request.op == _READ:
            moved = min(result, request.length)
            if moved:
                request.view[:moved] = ring.buffers[slot][:moved]
            end = request.advance(moved) if moved else errno.EIO
        elif request.op == _WRITE and not self.short_write_is_whole:
            moved = min(result, request.length)
            end = request.advance(moved)
        else:
            moved = request.length if request.op == _WRITE else 0
            end = 0
        if not self.need_get_data:
            self._take_buffer(ring, tag, moved)
        if end is None:
            self.waiting.appendleft(request)
            self._release(tag)
        else:
            self._release(tag)
            request.end(end)
        return 0

    def _get_data(self, ring: SimQueueRing, tag: SimTag, slot: int) -> int:
        if slot == NO_SLOT:
            # The driver does not check, and tries in vain to copy to nowhere, for ever. A refusal says it better.
            return -errno.EINVAL
        tag.flags = ACTIVE | NEED_GET_DATA
        tag.slot = slot
        self._take_buffer(ring, tag, 0)
        ring.post(tag.tag)
        return 0

    # ------------------------------------------------------------------ delivery

    def deliver(self, ring: SimQueueRing, tag_number: int) -> int:
        """Complete the tag's pending command with its request: 0, or 1 when a WRITE's data is still to be fetched."""
        tag = self.tags[tag_number]
        request = tag.request
        assert request is not None, f"queue {self.queue_id}: nothing to deliver on {tag!r}"
        if self.need_get_data and request.op == _WRITE and not tag.flags & NEED_GET_DATA:
            tag.flags = OWNED_BY_SRV | NEED_GET_DATA
            return 1
        if tag.poisoned_bytes >= 0:
            self._give_back_buffer(ring, tag)
        tag.flags = OWNED_BY_SRV
        if request.op == _WRITE:
            ring.buffers[tag.slot][: request.length] = request.view
        return 0

    # ------------------------------------------------------------------ the end of a server

    def cancel_idle(self) -> None:
        """Complete every idle command with ABORT (STOP_DEV and its kin; the disk is gone, so nothing is on its way)."""
        for tag in self.tags:
            if tag.flags & ACTIVE and not tag.flags & CANCELED and tag.request is None:
                tag.flags |= CANCELED
                assert tag.ring is not None
                if tag.poisoned_bytes >= 0:
                    self._give_back_buffer(tag.ring, tag)
                tag.ring.post_result(tag.tag, IO_RES_ABORT)

    def ring_closed(self, ring: SimQueueRing) -> None:
        """The ring's tags come back: idle ones are dropped, undelivered requests fail, delivered ones wait for the last close."""
        for tag in self.tags:
            if tag.ring is not ring:
                continue
            if tag.poisoned_bytes >= 0:
                self._give_back_buffer(ring, tag)
            if tag.flags & ACTIVE:
                tag.flags |= CANCELED
                if tag.request is not None:
                    self._fail(tag)

    def fail_owned(self) -> None:
        """The server is gone: whatever it still held fails with EIO."""
        assert self.canceling
        for tag in self.tags:
            if tag.request is not None:
                self._fail(tag)

    def _fail(self, tag: SimTag) -> None:
        request = tag.request
        assert request is not None
        self._release(tag)
        request.end(errno.EIO)

    def reset(self) -> None:
        """Ready for a new server's FETCH_REQs."""
        assert not self.waiting
        assert len(self._free) == self.depth, f"queue {self.queue_id}: tags still in use at reset"
        for tag in self.tags:
            tag.reset()
        self._free = list(range(self.depth - 1, -1, -1))
        self.fetched = 0
        self.canceling = False

    # ------------------------------------------------------------------ who may touch which buffer

    def _take_buffer(self, ring: SimQueueRing, tag: SimTag, moved_bytes: int) -> None:
        if not ring.paranoid or tag.slot == NO_SLOT:
            return
        holder = ring.kernel_holds.get(tag.slot)
        if holder is not None and holder != tag.tag:
            self._violation("shared-buffer", tag.tag, f"buffer {tag.slot} already belongs to tag {holder}'s command")
        ring.kernel_holds[tag.slot] = tag.tag
        tag.poisoned_bytes = checks.poison(ring.buffers[tag.slot], moved_bytes)

    def _give_back_buffer(self, ring: SimQueueRing, tag: SimTag) -> None:
        offset = checks.damage(ring.buffers[tag.slot], tag.poisoned_bytes)
        tag.poisoned_bytes = -1
        ring.kernel_holds.pop(tag.slot, None)
        if offset is not None:
            self._violation(
                "touched-kernel-buffer",
                tag.tag,
                f"buffer {tag.slot} was written to at byte {offset} while the kernel owned it",
            )

    def _check_commit(self, tag: SimTag, request: Request, result: int) -> None:
        if request.op in (_READ, _WRITE):
            if result > request.length:
                self._violation(
                    "result-too-long", tag.tag, f"{result} bytes committed of a request of {request.length}"
                )
            elif request.op == _WRITE and 0 <= result < request.length:
                self._violation("short-write", tag.tag, f"{result} bytes committed of a WRITE of {request.length}")
            elif request.op == _READ and result > 0 and result % 512:
                self._violation("ragged-read", tag.tag, f"{result} bytes are no whole number of sectors")
        elif result > request.length:
            self._violation(
                "result-too-long", tag.tag, f"{result} committed of a range of {request.length} bytes; it must be 0"
            )

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
