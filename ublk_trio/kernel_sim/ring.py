"""The rings: how a server talks to the driver, without io_uring.

**Supported.** `ring.ControlRing`, `ring.CharDevice` and `ring.QueueRing` whole, also with a worker; user copy as `user_copy`
has it, with copies that fall short if the fault `copy-short` strikes. A reap may find any part of what is
ready, in any order, and a wait may end for nothing, as Choices has it; nothing is ever lost: what a reap left makes the
next `wait` return, and no two reaps in a row find nothing of something.
**Rejected.** Calls on something closed: `trio.ClosedResourceError`, as the real ring. A second opener, a queue that
there is not: `KernelError`.
**Differs from Linux.** Completions are made when they are reaped. `close` takes effect at once, where a real ring dies
a moment later in a kernel worker; closing the char device before its rings is recorded as a violation, and the server
counts as gone with the last of them. The completion queue never overflows.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import trio

from ublk_trio.arena import Arena, make_slots
from ublk_trio.errors import KernelError, errno_text
from ublk_trio.kernel_sim.control import Call, execute
from ublk_trio.kernel_sim.user_copy import UserCopy
from ublk_trio.kernel_sim.worker import SimWorker
from ublk_trio.ring import EVENT, NO_SLOT, RECALLED_WHEN_CANCELLED, RingStatistics, Worker
from ublk_trio.uapi import ControlCommand, Feature, IoCommand, IoOp, user_copy_offset

if TYPE_CHECKING:
    from ublk_trio.kernel_sim.device import SimDevice
    from ublk_trio.kernel_sim.kernel import SimKernel
    from ublk_trio.kernel_sim.queue import CommandRing
    from ublk_trio.kernel_sim.registered import RequestBuffer

_NOTHING: Final = memoryview(b"")
_EVENT_BYTES: Final = EVENT.size
#: One call in so many is the server's last, where calls are drawn evenly.
KILL_OPTIONS: Final = 64
#: Passes of the scheduler by which a command's result may be late.
HELD_PASSES_MAX: Final = 3


class SimControlRing:
    """`ring.ControlRing`: see there."""

    def __init__(self, kernel: SimKernel) -> None:
        self._kernel = kernel
        self._closed = False

    async def submit(
        self,
        command: ControlCommand,
        *,
        dev_id: int,
        queue_id: int = 0xFFFF,
        data: int = 0,
        buffer: bytearray | None = None,
        length: int | None = None,
        dev_path_length: int = 0,
        ioctl_encoded: bool = True,
    ) -> int:
        if self._closed:
            raise trio.ClosedResourceError("the control ring is closed")
        kernel = self._kernel
        # Whether a cancelled caller's command was carried out is a matter of moments, and so a choice.
        done_although_cancelled = "late-cancel" in kernel.faults and kernel.choices.choose("command-before-cancel", 2)
        if not done_although_cancelled:
            await trio.lowlevel.checkpoint()
        if kernel.strikes("server-killed", KILL_OPTIONS):
            kernel.kill_server()
        if self._closed:
            raise trio.ClosedResourceError("the control ring is closed")
        call = Call(
            command=int(command),
            dev_id=dev_id,
            queue_id=queue_id,
            data=data,
            buffer=buffer,
            length=length if length is not None else len(buffer) if buffer is not None else 0,
            dev_path_length=dev_path_length,
            ioctl_encoded=ioctl_encoded,
        )
        name = getattr(command, "name", f"command {int(command):#x}")
        if kernel.log is not None:
            kernel.log.append(("control-sent", name, dev_id))
        results: list[int] = []
        answered = trio.Event()

        def on_done(result: int) -> None:
            if kernel.log is not None:
                kernel.log.append(("control", name, dev_id, result))
            results.append(result)
            answered.set()

        kernel.run(f"{name} of device {dev_id}", execute(kernel, call), ring=self, on_done=on_done)
        if not results or done_although_cancelled:
            try:
                await answered.wait()
            except trio.Cancelled:
                if command in RECALLED_WHEN_CANCELLED:
                    kernel.interrupt(self, on_done=on_done)
                raise
        if "held-longer" in kernel.faults:
            for _ in range(kernel.choices.choose("held-longer", HELD_PASSES_MAX + 1)):
                await trio.lowlevel.checkpoint()
        return results[0]

    def close(self) -> None:
        """What the kernel holds of this ring's commands is interrupted, where it can be."""
        if not self._closed:
            self._closed = True
            self._kernel.control_rings.remove(self)
            self._kernel.interrupt(self)


