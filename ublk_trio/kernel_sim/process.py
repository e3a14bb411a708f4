"""Processes of the simulated machine: their tasks, their memory, and the files that they have open.

**Supported.** Any number of processes; a task is an identity, for the driver's task rules; memory as page-aligned
mappings of buffers that other processes, or the test, can share; ``/dev/ublk-control`` and ``/dev/ublkcN`` with
open(2), mmap(2) of descriptors and close(2); plain files of bytes, for fixed reads and writes. A file lives as long as
something refers to it: the descriptor, a mapping, a command under way.
**Rejected.** A path that there is not: ENOENT. A char device that the process may not open: EACCES; one that has an
opener: EBUSY. A mapping at the wrong offset, of the wrong length, or for a second process: EINVAL; one that can be
written to: EPERM.
**Differs from Linux.** Files cannot be inherited nor passed on, except by handing the object to another process'
ring. Memory is what was mapped; code and stack are not there. `SimProcess.exit` takes effect at once.
"""

from __future__ import annotations

import bisect
import errno
import re
from typing import TYPE_CHECKING, Final

from ublk_trio.errors import KernelError, errno_text
from ublk_trio.kernel_sim.char_device import check_mmap
from ublk_trio.kernel_sim.user_copy import UserCopy
from ublk_trio.uapi import CONTROL_PATH

if TYPE_CHECKING:
    from ublk_trio.kernel_sim.device import SimDevice
    from ublk_trio.kernel_sim.kernel import SimKernel
    from ublk_trio.kernel_sim.uring import SimUring

_FIRST_ADDRESS: Final = 0x10_0000
_CHAR_PATH: Final = re.compile(r"/dev/ublkc(0|[1-9][0-9]*)")


class AddressSpace:
    """A process' memory: mappings of buffers, with holes of a page between them."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._next = _FIRST_ADDRESS
        self._starts: list[int] = []
        self._views: dict[int, memoryview] = {}

    def map(self, content: int | bytearray | memoryview) -> int:
        """Map a buffer, or so many zero bytes; returns the address, which is page-aligned and never 0.

        A buffer is shared, not copied: mapped by two processes it is shared memory. It must be writable.
        """
        view = memoryview(bytearray(content) if isinstance(content, int) else content).cast("B")
        assert view.nbytes, "a mapping of nothing"
        assert not view.readonly, "a mapping must be writable"
        address = self._next
        self._next += -(-view.nbytes // self._page_size) * self._page_size + self._page_size
        self._starts.append(address)
        self._views[address] = view
        return address

    def unmap(self, address: int) -> None:
        """Undo `map`; ``address`` is what that returned."""
        del self._views[address]
        self._starts.remove(address)

    def available(self, address: int, length: int) -> memoryview:
        """As much of ``length`` bytes at ``address`` as is mapped there, from the front."""
        index = bisect.bisect_right(self._starts, address) - 1
        if index < 0:
            return memoryview(bytearray())
        start = self._starts[index]
        offset = address - start
        return self._views[start][offset : offset + length]

    def view(self, address: int, length: int) -> memoryview | None:
        """``length`` bytes at ``address``, or None (EFAULT) when they are not all mapped."""
        view = self.available(address, length)
        return view if len(view) == length else None


class SimTask:
    """A thread. Nothing runs in it; commands come from it."""

    def __init__(self, process: SimProcess, tid: int) -> None:
        self.process = process
        self.tid = tid

    def __repr__(self) -> str:
        return f"<task {self.tid} of process {self.process.pid}>"


class SimProcess:
    """A process. Made by `SimKernel.process`. ``privileged`` is CAP_SYS_ADMIN."""

    def __init__(self, kernel: SimKernel, pid: int, *, privileged: bool, uid: int, gid: int) -> None:
        self.kernel = kernel
        self.pid = pid
        self.privileged = privileged
        self.uid = uid
        self.gid = gid
        self.memory = AddressSpace(kernel.page_size)
        self.exited = False
        self.rings: list[SimUring] = []
        self.mappings: list[SimMapping] = []
        self.files: list[SimFile] = []
        self._tasks = 0
        #: The first thread, whose id is the pid.
        self.main_task = self.task()

    def __repr__(self) -> str:
        return f"<process {self.pid}>"

    def task(self) -> SimTask:
        """A new thread."""
        self._tasks += 1
        return SimTask(self, self.pid + self._tasks - 1)

    def open(self, path: str) -> SimFile:
        """open(2) of a device, read and write. Raises `KernelError`."""
        assert not self.exited
        if path == CONTROL_PATH:
            return ControlFile(self)
        match = _CHAR_PATH.fullmatch(path)
        if match is None:
            raise KernelError(errno.ENOENT, f"cannot open {path}: {errno_text(errno.ENOENT)}")
        return CharFile(self, self.kernel.char_to_open(int(match[1]), self))

    def exit(self) -> None:
        """The process ends, as by SIGKILL: first its rings, then its mappings and files. Repeatable.

        Nobody in the kernel goes on between the two. A STOP_DEV or DEL_DEV that waits for the server's requests looks every
        3 ms only, and then has a disk to remove: long before that the server's files are closed.
        """
        with self.kernel.undisturbed():
            self._exit()

    def _exit(self) -> None:
        self.exited = True
        for device in self.kernel.devices.values():
            if self.pid in (device.opener_pid, device.info.ublksrv_pid):
                device.server_died = True
        for ring in list(self.rings):
            ring.close()
        for mapping in list(self.mappings):
            mapping.unmap()
        for file in list(self.files):
            file.close()


class SimFile:
    """An open file. Base of `ControlFile`, `CharFile` and `ByteFile`."""

    def __init__(self, process: SimProcess) -> None:
        self.process = process
        self.closed = False
        self._references = 1
        process.files.append(self)

    def get(self) -> None:
        """Something more refers to it."""
        assert self._references, "the file is gone already"
        self._references += 1

    def put(self) -> None:
        """Something refers to it no more; the last one releases it."""
        assert self._references, "the file is gone already"
        self._references -= 1
        if not self._references:
            self._released()

    def close(self) -> None:
        """close(2). Repeatable."""
        if not self.closed:
            self.closed = True
            self.process.files.remove(self)
            self.put()

    def _released(self) -> None:
        """The last reference went."""


class ControlFile(SimFile):
    """``/dev/ublk-control``."""


class ByteFile(SimFile):
    """A plain file, in ``data``."""

    def __init__(self, process: SimProcess, data: bytearray) -> None:
        super().__init__(process)
        self.data = data

    def read_into(self, view: memoryview, offset: int) -> int:
        """pread(2): less than asked for at the file's end."""
        piece = self.data[offset : offset + len(view)]
        view[: len(piece)] = piece
        return len(piece)

    def write_from(self, view: memoryview, offset: int) -> int:
        """pwrite(2): the file grows as needed."""
        self.data.extend(bytes(max(0, offset + len(view) - len(self.data))))
        self.data[offset : offset + len(view)] = view
        return len(view)


