"""A target: the scope that owns devices.

``async with open_target(kernel) as target:`` owns a nursery; each device is a task in it. Leaving the block,
cancelling it, or an error in it stops and deletes every device. One device's failure never takes another down: it is
kept for whoever waits for that device, and comes out of the block's end if nobody did.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager

import attrs
import trio

from ublk_trio.backends import Backend
from ublk_trio.control import Control, open_control
from ublk_trio.device import Device, DeviceStatistics
from ublk_trio.errors import UblkError, UsageError
from ublk_trio.nursery import open_plain_nursery
from ublk_trio.options import DeviceOptions
from ublk_trio.recovery import Recoverable, find_recoverable
from ublk_trio.ring import Kernel, Worker
from ublk_trio.workers import Workers, open_workers

logger = logging.getLogger("ublk_trio.target")


@attrs.frozen(kw_only=True)
class TargetStatistics:
    """What a target's devices did so far."""

    devices: tuple[DeviceStatistics, ...]


class Target:
    """Owner of devices. Made by `open_target`, never directly."""

    def __init__(self, kernel: Kernel, control: Control, nursery: trio.Nursery, workers: Workers | None) -> None:
        self.kernel = kernel
        self._workers = workers
        self._control = control
        self._nursery = nursery
        # Not by id: the kernel gives an id away again while the device that had it still closes its backend.
        self._devices: set[Device] = set()
        #: Failures that nobody has got yet.
        self._unseen: dict[Device, Exception] = {}
        self._starts: set[trio.CancelScope] = set()
        self._closed = False

    @property
    def devices(self) -> tuple[Device, ...]:
        """The devices that are live or stopping, by id."""
        return tuple(sorted(self._devices, key=lambda device: device.dev_id))

    @property
    def workers(self) -> tuple[Worker, ...]:
        """Its threads, by CPU; none if it was opened without CPUs. Which one has a queue: `QueueStatistics.cpu`."""
        return () if self._workers is None else self._workers.all

    async def start_device(self, backend: Backend, options: DeviceOptions | None = None) -> Device:
        """Start a disk; return when it is live. The target opens the backend and closes it when the disk is gone.

        Raises `UsageError`, `BackendError` or `KernelError`, and then nothing is left of it. Cancelled means the same.
        """
        return await self._begin(backend, options, None)

    async def recover_device(self, dev_id: int, backend: Backend, options: DeviceOptions | None = None) -> Device:
        """Take over a disk whose server is gone, and that was started with a `Recovery`; return when it is live again.

        Of ``options`` only ``serve``, ``pool_buffers`` and ``grace_seconds`` count; queues, depth, buffer size, mode and
        recovery are the device's own, read back from the kernel. Waits, up to 45 seconds, for the kernel to notice that the
        server is gone. Raises as `start_device` does, and `UsageError` for a device that cannot be recovered or a backend
        whose size, block size or operations are not the disk's; then, and when cancelled, the disk is left as it was.
        From then on it is this target's, which stops and deletes it as any other.
        """
        if any(device.dev_id == dev_id for device in self._devices):
            raise UsageError(f"device {dev_id} is live: this target serves it")
        return await self._begin(backend, options, dev_id)

    async def _begin(self, backend: Backend, options: DeviceOptions | None, recovers: int | None) -> Device:
        """Start or recover a device. Ends when the target is closed, which waits for it: whoever calls may not be inside its
        block."""
        if self._closed:
            raise UsageError("the target is closed: start devices inside its block")
        with trio.CancelScope() as scope:
            self._starts.add(scope)
            try:
                recoverable = None if recovers is None else await find_recoverable(self._control, recovers)
                device: Device = await self._nursery.start(self._hold, backend, options or DeviceOptions(), recoverable)
            finally:
                self._starts.remove(scope)
            return device
        raise UsageError("the target was closed while the device was starting")

    def _close(self) -> None:
        """No more starts; those under way end. Every device begins to stop."""
        self._closed = True
        for scope in self._starts:
            scope.cancel()
        self._nursery.cancel_scope.cancel()

    async def stop_device(self, device: Device, *, only_if_unused: bool = False) -> None:
        """Stop a disk; return when it is gone. Raises what made it fail, if it did.

        With ``only_if_unused`` a disk that somebody has open goes on as before, and the call raises `KernelError` with EBUSY and
        who that is; or `UsageError` where the kernel cannot tell (before Linux 7.0). Cancelling the wait does not undo the stop.
        """
        if only_if_unused:
            await device.stop_if_unused()
        else:
            device.ask_to_stop()
        await self.wait_device(device)
        if device.released:
            raise UsageError(f"device {device.dev_id} was released before: it waits for another server")

    async def release_device(self, device: Device) -> None:
        """Let go of a disk without stopping it, and return when it is without a server, and its backend closed: see `recover_device`.

        Raises as `Device.ask_to_release`; `StuckError` when the backend had not answered everything within the grace time, and the
        disk was released all the same; `UsageError` when it was stopped instead; and what made it fail. Cancelling the wait does
        not undo the release.
        """
        device.ask_to_release()
        await self.wait_device(device)
        if not device.released:
            raise UsageError(f"device {device.dev_id} was stopped by another program before it was released")

    async def wait_device(self, device: Device) -> None:
        """Wait until a disk is gone, for whatever reason. Raises what made it fail, if it did: to everybody who asks."""
        await device.wait_closed()
        self._unseen.pop(device, None)
        if device.failure is not None:
            raise device.failure

    def statistics(self) -> TargetStatistics:
        """A snapshot."""
        return TargetStatistics(devices=tuple(device.statistics() for device in self.devices))

    async def _hold(
        self,
        backend: Backend,
        options: DeviceOptions,
        recoverable: Recoverable | None,
        *,
        task_status: trio.TaskStatus[Device],
    ) -> None:
        device = Device(self.kernel, self._control, backend, options, recoverable, self._workers)
        live = _Live(self._devices, task_status)
        try:
            await device.run(live)
        except Exception as failure:
            if not live.reported:
                raise
            # What we raise on purpose says all in its message; anything else needs its traceback.
            surprise = None if isinstance(failure, UblkError) else failure
            logger.error("device %d failed: %s", device.dev_id, failure, exc_info=surprise)
            device.failure = self._unseen[device] = failure
        finally:
            if live.reported:
                self._devices.remove(device)

    def _raise_unseen(self) -> None:
        failures = list(self._unseen.values())
        if len(failures) == 1:
            raise failures[0]
        if failures:
            raise ExceptionGroup("devices failed", failures)