class SimCharDevice:
    """`ring.CharDevice`: see there. Made by `SimKernel.open_char_device`."""

    def __init__(self, device: SimDevice, *, ioctl_encoded: bool) -> None:
        self._device = device
        self._closed = False
        kernel = device.kernel
        #: What every per-tag command gets because of its encoding.
        self._refusal = 0
        if ioctl_encoded and kernel.version < (6, 4):
            self._refusal = -errno.EINVAL
        elif (not ioctl_encoded and not kernel.legacy_opcodes) or device.info.flags & Feature.BATCH_IO:
            self._refusal = -errno.EOPNOTSUPP
        device.char = self
        device.opener_pid = device.kernel.server_pid

    def open_queue(self, queue_id: int, *, buffers: int, worker: Worker | None = None) -> SimQueueRing:
        assert worker is None or isinstance(worker, SimWorker), "a worker belongs to the kernel that made it"
        if self._closed:
            raise trio.ClosedResourceError("the char device is closed")
        device = self._device
        if not 0 <= queue_id < len(device.queues):
            raise KernelError(
                errno.EINVAL, f"cannot map queue {queue_id} of device {device.dev_id}: {errno_text(errno.EINVAL)}"
            )
        return SimQueueRing(device, queue_id, buffers, refusal=self._refusal, worker=worker)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        device = self._device
        for ring in device.rings:
            device.kernel.violation(
                "char-closed-before-ring",
                device.dev_id,
                ring.queue_id,
                0,
                "the char device was closed before this ring",
            )
        device.char_closed()

    def crash(self) -> None:
        """The server is killed; its rings were closed before."""
        self.close()


