"""A raw io_uring: whatever any program may send to the driver, valid or not.

**Supported.** NOP, URING_CMD to ``/dev/ublk-control`` and ``/dev/ublkcN``, ASYNC_CANCEL, READ_FIXED and WRITE_FIXED
between registered buffers and plain files; a submission queue that takes
no more than it holds, and stops behind an entry that cannot be; a completion queue that overflows: what does not fit is
kept, in order, and comes with a later reap. The thread that opened a ring is the only one that may use it.
**Rejected.** KernelError EEXIST: another thread's submit. As completions: EBADF without a file, EOPNOTSUPP for a file
that takes no commands, EINVAL for a multishot command without a group of buffers and the reverse.
**Differs from Linux.** A completion that the kernel makes for a task (*task work*) becomes visible at that task's next
submit or reap, where Linux may interrupt the task. No linked, drained or fixed-file entries, no other operations.

Where a kernel is free, Choices decides, by the names in `RING_CHOICES`.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import attrs
import trio

from ublk_trio.errors import KernelError, errno_text
from ublk_trio.kernel_sim.control import Call, execute
from ublk_trio.kernel_sim.process import ByteFile, CharFile, ControlFile, SimFile
from ublk_trio.kernel_sim.queue import BAD_OPCODE, UNKNOWN_COMMAND
from ublk_trio.kernel_sim.registered import BufferTable, RequestBuffer
from ublk_trio.kernel_sim.uring_commands import (
    COMMIT_IO_CMDS,
    FETCH_IO_CMDS,
    PREP_IO_CMDS,
    BatchCommands,
    QueueCommands,
)
from ublk_trio.uapi import (
    BatchIo,
    ControlCmd,
    ControlCommand,
    Feature,
    IoCmd,
    IoCommand,
    control_opcode,
    io_opcode,
    split_opcode,
)

if TYPE_CHECKING:
    from ublk_trio.kernel_sim.process import SimTask

_IOCTL_TYPE: Final = ord("u")
_REGISTER_IO_BUF: Final = io_opcode(IoCommand.REGISTER_IO_BUF, ioctl_encoded=True)
_UNREGISTER_IO_BUF: Final = io_opcode(IoCommand.UNREGISTER_IO_BUF, ioctl_encoded=True)
_GET_FEATURES: Final = control_opcode(ControlCommand.GET_FEATURES, ioctl_encoded=True)
#: ``IORING_CQE_F_BUFFER`` and ``IORING_CQE_F_MORE``; a buffer's id stands above.
CQE_BUFFER: Final = 1
CQE_MORE: Final = 2
CQE_BUFFER_SHIFT: Final = 16


#: What a kernel is free to do to the user of a ring, by the name of the choice.
RING_CHOICES: Mapping[str, str] = MappingProxyType(
    {
        "submit-eagain": "no memory for a single entry: nothing is taken, EAGAIN",
        "submit-short": "memory for the first entries only: the others are not taken",
        "task-work-later": "what the kernel has for the task to do waits for its next call",
        "task-work-next": "it is done in another order than it came in",
        "reap-left-behind": "a reap finds only the first of the completions, or none",
        "cancel-late": "a control command hears of its cancellation only at the next call",
        "wait-interrupted": "a signal ends a wait: EINTR",
        "spurious-wake-up": "a wait ends although there is nothing",
    }
)


class UringOp(IntEnum):
    """``IORING_OP_*``, as far as they are here."""

    NOP = 0
    READ_FIXED = 4
    WRITE_FIXED = 5
    ASYNC_CANCEL = 14
    URING_CMD = 46


@attrs.frozen(kw_only=True)
class Sqe:
    """A submission queue entry. ``payload`` is the command area: it is padded with zeros, or cut."""

    opcode: UringOp
    user_data: int = 0
    file: SimFile | None = None
    cmd_op: int = 0
    payload: bytes = b""
    addr: int = 0
    length: int = 0
    offset: int = 0
    #: The registered buffer, or with ``buffer_select`` the group of provided buffers.
    buf_index: int = 0
    buffer_select: bool = False
    multishot: bool = False
    cancel_user_data: int = 0
    #: ``IOSQE_ASYNC``: not at once, but from the next call on.
    force_async: bool = False


@attrs.frozen
class Cqe:
    """A completion. ``flags``: `CQE_MORE`, and `CQE_BUFFER` with the buffer's id from bit 16."""

    user_data: int
    result: int
    flags: int = 0


