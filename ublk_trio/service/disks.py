"""`Disks`: the target that operators create and destroy by call, and its disks by id.

What each call answers, and where the order of calls matters:

| call | errno |
|---|---|
| create | EBUSY when there is one, or one is still being destroyed |
| destroy | ENOENT when there is none; EBUSY when it is being destroyed |
| start, recover | ENODEV without a target, or without such a bdev; EBUSY when the id is in use; EPERM when the bdev is claimed |
| start | ENOTSUP when the disk is to use user copy, and the target was created without |
| stop | ENODEV without such a disk; EBUSY when it is stopping |

A disk that is stopped, or whose bdev goes, or whose target is destroyed, while it is still starting, does not start: whoever
started it gets ECANCELED, and nothing is left of it. Every call that takes something away answers when it is gone. Cancelling
such a call stops the waiting only.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from enum import Enum
from typing import TypeAlias

import attrs
import trio

from ublk_trio.bdev import Registry
from ublk_trio.device import Device
from ublk_trio.errors import BackendError, KernelError, UblkError
from ublk_trio.nursery import open_plain_nursery
from ublk_trio.options import DataMode, DeviceOptions
from ublk_trio.ring import Kernel
from ublk_trio.service.cpumask import parse_cpumask
from ublk_trio.target import Target, open_target
from ublk_trio.uapi import ControlCommand

logger = logging.getLogger("ublk_trio.service")

#: Who has the bdevs of disks.
CLAIM = "ublk"


class DiskState(Enum):
    """How far a disk is."""

    STARTING = "starting"
    LIVE = "live"
    CLOSING = "closing"


@attrs.define(kw_only=True, eq=False)
class Disk:
    """A bdev that is served as a disk."""

    bdev_name: str
    #: The N of /dev/ublkbN; None while the kernel has not chosen one.
    ublk_id: int | None
    state: DiskState = DiskState.STARTING
    device: Device | None = None
    failure: Exception | None = None
    #: Its bdev's size changed while it was starting, so that it may be live with the old one.
    resized: bool = False
    #: Around its start.
    starting: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    #: Set when it begins to stop.
    closing: trio.Event = attrs.field(factory=trio.Event)
    gone: trio.Event = attrs.field(factory=trio.Event)

    async def follow_size(self) -> None:
        """Take over the bdev's new size; one that is starting does it when it is live. A disk that cannot keeps its own,
        and the log says why."""
        if self.device is None:
            self.resized = True
        if self.device is None or self.state is DiskState.CLOSING:
            return
        try:
            await self.device.update_size()
        except UblkError as error:
            logger.warning("disk %d keeps its size: %s", self.ublk_id, error)

    def end(self) -> None:
        """Begin to stop it, however far it is. Repeatable."""
        self.state = DiskState.CLOSING
        self.closing.set()
        self.starting.cancel()
        if self.device is not None:
            self.device.ask_to_stop()


#: A task for each disk, begun when it is live. It should end when `Disk.gone` is set.
Attend: TypeAlias = Callable[[Disk], Awaitable[None]]


async def leave_alone(disk: Disk) -> None:
    """Nobody attends to the disk."""


@attrs.define(kw_only=True, eq=False)
class _Running:
    """A target that was created."""

    target: Target
    #: Of its mask; None if none was given.
    cpus: frozenset[int] | None
    #: Disks of mode user-copy are refused.
    disable_user_copy: bool
    destroying: bool = False
    end: trio.Event = attrs.field(factory=trio.Event)
    ended: trio.Event = attrs.field(factory=trio.Event)


class Disks:
    """Made by `open_disks`, never directly."""

    def __init__(self, kernel: Kernel, registry: Registry, nursery: trio.Nursery, attend: Attend) -> None:
        self._kernel = kernel
        self._registry = registry
        self._nursery = nursery
        self._attend = attend
        self._creating = False
        self._running: _Running | None = None
        self._disks: list[Disk] = []

    # The target ------------------------------------------------------------------------------------------------------

    async def create_target(self, *, cpumask: str | None = None, disable_user_copy: bool = False) -> None:
        """Open the kernel's driver for disks. With a mask there is a worker on each of its CPUs, over which the disks' queues are
        spread in turn, and the thread that serves runs on those CPUs, too. Without, that thread is all. With
        ``disable_user_copy`` no disk is started in that mode; one that is recovered keeps its own.

        Raises `BackendError` (EBUSY), `UsageError` for a wrong mask, `KernelError` (EINVAL) for a CPU that is offline,
        `KernelUnavailableError`.
        """
        if self._creating or self._running is not None:
            raise BackendError(errno.EBUSY, "there is a target already: destroy it first, or use it")
        cpus = None if cpumask is None else parse_cpumask(cpumask)
        self._creating = True
        try:
            self._running = await self._nursery.start(self._hold_target, cpus, disable_user_copy)
        finally:
            self._creating = False

    async def _hold_target(
        self, cpus: frozenset[int] | None, disable_user_copy: bool, *, task_status: trio.TaskStatus[_Running]
    ) -> None:
        running: _Running | None = None
        try:
            with _confined_to(cpus):
                async with open_target(self._kernel, cpus=cpus) as target:
                    running = _Running(target=target, cpus=cpus, disable_user_copy=disable_user_copy)
                    task_status.started(running)
                    await running.end.wait()
        finally:
            if running is not None:
                self._running = None
                running.ended.set()

    async def destroy_target(self) -> None:
        """Stop every disk and close the driver; return when all is gone. Raises `BackendError` (ENOENT, EBUSY)."""
        running = self._running
        if running is None:
            raise BackendError(errno.ENOENT, "there is no target: nothing to destroy")
        if running.destroying:
            raise BackendError(errno.EBUSY, "the target is being destroyed")
        running.destroying = True
        self._nursery.start_soon(self._finish_destroying, running, name="end of the target")
        await running.ended.wait()

    async def _finish_destroying(self, running: _Running) -> None:
        # Bounded by each disk's grace time.
        with trio.CancelScope(shield=True):
            disks = tuple(self._disks)
            for disk in disks:
                disk.end()
            for disk in disks:
                await disk.gone.wait()
            running.end.set()

    @property
    def has_target(self) -> bool:
        """Whether there is a target, also while it is being destroyed."""
        return self._running is not None

    @property
    def cpus(self) -> frozenset[int] | None:
        """The CPUs of the target's mask; None without a target, or without a mask."""
        return None if self._running is None else self._running.cpus

    @property
    def disable_user_copy(self) -> bool:
        """As the target was created."""
        return self._running is not None and self._running.disable_user_copy

    # Its disks -------------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Disk]:
        """The disks that are live or stopping, in the order in which they were started."""
        return iter([disk for disk in self._disks if disk.device is not None])

    def get(self, ublk_id: int) -> Disk:
        """The disk of that id. Raises `BackendError` (ENODEV)."""
        found = next((disk for disk in self._disks if disk.ublk_id == ublk_id), None)
        if found is None:
            raise BackendError(errno.ENODEV, f"there is no disk {ublk_id}: ublk_get_disks lists those that there are")
        return found

    async def start_disk(self, bdev_name: str, options: DeviceOptions) -> Disk:
        """Serve a bdev as a disk; return when it is live. Without an id the kernel chooses one.

        Raises `BackendError` (see the module), `UsageError`, `KernelError`; then, and when cancelled, nothing is left.
        """
        return await self._begin(bdev_name, options, recovers=None)

    async def recover_disk(self, bdev_name: str, ublk_id: int) -> Disk:
        """Take over a disk that a server left behind. Raises as `start_disk`; then the disk is left as it was."""
        return await self._begin(bdev_name, DeviceOptions(dev_id=ublk_id), recovers=ublk_id)

    async def _begin(self, bdev_name: str, options: DeviceOptions, *, recovers: int | None) -> Disk:
        running = self._running
        if running is None or running.destroying:
            raise BackendError(errno.ENODEV, "there is no target: call ublk_create_target first")
        if options.dev_id is not None and any(disk.ublk_id == options.dev_id for disk in self._disks):
            raise BackendError(errno.EBUSY, f"disk {options.dev_id} is there already: choose another id, or none")
        if recovers is None and running.disable_user_copy and options.mode is DataMode.USER_COPY:
            raise BackendError(
                errno.ENOTSUP, "the target was created with disable_user_copy: choose mode copy or get-data"
            )
        descriptor = self._registry.descriptor(bdev_name, claim=CLAIM)
        disk = Disk(bdev_name=bdev_name, ublk_id=options.dev_id)
        descriptor.on_removed = disk.end
        descriptor.on_resized = disk.follow_size
        self._disks.append(disk)
        try:
            with disk.starting, _explained(options.dev_id):
                if recovers is None:
                    disk.device = await running.target.start_device(descriptor, options)
                else:
                    disk.device = await running.target.recover_device(recovers, descriptor, options)
        finally:
            if disk.device is None:
                self._forget(disk)
        if disk.device is not None:
            disk.ublk_id = disk.device.dev_id
            self._nursery.start_soon(self._watch, running.target, disk, name=f"watch of disk {disk.ublk_id}")
            if disk.state is DiskState.STARTING:
                disk.state = DiskState.LIVE
                self._nursery.start_soon(self._attend, disk, name=f"attendance of disk {disk.ublk_id}")
                if disk.resized:
                    # It is live: a cancellation would come too late. A moment.
                    with trio.CancelScope(shield=True):
                        await disk.follow_size()
                return disk
            # It went live in the moment in which it was asked to end.
            disk.device.ask_to_stop()
            await disk.gone.wait()
        raise BackendError(errno.ECANCELED, f"the disk of bdev {bdev_name} was stopped while it was starting")

    async def _watch(self, target: Target, disk: Disk) -> None:
        assert disk.device is not None
        with trio.CancelScope(shield=True):
            try:
                await target.wait_device(disk.device)
            except Exception as failure:
                # The target has logged it, with its traceback if it was not expected.
                disk.failure = failure
            self._forget(disk)

    def _forget(self, disk: Disk) -> None:
        self._disks.remove(disk)
        disk.closing.set()
        disk.gone.set()

    async def stop_disk(self, ublk_id: int, *, only_if_unused: bool = False) -> None:
        """Stop a disk; return when it is gone. Raises `BackendError` (ENODEV, EBUSY), or what made the disk fail.

        With ``only_if_unused`` as `Target.stop_device`.
        """
        disk = self.get(ublk_id)
        if disk.state is DiskState.CLOSING:
            raise BackendError(errno.EBUSY, f"disk {ublk_id} is being stopped")
        if only_if_unused and disk.device is not None:
            await disk.device.stop_if_unused()
        disk.end()
        await disk.gone.wait()
        if disk.failure is not None:
            raise disk.failure


@contextmanager
def _explained(dev_id: int | None) -> Iterator[None]:
    """For operators, an id that somebody else has is as busy as one of ours, and too many is ENOTSUP."""
    try:
        yield
    except KernelError as error:
        match error.command, error.errno:
            case ControlCommand.ADD_DEV, errno.EEXIST:
                busy = f"disk {dev_id} is another program's: choose another id, or none"
                raise BackendError(errno.EBUSY, busy) from error
            case ControlCommand.ADD_DEV, errno.EACCES:
                raise BackendError(errno.ENOTSUP, str(error)) from error
        raise


@contextmanager
def _confined_to(cpus: frozenset[int] | None) -> Iterator[None]:
    if cpus is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@asynccontextmanager
async def open_disks(kernel: Kernel, registry: Registry, *, attend: Attend = leave_alone) -> AsyncIterator[Disks]:
    """Disks of the registry's bdevs. At the end of the block the target is destroyed, if there is one."""
    async with open_plain_nursery() as nursery:
        disks = Disks(kernel, registry, nursery, attend)
        try:
            yield disks
        finally:
            with trio.CancelScope(shield=True):
                running = disks._running
                if running is not None and running.destroying:
                    await running.ended.wait()
                elif running is not None:
                    await disks.destroy_target()
