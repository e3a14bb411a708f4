"""The interface between the engine and a kernel: `Kernel`, `ControlRing`, `CharDevice`, `QueueRing`, `Worker`.

Two implementations: `ublk_trio.real` (io_uring and the machine's own `ublk_drv`) and `ublk_trio.kernel_sim` (both of
them in this process). The engine knows only what stands here.

It is batch-shaped, because cost is per call and not per request: `QueueRing.reap` hands over every ready completion
with its descriptor already read, in one call; `QueueRing.commit` queues any number of answers and submits them in one
call. Both sides of that exchange are packed integers rather than objects:

- an **event** is 24 bytes, `EVENT`: tag, result, and the descriptor's op_flags, nr_sectors and start_sector. The last
  three
  mean something only when the result is 0 or `uapi.IO_RES_NEED_GET_DATA`.
- an **answer** is one integer, `pack_answer(command, tag, result)`: the per-tag command to send, and for
  COMMIT_AND_FETCH_REQ
  the request's result (bytes, or a negative errno).

**Buffers.** A queue ring owns an arena of page-aligned buffers, all of the same size. `slots[tag]` says which of them
the tag's commands point the kernel at (`NO_SLOT`: none). With one buffer per tag it is the identity and nobody
touches it; with a bounded pool the engine sets it before it sends NEED_GET_DATA or COMMIT_AND_FETCH_REQ, or calls `QueueRing.copy_in`.

**User copy.** On a device with `uapi.Feature.USER_COPY` the kernel copies nothing by itself: the ring does, between the tag's buffer
and the request. A WRITE's data comes by `QueueRing.copy_in`; a READ's is moved by `QueueRing.commit`, before its answer is sent.

**Threads.** A ring belongs to the thread that opened it; the kernel refuses commands for a tag from any other. With a
`Worker` that is the worker's thread, and the engine's only hands over: then an answer is with the kernel some time after
`QueueRing.commit`, see `QueueRing.untaken`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Protocol

import attrs

from ublk_trio.uapi import ControlCommand

if TYPE_CHECKING:
    from ublk_trio.uapi import DevInfo, IoCommand

#: tag, (padding), result, op_flags, nr_sectors, start_sector
EVENT = struct.Struct("=HHiIIQ")
assert EVENT.size == 24, "EVENT must match struct ut_event in native/ring.h"

#: Commands that wait in the kernel for fetches which, once their waiter is cancelled, perhaps nobody will send any more:
#: cancelling the wait interrupts them. All others end by themselves, or are the clean-up itself, and go on.
RECALLED_WHEN_CANCELLED = frozenset({ControlCommand.START_DEV, ControlCommand.END_USER_RECOVERY})

#: In `QueueRing.slots`: this tag's commands carry no buffer.
NO_SLOT = 0xFFFF


def pack_answer(command: IoCommand, tag: int, result: int = 0) -> int:
    """One answer for `QueueRing.commit`: bits 0-15 the tag, 16-31 the command's number, 32-63 the result."""
    return (result << 32) | (command << 16) | tag


def unpack_answer(answer: int) -> tuple[int, int, int]:
    """``(command, tag, result)`` of a packed answer."""
    return (answer >> 16) & 0xFFFF, answer & 0xFFFF, answer >> 32


@attrs.frozen(kw_only=True)
class RingStatistics:
    """What a queue ring did so far. Counts of calls, and of what they moved."""

    reaps: int
    events: int
    commits: int
    answers: int
    waits: int
    #: With user copy: READs that were answered EIO in place of a success, because their data could not be moved.
    copies_failed: int = 0


class ControlRing(Protocol):
    """The way to `/dev/ublk-control`."""

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
        """Send one control command and wait for its result: 0 or more, or a negative errno.

        ``buffer`` is what the command's ``addr`` points at: it is sent, and holds what the kernel wrote when the call
        returns. ``length`` is the command's ``len``, by default the buffer's.

        The kernel may hold a command (START_DEV until every tag is fetched, STOP_DEV until in-flight requests are
        answered, DEL_DEV until the char device is closed). Cancelling the wait interrupts `RECALLED_WHEN_CANCELLED` if they still
        wait, since on Linux 6.12 nothing else would end them. Any other goes on in the kernel, and its memory is kept
        until the kernel is done with it. Either way the effect is not known: shield calls whose effect must be.
        """
        ...


