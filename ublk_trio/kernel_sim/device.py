"""A ublk device: its state, who holds it, how it starts and stops.

**Supported.** DEAD, LIVE, QUIESCED, FAIL_IO and the ways between them; one opener of the char device; references that
keep a deleted device's id taken; the 30 s that a request has. `server_end` has what happens
when the server goes.
**Rejected.** An opener of the disk that may not: EPERM, ENXIO. **Differs from Linux.** A STOP_DEV with user recovery
makes the page cache's last writes fail, but there is no page cache here.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

import attrs

from ublk_trio.kernel_sim import server_end
from ublk_trio.kernel_sim.block import SimDisk
from ublk_trio.kernel_sim.char_device import ATTEMPTS_TOO_EARLY_MAX, Node
from ublk_trio.kernel_sim.linux_errno import number
from ublk_trio.kernel_sim.params import structure_size
from ublk_trio.kernel_sim.process import SimTask
from ublk_trio.kernel_sim.queue import SimQueue
from ublk_trio.kernel_sim.shmem import ShmemBuffers
from ublk_trio.kernel_sim.waits import SimMutex, Steps, Wait
from ublk_trio.uapi import IO_DESC_SIZE, DeviceState, DevInfo, Feature, Params

if TYPE_CHECKING:
    from ublk_trio.kernel_sim.call import Caller
    from ublk_trio.kernel_sim.kernel import SimKernel
    from ublk_trio.kernel_sim.process import CharFile
    from ublk_trio.kernel_sim.queue import CommandRing
    from ublk_trio.kernel_sim.ring import SimCharDevice, SimQueueRing
    from ublk_trio.kernel_sim.tag import SimTag

#: The block layer's limit for a request: then the driver is asked what to do.
REQUEST_TIMEOUT_SECONDS: Final = 30.0


class SimDevice:
    """One device, from ADD_DEV until its last reference goes."""

    def __init__(self, kernel: SimKernel, info: DevInfo) -> None:
        self.kernel = kernel
        self.info = info
        self.dev_id = info.dev_id
        self.params = Params()
        #: The driver's structure, as SET_PARAMS and GET_PARAMS see it.
        self.held_params = bytearray(structure_size(kernel.version))
        self.node = Node(uid=info.owner_uid, gid=info.owner_gid)
        self.recovers = bool(info.flags & Feature.USER_RECOVERY)
        #: Without a server requests wait for the next one.
        self.holds = self.recovers and not info.flags & Feature.USER_RECOVERY_FAIL_IO
        #: What a dead server owned goes to the next one.
        self.reissues = self.recovers and bool(info.flags & Feature.USER_RECOVERY_REISSUE)
        #: Shared memory for requests' data: it stays from one server to the next.
        self.shmem = ShmemBuffers()
        self.queues = [SimQueue(self, queue_id, info.queue_depth) for queue_id in range(info.nr_hw_queues)]
        self.mutex = SimMutex(f"of device {info.dev_id}")
        self.disk: SimDisk | None = None
        #: A disk that was removed while somebody had it open.
        self.detached_disk: SimDisk | None = None
        #: STOP_DEV came while a server was there: no FETCH_REQ, no START_DEV until its char device is closed.
        self.stopping = False
        #: Commands of this server were cancelled: no queue becomes ready for requests until the next one.
        self.canceling = False
        #: Nothing is delivered, whatever the queues' own state is.
        self.quiesced = False
        #: Every tag was fetched, at least once since START_USER_RECOVERY.
        self.was_fetched = False
        #: Somebody without privileges fetched a tag: the disk is not scanned for partitions.
        self.unprivileged_daemons = False
        #: TRY_STOP_DEV has begun: from then on the disk is for root only.
        self.block_open = False
        #: DEL_DEV came: the char device is gone, the id is not free yet.
        self.removed = False
        #: Control commands that work on it.
        self.references = 0
        self.char: SimCharDevice | CharFile | None = None
        self.rings: list[SimQueueRing] = []
        self.releasing = False
        self.opener_pid = 0
        #: The process that mapped descriptors first; no other may.
        self.mapper: object = None
        #: The server's process is dead, and its pid is nobody's.
        self.server_died = False
        self._attempts_too_early = 0
        #: The clock will have `_check_deadlines` called.
        self._ticking = False

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
    def descriptor_bytes(self) -> int:
        """From one descriptor to the next. Before there was a choice the field could hold anything."""
        return self.info.io_desc_size if self.info.flags & Feature.IO_DESC_SIZE else IO_DESC_SIZE

    @property
    def recoverable(self) -> bool:
        """It has lost its server and may get another."""
        return self.info.state in (DeviceState.QUIESCED, DeviceState.FAIL_IO)

    def set_state(self, state: DeviceState, pid: int) -> None:
        self.info = attrs.evolve(self.info, state=state, ublksrv_pid=pid)
        if state is DeviceState.LIVE:
            self.server_died = False
        if self.kernel.log is not None:
            self.kernel.log.append(("state", self.dev_id, state.name))

    def forget_params(self) -> None:
        """No parameters at all."""
        self.held_params[:] = bytes(len(self.held_params))
        self.params = Params()

    def still_releasing(self) -> bool:
        """Whether the work after the last close has not quite ended. Whoever asks may ask again."""
        if not self._attempts_too_early:
            return False
        self._attempts_too_early -= 1
        return True

    def open_disk(self, caller: Caller) -> int:
        """What open(2) of the disk says: 0, or a negative errno."""
        if caller.privileged:
            return 0
        owner = (self.info.owner_uid, self.info.owner_gid)
        if self.info.flags & Feature.UNPRIVILEGED_DEV and (caller.uid, caller.gid) != owner:
            return -errno.EPERM
        return -errno.ENXIO if self.block_open else 0

    # ------------------------------------------------------------------ requests that cannot be delivered

    def update_delivery(self) -> None:
        """After a change of any flag: may the queues deliver?"""
        for queue in self.queues:
            queue.delivering = not (self.quiesced or queue.canceling or queue.fails_all or queue.aborts_all)

    def refusal(self, queue: SimQueue) -> int | None:
        """What a request ends with that the queue cannot deliver; None: it is held."""
        if self.quiesced:
            return None
        if queue.fails_all:
            return number("EREMOTEIO")
        if queue.aborts_all:
            return errno.EIO
        assert queue.canceling
        return None if self.holds else errno.EIO

    def set_canceling(self) -> None:
        """No queue delivers any more."""
        self.canceling = True
        for queue in self.queues:
            queue.canceling = True
        self.update_delivery()

    def redispatch(self) -> None:
        """What is held tries again."""
        for queue in self.queues:
            queue.redispatch()

    # ------------------------------------------------------------------ starting and stopping

    def queue_became_ready(self, queue: SimQueue) -> None:
        """The last of a queue's tags was fetched."""
        if not all(self._is_privileged(tag.task) for tag in queue.tags):
            self.unprivileged_daemons = True
        if self.kernel.version.release_ends_server:
            if not self.canceling:
                queue.canceling = False
            queue.fails_all = queue.aborts_all = False
            self.update_delivery()
        if self.all_fetched:
            self.was_fetched = True
        self.kernel.changed()

    def _is_privileged(self, task: object) -> bool:
        return task.process.privileged if isinstance(task, SimTask) else self.kernel.privileged

    def is_ready(self) -> bool:
        """What START_DEV and END_USER_RECOVERY wait for."""
        if self.kernel.version.readiness_is_checked_anew:
            return self.all_fetched or self.stopping
        return self.was_fetched

    def start(self, pid: int) -> SimDisk:
        """Make the disk; the mutex is held."""
        assert self.mutex.locked
        assert not self.used
        for queue in self.queues:
            if not queue.all_idle:
                # The driver of an older release delivers to commands that have ended, which is anybody's guess.
                queue.canceling = True
        self.update_delivery()
        self.disk = SimDisk(self, self.params)
        self.set_state(DeviceState.LIVE, pid)
        return self.disk

    def stop(self) -> Steps:
        """Remove the disk: no new operations, wait for those under way, DEAD. The mutex is held."""
        assert self.mutex.locked
        disk = self.disk
        if disk is None:
            return 0
        if self.holds:
            yield from self._abort_all()
        disk.dying = True
        yield Wait(f"{len(disk.bios)} operations on {self.kernel.disk_path(self.dev_id)}", lambda: not disk.bios)
        self.disk = None
        if disk.openers:
            self.detached_disk = disk
        self.set_state(DeviceState.DEAD, -1)
        return 0

    def _abort_all(self) -> Steps:
        """With requests held for a next server: let those end that a server has, fail all others, and those to come."""
        self.quiesced = True
        self.update_delivery()
        if self.info.state is DeviceState.LIVE:
            yield from self.wait_until_idle()
        # Not delivered, and then not delivered for another reason: nothing to update.
        for queue in self.queues:
            queue.aborts_all = True
        self.quiesced = False
        self.redispatch()
        return 0

    def wait_until_idle(self) -> Steps:
        """Until no server has a request, nor is one on its way to it."""
        yield Wait(
            f"the requests that the server of device {self.dev_id} has",
            lambda: not any(queue.in_flight for queue in self.queues),
        )
        return 0

    def cancel_idle(self) -> None:
        """End the server's idle commands."""
        for queue in self.queues:
            queue.cancel_idle()

    def cancel(self) -> None:
        """After STOP_DEV: end the server's idle commands and wake START_DEV, if there is a server."""
        if self.kernel.version.stopping_refuses:
            if self.char is None and not self.rings:
                return
            self.stopping = True
        self.cancel_idle()

    def disk_closed(self, disk: SimDisk) -> None:
        """An opener of a disk closed it."""
        if disk is self.detached_disk and not disk.openers:
            self.detached_disk = None
            self.kernel.put_device(self)

    # ------------------------------------------------------------------ the server's end

    def ring_closed(self, ring: SimQueueRing) -> None:
        """One ring of the engine's is gone."""
        self.rings.remove(ring)
        self.cancel_ring(ring)
        self._released()

    def cancel_ring(self, ring: CommandRing) -> None:
        """The commands of one ring are cancelled."""
        server_end.ring_closed(self, ring)

    def char_closed(self) -> None:
        """The server closed the char device; it counts once its rings are closed too."""
        self.char = None
        self._released()

    def _released(self) -> None:
        if self.char is None and not self.rings:
            assert not self.releasing
            self._attempts_too_early = self.kernel.choices.choose("release-late", ATTEMPTS_TOO_EARLY_MAX + 1)
            if self.kernel.version.release_ends_server:
                self.releasing = True
                self.kernel.run(f"release of /dev/ublkc{self.dev_id}", server_end.release(self))
            self.kernel.put_device(self)
        self.kernel.changed()

    def reset(self) -> None:
        """Ready for a new server."""
        for queue in self.queues:
            queue.reset()
        self.canceling = self.stopping = self.unprivileged_daemons = False
        self.mapper = None
        self.opener_pid = -1

    # ------------------------------------------------------------------ time

    def request_started(self, tag: SimTag) -> None:
        """The tag's request is on its way to the server: its time begins, the rest of a short READ's too."""
        clock = self.kernel.clock
        tag.deadline = clock.now + REQUEST_TIMEOUT_SECONDS
        if not self._ticking:
            self._ticking = True
            clock.after(REQUEST_TIMEOUT_SECONDS, self._check_deadlines)

    def _check_deadlines(self) -> None:
        """Some request's time may be up; one that stays gets as much again."""
        clock = self.kernel.clock
        for queue in self.queues:
            late = [tag for tag in queue.tags if tag.request is not None and tag.deadline <= clock.now]
            for tag in late:
                tag.deadline = clock.now + REQUEST_TIMEOUT_SECONDS
            if late:
                server_end.request_timed_out(self, queue)
        deadlines = [tag.deadline for queue in self.queues for tag in queue.tags if tag.request is not None]
        self._ticking = bool(deadlines)
        if deadlines:
            clock.after(min(deadlines) - clock.now, self._check_deadlines)