class CharFile(SimFile):
    """``/dev/ublkcN``."""

    def __init__(self, process: SimProcess, device: SimDevice) -> None:
        super().__init__(process)
        self.device = device
        device.char = self
        device.opener_pid = process.pid

    def mmap(
        self, offset: int, length: int, *, writable: bool = False, process: SimProcess | None = None
    ) -> SimMapping:
        """Map a queue's descriptors. Raises `KernelError`."""
        process = process if process is not None else self.process
        queue_id = check_mmap(self.device, process, offset=offset, length=length, writable=writable)
        if queue_id < 0:
            raise self._mmap_error(-queue_id)
        return SimMapping(process, self, queue_id, self.device.descriptor_bytes)

    def start_pread(self, offset: int, *, task: SimTask | None = None) -> UserCopy:
        """Begin a pread that takes a while: `UserCopy.read` ends it. Raises `KernelError`."""
        return UserCopy(self.device, task if task is not None else self.process.main_task, offset, write=False)

    def start_pwrite(self, offset: int, *, task: SimTask | None = None) -> UserCopy:
        """Begin a pwrite that takes a while: `UserCopy.write` ends it. Raises `KernelError`."""
        return UserCopy(self.device, task if task is not None else self.process.main_task, offset, write=True)

    def pread(self, length: int, offset: int, *, task: SimTask | None = None) -> bytes:
        """User copy, of a WRITE's data. ``offset`` as `uapi.user_copy_offset` has it. Raises `KernelError`."""
        return self.start_pread(offset, task=task).read(length)

    def pwrite(self, data: bytes | bytearray | memoryview, offset: int, *, task: SimTask | None = None) -> int:
        """User copy, into a READ's data. Raises `KernelError`."""
        return self.start_pwrite(offset, task=task).write(data)

    def _mmap_error(self, number: int) -> KernelError:
        path = self.process.kernel.char_path(self.device.dev_id)
        return KernelError(number, f"cannot map {path}: {errno_text(number)}")

    def crash(self) -> None:
        """The server is killed."""
        self.process.exit()

    def _released(self) -> None:
        self.device.char_closed()


class SimMapping:
    """A queue's descriptors, mapped. It keeps the char device open."""

    def __init__(self, process: SimProcess, file: CharFile, queue_id: int, descriptor_bytes: int) -> None:
        self.process = process
        self.queue_id = queue_id
        self._file = file
        self._bytes = descriptor_bytes
        self._queue = file.device.queues[queue_id]
        self._unmapped = False
        file.get()
        process.mappings.append(self)

    def read(self, tag: int) -> bytes:
        """The tag's descriptor as the driver wrote it at delivery; zeros before the first."""
        assert not self._unmapped, "unmapped"
        return self._queue.descriptors.get(tag, b"").ljust(self._bytes, b"\0")

    def unmap(self) -> None:
        """munmap(2). Repeatable."""
        if not self._unmapped:
            self._unmapped = True
            self.process.mappings.remove(self)
            self._file.put()