class Worker(Protocol):
    """A thread, pinned to a CPU, that owns the rings of queues. In it the kernel copies their requests' data; it runs no Python."""

    @property
    def cpu(self) -> int: ...

    @property
    def thread_id(self) -> int:
        """The system's number for the thread: ``/proc/PID/task/N``."""
        ...

    def close(self) -> None:
        """End the thread, and wait for its end; the rings that it owns must have been closed before. Repeatable.

        In a process that was forked from the worker's this only forgets the worker, which is not there.
        """
        ...


class QueueRing(Protocol):
    """One queue's ring, with its descriptors mapped and its buffers."""

    @property
    def queue_id(self) -> int: ...

    @property
    def depth(self) -> int:
        """Number of tags."""
        ...

    @property
    def worker(self) -> Worker | None:
        """Who owns the ring; None: the thread that opened it."""
        ...

    @property
    def untaken(self) -> int:
        """How many of the answers, the last ones, the kernel does not have yet: their buffers are not to be touched.

        Without a worker always 0. Once it was not, the next `wait` ends when it has gone down.
        """
        ...

    @property
    def buffers(self) -> Sequence[memoryview]:
        """The arena's buffers, writable, each `max_io_bytes` long."""
        ...

    @property
    def slots(self) -> memoryview:
        """Per tag (``H``): the index in `buffers` that its commands point at, or `NO_SLOT`."""
        ...

    def reap(self) -> memoryview:
        """Every completion that is ready, as packed `EVENT`s; empty when there is none.

        Never blocks and makes no system call when the completion queue is not empty. The view is valid until the next
        reap.
        """
        ...

    def commit(self, answers: list[int]) -> None:
        """Send all the answers, in order, in one call, or have the worker send them. Never blocks. What `slots` says then, counts.

        Raises `KernelError` when the ring itself fails; then the ring is of no more use. A refusal of a single command
        comes as an event with its negative errno. With user copy a READ's data is moved before its answer is sent, and a READ
        whose data cannot all be moved is answered EIO: see `RingStatistics.copies_failed`.
        """
        ...

    def copy_in(self, tag: int) -> int:
        """User copy: move a delivered WRITE's data, all of it, into the tag's buffer. 0, or a negative errno when that did not work.

        At once, in the thread that calls, also with a worker. Raises `trio.ClosedResourceError`.
        """
        ...

    async def wait(self) -> None:
        """Return when a reap may find something. Call it only after a reap came back empty. May return early.

        A checkpoint. Raises `trio.ClosedResourceError` when `close` is called meanwhile.
        """
        ...

    def statistics(self) -> RingStatistics: ...

    def close(self) -> None:
        """Exit the ring, unmap the descriptors, free the buffers. The kernel takes back every tag. Repeatable.

        What was answered before is sent before.
        """
        ...


class CharDevice(Protocol):
    """`/dev/ublkcN`, open. The server counts as gone when it is closed."""

    def open_queue(self, queue_id: int, *, buffers: int, worker: Worker | None = None) -> QueueRing:
        """Map a queue's descriptors and set up its ring, with an arena of ``buffers`` buffers. Raises `KernelError`.

        With a ``worker``, which must be one of this kernel's, the ring is that one's, else the calling thread's.
        """
        ...

    def close(self) -> None:
        """Close it; every queue ring must have been closed before. Repeatable."""
        ...


class Kernel(Protocol):
    """A kernel with a ublk driver."""

    @property
    def name(self) -> str:
        """What to call it in messages."""
        ...

    @property
    def page_size(self) -> int: ...

    def open_control(self) -> AbstractAsyncContextManager[ControlRing]:
        """Open the control device. Raises `KernelUnavailableError` with the mend when there is none."""
        ...

    def open_worker(self, cpu: int) -> Worker:
        """Start a thread on that CPU. Raises `KernelError`: EINVAL when this process may not run there, or it is offline."""
        ...

    async def open_char_device(self, info: DevInfo, *, ioctl_encoded: bool) -> CharDevice:
        """Open the char device of an added device. Raises `KernelError`."""
        ...

    def device_ids(self) -> list[int]:
        """The ids of all ublk devices of this kernel, ascending."""
        ...

    def disk_path(self, dev_id: int) -> str:
        """The path by which users know the disk, ``/dev/ublkbN``."""
        ...

    def char_path(self, dev_id: int) -> str:
        """The path of the char device, ``/dev/ublkcN``."""
        ...

    def disk_usable(self, dev_id: int) -> bool:
        """Whether the disk's node is there, and this user may read and write it."""
        ...

    def disk_users(self, dev_id: int) -> list[str]:
        """Who has the disk open, in words, as far as this process may know. For messages: it may be wrong a moment later."""
        ...
