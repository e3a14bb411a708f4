"""The char device ``/dev/ublkcN`` as a file: who may open it, and what may be mapped of it.

**Supported.** One opener at a time, EBUSY also while the last close is being worked off; the file's owner and mode;
the checks of mmap, in the driver's order.
**Rejected.** With the errnos that the functions say. **Differs from Linux.** The file belongs to the device's owner,
with mode 0600, as the udev rule of ublk's documentation makes it. The work after the last close has its effects at
once; only its end, which frees the file for the next opener, may be late: how many attempts come too early is a choice.
"""

from __future__ import annotations

import errno
import posixpath
from typing import TYPE_CHECKING, Final

import attrs

from ublk_trio.uapi import descriptors_length, descriptors_offset

if TYPE_CHECKING:
    from ublk_trio.kernel_sim.call import Caller
    from ublk_trio.kernel_sim.device import SimDevice
    from ublk_trio.kernel_sim.kernel import SimKernel

_CONTROL_PATH: Final = "/dev/ublk-control"
_READ: Final = 4
_WRITE: Final = 2
#: How many attempts can come before the work after the last close has ended.
ATTEMPTS_TOO_EARLY_MAX: Final = 2


@attrs.define(kw_only=True)
class Node:
    """The file's owner and mode: ``chown`` and ``chmod`` set them."""

    uid: int
    gid: int
    mode: int = 0o600

    def allows(self, caller: Caller, wanted: int) -> bool:
        """Whether the caller may read (4), write (2) or both."""
        if caller.privileged:
            return True
        shift = 6 if caller.uid == self.uid else 3 if caller.gid == self.gid else 0
        return self.mode >> shift & wanted == wanted


def permission(device: SimDevice, path: str, caller: Caller, *, write: bool) -> int:
    """Whether ``path`` is the device's char device and the caller may use it so: 0, ENOENT, EPERM or EACCES, negative."""
    kernel = device.kernel
    path = posixpath.normpath("/" + path.lstrip("/")) if path else ""
    if path != kernel.char_path(device.dev_id) or device.removed:
        return -errno.EPERM if _exists(kernel, path) else -errno.ENOENT
    return 0 if device.node.allows(caller, _READ | _WRITE if write else _READ) else -errno.EACCES


def _exists(kernel: SimKernel, path: str) -> bool:
    if path in ("/", "/dev", _CONTROL_PATH):
        return True
    return any(
        (path == kernel.char_path(dev_id) and not device.removed)
        or (path == kernel.disk_path(dev_id) and device.disk is not None)
        for dev_id, device in kernel.devices.items()
    )


def check_open(device: SimDevice | None, caller: Caller) -> int:
    """What open(2) for reading and writing says: 0, or ENOENT, EACCES or EBUSY, negative."""
    if device is None or device.removed:
        return -errno.ENOENT
    if not device.node.allows(caller, _READ | _WRITE):
        return -errno.EACCES
    if device.char_in_use:
        return -errno.EBUSY
    # Before 6.15 there was no such work, only some that END_USER_RECOVERY's kin had to wait for.
    return -errno.EBUSY if device.kernel.version.release_ends_server and device.still_releasing() else 0


def check_mmap(device: SimDevice, process: object, *, offset: int, length: int, writable: bool) -> int:
    """Which queue's descriptors a mapping shows, or a negative errno.

    EINVAL: nothing to map, not at a page, from another process than the first one that tried, outside of the queues,
    not the length of the descriptors. EPERM: writable. An offset inside a queue's share maps that queue from its start.
    """
    page_size = device.kernel.page_size
    if length <= 0 or offset % page_size or offset < 0:
        return -errno.EINVAL
    if device.mapper is None:
        device.mapper = process
    if device.mapper != process:
        return -errno.EINVAL
    if writable:
        return -errno.EPERM
    info = device.info
    stride = device.descriptor_bytes
    share = descriptors_offset(1, io_desc_size=stride, page_size=page_size)
    if offset >= share * info.nr_hw_queues:
        return -errno.EINVAL
    # What is mapped is whole pages, whatever was asked.
    pages = -(-length // page_size) * page_size
    if pages != descriptors_length(info.queue_depth, io_desc_size=stride, page_size=page_size):
        return -errno.EINVAL
    return offset // share
