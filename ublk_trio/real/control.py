"""The control ring: commands to `/dev/ublk-control`.

Some facts, and what they mean here:

- A command may be held by the kernel for as long as it likes: START_DEV until every tag is fetched, DEL_DEV until the char device is
  closed. Each runs on a worker thread of io_uring's own (see ut_control_open), so none holds up another, and none this thread.
- The kernel writes a command's answer to the buffer whenever it gets to it. So the buffer belongs to the command record, and the record
  to the ring, until the completion is there: not to the task that waits, which may be cancelled.
- On older kernels (6.12 at least) neither STOP_DEV nor closing the char device ends a START_DEV that waits for fetches, and DEL_DEV then
  waits for the START_DEV, for ever. So one whose waiting task is cancelled is recalled: interrupted, by io_uring's own cancel. That
  is a request and no promise: whether it then gave EINTR or had just succeeded, nobody learns.
- Only one task can wait for a file descriptor in Trio. There is no nursery here to run a dispatcher in, so the waiters take turns: one of
  them, the **leader**, waits for the ring and takes in everybody's results; the others, its followers, sleep. Whoever leaves
  (with a result, cancelled, by an error) while nobody leads wakes one follower, which then leads. That makes it an invariant that if
  anybody waits, somebody leads or is about to.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import trio

from ublk_trio import uapi
from ublk_trio.errors import KernelError, KernelUnavailableError, errno_text
from ublk_trio.real import native
from ublk_trio.ring import RECALLED_WHEN_CANCELLED
from ublk_trio.uapi import ControlCommand

if TYPE_CHECKING:
    from typing import Any

#: How long closing waits for commands that are still with the kernel, after it interrupted those that can be.
CLOSE_GRACE_SECONDS = 1.0

_RESULTS_MAX = 64

# Commands that were with the kernel when their ring was closed, and did not end in the grace time. The kernel may still read or write
# their buffers, at a time that nothing tells us. Freed memory would be written to under somebody else's feet, so this is kept
# until the process ends, on purpose. It is a few hundred bytes for each command that a stuck kernel never finished.
_abandoned: list[object] = []


class _Command:
    """A command that is with the kernel."""

    __slots__ = ("address", "buffer", "id", "result", "turn")

    def __init__(self, command_id: int, buffer: bytearray | None, address: Any) -> None:
        self.id = command_id
        self.buffer = buffer
        #: cffi's hold on the buffer: while it lives, Python can't move or free the memory.
        self.address = address
        self.result: int | None = None
        #: Set to wake the follower that waits for this command.
        self.turn: trio.Event | None = None


class RealControlRing:
    """`ring.ControlRing` on io_uring. Made by `RealKernel.open_control`."""

    def __init__(self) -> None:
        """Raises `KernelUnavailableError` when there is no driver, no permission or no io_uring."""
        self._ffi, self._lib = native.load()
        self._control_fd = _open_control_device()
        opened = self._ffi.new("struct ut_control **")
        failed = self._ffi.new("char **")
        error = self._lib.ut_control_open(opened, self._control_fd, self._ffi.cast("const char **", failed))
        if error < 0:
            os.close(self._control_fd)
            raise native.ring_error(error, self._ffi.string(failed[0]).decode(), "the control device")
        self._ring = opened[0]
        self._fd = self._lib.ut_control_fd(self._ring)
        self._results = self._ffi.new("struct ut_control_result[]", _RESULTS_MAX)
        self._commands: dict[int, _Command] = {}
        self._last_id = 0
        self._led = False
        self._closed = False

    async def submit(
        self,
        command: ControlCommand,
        *,
        dev_id: int,
        queue_id: int = uapi.NO_QUEUE,
        data: int = 0,
        buffer: bytearray | None = None,
        length: int | None = None,
        dev_path_length: int = 0,
        ioctl_encoded: bool = True,
    ) -> int:
        """See `ring.ControlRing.submit`. A checkpoint; cancelled before the command was sent, it is not sent.

        Raises `KernelError` when the ring itself fails, and `trio.ClosedResourceError` when it is closed, now or meanwhile.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._closed:
            raise trio.ClosedResourceError("the control ring is closed")
        sent = self._send(
            uapi.control_opcode(command, ioctl_encoded=ioctl_encoded),
            buffer,
            dev_id=dev_id,
            queue_id=queue_id,
            data=data,
            length=length if length is not None else len(buffer or b""),
            dev_path_length=dev_path_length,
        )
        try:
            return await self._result(sent)
        except trio.Cancelled:
            if command in RECALLED_WHEN_CANCELLED and sent.result is None and not self._closed:
                # Its failure changes nothing: then the command waits on, until the ring is closed.
                self._lib.ut_control_recall(self._ring, sent.id)
            raise

    def _send(
        self,
        opcode: int,
        buffer: bytearray | None,
        *,
        dev_id: int,
        queue_id: int,
        data: int,
        length: int,
        dev_path_length: int,
    ) -> _Command:
        if len(self._commands) >= self._lib.UT_CONTROL_COMMANDS_MAX:
            raise KernelError(errno.EBUSY, f"{len(self._commands)} control commands are with the kernel and none ends")
        address = self._ffi.NULL
        if buffer is not None:
            address = self._ffi.from_buffer("char[]", buffer, require_writable=True)
        packed = uapi.ControlCmd(
            dev_id=dev_id & 0xFFFFFFFF,
            queue_id=queue_id,
            len=length,
            addr=int(self._ffi.cast("uintptr_t", address)),
            data=data,
            dev_path_len=dev_path_length,
        ).pack()
        self._last_id += 1
        command = _Command(self._last_id, buffer, address)
        # Known before it is sent: once the kernel has it, nothing may fail that would drop its memory.
        self._commands[command.id] = command
        error = self._lib.ut_control_submit(self._ring, command.id, opcode, packed)
        if error < 0:
            # The command stays recorded: whether the kernel saw it, nobody knows.
            raise KernelError(error, f"cannot send a control command: io_uring_enter: {errno_text(error)}")
        return command

    async def _result(self, command: _Command) -> int:
        try:
            while command.result is None:
                if self._closed:
                    raise trio.ClosedResourceError("the control ring was closed while a command was with the kernel")
                if self._led:
                    await self._follow(command)
                else:
                    await self._lead(command)
        finally:
            # Also after a Cancelled that met a follower just when it was its turn: the turn passes on.
            self._hand_over()
        return command.result

    async def _lead(self, command: _Command) -> None:
        self._led = True
        try:
            while command.result is None:
                await trio.lowlevel.wait_readable(self._fd)
                self._reap()
        finally:
            self._led = False

    async def _follow(self, command: _Command) -> None:
        command.turn = trio.Event()
        try:
            await command.turn.wait()
        finally:
            command.turn = None

    def _hand_over(self) -> None:
        if self._led:
            return
        for command in self._commands.values():
            if command.turn is not None:
                command.turn.set()
                return

    def _reap(self) -> None:
        """Take in every result that is there."""
        while True:
            count = self._lib.ut_control_reap(self._ring, self._results, _RESULTS_MAX)
            if count < 0:
                raise KernelError(count, f"cannot read the control ring: {errno_text(count)}")
            for index in range(count):
                self._finish(self._results[index].id, self._results[index].result)
            if count < _RESULTS_MAX:
                return

    def _finish(self, command_id: int, result: int) -> None:
        command = self._commands.pop(command_id)
        if command.buffer is not None:
            self._ffi.release(command.address)
        command.result = result
        if command.turn is not None:
            command.turn.set()

    async def aclose(self) -> None:
        """Interrupt what is still with the kernel, wait for it a bounded time, close. Repeatable. Not cancellable, but bounded."""
        if self._closed:
            return
        self._closed = True
        # The leader gets ClosedResourceError at once, so that the descriptor is free for us to wait on.
        trio.lowlevel.notify_closing(self._fd)
        for command in self._commands.values():
            if command.turn is not None:
                command.turn.set()
        try:
            with trio.move_on_after(CLOSE_GRACE_SECONDS, shield=True):
                await self._drain()
        finally:
            # Exiting the ring before the memory is looked at: nothing is added to the commands any more.
            self._lib.ut_control_close(self._ring)
            self._ring = self._ffi.NULL
            os.close(self._control_fd)
            _abandoned.extend(self._commands.values())
            self._commands.clear()

    async def _drain(self) -> None:
        await trio.lowlevel.checkpoint()
        if self._commands and self._lib.ut_control_recall(self._ring, self._lib.UT_EVERY_COMMAND) < 0:
            return
        while self._commands:
            await trio.lowlevel.wait_readable(self._fd)
            self._reap()


def _open_control_device() -> int:
    try:
        return os.open(uapi.CONTROL_PATH, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        number = error.errno or errno.EIO
    mend = {
        errno.ENOENT: "load the driver: modprobe ublk_drv",
        errno.ENODEV: "load the driver: modprobe ublk_drv",
        errno.ENXIO: "load the driver: modprobe ublk_drv",
        errno.EACCES: "run as root, or let ordinary users in (as root: `ublk-trio udev-rule --install`)",
        errno.EPERM: "run as root, or allow the device in the container's or cgroup's policy",
    }.get(number, "see dmesg")
    raise KernelUnavailableError(f"cannot open {uapi.CONTROL_PATH}: {errno_text(number)}: {mend}", number)
