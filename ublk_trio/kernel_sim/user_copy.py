"""User copy: the server moves a request's data itself, with pread and pwrite on the char device.

**Supported.** Data and integrity data (bit 62 of the position), with the checks in the order of the release; copies that
take time: one that another task than the tag's daemon has under way keeps the request from ending.
**Rejected.** EACCES: the device is dead, the wrong direction, a device without USER_COPY (since 6.18; before, EINVAL).
EINVAL: no such queue or tag, a tag that the server does not hold, a request without data, an offset behind its end.
**Differs from Linux.** The copying itself happens at once, when the call ends.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from ublk_trio.errors import KernelError, errno_text
from ublk_trio.kernel_sim.queue import FILLED_BY_SERVER, READ_BY_SERVER
from ublk_trio.kernel_sim.tag import OWNED_BY_SRV
from ublk_trio.uapi import (
    INTEGRITY_SHIFT,
    IO_BUF_BITS,
    IO_BUF_OFFSET,
    QUEUE_BITS,
    QUEUE_SHIFT,
    TAG_BITS,
    TAG_SHIFT,
    DeviceState,
    Feature,
)

if TYPE_CHECKING:
    from ublk_trio.kernel_sim.block import Request
    from ublk_trio.kernel_sim.device import SimDevice
    from ublk_trio.kernel_sim.queue import SimQueue
    from ublk_trio.kernel_sim.tag import SimTag


_NOTHING: Final = memoryview(bytearray())


class UserCopy:
    """A pread or pwrite under way. Making one carries out the checks and raises `KernelError`; `finish` copies."""

    def __init__(self, device: SimDevice, task: object, position: int, *, write: bool) -> None:
        self._path = device.kernel.char_path(device.dev_id)
        self._finished = False
        version = device.kernel.version
        flags = device.info.flags
        if position < 0:
            raise self._error(errno.EINVAL)
        if device.info.state is DeviceState.DEAD:
            raise self._error(errno.EACCES)
        place = position - IO_BUF_OFFSET
        queue_id = place >> QUEUE_SHIFT & (1 << QUEUE_BITS) - 1
        number = place >> TAG_SHIFT & (1 << TAG_BITS) - 1
        offset = place & (1 << IO_BUF_BITS) - 1
        integrity = bool(position >> INTEGRITY_SHIFT & 1) and version >= (7, 0)
        if integrity and not flags & Feature.INTEGRITY:
            raise self._error(errno.EINVAL)
        if queue_id >= len(device.queues):
            raise self._error(errno.EINVAL)
        if version >= (6, 18) and not flags & Feature.USER_COPY:
            raise self._error(errno.EACCES)
        queue = device.queues[queue_id]
        if number >= queue.depth or not flags & Feature.USER_COPY:
            raise self._error(errno.EINVAL)
        tag = queue.tags[number]
        #: The tag that this copy keeps a reference to; the daemon needs none, because it can't commit meanwhile.
        self._held: tuple[SimQueue, SimTag] | None = None
        if version >= (7, 0) and tag.task == task:
            if not tag.flags & OWNED_BY_SRV or not queue.has_data(tag):
                raise self._error(errno.EINVAL)
        elif queue.hold(tag):
            self._held = queue, tag
        else:
            raise self._error(errno.EINVAL)
        request = tag.request
        assert request is not None
        data, length = request.view, request.length
        if integrity:
            data, length = request.metadata or _NOTHING, _integrity_length(device, request)
        if offset > length:
            self._let_go()
            raise self._error(errno.EINVAL)
        if request.op not in (FILLED_BY_SERVER if write else READ_BY_SERVER):
            self._let_go()
            raise self._error(errno.EACCES)
        self._data = data[offset:]

    def _error(self, number: int) -> KernelError:
        return KernelError(number, f"cannot copy by {self._path}: {errno_text(number)}")

    def _let_go(self) -> None:
        if self._held is not None:
            queue, tag = self._held
            queue.let_go(tag)

    def _finish(self) -> None:
        assert not self._finished
        self._finished = True
        self._let_go()

    def read(self, length: int) -> bytes:
        """End a pread: what there is of ``length`` bytes."""
        data = bytes(self._data[:length])
        self._finish()
        return data

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """End a pwrite: how many bytes there was room for."""
        count = min(len(data), len(self._data))
        self._data[:count] = memoryview(data)[:count]
        self._finish()
        return count


def _integrity_length(device: SimDevice, request: Request) -> int:
    profile, basic = device.params.integrity, device.params.basic
    if profile is None or basic is None:
        return 0
    return (request.length >> (profile.interval_exp or basic.logical_bs_shift)) * profile.metadata_size
