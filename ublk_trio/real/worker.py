"""A worker: a thread of native/worker.c, which owns rings of queues.

Fact: fork copies only the thread that calls it. In a child there is no worker, whatever the memory says, and waiting for one never ends.
"""

from __future__ import annotations

import errno
import os

from ublk_trio.errors import KernelError, errno_text
from ublk_trio.real import native


class RealWorker:
    """`ring.Worker`. Made by `RealKernel.open_worker`."""

    def __init__(self, cpu: int) -> None:
        """Raises `KernelError`, and `KernelUnavailableError` without the native part."""
        self._ffi, self._lib = native.load()
        self._cpu = cpu
        #: How many open rings it owns.
        self.queues = 0
        opened = self._ffi.new("struct ut_worker **")
        failed = self._ffi.new("char **")
        error = self._lib.ut_worker_open(opened, cpu, self._ffi.cast("const char **", failed))
        if error < 0:
            raise _worker_error(error, cpu, self._ffi.string(failed[0]).decode())
        #: For native calls; NULL once it is closed.
        self.pointer = opened[0]
        self._thread_id = self._lib.ut_worker_thread_id(self.pointer)
        self._pid = os.getpid()

    @property
    def cpu(self) -> int:
        return self._cpu

    @property
    def thread_id(self) -> int:
        return self._thread_id

    @property
    def is_here(self) -> bool:
        """Whether the thread is one of this process, and not of one that this was forked from."""
        return self._pid == os.getpid()

    def close(self) -> None:
        if self.pointer == self._ffi.NULL:
            return
        if not self.is_here:
            self.pointer = self._ffi.NULL
            return
        assert not self.queues, f"{self} still owns the rings of {self.queues} queues"
        error = self._lib.ut_worker_close(self.pointer)
        assert error == 0, errno_text(error)
        self.pointer = self._ffi.NULL

    def __repr__(self) -> str:
        return f"<worker on CPU {self._cpu}>"


def _worker_error(number: int, cpu: int, call: str) -> KernelError:
    mend = {
        errno.EINVAL: "it is offline, or this process may not run there (taskset, cpuset)",
        errno.EAGAIN: "raise the limit on threads (ulimit -u, or the cgroup's pids.max)",
        errno.EMFILE: "raise the limit on open files (ulimit -n)",
    }.get(-number, "see dmesg")
    return KernelError(number, f"cannot start a worker on CPU {cpu}: {call}: {errno_text(number)}: {mend}")
