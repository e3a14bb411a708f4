"""The Linux calls that a file backend needs and Python does not have: fallocate, statx, the block ioctls.

Importing this works everywhere; calling needs Linux. Numbers are from linux/falloc.h, linux/fs.h and linux/stat.h.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import struct
from collections.abc import Callable
from enum import IntEnum, IntFlag
from typing import Final, cast

STATX_DIOALIGN: Final = 0x2000
_AT_EMPTY_PATH: Final = 0x1000


class Fallocate(IntFlag):
    """Modes of fallocate(2)."""

    KEEP_SIZE = 0x01
    PUNCH_HOLE = 0x02
    ZERO_RANGE = 0x10


class BlockIoctl(IntEnum):
    """Requests to a block device. BLKGETSIZE64 encodes the size of a size_t: this is the value of 64-bit machines."""

    ROTATIONAL = 0x127E
    GET_SIZE_64 = 0x80081272 if struct.calcsize("P") == 8 else 0x80041272
    LOGICAL_BLOCK = 0x1268
    PHYSICAL_BLOCK = 0x127B
    OPTIMAL_IO = 0x1279
    READ_ONLY = 0x125E
    DISCARD = 0x1277
    ZERO_OUT = 0x127F


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


@functools.cache
def _fallocate() -> Callable[[int, int, int, int], int]:
    # Where off_t can be 32 bits (glibc on 32-bit machines) only the name with 64 takes a 64-bit offset; musl needs none
    # and newer versions of it have none.
    function = getattr(_libc(), "fallocate64", None) or _libc().fallocate
    function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    function.restype = ctypes.c_int
    return cast("Callable[[int, int, int, int], int]", function)


def fallocate(fd: int, mode: Fallocate, offset: int, length: int) -> None:
    """fallocate(2), without the GIL. Raises `OSError`; EINTR is retried, as Python does for its own calls."""
    while _fallocate()(fd, mode, offset, length) != 0:
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def direct_alignment(fd: int) -> tuple[int, int] | None:
    """``(memory, offset)`` alignment in bytes that O_DIRECT needs on this file; (0, 0): it can't do it; None: the
    kernel does not say.

    From STATX_DIOALIGN, Linux 6.1; not every filesystem fills it in.
    """
    statx = getattr(_libc(), "statx", None)
    if statx is None:
        return None
    buffer = ctypes.create_string_buffer(256)
    path, at, mask = ctypes.c_char_p(b""), ctypes.c_int(_AT_EMPTY_PATH), ctypes.c_uint(STATX_DIOALIGN)
    if statx(ctypes.c_int(fd), path, at, mask, buffer) != 0:
        return None
    # struct statx: stx_mask at 0; stx_dio_mem_align and stx_dio_offset_align at 152 and 156.
    (answered,) = struct.unpack_from("=I", buffer, 0)
    if not answered & STATX_DIOALIGN:
        return None
    memory, offset = struct.unpack_from("=II", buffer, 152)
    return memory, offset


def block_number(fd: int, request: BlockIoctl) -> int:
    """A number that a block device tells about itself."""
    import fcntl

    # ROTATIONAL writes 2 bytes, GET_SIZE_64 8, the others 4: all little enough for a zeroed 8, read by their own width.
    answer = fcntl.ioctl(fd, request, bytes(8))
    width = {BlockIoctl.ROTATIONAL: "=H", BlockIoctl.GET_SIZE_64: "=Q"}.get(request, "=I")
    (number,) = struct.unpack_from(width, answer)
    return int(number)


def block_range(fd: int, request: BlockIoctl, offset: int, length: int) -> None:
    """DISCARD or ZERO_OUT of a range, in bytes, both aligned to the logical block."""
    import fcntl

    fcntl.ioctl(fd, request, struct.pack("=QQ", offset, length))


def block_queue_limit(device_number: int, name: str) -> int:
    """A queue limit from sysfs, such as ``discard_max_bytes``; 0 when there is none. A partition's limits are its
    disk's.
    """
    base = f"/sys/dev/block/{os.major(device_number)}:{os.minor(device_number)}"
    for directory in (f"{base}/queue", f"{base}/../queue"):
        try:
            with open(f"{directory}/{name}", encoding="ascii") as file:
                return int(file.read())
        except (OSError, ValueError):
            continue
    return 0


def lock_whole(fd: int, *, shared: bool) -> None:
    """flock(2) without waiting. Raises `BlockingIOError` when somebody else holds it."""
    import fcntl

    fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
