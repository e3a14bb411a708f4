"""A ublk device: its state, who holds it, and what happens when its server goes.

**Supported.** DEAD, LIVE, and the way between them; one opener of the char device; the last close (of the char device
and of every ring on it) as the server's end; references that keep a deleted device's id taken.
**Rejected.** A second opener: EBUSY, also while the last close is still being worked off.
**Differs from Linux.** QUIESCED and FAIL_IO come with recovery. The work after the last close runs at once, unless
START_DEV or STOP_DEV holds the device's mutex.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

import attrs

from ublk_trio.kernel_sim.block import SimDisk
from ublk_trio.kernel_sim.queue import SimQueue
from ublk_trio.kernel_sim.wait import Wait
from ublk_trio.uapi import DeviceState, DevInfo, Params

if TYPE_CHECKING:
    from ublk_trio.kernel_sim.control import Steps
    from ublk_trio.kernel_sim.kernel import SimKernel
    from ublk_trio.kernel_sim.ring import SimCharDevice, SimQueueRing


class SimMutex:
    """A kernel mutex: taken in a command's own time, so that the commands of two callers exclude each other."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.locked = False

    def lock(self) -> Generator[Wait, bool, None]:
        """Wait for it, not interruptibly, and take it."""
        while self.locked:
            yield Wait(self, lambda: not self.locked)
        self.locked = True

    def unlock(self) -> None:
        assert self.locked, f"{self.name} is not locked"
        self.locked = False

    def __str__(self) -> str:
        return f"the mutex {self.name}"


class SimDevice:
    """One device, from ADD_DEV until its last reference goes."""

    def __init__(self, kernel: SimKernel, info: DevInfo) -> None:
        self.kernel = kernel
        self.info = info
        self.dev_id = info.dev_id
        self.params = Params()
        self.params_length = 0
        self.queues = [SimQueue(self, queue_id, info.queue_depth) for queue_id in range(info.nr_hw_queues)]
        self.mutex = SimMutex(f"of device {info.dev_id}")
        self.disk: SimDisk | None = None
        #: A disk that was removed while somebody had it open.
        self.detached_disk: SimDisk | None = None
        #: STOP_DEV came while a server was there: no FETCH_REQ, no START_DEV until its char device is closed.
        self.stopping = False
        #: How often that happened: whoever waits for the server's FETCH_REQs waits in vain.
        self.cancels = 0
        #: DEL_DEV came: the char device is gone, the id is not free yet.
        self.removed = False
        #: Control commands that work on it.
        self.references = 0
        self.char: SimCharDevice | None = None
        self.rings: list[SimQueueRing] = []
        self.releasing = False
        self.opener_pid = 0

    # ------------------------------------------------------------------ what it is

    @property
    def all_fetched(self) -> bool:
        return all(queue.ready for queue in self.queues)

    @property
    def used(self) -> bool:
        """A disk was made of it and is not freed yet."""
        return self.disk is not None or self.detached_disk is not None

    @property
    def char_in_use(self) -> bool:
        """Somebody has the char device open, or it is still being released."""
        return self.char is not None or bool(self.rings) or self.releasing

    @property
    def unanswered(self) -> int:
        """Operations on the disk that have not ended."""
        return len(self.disk.bios) if self.disk is not None else 0

    def set_state(self, state: DeviceState, pid: int) -> None:
        self.info = attrs.evolve(self.info, state=state, ublksrv_pid=pid)
        if self.kernel.log is not None:
            self.kernel.log.append(("state", self.dev_id, state.name))

    # ------------------------------------------------------------------ starting and stopping

    def queue_became_ready(self, queue: SimQueue) -> None:
        """The last of a queue's tags was fetched."""
        queue.canceling = False
        self.kernel.changed()

    def start(self, pid: int) -> SimDisk:
        """Make the disk; the mutex is held."""
        assert self.mutex.locked
        assert not self.used
        self.disk = SimDisk(self, self.params)
        self.set_state(DeviceState.LIVE, pid)
        return self.disk

    def stop(self) -> Steps:
        """Remove the disk: no new operations, wait for those under way, DEAD. The mutex is held."""
        assert self.mutex.locked
        disk = self.disk
        if disk is None:
            return 0
        disk.dying = True
        # With recovery (later): what is held for a new server is aborted here.
        yield Wait(f"{len(disk.bios)} operations on {self.kernel.disk_path(self.dev_id)}", lambda: not disk.bios)
        self.disk = None
        if disk.openers:
            self.detached_disk = disk
        self.set_state(DeviceState.DEAD, -1)
        return 0

    def cancel(self) -> None:
        """End the server's idle commands and wake START_DEV, if there is a server."""
        if self.char is None and not self.rings:
            return
        if self.kernel.version.stopping_refuses:
            self.stopping = True
            self.cancels += 1
        for queue in self.queues:
            queue.cancel_idle()
        self.kernel.changed()

    def disk_closed(self, disk: SimDisk) -> None:
        """An opener of a disk closed it."""
        if disk is self.detached_disk and not disk.openers:
            self.detached_disk = None
            self.kernel.put_device(self)

    # ------------------------------------------------------------------ the server's end

    def ring_closed(self, ring: SimQueueRing) -> None:
        """The commands of one ring are cancelled, and no queue delivers any more."""
        if any(tag.ring is ring for queue in self.queues for tag in queue.tags):
            for queue in self.queues:
                queue.canceling = True
            for queue in self.queues:
                queue.ring_closed(ring)
        self.rings.remove(ring)
        self._released()

    def char_closed(self) -> None:
        """The server closed the char device; it counts once its rings are closed too."""
        self.char = None
        self._released()

    def _released(self) -> None:
        if self.char is None and not self.rings:
            assert not self.releasing
            self.releasing = True
            self.kernel.run(f"release of /dev/ublkc{self.dev_id}", self._release())
        self.kernel.changed()

    def _release(self) -> Steps:
        """The work after the last close."""
        for queue in self.queues:
            queue.canceling = True
        # Without the mutex: whoever holds it may wait for just these requests.
        for queue in self.queues:
            queue.fail_owned()
        yield from self.mutex.lock()
        yield from self.stop()
        self.mutex.unlock()
        for queue in self.queues:
            queue.reset()
        self.stopping = False
        self.releasing = False
        self.kernel.put_device(self)
        return 0