class SimQueueRing:
    """`ring.QueueRing`: see there. Made by `SimCharDevice.open_queue`."""

    def __init__(
        self, device: SimDevice, queue_id: int, buffers: int, *, refusal: int, worker: SimWorker | None = None
    ) -> None:
        kernel = device.kernel
        self._device = device
        self._kernel = kernel
        self._queue = device.queues[queue_id]
        self._queue_id = queue_id
        self._depth = self._queue.depth
        self._refusal = refusal
        # A device with room for nothing can be opened, though never started.
        buffer_bytes = device.info.max_io_buf_bytes or kernel.page_size
        self._arena = Arena(buffers=buffers, buffer_bytes=buffer_bytes)
        self.buffers: Sequence[memoryview] = self._arena.buffers
        self._slots = make_slots(depth=self._depth, buffers=buffers)
        self._thread = threading.get_ident()
        self.worker = worker
        self.task: object = self._thread if worker is None else worker
        #: What the worker has been given and has not sent yet: answers, each with its slot of then.
        self._handed: list[tuple[int, int]] = []
        #: How many of these the engine was told of.
        self._told_untaken = 0
        self.paranoid = kernel.paranoid
        #: Which tag's command has given a buffer to the kernel; only kept when paranoid.
        self.kernel_holds: dict[int, int] = {}
        # What is ready: a tag whose request is to be delivered, or a result (negative) above a tag.
        self._ready: list[int] = []
        self._events = bytearray(self._depth * _EVENT_BYTES)
        self._lot = trio.lowlevel.ParkingLot()
        self._closed = False
        self._came_back_empty = False
        self._woke_for_nothing = False
        self._reaps = self._reaped = self._commits = self._answers = self._waits = self._copies_failed = 0
        self._user_copy = bool(device.info.flags & Feature.USER_COPY)
        device.rings.append(self)
        if kernel.log is not None:
            kernel.log.append(("ring-opened", device.dev_id, queue_id, self._depth))

    @property
    def queue_id(self) -> int:
        return self._queue_id

    @property
    def depth(self) -> int:
        return self._depth

    @property
    def slots(self) -> memoryview:
        return self._slots

    @property
    def untaken(self) -> int:
        self._told_untaken = len(self._handed)
        return self._told_untaken

    # ------------------------------------------------------------------ from the driver

    def post(self, tag: int) -> None:
        """The tag's request can be delivered."""
        self._ready.append(tag)
        if self._lot:
            self._lot.unpark_all()

    post_later = post

    def post_result(self, tag: int, result: int) -> None:
        """A command ended without a request."""
        assert result < 0
        self.post(result << 16 | tag)

    def copy_to(self, address: int, data: memoryview) -> int:
        """`queue.CommandRing`: an address is a slot + 1."""
        if not address:
            return 0
        self.buffers[address - 1][: len(data)] = data
        return len(data)

    def copy_from(self, address: int, data: memoryview) -> int:
        data[:] = self.buffers[address - 1][: len(data)]
        return len(data)

    def register_buffer(self, index: int, buffer: RequestBuffer) -> int:
        """The engine registers no buffers, so there is no table."""
        return -errno.EINVAL

    def unregister_buffer(self, index: int) -> int:
        return -errno.EINVAL

    def is_same_ring(self, other: CommandRing) -> bool:
        return self is other

    # ------------------------------------------------------------------ ring.QueueRing

    def reap(self) -> memoryview:
        if self._closed:
            raise self._closed_error()
        if "server-killed" in self._kernel.faults:
            self._perhaps_killed()
        self._reaps += 1
        if self._handed:
            self._send_handed()
        ready = self._ready
        if not ready:
            return _NOTHING
        if self._kernel.choices.calm:
            self._ready = []
        else:
            ready = self._choose_ready(ready)
            if not ready:
                return _NOTHING
        count = len(ready)
        self._reaped += count
        if count * _EVENT_BYTES > len(self._events):
            # Only refused commands come in such numbers: a tag has one command pending at a time.
            self._events = bytearray(2 * count * _EVENT_BYTES)
        events = self._events
        queue = self._queue
        tags = queue.tags
        deliver = queue.deliver
        pack_into = EVENT.pack_into
        log = self._kernel.log
        offset = 0
        for entry in ready:
            if entry >= 0:
                result = deliver(self, entry)
                if result is None:
                    continue
                request = tags[entry].request
                assert request is not None
                pack_into(events, offset, entry, 0, result, request.op_flags, request.nr_sectors, request.start_sector)
                if log is not None:
                    log.append(
                        (
                            "event",
                            self._device.dev_id,
                            self._queue_id,
                            entry,
                            result,
                            request.op_flags,
                            request.nr_sectors,
                            request.start_sector,
                        )
                    )
            else:
                pack_into(events, offset, entry & 0xFFFF, 0, entry >> 16, 0, 0, 0)
                if log is not None:
                    log.append(("event", self._device.dev_id, self._queue_id, entry & 0xFFFF, entry >> 16))
            offset += _EVENT_BYTES
        return memoryview(events)[:offset]

    def _choose_ready(self, ready: list[int]) -> list[int]:
        """Which of what is ready a reap finds, in which order; option 0 is all, in order."""
        choose = self._kernel.choices.choose
        faults = self._kernel.faults
        least = 1 if self._came_back_empty else 0
        late = choose("reap-left-behind", len(ready) - least + 1) if "completions-late" in faults else 0
        reordered = "completions-reordered" in faults
        chosen = [ready.pop(choose("reap-next", len(ready)) if reordered else 0) for _ in range(len(ready) - late)]
        self._came_back_empty = not chosen
        return chosen

    def commit(self, answers: list[int]) -> None:
        if self._closed:
            raise self._closed_error()
        if threading.get_ident() != self._thread:
            raise KernelError(
                errno.EEXIST, f"cannot commit: {errno_text(errno.EEXIST)}: a ring belongs to the thread that opened it"
            )
        if "server-killed" in self._kernel.faults:
            self._perhaps_killed()
        self._commits += 1
        self._answers += len(answers)
        slots = self._slots
        depth = self._depth
        if self.worker is not None and (self._handed or self._kernel.strikes("worker-late")):
            self._handed += [
                (answer, slots[tag] if (tag := answer & 0xFFFF) < depth else NO_SLOT) for answer in answers
            ]
            # Who sleeps in `wait` is not to sleep on: nothing else would have the worker send.
            self._lot.unpark_all()
            return
        for answer in answers:
            tag = answer & 0xFFFF
            self._send(answer, slots[tag] if tag < depth else NO_SLOT)

    def _send(self, answer: int, slot: int) -> None:
        tag = answer & 0xFFFF
        number = answer >> 16 & 0xFFFF
        assert slot == NO_SLOT or slot < len(self.buffers), f"tag {tag}: there is no buffer {slot}"
        log = self._kernel.log
        if log is not None:
            log.append(("command", self._device.dev_id, self._queue_id, tag, number, answer >> 32))
        result = answer >> 32
        if self._user_copy:
            result = self._copy_out(number, tag, slot, result)
            slot = NO_SLOT
        # NO_SLOT becomes address 0.
        refusal = self._refusal or self._queue.command(self, number, tag, result, slot + 1 & NO_SLOT)
        if refusal:
            self._queue.refused(number, tag, refusal)
            self.post_result(tag, refusal)

    def _copy_out(self, number: int, tag: int, slot: int, result: int) -> int:
        """A READ's data, on its way to the commit: the result to send."""
        if number != IoCommand.COMMIT_AND_FETCH_REQ or result <= 0 or tag >= self._depth:
            return result
        request = self._queue.tags[tag].request
        if request is None or request.op != IoOp.READ:
            return result
        if slot != NO_SLOT:
            data = self.buffers[slot][:result]
            try:
                # Who commits, copies: the worker, if there is one.
                if self._user_copy_of(self.task, tag, write=True).write(data[: self._copied(result)]) == result:
                    return result
            except KernelError:
                pass
        self._copies_failed += 1
        return -errno.EIO

    def copy_in(self, tag: int) -> int:
        if self._closed:
            raise self._closed_error()
        request, slot = self._queue.tags[tag].request, self._slots[tag]
        assert self._user_copy, "the device has no user copy"
        assert request is not None, f"tag {tag} has no request"
        assert slot < len(self.buffers), f"tag {tag}: there is no buffer {slot}"
        try:
            data = self._user_copy_of(self._thread, tag, write=False).read(self._copied(request.length))
        except KernelError as error:
            return -(error.errno or errno.EIO)
        self.buffers[slot][: len(data)] = data
        return 0 if len(data) == request.length else -errno.EIO

    def _user_copy_of(self, task: object, tag: int, *, write: bool) -> UserCopy:
        position = user_copy_offset(queue_id=self._queue_id, tag=tag, offset=0)
        return UserCopy(self._device, task, position, write=write)

    def _copied(self, length: int) -> int:
        """How much of a copy of that length there is memory for."""
        return length >> 1 if self._kernel.strikes("copy-short") else length

    def _send_handed(self) -> None:
        handed, self._handed = self._handed, []
        for answer, slot in handed:
            self._send(answer, slot)

    async def wait(self) -> None:
        if self._closed:
            await trio.lowlevel.checkpoint()
            raise self._closed_error()
        self._waits += 1
        if self._handed:
            self._send_handed()
        told, self._told_untaken = self._told_untaken, 0
        if self._ready or told or self._wakes_for_nothing():
            await trio.lowlevel.checkpoint()
        else:
            await self._lot.park()
        if self._closed:
            raise self._closed_error()

    def _wakes_for_nothing(self) -> bool:
        kernel = self._kernel
        if kernel.choices.calm:
            return False
        self._woke_for_nothing = not self._woke_for_nothing and kernel.strikes("spurious-wake-up")
        return self._woke_for_nothing

    def _perhaps_killed(self) -> None:
        if self._kernel.strikes("server-killed", KILL_OPTIONS):
            self._kernel.kill_server()
            raise self._closed_error()

    def statistics(self) -> RingStatistics:
        return RingStatistics(
            reaps=self._reaps,
            events=self._reaped,
            commits=self._commits,
            answers=self._answers,
            waits=self._waits,
            copies_failed=self._copies_failed,
        )

    def close(self) -> None:
        if self._closed:
            return
        if self._handed:
            self._send_handed()
        self._closed = True
        self._ready = []
        self._lot.unpark_all()
        if self._kernel.log is not None:
            self._kernel.log.append(("ring-closed", self._device.dev_id, self._queue_id))
        self._device.ring_closed(self)
        self.buffers = ()
        self._arena.close()

    def _closed_error(self) -> trio.ClosedResourceError:
        return trio.ClosedResourceError("the queue ring is closed")

    def __str__(self) -> str:
        return f"ring of queue {self._queue_id} of device {self._device.dev_id}"


assert IoCommand.COMMIT_AND_FETCH_REQ < 1 << 16
