"""Threads of the server that own queue rings: `ring.Worker`.

**Supported.** Any number of them; each is a task of its own for the driver's rule that a tag's commands come from the thread that
fetched it. **Rejected.** A CPU of `SimKernel.offline_cpus`: `KernelError` EINVAL.
**Differs from Linux.** Nothing runs in it: what is handed to a worker is carried out at once, or, if the fault `worker-late` strikes, when
the engine next reaps, waits or closes. Its CPU need not be one of the simulated machine's.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from ublk_trio.errors import KernelError, errno_text

if TYPE_CHECKING:
    from ublk_trio.kernel_sim.kernel import SimKernel


class SimWorker:
    """Made by `SimKernel.open_worker`. The rings that it owns have it as their task."""

    def __init__(self, kernel: SimKernel, cpu: int, thread_id: int) -> None:
        if cpu in kernel.offline_cpus:
            raise KernelError(
                errno.EINVAL, f"cannot start a worker on CPU {cpu}: {errno_text(errno.EINVAL)}: it is offline"
            )
        self._kernel = kernel
        self._cpu = cpu
        self._thread_id = thread_id
        self._closed = False
        kernel.workers.append(self)

    @property
    def cpu(self) -> int:
        return self._cpu

    @property
    def thread_id(self) -> int:
        return self._thread_id

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        kernel = self._kernel
        rings = [ring for device in kernel.devices.values() for ring in device.rings if ring.task is self]
        assert not rings, f"{self} still owns {rings}"
        kernel.workers.remove(self)

    def __repr__(self) -> str:
        return f"<simulated worker on CPU {self._cpu}>"
