"""`/dev/ublkcN`, open.

Some facts, and what they mean here:

- It has one opener at a time, and counts as open until the kernel has done with the last one's rings, a moment after they were closed. So
  opening it again, for a recovery, meets EBUSY for that moment: worth a short, bounded wait and not more.
- While it is open, while its descriptors are mapped and while a ring has it registered, DEL_DEV waits. So a queue ring must be closed before it,
  and no duplicate of its descriptor is made.
"""

from __future__ import annotations

import errno
import os

import trio

from ublk_trio.errors import KernelError, errno_text
from ublk_trio.real.queue import RealQueueRing, bury_ended
from ublk_trio.real.worker import RealWorker
from ublk_trio.ring import Worker
from ublk_trio.uapi import DevInfo

_BUSY_TRIES = 50
_BUSY_PAUSE_SECONDS = 0.02


async def open_char_device(info: DevInfo, *, ioctl_encoded: bool) -> RealCharDevice:
    """Open an added device's char device. Raises `KernelError`; waits about a second at most. A checkpoint."""
    path = f"/dev/ublkc{info.dev_id}"
    await trio.lowlevel.checkpoint()
    for _ in range(_BUSY_TRIES):
        try:
            # No checkpoint from here on: nothing may come between the descriptor and its owner.
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            number = error.errno or errno.EIO
        else:
            return RealCharDevice(fd, info, ioctl_encoded=ioctl_encoded)
        if number != errno.EBUSY:
            break
        await trio.sleep(_BUSY_PAUSE_SECONDS)
    mend = {
        errno.EBUSY: "another server has it open: stop that one first",
        errno.ENOENT: "the device is gone, or this /dev is not a devtmpfs: look at /sys/class/ublk-char",
        errno.EACCES: "run as root, or as the user who added the device",
        errno.EPERM: "allow the device in the container's or cgroup's policy",
    }.get(number, "see dmesg")
    raise KernelError(number, f"cannot open {path}: {errno_text(number)}: {mend}")


class RealCharDevice:
    """`ring.CharDevice`. Made by `open_char_device`."""

    def __init__(self, fd: int, info: DevInfo, *, ioctl_encoded: bool) -> None:
        self._fd = fd
        self._info = info
        self._ioctl_encoded = ioctl_encoded

    def open_queue(self, queue_id: int, *, buffers: int, worker: Worker | None = None) -> RealQueueRing:
        if self._fd < 0:
            raise trio.ClosedResourceError("the char device is closed")
        assert worker is None or isinstance(worker, RealWorker), "a worker belongs to the kernel that made it"
        return RealQueueRing(
            self._fd,
            self._info,
            queue_id=queue_id,
            buffers=buffers,
            ioctl_encoded=self._ioctl_encoded,
            worker=worker,
        )

    def close(self) -> None:
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        os.close(fd)
        bury_ended()
