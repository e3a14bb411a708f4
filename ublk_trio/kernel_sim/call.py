"""A control command as it was sent: its numbers, its sender, and the memory that its address points at.

**Supported.** A buffer (from the engine's ring, which cannot point anywhere else) or an address in a process's memory.
**Rejected.** Nothing: that is the commands' part. **Differs from Linux.** What lies past the end of a buffer reads as
zeros, and writes there are dropped; an address in no mapping is EFAULT.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import attrs

from ublk_trio.uapi import LAST_LEGACY_CONTROL_COMMAND

if TYPE_CHECKING:
    from ublk_trio.kernel_sim.kernel import SimKernel


class Caller(Protocol):
    """Who a system call comes from. `Identity`, or a simulated process."""

    @property
    def pid(self) -> int: ...
    @property
    def uid(self) -> int: ...
    @property
    def gid(self) -> int: ...
    @property
    def privileged(self) -> bool:
        """Root: CAP_SYS_ADMIN, and access to every file."""
        ...


@attrs.frozen(kw_only=True)
class Identity:
    """A `Caller` that is nothing else."""

    pid: int
    uid: int = 0
    gid: int = 0
    privileged: bool = True


class Memory(Protocol):
    """An address space."""

    def view(self, address: int, length: int) -> memoryview | None:
        """So many bytes from there; None when not all of them are mapped."""
        ...


_IOCTL_TYPE = ord("u")


@attrs.define(kw_only=True)
class Call:
    """A control command."""

    command: int
    dev_id: int
    queue_id: int = 0xFFFF
    data: int = 0
    buffer: bytearray | None = None
    length: int = 0
    dev_path_length: int = 0
    ioctl_encoded: bool = True
    #: Where ``address`` points, when there is no ``buffer``.
    memory: Memory | None = None
    address: int = 0
    #: None: the kernel's own `SimKernel.identity`.
    caller: Caller | None = None
    #: Whether the opcode is the published one, with its direction and size: only GET_FEATURES minds.
    exact_opcode: bool = True
    #: The type in the opcode: 0 for a plain number, anything for a broken one.
    opcode_type: int = attrs.field()
    #: Where the command's own part of the memory begins: behind the path.
    start: int = 0

    @opcode_type.default
    def _default_type(self) -> int:
        encoded = self.ioctl_encoded or self.command > LAST_LEGACY_CONTROL_COMMAND
        return _IOCTL_TYPE if encoded else 0

    @property
    def encoded(self) -> bool:
        return self.opcode_type == _IOCTL_TYPE

    @property
    def has_address(self) -> bool:
        """The address is not 0."""
        return self.buffer is not None or self.address != 0

    def sender(self, kernel: SimKernel) -> Caller:
        return self.caller if self.caller is not None else kernel.identity

    def sent(self, length: int) -> bytes | None:
        """What the server's memory holds; None for EFAULT."""
        if self.buffer is not None:
            return bytes(self.buffer[self.start : self.start + length]).ljust(length, b"\0")
        view = self._view(length)
        return bytes(view) if view is not None else None

    def answer(self, data: bytes) -> bool:
        """Write to the server's memory; False for EFAULT."""
        if self.buffer is not None:
            data = data[: max(0, len(self.buffer) - self.start)]
            self.buffer[self.start : self.start + len(data)] = data
            return True
        view = self._view(len(data))
        if view is None:
            return False
        view[:] = data
        return True

    def _view(self, length: int) -> memoryview | None:
        if self.memory is None or not self.address:
            return None
        return self.memory.view(self.address + self.start, length)

    @property
    def pid(self) -> int:
        """The pid in the data word, of which the driver takes the lower half, signed."""
        low = self.data & 0xFFFF_FFFF
        return low - (1 << 32) if low >> 31 else low
