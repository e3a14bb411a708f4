"""ADD_DEV: its checks in the driver's order, and what the device gets of what was asked.

**Supported.** Every check that the release has; flags that are dropped, refused together, or granted unasked; queues
no more than CPUs; the buffer size cut to a page; root's devices and those of ordinary users, which count against
``ublks_max``. **Rejected.** EINVAL, EPERM, EACCES, EEXIST as the driver has them; ENOMEM, EFAULT and EINTR when
Choices may (`control_faults`).
**Differs from Linux.** A flag that the driver knows and the simulator does not model is checked like the driver does,
and then dropped as one that it does not know.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

import attrs

from ublk_trio.kernel_sim.call import Call, Caller
from ublk_trio.kernel_sim.control_faults import fails
from ublk_trio.kernel_sim.device import SimDevice
from ublk_trio.kernel_sim.version import ALWAYS_GRANTED, KernelVersion
from ublk_trio.kernel_sim.waits import Steps
from ublk_trio.uapi import (
    ANY_DEVICE_ID,
    IO_DESC_SIZE,
    IO_DESC_SIZE_MAX,
    IO_DESC_SIZE_STEP,
    MAX_DEVICES,
    MAX_NR_QUEUES,
    MAX_QUEUE_DEPTH,
    NO_QUEUE,
    DeviceState,
    DevInfo,
    Feature,
)

if TYPE_CHECKING:
    from ublk_trio.kernel_sim.kernel import SimKernel

_INFO: Final = DevInfo.LAYOUT
_ALL_RECOVERY: Final = Feature.USER_RECOVERY | Feature.USER_RECOVERY_REISSUE | Feature.USER_RECOVERY_FAIL_IO
_RECOVERY_CHOICES: Final = (
    Feature(0),
    Feature.USER_RECOVERY,
    Feature.USER_RECOVERY | Feature.USER_RECOVERY_REISSUE,
    Feature.USER_RECOVERY | Feature.USER_RECOVERY_FAIL_IO,
)
#: The server moves the data itself.
SERVERS_DATA: Final = Feature.USER_COPY | Feature.SUPPORT_ZERO_COPY | Feature.AUTO_BUF_REG
#: What an ordinary user's device loses without a word: a dead server would hold up whoever waits for the disk.
_DROPPED_UNPRIVILEGED: Final = Feature.USER_RECOVERY | Feature.USER_RECOVERY_REISSUE


def add_device(kernel: SimKernel, call: Call) -> Steps:
    """The whole command."""
    if call.length < _INFO.size or not call.has_address:
        return -errno.EINVAL
    if call.queue_id != NO_QUEUE:
        return -errno.EINVAL
    sent = None if fails(kernel, "ADD_DEV copy-in") else call.sent(_INFO.size)
    if sent is None:
        return -errno.EFAULT
    asked = _unpack(sent)
    caller = call.sender(kernel)
    refused, flags = _check_flags(kernel.version, asked, caller)
    if refused:
        return refused
    if call.dev_id != asked.dev_id:
        return -errno.EINVAL
    if asked.dev_id != ANY_DEVICE_ID and asked.dev_id >= MAX_DEVICES:
        return -errno.EINVAL
    if fails(kernel, "ADD_DEV lock"):
        return -errno.EINTR
    yield from kernel.devices_mutex.lock()
    try:
        return _add(kernel, call, attrs.evolve(asked, flags=flags), caller)
    finally:
        kernel.devices_mutex.unlock()


def _unpack(sent: bytes) -> DevInfo:
    """What was asked. The driver does not look at the state that a server sends, so one that there is none of does no harm."""
    state = DevInfo.offsets()["state"]
    return DevInfo.unpack(sent[:state] + b"\0\0" + sent[state + 2 :])


def _check_flags(version: KernelVersion, asked: DevInfo, caller: Caller) -> tuple[int, Feature]:
    """A negative errno, or 0 and the flags that go on to be granted or not. What a release does not know it does not check."""
    flags = asked.flags & version.features
    if not 0 < asked.queue_depth <= MAX_QUEUE_DEPTH or not 0 < asked.nr_hw_queues <= MAX_NR_QUEUES:
        return -errno.EINVAL, flags
    if caller.privileged:
        flags &= ~Feature.UNPRIVILEGED_DEV
    elif not flags & Feature.UNPRIVILEGED_DEV:
        return -errno.EPERM, flags
    refused = (
        (version.checks_recovery_flags and flags & _ALL_RECOVERY not in _RECOVERY_CHOICES)
        or (flags & Feature.QUIESCE and not flags & Feature.USER_RECOVERY)
        or (flags & Feature.UNPRIVILEGED_DEV and flags & SERVERS_DATA)
        or (flags & Feature.INTEGRITY and not flags & Feature.USER_COPY)
        or (flags & Feature.IO_DESC_SIZE and not _descriptor_size_ok(asked.io_desc_size))
    )
    if flags & Feature.UNPRIVILEGED_DEV:
        flags &= ~_DROPPED_UNPRIVILEGED
    return -errno.EINVAL if refused else 0, flags


def _descriptor_size_ok(size: int) -> bool:
    return IO_DESC_SIZE <= size <= IO_DESC_SIZE_MAX and size % IO_DESC_SIZE_STEP == 0


def _add(kernel: SimKernel, call: Call, asked: DevInfo, caller: Caller) -> int:
    """What happens under the mutex of all devices."""
    if _limit_reached(kernel, asked.flags):
        return -errno.EACCES
    if fails(kernel, "ADD_DEV allocate"):
        return -errno.ENOMEM
    dev_id = asked.dev_id if asked.dev_id != ANY_DEVICE_ID else kernel.free_id()
    if dev_id in kernel.devices:
        return -errno.EEXIST
    if asked.flags & Feature.ZONED and not asked.flags & (Feature.USER_COPY | Feature.SUPPORT_ZERO_COPY):
        return -errno.EINVAL
    # The size of a descriptor came with a flag of its own; before, the field was there to be ignored.
    described = Feature.IO_DESC_SIZE in kernel.version.features
    sized = bool(asked.flags & Feature.IO_DESC_SIZE)
    info = attrs.evolve(
        asked,
        dev_id=dev_id,
        flags=_granted(kernel, asked.flags),
        nr_hw_queues=min(asked.nr_hw_queues, kernel.cpus),
        max_io_buf_bytes=asked.max_io_buf_bytes // kernel.page_size * kernel.page_size,
        io_desc_size=IO_DESC_SIZE if described and not sized else asked.io_desc_size,
        state=DeviceState.DEAD,
        ublksrv_pid=-1,
        owner_uid=caller.uid,
        owner_gid=caller.gid,
    )
    if fails(kernel, "ADD_DEV copy-out") or not call.answer(info.pack()):
        return -errno.EFAULT
    kernel.devices[dev_id] = SimDevice(kernel, info)
    return 0


def _limit_reached(kernel: SimKernel, flags: Feature) -> bool:
    """``ublks_max``, and which devices it is about."""
    kinds = Feature(0) if kernel.version.limits_privileged_devices else Feature.UNPRIVILEGED_DEV
    if flags & kinds != kinds:
        return False
    counted = sum(device.info.flags & kinds == kinds and not device.removed for device in kernel.devices.values())
    return counted >= kernel.devices_max


def _granted(kernel: SimKernel, flags: Feature) -> Feature:
    """The flags that the device gets."""
    flags = (flags & kernel.features) | (ALWAYS_GRANTED & kernel.features)
    if flags & Feature.BATCH_IO:
        flags &= ~(Feature.PER_IO_DAEMON | Feature.NEED_GET_DATA)
    if flags & SERVERS_DATA:
        flags &= ~Feature.NEED_GET_DATA
    return flags
