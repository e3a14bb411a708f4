"""Shared memory that a server registers for a device: requests whose data lies in it are delivered without a copy (7.1).

**Supported.** REG_BUF and UNREG_BUF with their checks, while the disk is frozen: they wait until it is idle, and what comes
meanwhile waits for them. From REG_BUF until UNREG_BUF, whoever serves the device and however it moves data, a request
whose data lies whole in one buffer is delivered with SHMEM_ZC and the place in the buffer. Nothing of it is copied, and any
result above 0 is all of a READ. A WRITE is announced all the same where NEED_GET_DATA is on; then its descriptor has the
address that the command brought. Other requests are delivered as ever: those in two buffers or in part outside, a
READ into a read-only buffer, a WRITE of a constant, and all without data.
**Rejected.** EOPNOTSUPP without the feature. REG_BUF: EFAULT for memory that is not mapped; EINVAL for unknown flags, for
reserved bits, for a length of nothing, above 4 GiB or not of whole pages, for an address within a page; ENOSPC for
the 65537th; EEXIST when some of it is registered. UNREG_BUF: EINVAL for an index that cannot be, ENOENT for one that is not.
**Differs from Linux.** A process' mapping lies in one piece, and so does an operation's memory, so that an index stands for
one range. A report of zones does not wait while the disk is frozen.
"""

from __future__ import annotations

import ctypes
import errno
from typing import TYPE_CHECKING, Final

import attrs

from ublk_trio.kernel_sim.waits import Steps
from ublk_trio.uapi import Feature, IoOp, ShmemBufFlag, ShmemBufReg, shmem_zc_addr

if TYPE_CHECKING:
    from ublk_trio.kernel_sim.block import Request
    from ublk_trio.kernel_sim.call import Call
    from ublk_trio.kernel_sim.device import SimDevice
    from ublk_trio.kernel_sim.kernel import SimKernel

_WRITE: Final = int(IoOp.WRITE)
_BUFFERS_MAX: Final = 1 << 16
_BYTES_MAX: Final = 1 << 32


def _place(view: memoryview) -> int | None:
    """Where the memory really is; None for a constant, which nobody can have mapped."""
    if view.readonly or not view.nbytes:
        return None
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


@attrs.frozen
class _Buffer:
    view: memoryview
    start: int
    read_only: bool

    @property
    def end(self) -> int:
        return self.start + len(self.view)


class ShmemBuffers:
    """A device's registered buffers, by index."""

    def __init__(self) -> None:
        self._buffers: dict[int, _Buffer] = {}

    def add(self, view: memoryview, *, read_only: bool) -> int:
        """The lowest free index, or a negative errno."""
        if len(self._buffers) >= _BUFFERS_MAX:
            return -errno.ENOSPC
        start = _place(view)
        assert start is not None
        if any(start < buffer.end and buffer.start < start + len(view) for buffer in self._buffers.values()):
            return -errno.EEXIST
        index = next(index for index in range(len(self._buffers) + 1) if index not in self._buffers)
        self._buffers[index] = _Buffer(view, start, read_only)
        return index

    def remove(self, index: int) -> int:
        """0 or a negative errno."""
        return 0 if self._buffers.pop(index, None) is not None else -errno.ENOENT

    def match(self, request: Request) -> int | None:
        """The address word for a request with data that lies whole in a buffer; None when it does not."""
        start = _place(request.view)
        if start is None:
            return None
        for index, buffer in self._buffers.items():
            if buffer.start <= start and start + request.length <= buffer.end:
                if buffer.read_only and request.op != _WRITE:
                    return None
                return shmem_zc_addr(index=index, offset=start - buffer.start)
        return None


def register(kernel: SimKernel, device: SimDevice, call: Call) -> Steps:
    """REG_BUF: the index."""
    if not device.info.flags & Feature.SHMEM_ZC:
        return -errno.EOPNOTSUPP
    sent = call.sent(min(call.length, ShmemBufReg.LAYOUT.size)) if call.length else b""
    if sent is None:
        return -errno.EFAULT
    address, length, flags, reserved = ShmemBufReg.LAYOUT.unpack(sent.ljust(ShmemBufReg.LAYOUT.size, b"\0"))
    if flags & ~int(ShmemBufFlag.READ_ONLY) or reserved:
        return -errno.EINVAL
    if not 0 < length <= _BYTES_MAX or length % kernel.page_size or address % kernel.page_size:
        return -errno.EINVAL
    view = call.memory.view(address, length) if call.memory is not None else None
    if view is None:
        return -errno.EFAULT
    yield from _freeze(device)
    index = device.shmem.add(view, read_only=bool(flags))
    _unfreeze(device)
    return index


def unregister(kernel: SimKernel, device: SimDevice, call: Call) -> Steps:
    """UNREG_BUF, of the index in the data word."""
    if not device.info.flags & Feature.SHMEM_ZC:
        return -errno.EOPNOTSUPP
    index = call.pid  # an int, like a pid
    if not 0 <= index < _BUFFERS_MAX:
        return -errno.EINVAL
    yield from _freeze(device)
    result = device.shmem.remove(index)
    _unfreeze(device)
    return result


def _freeze(device: SimDevice) -> Steps:
    """Take the mutex, let nothing new into the disk, and wait until no operation is under way."""
    yield from device.mutex.lock()
    if device.disk is not None:
        yield from device.disk.freeze()
    return 0


def _unfreeze(device: SimDevice) -> None:
    if device.disk is not None:
        device.disk.unfreeze()
    device.mutex.unlock()