class _ControlCommand:
    """A control command under way."""

    def __init__(self, ring: SimUring, user_data: int, name: str, dev_id: int) -> None:
        self._ring = ring
        self.user_data = user_data
        self._name = name
        self._dev_id = dev_id

    def done(self, result: int) -> None:
        ring = self._ring
        if ring.kernel.log is not None:
            ring.kernel.log.append(("control", self._name, self._dev_id, result))
        ring.control_commands.remove(self)
        ring.post_cqe(self.user_data, result)


class SimUring:
    """One io_uring of ``task``, who alone may submit. Everything that can happen has happened when a call returns.

    ``sq_entries`` and ``cq_entries`` (default: twice that) are rounded up to powers of two. ``sqe128`` is needed for control
    commands.
    """

    def __init__(
        self, task: SimTask, *, sq_entries: int = 64, cq_entries: int | None = None, sqe128: bool = True
    ) -> None:
        assert sq_entries > 0
        self.task = task
        self.kernel = task.process.kernel
        self.sq_entries = 1 << (sq_entries - 1).bit_length()
        self.cq_entries = 1 << ((cq_entries or 2 * self.sq_entries) - 1).bit_length()
        #: How many completions did not fit so far. None was lost.
        self.overflow = 0
        self.closed = False
        self.control_commands: list[_ControlCommand] = []
        self._sqe_command_bytes = 80 if sqe128 else 16
        self._sqe128 = sqe128
        self._completions: deque[Cqe] = deque()
        self._overflowed: deque[Cqe] = deque()
        self._work: list[Callable[[], None]] = []
        self._later: list[Callable[[], None]] = []
        #: The registered buffers.
        self.table = BufferTable(0)
        #: What fixed reads and writes under way use.
        self._moving: list[tuple[RequestBuffer, SimFile]] = []
        #: The provided buffers of each group, as (id, address, length), in the order in which they are used.
        self._groups: dict[int, deque[tuple[int, int, int]]] = {}
        self._queues: dict[tuple[CharFile, int], QueueCommands] = {}
        self._lot = trio.lowlevel.ParkingLot()
        self._came_back_empty = False
        self._woke_for_nothing = False
        task.process.rings.append(self)
        self.kernel.raw_rings.append(self)

    def __str__(self) -> str:
        return f"raw ring of {self.task!r}"

    # ------------------------------------------------------------------ submission

    def submit(self, sqes: Sequence[Sqe], *, task: SimTask | None = None) -> int:
        """io_uring_enter(2): how many entries were taken, in order.

        Fewer than given when the queue is too small, or behind an entry that cannot be. Raises `KernelError`: EEXIST when
        another task than the ring's calls, EAGAIN when the kernel had no memory for a single one (Choices), and
        `trio.ClosedResourceError`.
        """
        self._check_open()
        if task is not None and task is not self.task:
            raise self._error(errno.EEXIST)
        choices = self.kernel.choices
        count = min(len(sqes), self.sq_entries)
        if count and not choices.calm:
            if choices.choose("submit-eagain", 2):
                raise self._error(errno.EAGAIN)
            count -= choices.choose("submit-short", count)
        self._later_is_now()
        taken = 0
        for sqe in sqes[:count]:
            taken += 1
            if not self._issue(sqe):
                break
        self._run_work()
        self.kernel.changed()
        return taken

    def _issue(self, sqe: Sqe) -> bool:
        """Start one entry; False when it cannot be, and those behind it stay where they are."""
        if self.kernel.log is not None:
            self.kernel.log.append(("sqe", sqe.opcode.name, sqe.user_data, sqe.cmd_op & 0xFF))
        if sqe.opcode is UringOp.URING_CMD:
            if sqe.buffer_select and not self.kernel.version.has_multishot_commands:
                self.post_cqe(sqe.user_data, -errno.EOPNOTSUPP)
                return False
            if sqe.multishot != sqe.buffer_select:
                self.post_cqe(sqe.user_data, -errno.EINVAL)
                return False
        result = self._start(sqe)
        if result is not None:
            self.post_cqe(sqe.user_data, result)
        return True

    def _start(self, sqe: Sqe) -> int | None:
        """The result, or None when that comes later."""
        if sqe.opcode is UringOp.NOP:
            return 0
        if sqe.opcode is UringOp.ASYNC_CANCEL:
            return self._cancel(sqe)
        if sqe.file is None:
            return -errno.EBADF
        assert not sqe.file.closed, "a closed file's number means nothing, or another file"
        if sqe.opcode in (UringOp.READ_FIXED, UringOp.WRITE_FIXED):
            return self._fixed(sqe, sqe.file)
        if isinstance(sqe.file, ControlFile):
            return self._control(sqe)
        if isinstance(sqe.file, CharFile):
            if sqe.file.device.info.flags & Feature.BATCH_IO:
                return self._batch(sqe, sqe.file)
            return self._per_tag(sqe, sqe.file)
        return -errno.EOPNOTSUPP

    def _cancel(self, sqe: Sqe) -> int:
        """Only what waits in a worker, that is a control command, can be found; commands to the char device cannot."""
        found = next((command for command in self.control_commands if command.user_data == sqe.cancel_user_data), None)
        if found is None:
            return -errno.ENOENT
        interrupt: Callable[[], None] = lambda: self.kernel.interrupt(self, on_done=found.done)  # noqa: E731
        if self.kernel.choices.choose("cancel-late", 2):
            self._later.append(interrupt)
        else:
            self._work.append(interrupt)
        return -errno.EALREADY

    def _command_area(self, sqe: Sqe, size: int) -> bytes:
        return sqe.payload[: self._sqe_command_bytes].ljust(size, b"\0")[:size]

    def _control(self, sqe: Sqe) -> int | None:
        if not self._sqe128:
            return -errno.EINVAL
        header = ControlCmd.unpack(self._command_area(sqe, ControlCmd.LAYOUT.size))
        kind, number = split_opcode(sqe.cmd_op)
        process = self.task.process
        call = Call(
            command=number,
            dev_id=header.dev_id,
            queue_id=header.queue_id,
            data=header.data,
            length=header.len,
            dev_path_length=header.dev_path_len,
            memory=process.memory,
            address=header.addr,
            caller=process,
            opcode_type=kind,
            exact_opcode=sqe.cmd_op == _GET_FEATURES,
        )
        known = call.command in ControlCommand._value2member_map_
        name = ControlCommand(call.command).name if known else f"command {call.command:#x}"
        command = _ControlCommand(self, sqe.user_data, name, header.dev_id)
        self.control_commands.append(command)
        self.kernel.run(
            f"{name} of device {header.dev_id}",
            execute(self.kernel, call),
            ring=self,
            on_done=command.done,
        )
        return None

    def _per_tag(self, sqe: Sqe, file: CharFile) -> int | None:
        kernel = self.kernel
        kind, command = split_opcode(sqe.cmd_op)
        if kind == _IOCTL_TYPE and kernel.version < (6, 4):
            command = UNKNOWN_COMMAND
        elif kind not in (0, _IOCTL_TYPE) or (not kind and not kernel.legacy_opcodes):
            if kernel.version >= (6, 17):
                return -errno.EOPNOTSUPP
            command = BAD_OPCODE
        io = IoCmd.unpack(self._command_area(sqe, IoCmd.LAYOUT.size))
        device = file.device
        if command == IoCommand.UNREGISTER_IO_BUF and kernel.version >= (6, 17):
            # It names a buffer of the ring, and no queue.
            io = attrs.evolve(io, q_id=0, tag=0)
        if io.q_id >= len(device.queues):
            return -errno.EINVAL
        commands = self._commands(file, io.q_id)
        if kernel.log is not None:
            kernel.log.append(("command", device.dev_id, io.q_id, io.tag, command, io.result))
        return commands.send(command, sqe.user_data, io, sqe.addr)

    def _commands(self, file: CharFile, queue_id: int) -> QueueCommands:
        commands = self._queues.get((file, queue_id))
        if commands is None:
            queue = file.device.queues[queue_id]
            if queue.batch is None:
                commands = QueueCommands(self, file, queue)
            else:
                commands = BatchCommands(self, file, queue, queue.batch)
            self._queues[file, queue_id] = commands
        return commands

    def _batch(self, sqe: Sqe, file: CharFile) -> int | None:
        """A command to a device with BATCH_IO: opcodes must be right in every bit."""
        device = file.device
        if sqe.cmd_op in (PREP_IO_CMDS, COMMIT_IO_CMDS, FETCH_IO_CMDS):
            # Whatever flags: unknown ones are refused in their turn.
            queue_id, flags, nr_elem, elem_bytes, *_ = BatchIo.LAYOUT.unpack(
                self._command_area(sqe, BatchIo.LAYOUT.size)
            )
            if queue_id >= len(device.queues):
                return -errno.EINVAL
            commands = self._commands(file, queue_id)
            assert isinstance(commands, BatchCommands)
            if self.kernel.log is not None:
                self.kernel.log.append(("batch", device.dev_id, queue_id, sqe.cmd_op & 0xFF, nr_elem))
            return commands.start(sqe, BatchIo(q_id=queue_id, flags=flags, nr_elem=nr_elem, elem_bytes=elem_bytes))
        io = IoCmd.unpack(self._command_area(sqe, IoCmd.LAYOUT.size))
        if sqe.cmd_op == _UNREGISTER_IO_BUF:
            return self._commands(file, 0).send(IoCommand.UNREGISTER_IO_BUF, sqe.user_data, io, 0)
        if io.q_id >= len(device.queues) or io.tag >= device.info.queue_depth:
            return -errno.EINVAL
        if sqe.cmd_op != _REGISTER_IO_BUF:
            return -errno.EOPNOTSUPP
        # For a tag without a task everybody is off the daemon.
        return self._commands(file, io.q_id).register(io)

    # ------------------------------------------------------------------ provided buffers

    def register_buffer_ring(self, group: int, buffers: Sequence[tuple[int, int]]) -> None:
        """Provide buffers, as (address, length): their ids are 0, 1, …. Raises `KernelError` EEXIST for a group that there is."""
        if group in self._groups:
            raise self._error(errno.EEXIST)
        self._groups[group] = deque((number, address, length) for number, (address, length) in enumerate(buffers))

    def provide_buffer(self, group: int, buffer_id: int, address: int, length: int) -> None:
        """Give a buffer, used up or new, to the kernel."""
        self._groups[group].append((buffer_id, address, length))

    def select_buffer(self, group: int) -> tuple[int, int, int] | None:
        """The next buffer of the group, which stays where it is until a completion names it."""
        buffers = self._groups.get(group)
        return buffers[0] if buffers else None

    def post_more(self, user_data: int, result: int, group: int, buffer_id: int) -> bool:
        """A completion of a command that goes on, and uses a buffer up. False when the completion queue is full."""
        if len(self._completions) >= self.cq_entries:
            return False
        self._groups[group].popleft()
        self.post_cqe(user_data, result, CQE_MORE | CQE_BUFFER | buffer_id << CQE_BUFFER_SHIFT)
        return True

    # ------------------------------------------------------------------ registered buffers

    def register_buffers(self, count: int) -> None:
        """io_uring_register(2): a table of ``count`` empty places. Raises `KernelError` EBUSY when there is one."""
        if len(self.table):
            raise self._error(errno.EBUSY)
        self.table = BufferTable(count)

    def unregister_buffers(self) -> None:
        """Give up the table and what is in it. Raises `KernelError` ENXIO when there is none."""
        if not len(self.table):
            raise self._error(errno.ENXIO)
        table, self.table = self.table, BufferTable(0)
        table.clear()

    def buffer(self, index: int) -> RequestBuffer | None:
        """What is registered at that place."""
        return self.table.get(index)

    def _fixed(self, sqe: Sqe, file: SimFile) -> int | None:
        """A read or write with a registered buffer; ``addr`` is the offset in it."""
        buffer = self.table.get(sqe.buf_index)
        fill = sqe.opcode is UringOp.READ_FIXED
        part = buffer.part(sqe.addr, sqe.length, fill=fill) if buffer is not None else None
        if part is None or buffer is None:
            return -errno.EFAULT
        if isinstance(file, CharFile):
            return -errno.EACCES  # only a program's own memory will do
        if not isinstance(file, ByteFile):
            return -errno.EINVAL
        move = file.read_into if fill else file.write_from
        if not sqe.force_async:
            return move(part, sqe.offset)
        buffer.get()
        file.get()
        self._moving.append((buffer, file))

        def finish() -> None:
            self.post_cqe(sqe.user_data, move(part, sqe.offset))
            self._moving.remove((buffer, file))
            buffer.put()
            file.put()

        self.add_work(finish, later=True)
        return None

    # ------------------------------------------------------------------ completion

    def add_work(self, work: Callable[[], None], *, later: bool = False) -> None:
        """The task has something to do when it next enters the kernel; ``later``: the time after that."""
        (self._later if later else self._work).append(work)
        self._lot.unpark_all()

    def _later_is_now(self) -> None:
        self._later, later = [], self._later
        self._work += later

    def _run_work(self, *, all_of_it: bool = False) -> None:
        choices = self.kernel.choices
        while self._work:
            if choices.calm:
                self._work.pop(0)()
                continue
            if not all_of_it and choices.choose("task-work-later", 2):
                return
            self._work.pop(choices.choose("task-work-next", len(self._work)))()

    def post_cqe(self, user_data: int, result: int, flags: int = 0) -> None:
        """A completion: into the queue, or behind it when that is full; `reap` fills the room that it makes."""
        if self.closed:
            return
        cqe = Cqe(user_data, result, flags)
        if len(self._completions) >= self.cq_entries:
            self.overflow += 1
            self._overflowed.append(cqe)
        else:
            self._completions.append(cqe)
        self._lot.unpark_all()

    def reap(self, most: int | None = None) -> list[Cqe]:
        """The completions that are there, ``most`` at most. Those that overflowed come with the next call."""
        self._check_open()
        self._later_is_now()
        self._run_work(all_of_it=self._came_back_empty)
        self.kernel.changed()
        completions = self._completions
        count = len(completions) if most is None else min(most, len(completions))
        if count and not self.kernel.choices.calm:
            least = 1 if self._came_back_empty else 0
            count -= self.kernel.choices.choose("reap-left-behind", count - least + 1)
        self._came_back_empty = not count
        found = [completions.popleft() for _ in range(count)]
        while self._overflowed and len(completions) < self.cq_entries:
            completions.append(self._overflowed.popleft())
        if self.kernel.log is not None:
            self.kernel.log += [("cqe", cqe.user_data, cqe.result, cqe.flags) for cqe in found]
        return found

    async def wait(self) -> None:
        """Return when a reap may find something; it may return early. A checkpoint.

        Raises `KernelError` EINTR when a signal came (Choices), `trio.ClosedResourceError` when the ring is closed.
        """
        self._check_open()
        choices = self.kernel.choices
        self._woke_for_nothing = (
            not choices.calm and not self._woke_for_nothing and bool(choices.choose("spurious-wake-up", 2))
        )
        if self._completions or self._work or self._later or self._woke_for_nothing:
            await trio.lowlevel.checkpoint()
        else:
            await self._lot.park()
        self._check_open()
        if choices.choose("wait-interrupted", 2):
            raise self._error(errno.EINTR)

    def _check_open(self) -> None:
        if self.closed:
            raise trio.ClosedResourceError("the ring is closed")

    def _error(self, number: int) -> KernelError:
        return KernelError(number, f"cannot enter the ring: {errno_text(number)}")

    # ------------------------------------------------------------------ its end

    def close(self) -> None:
        """Exit the ring: whatever is pending is cancelled, and its completions are lost. Repeatable."""
        if self.closed:
            return
        self.closed = True
        self.task.process.rings.remove(self)
        self.kernel.raw_rings.remove(self)
        self._lot.unpark_all()
        self._work.clear()
        self._later.clear()
        for commands in self._queues.values():
            commands.close()
        self.table.clear()
        for buffer, file in self._moving:
            buffer.put()
            file.put()
        self.kernel.interrupt(self)
        self.kernel.changed()
