"""`RealKernel`: this machine's kernel, as `ring.Kernel`."""

from __future__ import annotations

import contextlib
import mmap
import os
import platform
import re
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from ublk_trio.real.char_device import RealCharDevice, open_char_device
from ublk_trio.real.control import RealControlRing
from ublk_trio.real.users import users_of
from ublk_trio.real.worker import RealWorker
from ublk_trio.uapi import DevInfo

if TYPE_CHECKING:
    from ublk_trio.ring import ControlRing, Kernel

# The class directory lists devices whatever /dev looks like; in a container it may be missing.
_DEVICE_DIRECTORIES = ("/sys/class/ublk-char", "/dev")
_DEVICE_NAME = re.compile(r"ublkc(\d+)")


class RealKernel:
    """The kernel that this process runs on. Making one opens nothing and cannot fail."""

    @property
    def name(self) -> str:
        return f"Linux {platform.release()}"

    @property
    def page_size(self) -> int:
        return mmap.PAGESIZE

    @contextlib.asynccontextmanager
    async def open_control(self) -> AsyncIterator[ControlRing]:
        """See `ring.Kernel.open_control`. Leaving it takes at most `control.CLOSE_GRACE_SECONDS`."""
        ring = RealControlRing()
        try:
            yield ring
        finally:
            await ring.aclose()

    def open_worker(self, cpu: int) -> RealWorker:
        return RealWorker(cpu)

    async def open_char_device(self, info: DevInfo, *, ioctl_encoded: bool) -> RealCharDevice:
        return await open_char_device(info, ioctl_encoded=ioctl_encoded)

    def device_ids(self) -> list[int]:
        for directory in _DEVICE_DIRECTORIES:
            with contextlib.suppress(FileNotFoundError):
                names = os.listdir(directory)
                return sorted(int(match[1]) for name in names if (match := _DEVICE_NAME.fullmatch(name)))
        return []

    def disk_path(self, dev_id: int) -> str:
        return f"/dev/ublkb{dev_id}"

    def char_path(self, dev_id: int) -> str:
        return f"/dev/ublkc{dev_id}"

    def disk_usable(self, dev_id: int) -> bool:
        return os.access(self.disk_path(dev_id), os.R_OK | os.W_OK)

    def disk_users(self, dev_id: int) -> list[str]:
        return users_of(self.disk_path(dev_id))


if TYPE_CHECKING:
    _conforms: type[Kernel] = RealKernel
