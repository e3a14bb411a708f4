"""A queue's ring on io_uring.

Some facts, and what they mean here:

- A ring's descriptor is readable as long as its completion queue is not empty, and Trio asks level-triggered: `wait` can't miss a
  completion that was posted between the reap that found nothing and the moment when Trio looks. A command of this thread that ends is at first
  "task work", which becomes a completion when this thread next enters the kernel for any reason. Trio does that with every
  wait (epoll_ctl, epoll_wait), and task work that arrives while it sleeps there wakes it. So no wake-up is lost.
- Which is not so with DEFER_TASKRUN: there only a call that asks for events runs task work, and the descriptor never becomes readable. It is not
  used here.
- The ring of a worker is the worker's: what is called here is the worker's side of native/worker.c, which has the same calls. The descriptor to
  wait for is then one that the worker writes to, and only when it was armed.
- Exiting a ring only begins its end. Until a kernel worker has cancelled its commands, a request may still arrive and be copied
  into the arena: if the arena were unmapped by then, into whatever was mapped there next. So the arena's addresses outlive the ring until the kernel
  says, through the witness (see struct ut_queue), that the ring is gone. Its memory goes at once.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import attrs
import trio

from ublk_trio import uapi
from ublk_trio.arena import Arena, make_slots
from ublk_trio.errors import KernelError, errno_text
from ublk_trio.real import native
from ublk_trio.real.worker import RealWorker
from ublk_trio.ring import EVENT, RingStatistics
from ublk_trio.uapi import DevInfo, Feature, IoCommand

if TYPE_CHECKING:
    from ublk_trio.real._native import _Lib

_EVENT_BYTES = EVENT.size

# Closed rings' witnesses and arenas, until the kernel has done with them. Looked through whenever a ring is opened or closed. A closed ring
# is gone in a fraction of a second, so there are never more of these than rings that were open at once not long ago.
_ending: list[tuple[int, Arena]] = []


@attrs.frozen(kw_only=True)
class _Calls:
    """The native calls on one kind of queue: a ring of this thread's, or a worker's."""

    fd: Callable[[Any], int]
    events_max: Callable[[Any], int]
    reap: Callable[[Any, Any, int], int]
    commit: Callable[[Any, list[int], int], int]
    copy_in: Callable[[Any, int, int], int]
    counters: Callable[[Any, Any], None]
    close: Callable[[Any], int]


def _calls_of_thread(lib: _Lib) -> _Calls:
    return _Calls(
        fd=lib.ut_queue_fd,
        events_max=lib.ut_queue_events_max,
        reap=lib.ut_queue_reap,
        commit=lib.ut_queue_commit,
        copy_in=lib.ut_queue_copy_in,
        counters=lib.ut_queue_counters,
        close=lib.ut_queue_close,
    )


def _calls_of_worker(lib: _Lib) -> _Calls:
    return _Calls(
        fd=lib.ut_worker_queue_fd,
        events_max=lib.ut_worker_queue_events_max,
        reap=lib.ut_worker_queue_reap,
        commit=lib.ut_worker_queue_commit,
        copy_in=lib.ut_worker_queue_copy_in,
        counters=lib.ut_worker_queue_counters,
        close=lib.ut_worker_queue_close,
    )


class RealQueueRing:
    """`ring.QueueRing` on io_uring. Made by `CharDevice.open_queue`, for the thread that calls it, or for a worker's."""

    def __init__(
        self,
        char_fd: int,
        info: DevInfo,
        *,
        queue_id: int,
        buffers: int,
        ioctl_encoded: bool,
        worker: RealWorker | None = None,
    ) -> None:
        bury_ended()
        self._ffi, self._lib = native.load()
        self._calls = _calls_of_worker(self._lib) if worker is not None else _calls_of_thread(self._lib)
        self._worker = worker
        self._queue_id = queue_id
        self._depth = info.queue_depth
        self._arena = Arena(buffers=buffers, buffer_bytes=info.max_io_buf_bytes)
        self._buffers = self._arena.buffers
        self._slots = make_slots(depth=info.queue_depth, buffers=buffers)
        self._waiting = False
        self._waits = 0
        self._counters = self._ffi.new("struct ut_queue_counters *")
        try:
            self._queue = self._open(char_fd, info, ioctl_encoded)
        except BaseException:
            self._arena.close()
            raise
        if worker is not None:
            worker.queues += 1
        self._fd = self._calls.fd(self._queue)
        self._events_max = self._calls.events_max(self._queue)
        event_bytes = bytearray(self._events_max * EVENT.size)
        self._event_bytes = memoryview(event_bytes).toreadonly()
        self._events = self._ffi.from_buffer("struct ut_event[]", event_bytes, require_writable=True)
        self._nothing = self._event_bytes[:0]
        # Bound once: these calls are all that a request costs here, the last one only a WRITE with user copy.
        self._native_reap = self._calls.reap
        self._native_commit = self._calls.commit
        self._native_copy_in = self._calls.copy_in

    def _open(self, char_fd: int, info: DevInfo, ioctl_encoded: bool) -> Any:
        descriptor_bytes = info.io_desc_size if Feature.IO_DESC_SIZE in info.flags else uapi.IO_DESC_SIZE
        page_size = os.sysconf("SC_PAGESIZE")
        memory = self._arena.memory
        config = self._ffi.new("struct ut_queue_config *")
        config.char_fd = char_fd
        config.queue_id = self._queue_id
        config.depth = self._depth
        config.descriptor_bytes = descriptor_bytes
        config.descriptors_offset = uapi.descriptors_offset(
            self._queue_id, io_desc_size=descriptor_bytes, page_size=page_size
        )
        config.descriptors_length = uapi.descriptors_length(
            self._depth, io_desc_size=descriptor_bytes, page_size=page_size
        )
        config.opcode_base = opcode_base(ioctl_encoded=ioctl_encoded)
        # These two are held for the ring's life: what C reads through a pointer, Python must neither move nor free.
        self._arena_pointer = self._ffi.NULL if memory is None else self._ffi.from_buffer("char[]", memory)
        self._slots_pointer = self._ffi.from_buffer("uint16_t[]", self._slots)
        config.arena = self._arena_pointer
        config.slots = self._slots_pointer
        config.buffer_stride = self._arena.stride
        config.buffers = len(self._buffers)
        config.user_copy = Feature.USER_COPY in info.flags
        if self._worker is None:
            opened = self._ffi.new("struct ut_queue **")
            error = self._lib.ut_queue_open(opened, config)
        else:
            opened = self._ffi.new("struct ut_worker_queue **")
            error = self._lib.ut_worker_queue_open(opened, self._worker.pointer, config)
        if error < 0:
            call = self._ffi.string(config.failed).decode()
            self._release_pointers()
            raise native.ring_error(error, call, f"queue {self._queue_id} of device {info.dev_id}")
        return opened[0]

    def _release_pointers(self) -> None:
        # Also because Python 3.11 crashes when it collects a cycle in which somebody still holds a memoryview's buffer.
        for pointer in (self._arena_pointer, self._slots_pointer):
            if pointer != self._ffi.NULL:
                self._ffi.release(pointer)
        self._arena_pointer = self._slots_pointer = self._ffi.NULL

    @property
    def queue_id(self) -> int:
        return self._queue_id

    @property
    def depth(self) -> int:
        return self._depth

    @property
    def worker(self) -> RealWorker | None:
        return self._worker

    @property
    def untaken(self) -> int:
        if self._worker is None or self._queue == self._ffi.NULL:
            return 0
        return self._lib.ut_worker_queue_untaken(self._queue)

    @property
    def buffers(self) -> Sequence[memoryview]:
        return self._buffers

    @property
    def slots(self) -> memoryview:
        return self._slots

    def reap(self) -> memoryview:
        count = self._native_reap(self._queue, self._events, self._events_max)
        if count > 0:
            return self._event_bytes[: count * _EVENT_BYTES]
        if count == 0:
            return self._nothing
        raise self._ring_failure("reap", count)

    def commit(self, answers: list[int]) -> None:
        # cffi makes a C array of the list, for the time of the call: measured, no other way to hand it over is faster.
        error = self._native_commit(self._queue, answers, len(answers))
        if error < 0:
            raise self._ring_failure("commit", error)

    def copy_in(self, tag: int) -> int:
        result = self._native_copy_in(self._queue, tag, self._slots[tag])
        if result == -errno.EBADF and self._queue == self._ffi.NULL:
            raise self._ring_failure("copy in", result)
        assert result != -errno.ERANGE, (
            f"queue {self._queue_id} tag {tag}: user copy needs a buffer, and a device that has it"
        )
        return result

    def _ring_failure(self, what: str, number: int) -> Exception:
        if self._queue == self._ffi.NULL:
            return trio.ClosedResourceError("the queue ring is closed")
        if number == -errno.ERANGE:
            return AssertionError(f"queue {self._queue_id}: a slot lies outside the arena; nothing was sent")
        hint = ": a ring belongs to the thread that opened it" if number == -errno.EEXIST else ""
        return KernelError(number, f"queue {self._queue_id}: cannot {what}: io_uring_enter: {errno_text(number)}{hint}")

    async def wait(self) -> None:
        if self._queue == self._ffi.NULL:
            await trio.lowlevel.checkpoint()
            raise trio.ClosedResourceError("the queue ring is closed")
        self._waits += 1
        if self._worker is not None and self._lib.ut_worker_queue_arm(self._queue):
            await trio.lowlevel.checkpoint()
            return
        self._waiting = True
        try:
            await trio.lowlevel.wait_readable(self._fd)
        finally:
            self._waiting = False

    def statistics(self) -> RingStatistics:
        if self._queue != self._ffi.NULL:
            self._calls.counters(self._queue, self._counters)
        counters = self._counters
        return RingStatistics(
            reaps=counters.reaps,
            events=counters.events,
            commits=counters.commits,
            answers=counters.answers,
            waits=self._waits,
            copies_failed=counters.copies_failed,
        )

    def close(self) -> None:
        if self._queue == self._ffi.NULL:
            return
        if self._worker is not None and not self._worker.is_here:
            # Forked: who would have to close it is in the other process, and goes on using it there. So does Trio, whose epoll is shared.
            self._queue = self._ffi.NULL
            self._buffers = ()
            return
        if self._waiting:
            trio.lowlevel.notify_closing(self._fd)
        queue, self._queue = self._queue, self._ffi.NULL
        self._buffers = ()
        self._calls.counters(queue, self._counters)
        witness = self._calls.close(queue)
        if self._worker is not None:
            self._worker.queues -= 1
        self._release_pointers()
        self._arena.discard()
        _ending.append((witness, self._arena))
        bury_ended()


def opcode_base(*, ioctl_encoded: bool) -> int:
    """A per-tag command's opcode without the command's number."""
    opcode = uapi.io_opcode(IoCommand.FETCH_REQ, ioctl_encoded=ioctl_encoded)
    return opcode & ~0xFF


def bury_ended() -> int:
    """Unmap the arenas of the rings that the kernel has done with. Returns how many are left."""
    _ending[:] = [entry for entry in _ending if not _bury(*entry)]
    return len(_ending)


def _bury(witness: int, arena: Arena) -> bool:
    with contextlib.suppress(BlockingIOError):
        end = os.read(witness, 1)
        assert end == b"", "nobody writes to a witness"
        os.close(witness)
        arena.close()
        return True
    return False


for _command in (IoCommand.COMMIT_AND_FETCH_REQ, IoCommand.NEED_GET_DATA):
    for _encoded in (False, True):
        assert uapi.io_opcode(_command, ioctl_encoded=_encoded) == opcode_base(ioctl_encoded=_encoded) | _command
