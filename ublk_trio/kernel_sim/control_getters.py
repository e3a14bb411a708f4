"""The control commands that only look: GET_FEATURES, GET_DEV_INFO, GET_DEV_INFO2, GET_QUEUE_AFFINITY.

**Supported.** All four, with their checks in the driver's order. **Rejected.** EINVAL: lengths, no address, no such
queue. **Differs from Linux.** See `block.mapping`: the machine has no topology.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import attrs

from ublk_trio.kernel_sim.block.mapping import queue_of_cpu
from ublk_trio.kernel_sim.call import Call
from ublk_trio.kernel_sim.control_faults import fails
from ublk_trio.uapi import FEATURES_LEN, DevInfo

if TYPE_CHECKING:
    from ublk_trio.kernel_sim.device import SimDevice
    from ublk_trio.kernel_sim.kernel import SimKernel

_LONG_BYTES = 8


def get_features(kernel: SimKernel, call: Call) -> int:
    """What the driver offers. For anybody, and without a device."""
    if call.length != FEATURES_LEN or not call.has_address:
        return -errno.EINVAL
    if fails(kernel, "GET_FEATURES copy-out"):
        return -errno.EFAULT
    return 0 if call.answer(int(kernel.features).to_bytes(FEATURES_LEN, "little")) else -errno.EFAULT


def get_info(kernel: SimKernel, device: SimDevice, call: Call) -> int:
    """The device as it is now."""
    if call.length < DevInfo.LAYOUT.size or not call.has_address:
        return -errno.EINVAL
    info = device.info
    if kernel.version.reports_live_pids_only and device.server_died:
        info = attrs.evolve(info, ublksrv_pid=-1)
    if fails(kernel, "GET_DEV_INFO copy-out"):
        return -errno.EFAULT
    return 0 if call.answer(info.pack()) else -errno.EFAULT


def get_affinity(kernel: SimKernel, device: SimDevice, call: Call) -> int:
    """The CPUs of a queue, as bits. The queue stands in the data word, not in ``queue_id``."""
    if call.length * 8 < kernel.cpus or call.length % _LONG_BYTES or not call.has_address:
        return -errno.EINVAL
    queues = len(device.queues)
    if call.data >= queues:
        return -errno.EINVAL
    if fails(kernel, "GET_QUEUE_AFFINITY allocate"):
        return -errno.ENOMEM
    mapping = queue_of_cpu(cpus=kernel.cpus, queues=queues, version=kernel.version)
    mask = sum(1 << cpu for cpu, queue in enumerate(mapping) if queue == call.data)
    if fails(kernel, "GET_QUEUE_AFFINITY copy-out"):
        return -errno.EFAULT
    return 0 if call.answer(mask.to_bytes(call.length, "little")) else -errno.EFAULT
