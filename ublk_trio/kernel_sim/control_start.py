"""START_DEV, STOP_DEV, TRY_STOP_DEV, DEL_DEV, DEL_DEV_ASYNC and UPDATE_SIZE.

**Supported.** All of them, with their checks in the driver's order and their waiting. **Rejected.** See the functions.
**Differs from Linux.** add_disk does not fail. A killed server's DEL_DEV and ADD_DEV wait for the mutex of all devices
as if they could not be killed. The disk of a server that had no right to it is not scanned, as on Linux; whether a
server has is known from whoever fetched a queue's last tag.
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

import attrs

from ublk_trio.kernel_sim import params
from ublk_trio.kernel_sim.block.limits import limits_of
from ublk_trio.kernel_sim.call import Call
from ublk_trio.kernel_sim.control_faults import fails
from ublk_trio.kernel_sim.device import SimDevice
from ublk_trio.kernel_sim.waits import Steps, Wait
from ublk_trio.uapi import Feature, ParamsBasic

if TYPE_CHECKING:
    from ublk_trio.kernel_sim.block import SimDisk
    from ublk_trio.kernel_sim.kernel import SimKernel

_DEV_SECTORS = params.OFFSETS["basic"] + ParamsBasic.offsets()["dev_sectors"]


def wait_until_ready_and_lock(device: SimDevice) -> Steps:
    """Wait until every tag is fetched, or no more will be, and take the mutex: 0, or -EINTR without it."""
    while True:
        if not device.is_ready():
            what = f"every tag of device {device.dev_id} to be fetched"
            if (yield Wait(what, device.is_ready, True)):
                return -errno.EINTR
        yield from device.mutex.lock()
        # Whoever held it may have reset the device.
        if device.is_ready():
            return 0
        device.mutex.unlock()


def start(kernel: SimKernel, device: SimDevice, call: Call) -> Steps:
    """START_DEV.

    EINVAL: the pid, no parameters, limits that the block layer refuses. EINTR: the wait for the tags. EEXIST: live.
    EBUSY: stopping.
    """
    pid = call.pid
    if pid <= 0 or device.params.basic is None:
        return -errno.EINVAL
    if fails(kernel, "START_DEV wait") or (yield from wait_until_ready_and_lock(device)):
        return -errno.EINTR
    try:
        if kernel.version.checks_opener_pid and pid != device.opener_pid:
            return -errno.EINVAL
        # A LIVE device, for which the driver looks too, has a disk.
        if device.used:
            return -errno.EEXIST
        if device.stopping:
            return -errno.EBUSY
        if limits_of(device.params, kernel.version) is None:
            return -errno.EINVAL
        if fails(kernel, "START_DEV allocate"):
            return -errno.ENOMEM
        disk = device.start(pid)
        if disk.zones is not None and (refused := (yield from disk.zones.revalidate())):
            yield from device.stop()
            return refused
        return (yield from _scan(kernel, device, disk))
    finally:
        device.mutex.unlock()


def _scan(kernel: SimKernel, device: SimDevice, disk: SimDisk) -> Steps:
    """Look for partitions on a disk whose server can be trusted."""
    unwanted = device.info.flags & Feature.NO_AUTO_PART_SCAN or device.unprivileged_daemons
    if not kernel.partition_scan or unwanted:
        return 0
    scan = disk.scan_partitions()
    if scan is not None and not kernel.version.scans_partitions_later:
        yield Wait(f"the partition scan of {kernel.disk_path(device.dev_id)}", lambda: scan.done)
    return 0


def stop(kernel: SimKernel, device: SimDevice, call: Call) -> Steps:
    """STOP_DEV: always 0."""
    yield from _stop_and_cancel(device)
    return 0


def _stop_and_cancel(device: SimDevice) -> Steps:
    yield from device.mutex.lock()
    try:
        yield from device.stop()
    finally:
        device.mutex.unlock()
    device.cancel()
    return 0


def try_stop(kernel: SimKernel, device: SimDevice, call: Call) -> Steps:
    """TRY_STOP_DEV. ENODEV: no disk. EBUSY: somebody has it open."""
    if device.disk is None:
        return -errno.ENODEV
    if device.disk.openers:
        return -errno.EBUSY
    device.block_open = True
    yield from _stop_and_cancel(device)
    return 0


def delete(kernel: SimKernel, device: SimDevice, call: Call, *, wait: bool) -> Steps:
    """DEL_DEV, and without ``wait`` DEL_DEV_ASYNC. EINTR: the wait for the last user."""
    if fails(kernel, "DEL_DEV lock"):
        return -errno.EINTR
    device.references += 1
    yield from kernel.devices_mutex.lock()
    # Under this mutex: a device that cannot be stopped holds up every ADD_DEV and DEL_DEV.
    if not device.removed:
        yield from _stop_and_cancel(device)
        device.removed = True
    kernel.devices_mutex.unlock()
    device.references -= 1
    kernel.put_device(device)
    if wait and kernel.devices.get(call.dev_id) is device:
        if device.char_in_use:
            kernel.notes.append(f"DEL_DEV of device {call.dev_id} waits for its char device and rings to be closed")
        gone = Wait(
            f"the last user of device {call.dev_id}", lambda: kernel.devices.get(call.dev_id) is not device, True
        )
        if fails(kernel, "DEL_DEV wait") or (yield gone):
            return -errno.EINTR
    return 0


def update_size(kernel: SimKernel, device: SimDevice, call: Call) -> Steps:
    """UPDATE_SIZE, in sectors. ENODEV: no disk."""
    yield from device.mutex.lock()
    try:
        if device.disk is None:
            return -errno.ENODEV
        assert device.params.basic is not None
        struct.pack_into("=Q", device.held_params, _DEV_SECTORS, call.data)
        device.params = attrs.evolve(device.params, basic=attrs.evolve(device.params.basic, dev_sectors=call.data))
        device.disk.sectors = call.data
        return 0
    finally:
        device.mutex.unlock()
