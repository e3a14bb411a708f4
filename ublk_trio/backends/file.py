"""`File` and `ThreadedFile`: a disk in a regular file, or another block device.

Some facts, and what they mean:

- *Size.* A regular file's length, or what the block device says, at `open` and at each `rescan`. If the file shrinks
  in between, reading what is gone fails with EIO: zeroes would be silent loss of data. Writing there makes the file
  longer again. Beyond the size everything fails with EIO, so nothing that was under way makes a file longer that was
  cut off and rescanned.
- *Cache.* Writes go to the page cache (or, with `direct`, to a device that may have a cache of its own), so the disk
  has a volatile cache: `flush` is fdatasync(2), and ``fua`` is RWF_DSYNC on that one write (pwritev2(2), Linux 4.7).
  Closing does not flush: the page cache outlives us.
- *Locks.* Two writers of one disk destroy its filesystem. A regular file is locked by flock(2) for as long as it is
  open, exclusively, or shared when read-only; a block device is opened with O_EXCL when writable, which the kernel
  refuses while it is mounted or part of another device. flock is advisory: it stops a second ublk_trio, and qemu or cp
  do not look at it. It belongs to the open file, so a forked child that keeps the descriptor keeps the lock.
- *Direct.* O_DIRECT needs buffer, offset and length aligned (STATX_DIOALIGN, Linux 6.1; before, the filesystem's block
  is assumed). The engine's buffers are page aligned and offsets are multiples of the block size, which `open` makes
  large enough. A buffer that is not aligned gets EINVAL from the kernel; it is then served through an aligned copy.
- *Discard.* A regular file is punched (PUNCH_HOLE with KEEP_SIZE: the range reads as zeroes and its space is free); a
  block device gets BLKDISCARD (what it then reads is its own business). Whether that works is found out at `open`
  without changing anything: by punching behind the end of the file, or from the device's ``discard_max_bytes``. If not,
  "discard" is in `unsupported`.
- *Zeroes.* With ``unmap``: PUNCH_HOLE, then ZERO_RANGE; without: the other way round; if the filesystem has neither,
  zeroes are written. (tmpfs has no ZERO_RANGE: there, and only there, zeroing without ``unmap`` gives space back.) A
  block device: PUNCH_HOLE with ``unmap``, else BLKZEROOUT.
- *Errors* of a request pass through with their errno: ENOSPC when a sparse file finds its filesystem full, EIO, EFBIG.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
from collections.abc import Callable
from typing import Any, Final

import trio

from ublk_trio.backends import _linux
from ublk_trio.backends._linux import BlockIoctl, Fallocate
from ublk_trio.backends.base import (
    BLOCK_SIZE_MAX,
    BLOCK_SIZE_MIN,
    Backend,
    Done,
    Result,
    check_block_size,
    fill_zeroes,
    set_size,
)
from ublk_trio.errors import BackendError, UsageError, errno_text

_PUNCH: Final = Fallocate.PUNCH_HOLE | Fallocate.KEEP_SIZE
_ZERO: Final = Fallocate.ZERO_RANGE | Fallocate.KEEP_SIZE
#: fallocate's and BLKDISCARD's ways of saying "not this mode here".
_NOT_HERE: Final = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.ENOTTY})
#: Zeroes are written in parts of at most this many bytes.
_ZEROES_PART: Final = 1 << 20
_GRANULARITY_MAX: Final = 1 << 20


class File(Backend):
    """A regular file or a block device, served by blocking calls in Trio's thread.

    Right for files in the page cache and for a process that does nothing else; a slow disk stops the whole event loop
    while it is read. `ThreadedFile` does the same in threads.

    Args:
        path: a regular file of the disk's size, or a block device.
        direct: bypass the page cache (O_DIRECT).
        read_only: open for reading, and share the lock with other readers.
        block_size: logical block, bytes; None takes the smallest that the file allows.

    `open` raises `BackendError`, one line with the mend: no such file, not permitted, in use, size 0, no O_DIRECT here,
    …
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        direct: bool = False,
        read_only: bool = False,
        block_size: int | None = None,
    ) -> None:
        self.path = os.fspath(path)
        self.direct = direct
        self.read_only = read_only
        self._block_size_wanted = block_size
        if block_size is not None:
            check_block_size(self, block_size)
            self.block_size = block_size
        self._fd = -1
        self._is_block_device = False
        # Its own limiter: closing is shielded, and must not queue behind whatever else the application does in threads.
        self._opening = trio.CapacityLimiter(1)

    # Any thread may run what follows, several at once: nothing below changes `self` between open and close, but `rescan`
    # the size.

    def read(self, offset: int, buffer: memoryview) -> Result:
        """Reads all of it, however many calls that takes. EIO: the file has become shorter than the disk."""
        self._check_within(offset + len(buffer))
        done, length = 0, len(buffer)
        while done < length:
            rest = buffer[done:] if done else buffer
            try:
                count = os.preadv(self._fd, [rest], offset + done)
            except OSError as error:
                if not self._needs_aligned_copy(error, offset + done):
                    raise
                with mmap.mmap(-1, len(rest)) as copy:
                    count = os.preadv(self._fd, [copy], offset + done)
                    rest[:count] = copy[:count]
            if count == 0 or self._ends_unaligned(done + count, length):
                raise OSError(errno.EIO, f"{self.path}: the file has become shorter than the disk")
            done += count
        return None

    def write(self, offset: int, data: memoryview, *, fua: bool) -> Result:
        """Writes all of it, however many calls that takes."""
        self._check_within(offset + len(data))
        flags = os.RWF_DSYNC if fua else 0
        done, length = 0, len(data)
        while done < length:
            rest = data[done:] if done else data
            try:
                count = os.pwritev(self._fd, [rest], offset + done, flags)
            except OSError as error:
                if not self._needs_aligned_copy(error, offset + done):
                    raise
                with mmap.mmap(-1, len(rest)) as copy:
                    copy[:] = bytes(rest)
                    count = os.pwritev(self._fd, [copy], offset + done, flags)
            if count == 0:  # POSIX allows it, Linux does not do it; without this the loop had no bound
                raise OSError(errno.EIO, f"{self.path}: nothing could be written")
            done += count
        return None

    def flush(self) -> Done:
        """fdatasync(2): every finished write is on stable storage."""
        os.fdatasync(self._fd)
        return None

    def discard(self, offset: int, length: int) -> Done:
        """Frees the space. A regular file then reads zeroes there."""
        self._check_within(offset + length)
        if self._is_block_device:
            _linux.block_range(self._fd, BlockIoctl.DISCARD, offset, length)
        else:
            _linux.fallocate(self._fd, _PUNCH, offset, length)
        return None

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> Done:
        """Zeroes the range by the best means that the file has, in the end by writing them."""
        self._check_within(offset + length)
        for zero in self._ways_to_zero(unmap):
            try:
                zero(offset, length)
                return None
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise
        self._write_zeroes_by_hand(offset, length)
        return None

    async def open(self) -> None:
        """Opens, locks and measures the file, in a thread. Cancellation waits for that thread: nothing stays open or
        locked.
        """
        if self._fd >= 0:
            raise UsageError(f"backend {self}: open already: use one backend object per device")
        await trio.to_thread.run_sync(self._open, limiter=self._opening)

    async def aclose(self) -> None:
        """Closes the file, in a thread: with that the lock is gone."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            await trio.to_thread.run_sync(os.close, fd, limiter=self._opening)

    async def rescan(self) -> int:
        """Asks the file or the block device for its size anew, in a thread, and returns it: bytes.

        Raises `UsageError` when it is not open or no disk has that size, and `OSError` when it can't be asked; the size
        stays what it was.
        """
        if self._fd < 0:
            raise UsageError(f"backend {self}: not open: rescan it while it is")
        set_size(self, await trio.to_thread.run_sync(self._ask_size, self._fd, limiter=self._opening))
        return self.size

    def fileno(self) -> int:
        """The descriptor while open, -1 otherwise: for those who serve the file without this class."""
        return self._fd

    def __str__(self) -> str:
        options = [f"{name}=on" for name in ("direct", "read_only") if getattr(self, name)]
        if self._block_size_wanted is not None:
            options.append(f"block_size={self._block_size_wanted}")
        return ",".join([f"file:{self.path}", *options])

    # Requests

    def _check_within(self, end: int) -> None:
        if end > self.size:
            raise OSError(errno.EIO, f"{self.path}: {end} is beyond the end of the disk")

    def _ends_unaligned(self, done: int, length: int) -> bool:
        """A direct read that stops inside a block met the end of the file: no direct read can go on from there."""
        return self.direct and done < length and done % self.block_size != 0

    def _needs_aligned_copy(self, error: OSError, position: int) -> bool:
        """EINVAL from O_DIRECT at a good position: it is the buffer's address that does not suit."""
        return self.direct and error.errno == errno.EINVAL and position % self.block_size == 0

    def _ways_to_zero(self, unmap: bool) -> tuple[Callable[[int, int], None], ...]:
        if self._is_block_device:
            return (self._punch, self._zero_out) if unmap else (self._zero_out,)
        return (self._punch, self._zero_range) if unmap else (self._zero_range, self._punch)

    def _punch(self, offset: int, length: int) -> None:
        _linux.fallocate(self._fd, _PUNCH, offset, length)

    def _zero_range(self, offset: int, length: int) -> None:
        _linux.fallocate(self._fd, _ZERO, offset, length)

    def _zero_out(self, offset: int, length: int) -> None:
        _linux.block_range(self._fd, BlockIoctl.ZERO_OUT, offset, length)

    def _write_zeroes_by_hand(self, offset: int, length: int) -> None:
        with mmap.mmap(-1, min(length, _ZEROES_PART)) as zeroes, memoryview(zeroes) as view:
            fill_zeroes(view)
            for start in range(0, length, len(view)):
                with view[: min(len(view), length - start)] as part:
                    File.write(self, offset + start, part, fua=False)

    # Opening

    def _open(self) -> None:
        try:
            fd = self._open_descriptor()
        except BackendError:
            raise
        except OSError as error:
            raise self._error(error.errno or errno.EIO, self._mend_of_open(error.errno)) from error
        try:
            self._measure(fd)
        except BackendError:
            os.close(fd)
            raise
        except OSError as error:
            os.close(fd)
            raise self._error(error.errno or errno.EIO, "the file can't be examined: see the kernel's log") from error
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd

    def _open_descriptor(self) -> int:
        """Looks before it opens: opening a FIFO waits, and O_EXCL has a meaning for block devices only."""
        before = os.stat(self.path)
        if stat.S_ISDIR(before.st_mode):
            raise self._error(errno.EISDIR, "a directory: name a file in it")
        if not (stat.S_ISREG(before.st_mode) or stat.S_ISBLK(before.st_mode)):
            raise self._error(errno.ENOTBLK, "neither a regular file nor a block device: name one of those")
        flags = os.O_CLOEXEC | (os.O_RDONLY if self.read_only else os.O_RDWR)
        if self.direct:
            flags |= os.O_DIRECT
        if stat.S_ISBLK(before.st_mode) and not self.read_only:
            flags |= os.O_EXCL
        fd = os.open(self.path, flags)
        after = os.fstat(fd)
        if (before.st_dev, before.st_ino) != (after.st_dev, after.st_ino):
            os.close(fd)
            raise self._error(errno.ESTALE, "it was replaced while it was opened: try again")
        return fd

    def _measure(self, fd: int) -> None:
        status = os.fstat(fd)
        self._is_block_device = stat.S_ISBLK(status.st_mode)
        if self._is_block_device:
            self._measure_block_device(fd, status)
        else:
            self._lock(fd)
            self._measure_regular(fd, status)
        if self.size == 0:
            mend = (
                "attach a medium or a disk to it"
                if self._is_block_device
                else f"give it one with truncate -s 1G {self.path}"
            )
            raise self._error(errno.EINVAL, f"size 0: {mend}")
        if self.size % self.block_size:
            raise self._error(
                errno.EINVAL,
                f"size {self.size} is not a multiple of block_size {self.block_size}: {self._mend_of_size()}",
            )
        self.unsupported = frozenset() if self.read_only or self._can_discard(fd, status) else frozenset({"discard"})

    def _ask_size(self, fd: int) -> int:
        return _linux.block_number(fd, BlockIoctl.GET_SIZE_64) if self._is_block_device else os.fstat(fd).st_size

    def _lock(self, fd: int) -> None:
        try:
            _linux.lock_whole(fd, shared=self.read_only)
        except BlockingIOError as error:
            mend = "stop the writer" if self.read_only else "stop that one, or open both with read_only=on"
            raise self._error(
                error.errno or errno.EAGAIN, f"in use, its lock is held by another opener: {mend}"
            ) from error
        except OSError as error:
            mend = "use a file on a local filesystem"
            raise self._error(error.errno or errno.ENOLCK, f"this filesystem can't lock files: {mend}") from error

    def _measure_regular(self, fd: int, status: os.stat_result) -> None:
        self.size = status.st_size
        filesystem_block = os.fstatvfs(fd).f_bsize
        smallest = self._direct_block(fd, filesystem_block) if self.direct else BLOCK_SIZE_MIN
        self._settle_block_size(smallest, "direct access needs")
        self.physical_block_size = _suitable(
            filesystem_block, at_least=self.block_size, otherwise=max(self.block_size, 4096)
        )
        self.discard_granularity = _suitable(filesystem_block, at_least=self.block_size, otherwise=self.block_size)

    def _direct_block(self, fd: int, filesystem_block: int) -> int:
        alignment = _linux.direct_alignment(fd)
        if alignment is None:
            return max(min(filesystem_block, BLOCK_SIZE_MAX), BLOCK_SIZE_MIN)
        if alignment[1] == 0:
            raise self._error(errno.EINVAL, "this file can't be opened with direct=on: leave that out")
        return max(alignment[1], BLOCK_SIZE_MIN)

    def _measure_block_device(self, fd: int, status: os.stat_result) -> None:
        if not self.read_only and _linux.block_number(fd, BlockIoctl.READ_ONLY):
            raise self._error(errno.EROFS, "the device is read-only: pass read_only=on")
        self.size = self._ask_size(fd)
        self._settle_block_size(_linux.block_number(fd, BlockIoctl.LOGICAL_BLOCK), "the device has")
        physical = _linux.block_number(fd, BlockIoctl.PHYSICAL_BLOCK)
        self.physical_block_size = _suitable(physical, at_least=self.block_size, otherwise=self.block_size)
        self.optimal_io_size = _suitable(
            _linux.block_number(fd, BlockIoctl.OPTIMAL_IO), at_least=self.block_size, otherwise=0
        )
        granularity = _linux.block_queue_limit(status.st_rdev, "discard_granularity")
        self.discard_granularity = (
            granularity if granularity and granularity % self.block_size == 0 else self.block_size
        )
        self.rotational = bool(_linux.block_number(fd, BlockIoctl.ROTATIONAL))

    def _settle_block_size(self, smallest: int, why: str) -> None:
        if smallest > BLOCK_SIZE_MAX:
            raise self._error(
                errno.EINVAL,
                f"{why} blocks of {smallest} bytes, the kernel takes 4096 at most: use a file on another disk",
            )
        wanted = self._block_size_wanted
        if wanted is not None and wanted < smallest:
            raise self._error(
                errno.EINVAL,
                f"block_size {wanted} is too small, {why} {smallest}: use block_size={smallest} or leave it out",
            )
        self.block_size = smallest if wanted is None else wanted

    def _can_discard(self, fd: int, status: os.stat_result) -> bool:
        """Finds out without changing a byte: with KEEP_SIZE, punching behind the end touches nothing readable."""
        if self._is_block_device:
            return _linux.block_queue_limit(status.st_rdev, "discard_max_bytes") > 0
        try:
            _linux.fallocate(fd, _PUNCH, self.size, self.block_size)
        except OSError:
            return False
        return True

    # What is told when it goes wrong

    def _error(self, number: int, text: str) -> BackendError:
        return BackendError(number, f"file:{self.path}: {errno_text(number)}: {text}")

    def _mend_of_size(self) -> str:
        fitting = -(-self.size // self.block_size) * self.block_size
        if not self._is_block_device:
            return f"make it one with truncate -s {fitting} {self.path}"
        return "leave block_size out"

    def _mend_of_open(self, number: int | None) -> str:
        if number == errno.ENOENT:
            return f"create it with truncate -s 1G {self.path}"
        if number in (errno.EACCES, errno.EPERM):
            return (
                "not permitted to read it: chmod it, or be root"
                if self.read_only
                else "not permitted to write it: chmod it, be root, or pass read_only=on"
            )
        if number == errno.EROFS:
            return "its filesystem is read-only: remount it, or pass read_only=on"
        if number == errno.EBUSY:
            return "in use, mounted or part of another device: unmount it, or pass read_only=on"
        if number == errno.EINVAL and self.direct:
            return "its filesystem has no direct access: leave direct=on out"
        if number == errno.ETXTBSY:
            return "a program or swap file that is in use: name another"
        if number in (errno.EMFILE, errno.ENFILE):
            return "too many open files: raise ulimit -n"
        if number in (errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
            return "no file can have this path: check it"
        return "it can't be opened: check the path and the disk that it is on"


class ThreadedFile(File):
    """A `File` whose requests run in threads, so that a slow disk delays nobody else.

    Args:
        threads: how many of this disk's requests may be in the kernel at the same time.
        The others are `File`'s.

    *Cancellation*: a request that still waits for a thread is cancelled at once; one that has its thread is finished
    first. It can't be abandoned: the thread would go on using the request's buffer, which the kernel by then has given
    to another request.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        direct: bool = False,
        read_only: bool = False,
        block_size: int | None = None,
        threads: int = 8,
    ) -> None:
        super().__init__(path, direct=direct, read_only=read_only, block_size=block_size)
        if type(threads) is not int or threads < 1:
            raise UsageError(f"backend {self}: threads {threads!r} is not possible: use a number from 1 up")
        self.limiter = trio.CapacityLimiter(threads)

    async def read(self, offset: int, buffer: memoryview) -> None:
        """As `File.read`, in a thread."""
        await self._in_thread(File.read, offset, buffer)

    async def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        """As `File.write`, in a thread."""
        await self._in_thread(_write, offset, data, fua)

    async def flush(self) -> None:
        """As `File.flush`, in a thread."""
        await self._in_thread(File.flush)

    async def discard(self, offset: int, length: int) -> None:
        """As `File.discard`, in a thread."""
        await self._in_thread(File.discard, offset, length)

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """As `File.write_zeroes`, in a thread."""
        await self._in_thread(_write_zeroes, offset, length, unmap)

    async def _in_thread(self, function: Callable[..., Any], *arguments: Any) -> None:
        await trio.to_thread.run_sync(function, self, *arguments, abandon_on_cancel=False, limiter=self.limiter)


def as_threaded(file: File) -> ThreadedFile:
    """The same file with the same options, served in threads. Raises `UsageError` for a file that is open."""
    if file.fileno() >= 0:
        raise UsageError(f"backend {file}: open already: convert it before it is opened")
    return ThreadedFile(file.path, direct=file.direct, read_only=file.read_only, block_size=file._block_size_wanted)


def _write(file: File, offset: int, data: memoryview, fua: bool) -> None:
    File.write(file, offset, data, fua=fua)


def _write_zeroes(file: File, offset: int, length: int, unmap: bool) -> None:
    File.write_zeroes(file, offset, length, unmap=unmap)


def _suitable(value: int, *, at_least: int, otherwise: int) -> int:
    """`value` if the kernel could take it as a block size or hint, else `otherwise`."""
    power_of_two = value > 0 and value & (value - 1) == 0
    return value if power_of_two and at_least <= value <= _GRANULARITY_MAX else otherwise