class _Live(trio.TaskStatus[Device]):
    """Enters a device in its target's list at the moment when it is live."""

    def __init__(self, devices: set[Device], task_status: trio.TaskStatus[Device]) -> None:
        self._devices = devices
        self._task_status = task_status
        self.reported = False

    def started(self, value: Device | None = None) -> None:
        assert value is not None
        self._devices.add(value)
        self.reported = True
        self._task_status.started(value)


@asynccontextmanager
async def open_target(kernel: Kernel, *, cpus: Collection[int] | None = None) -> AsyncIterator[Target]:
    """Open a kernel's ublk driver for serving disks.

    With ``cpus`` there is a worker for each: a thread, pinned to that CPU, in which the kernel copies the data of the queues
    that are placed on it, one queue after the other in turn, whatever disk it belongs to. Backends are called in the caller's
    thread all the same. Without, that thread does all, and there is no other.

    Raises `KernelUnavailableError` when there is no driver; `KernelError` (EINVAL) for a CPU on which this process may not run or
    that is offline. At the end of the block every device is stopped and deleted, shielded from cancellation and bounded by
    each device's grace time; then the workers end. One error comes out plainly, several as an `ExceptionGroup`; a device's
    failure comes out here only if nobody got it from `Target.wait_device` or `Target.stop_device`.
    """
    async with open_control(kernel) as control:
        with open_workers(kernel, cpus) as workers:
            async with open_plain_nursery() as nursery:
                target = Target(kernel, control, nursery, workers)
                try:
                    yield target
                finally:
                    target._close()
        target._raise_unseen()
