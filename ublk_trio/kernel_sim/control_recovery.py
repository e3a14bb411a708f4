"""START_USER_RECOVERY, END_USER_RECOVERY and QUIESCE_DEV.

**Supported.** All of them, with their checks in the driver's order and their waiting, as releases before 6.15, those
before 7.0 and later ones have them. **Rejected.** See the functions. **Differs from Linux.** Nothing known.

QUIESCE_DEV takes a time limit in ms, and means to wait so long for every queue to have an idle command; but what it
counts is never there, in any release, so that it never waits. A limit whose lower 32 bits are 0 is over at once.

A device that is not LIVE has nothing to quiesce, says the driver, and ends its idle commands all the same: those of a next
server, too, that has fetched and not yet ended the recovery. The tags count as fetched, nothing is being cancelled, and so
the next request follows the null pointer that is left of its tag's command: `checks.SimulatedOopsError`.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from ublk_trio.kernel_sim import server_end
from ublk_trio.kernel_sim.call import Call
from ublk_trio.kernel_sim.control_faults import fails
from ublk_trio.kernel_sim.control_start import wait_until_ready_and_lock
from ublk_trio.kernel_sim.waits import Steps
from ublk_trio.uapi import DeviceState, Feature

if TYPE_CHECKING:
    from ublk_trio.kernel_sim.device import SimDevice
    from ublk_trio.kernel_sim.kernel import SimKernel

_U32_MAX = (1 << 32) - 1


def start_recovery(kernel: SimKernel, device: SimDevice, call: Call) -> Steps:
    """START_USER_RECOVERY. EINVAL: not that kind of device. EBUSY: it has a server, or its end is still being worked off.

    Before 6.15 it also makes the device forget its old server, and is EINVAL where there is nothing to forget.
    """
    yield from device.mutex.lock()
    try:
        if not device.recovers:
            return -errno.EINVAL
        forgets = not kernel.version.release_ends_server
        if forgets and not any(queue.ready for queue in device.queues):
            return -errno.EINVAL
        if device.char_in_use or not device.recoverable or device.still_releasing():
            return -errno.EBUSY
        if forgets:
            server_end.reset_for_recovery(device)
        device.was_fetched = False
        return 0
    finally:
        device.mutex.unlock()


def end_recovery(kernel: SimKernel, device: SimDevice, call: Call) -> Steps:
    """END_USER_RECOVERY: LIVE, and held requests go on. EINTR: the wait for the tags. EINVAL: not that kind of device.
    EBUSY: it has a server.

    The pid is EINVAL when it is not the opener's (since 6.17).
    """
    if fails(kernel, "END_USER_RECOVERY wait") or (yield from wait_until_ready_and_lock(device)):
        return -errno.EINTR
    try:
        if kernel.version.checks_opener_pid and call.pid != device.opener_pid:
            return -errno.EINVAL
        if not device.recovers:
            return -errno.EINVAL
        if not device.recoverable:
            return -errno.EBUSY
        device.set_state(DeviceState.LIVE, call.pid)
        device.quiesced = False
        for queue in device.queues:
            queue.fails_all = False
        device.update_delivery()
        device.redispatch()
        return 0
    finally:
        device.mutex.unlock()


def quiesce(kernel: SimKernel, device: SimDevice, call: Call) -> Steps:
    """QUIESCE_DEV: nothing is delivered any more, and the server's idle commands end.

    EOPNOTSUPP: without the flag. ENODEV: no disk. EINTR, EBUSY: the wait. 0 when the server is gone already.
    """
    if not device.info.flags & Feature.QUIESCE:
        return -errno.EOPNOTSUPP
    yield from device.mutex.lock()
    try:
        if device.disk is None:
            return -errno.ENODEV
        if device.info.state is DeviceState.LIVE:
            device.set_canceling()
            if fails(kernel, "QUIESCE_DEV signal"):
                return -errno.EINTR
            if call.data and not call.data & _U32_MAX:
                return -errno.EBUSY
    finally:
        device.mutex.unlock()
    device.cancel_idle()
    return 0
