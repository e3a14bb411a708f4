"""The two kernels that one test body runs on, and what an application sees of a disk on each."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Protocol, TypeVar

import trio

from ublk_trio import Device, Kernel, RealKernel, SimKernel
from ublk_trio.uapi import CONTROL_PATH
from ublk_trio.workload import Disk

T = TypeVar("T")

_BLKDISCARD = 0x1277
_BLKZEROOUT = 0x127F


def has_real_kernel() -> bool:
    """Whether this process can serve real disks."""
    return os.access(CONTROL_PATH, os.R_OK | os.W_OK)


class Arm(Protocol):
    """A kernel under test."""

    @property
    def kernel(self) -> Kernel: ...

    def open_disk(self, device: Device) -> AbstractAsyncContextManager[Disk]: ...

    def leftovers(self) -> list[str]: ...


class SimArm:
    """The simulator, calm: every choice is the first."""

    def __init__(self) -> None:
        self.kernel = SimKernel(cpus=4, paranoid=True)

    @asynccontextmanager
    async def open_disk(self, device: Device) -> AsyncIterator[Disk]:
        yield self.kernel.block_device(device.dev_id)

    def leftovers(self) -> list[str]:
        self.kernel.check()
        return self.kernel.leftovers()


class RealArm:
    """This machine's own kernel."""

    def __init__(self) -> None:
        self.kernel = RealKernel()
        self._fds = _open_files()

    @asynccontextmanager
    async def open_disk(self, device: Device) -> AsyncIterator[Disk]:
        disk = await trio.to_thread.run_sync(RealDisk, device.path)
        try:
            yield disk
        finally:
            await trio.to_thread.run_sync(disk.close)

    def leftovers(self) -> list[str]:
        nodes = [str(path) for path in Path("/dev").glob("ublk[bc]*")]
        return nodes + sorted(_open_files() - self._fds) + _mappings()


def _open_files() -> set[str]:
    """What this process has open, that is ublk's or io_uring's."""
    links = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:
            continue
    return {link for link in links if "ublk" in link or "io_uring" in link}


def _mappings() -> list[str]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line for line in lines if "/dev/ublk" in line or "io_uring" in line]


class RealDisk:
    """A block device node, used past the page cache (O_DIRECT), each call in a thread."""

    def __init__(self, path: str) -> None:
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_DIRECT)
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES):
                raise
            self._fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        self.size = os.lseek(self._fd, 0, os.SEEK_END)
        self.block_size = struct.unpack("i", fcntl.ioctl(self._fd, 0x1268, bytes(4)))[0]

    def close(self) -> None:
        os.close(self._fd)

    async def read(self, offset: int, length: int) -> bytes:
        return await _in_thread(lambda: self._read(offset, length))

    def _read(self, offset: int, length: int) -> bytes:
        with mmap.mmap(-1, length) as buffer:
            done = os.preadv(self._fd, [buffer], offset)
            return buffer[:done]

    async def write(self, offset: int, data: bytes, *, fua: bool = False) -> None:
        await _in_thread(lambda: self._write(offset, data, fua))

    def _write(self, offset: int, data: bytes, fua: bool) -> None:
        with mmap.mmap(-1, len(data)) as buffer:
            buffer[:] = data
            # A direct write with RWF_DSYNC goes out as one write with FUA where the disk has it.
            done = os.pwritev(self._fd, [buffer], offset, os.RWF_DSYNC if fua else 0)
            assert done == len(data), "a direct write of a disk is not short"

    async def flush(self) -> None:
        await _in_thread(lambda: os.fsync(self._fd))

    async def discard(self, offset: int, length: int) -> None:
        await self._range(_BLKDISCARD, offset, length)

    async def write_zeroes(self, offset: int, length: int) -> None:
        await self._range(_BLKZEROOUT, offset, length)

    async def _range(self, request: int, offset: int, length: int) -> None:
        argument = struct.pack("QQ", offset, length)
        await _in_thread(lambda: fcntl.ioctl(self._fd, request, argument))


async def _in_thread(call: Callable[[], T]) -> T:
    # Abandoned on cancellation: a thread that waits for a disk can only be freed by the disk.
    return await trio.to_thread.run_sync(call, abandon_on_cancel=True)
