"""The commands that a raw ring sent to one queue of a char device, and what becomes of them.

**Supported.** Per-tag commands, of which one may be pending for each tag; batch commands, of which any number of
FETCH_IO_CMDS may be; each keeps the char device open while it is pending. **Rejected.** What `queue` and `batch` refuse.
**Differs from Linux.** When a ring closes, its commands end without a completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from ublk_trio.kernel_sim import batch
from ublk_trio.kernel_sim.batch import FetchCommand
from ublk_trio.uapi import IoCommand, io_opcode

if TYPE_CHECKING:
    from ublk_trio.kernel_sim.batch import BatchQueue
    from ublk_trio.kernel_sim.process import CharFile
    from ublk_trio.kernel_sim.queue import CommandRing, SimQueue
    from ublk_trio.kernel_sim.registered import RequestBuffer
    from ublk_trio.kernel_sim.uring import SimUring, Sqe
    from ublk_trio.uapi import BatchIo, IoCmd

#: The batch commands' opcodes, which must be right in every bit.
PREP_IO_CMDS: Final = io_opcode(IoCommand.PREP_IO_CMDS, ioctl_encoded=True)
COMMIT_IO_CMDS: Final = io_opcode(IoCommand.COMMIT_IO_CMDS, ioctl_encoded=True)
FETCH_IO_CMDS: Final = io_opcode(IoCommand.FETCH_IO_CMDS, ioctl_encoded=True)
_CAN_BE_PENDING: Final = frozenset({IoCommand.FETCH_REQ, IoCommand.COMMIT_AND_FETCH_REQ, IoCommand.NEED_GET_DATA})


class QueueCommands:
    """The per-tag commands of one queue that came from one ring. Implements `queue.CommandRing`."""

    paranoid = False
    buffers: Sequence[memoryview] = ()

    def __init__(self, ring: SimUring, file: CharFile, queue: SimQueue) -> None:
        self.ring = ring
        self.task: object = ring.task
        self.queue = queue
        self.kernel_holds: dict[int, int] = {}
        #: The user data of each tag's pending command.
        self.pending: dict[int, int] = {}
        self.memory = ring.task.process.memory
        self._file = file

    def send(self, command: int, user_data: int, io: IoCmd, auto_buffer: int) -> int | None:
        """Carry out a command: its result, or None when it is pending."""
        queue = self.queue
        if command not in _CAN_BE_PENDING:
            return queue.command(self, command, io.tag, io.result, io.addr, auto_buffer)
        before = self.pending.get(io.tag)
        # First, because a command may end before the driver is through with it.
        self.pending[io.tag] = user_data
        self._file.get()
        result = queue.command(self, command, io.tag, io.result, io.addr, auto_buffer)
        if not result:
            return None
        if before is None:
            del self.pending[io.tag]
        else:
            self.pending[io.tag] = before
        self._file.put()
        return result

    def register(self, io: IoCmd) -> int:
        """REGISTER_IO_BUF without a look at the task: its result."""
        return self.queue.register(self, self.queue.tags[io.tag], io.addr)

    def post(self, tag: int) -> None:
        self.ring.add_work(lambda: self._deliver(tag))

    def post_later(self, tag: int) -> None:
        self.ring.add_work(lambda: self._deliver(tag), later=True)

    def _deliver(self, number: int) -> None:
        tag = self.queue.tags[number]
        if self.queue.daemon not in (None, self.task):
            # Delivery happens in the task that sent the command, and that is not the daemon.
            self.queue.abort(tag)
            return
        tag.sectors_copied = -1
        tag.delivered_flags = 0
        result = self.queue.deliver(self, number)
        if result is not None:
            self.queue.descriptors[number] = self.queue.descriptor(tag)
            self.post_result(number, result)

    def post_result(self, tag: int, result: int) -> None:
        self.ring.post_cqe(self.pending.pop(tag), result)
        # Later: whoever is at work on the device must not find it released meanwhile.
        self.ring.kernel.drop(self._file.put)

    def copy_to(self, address: int, data: memoryview) -> int:
        target = self.memory.available(address, len(data))
        target[:] = data[: len(target)]
        return len(target)

    def copy_from(self, address: int, data: memoryview) -> int:
        source = self.memory.available(address, len(data))
        data[: len(source)] = source
        return len(source)

    def register_buffer(self, index: int, buffer: RequestBuffer) -> int:
        return self.ring.table.register(index, buffer)

    def unregister_buffer(self, index: int) -> int:
        return self.ring.table.unregister(index)

    def is_same_ring(self, other: CommandRing) -> bool:
        return isinstance(other, QueueCommands) and other.ring is self.ring

    def close(self) -> None:
        """The ring ends: what is pending is cancelled."""
        if not self.pending:
            return
        self.queue.device.cancel_ring(self)
        for _ in self.pending:
            self.ring.kernel.drop(self._file.put)


class BatchCommands(QueueCommands):
    """The same for a device with batch commands: tags belong to no task, and nothing is pending but FETCH_IO_CMDS."""

    def __init__(self, ring: SimUring, file: CharFile, queue: SimQueue, batch: BatchQueue) -> None:
        super().__init__(ring, file, queue)
        self.task = None
        self._batch = batch
        self._fetches = 0

    def start(self, sqe: Sqe, io: BatchIo) -> int | None:
        """One of the three: its result, or None when it is pending, or ended with a completion of its own."""
        if sqe.cmd_op != FETCH_IO_CMDS:
            handle = batch.prepare if sqe.cmd_op == PREP_IO_CMDS else batch.commit
            return batch.refused(self.queue, io) or handle(self.queue, self, io, sqe.addr)
        refused = batch.fetch_refused(io, multishot=sqe.multishot)
        if refused:
            return refused
        self._fetches += 1
        self._file.get()
        self._batch.attach(FetchCommand(self, sqe.user_data, sqe.buf_index))
        return None

    def fetch_ended(self) -> None:
        """A FETCH_IO_CMDS had its last completion."""
        self._fetches -= 1
        self.ring.kernel.drop(self._file.put)

    def prepare_delivery(self, number: int) -> bool:
        """Do for a tag what its own command would do; False when its request cannot be delivered now."""
        tag = self.queue.tags[number]
        tag.sectors_copied = -1
        tag.delivered_flags = 0
        if self.queue.deliver(self, number) is None:
            return False
        self.queue.descriptors[number] = self.queue.descriptor(tag)
        return True

    def post(self, tag: int) -> None:
        self._batch.post(tag)

    def post_later(self, tag: int) -> None:
        self.ring.add_work(lambda: self._batch.post(tag), later=True)

    def post_result(self, tag: int, result: int) -> None:
        raise AssertionError("no tag has a command of its own")

    def close(self) -> None:
        if self._fetches:
            self.queue.device.set_canceling()
            self._batch.ring_closed(self)
            for _ in range(self._fetches):
                self.ring.kernel.drop(self._file.put)
