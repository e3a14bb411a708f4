"""The end of a server, and what becomes of the device and of the requests that the server had.

**Supported.** Cancelling the commands of a ring that closes, and the last close of the char device, as two kinds of
releases have them; requests that fail, are held for the next server, or are reissued to it at the head of the line; a request's time
limit, by which older releases learn of a death, and which costs an ordinary user's server its life.
**Rejected.** Nothing. **Differs from Linux.** A ring closes at once. Requests that are held do not keep their tags, and
leave in the order in which they came. A short READ of the next server does not set free what END_USER_RECOVERY will.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ublk_trio.kernel_sim.waits import Steps, Wait
from ublk_trio.uapi import DeviceState, Feature

if TYPE_CHECKING:
    from ublk_trio.kernel_sim.device import SimDevice
    from ublk_trio.kernel_sim.queue import CommandRing, SimQueue


def ring_closed(device: SimDevice, ring: CommandRing) -> None:
    """io_uring cancels every command that is pending on the ring."""
    pending = [queue for queue in device.queues if queue.has_pending(ring)]
    found_out = []
    if not device.kernel.version.release_ends_server:
        found_out = [queue for queue in pending if _is_news(device, queue)]
    elif pending:
        device.set_canceling()
    for queue in device.queues:
        queue.ring_closed(ring)
    _end_server(device, found_out)


# ---------------------------------------------------------------------- since 6.15: the last close


def release(device: SimDevice) -> Steps:
    """The work after the last close of the char device."""
    if any(queue.in_use for queue in device.queues):
        yield Wait(
            f"references to the data of requests of device {device.dev_id}",
            lambda: not any(queue.in_use for queue in device.queues),
        )
    if device.disk is None:
        yield from device.mutex.lock()
        if device.kernel.version.closed_device_is_reset:
            device.reset()
    else:
        device.set_canceling()
        # Without the mutex: whoever holds it may wait for just these requests.
        for queue in device.queues:
            queue.abort_owned()
        device.redispatch()
        yield from device.mutex.lock()
        if device.disk is not None:
            yield from _lose_server(device)
        device.reset()
    device.mutex.unlock()
    device.releasing = False
    device.kernel.put_device(device)
    return 0


def _lose_server(device: SimDevice) -> Steps:
    pid = device.info.ublksrv_pid
    if not device.recovers:
        yield from device.stop()
    elif device.holds:
        device.set_state(DeviceState.QUIESCED, pid)
    else:
        _fail_io(device)
    return 0


def _fail_io(device: SimDevice) -> None:
    device.set_state(DeviceState.FAIL_IO, device.info.ublksrv_pid)
    for queue in device.queues:
        queue.fails_all = True
    device.update_delivery()


# ---------------------------------------------------------------------- before 6.15: when a command is cancelled


def _is_news(device: SimDevice, queue: SimQueue) -> bool:
    """Mark the queue as one whose server goes. False when it was, or when there is no disk that would mind."""
    if queue.canceling or device.disk is None:
        return False
    queue.canceling = True
    device.update_delivery()
    return True


def _end_server(device: SimDevice, queues: list[SimQueue]) -> None:
    """What the server of these queues had is failed or reissued, and the device follows."""
    for queue in queues:
        queue.abort_owned()
    if queues:
        device.kernel.run(f"end of the server of device {device.dev_id}", _end_work(device))


def _end_work(device: SimDevice) -> Steps:
    yield from device.mutex.lock()
    if not device.recovers:
        yield from device.stop()
    elif device.info.state is DeviceState.LIVE:
        if device.holds:
            device.quiesced = True
            device.update_delivery()
            yield from device.wait_until_idle()
            device.set_state(DeviceState.QUIESCED, device.info.ublksrv_pid)
        else:
            _fail_io(device)
    device.mutex.unlock()
    device.cancel_idle()
    return 0


def reset_for_recovery(device: SimDevice) -> None:
    """START_USER_RECOVERY of these releases: forget the old server. Nothing is delivered before END_USER_RECOVERY."""
    device.reset()
    for queue in device.queues:
        queue.canceling = False
    device.update_delivery()


# ---------------------------------------------------------------------- time


def minds_time(device: SimDevice) -> bool:
    """Whether `request_timed_out` does anything, ever."""
    return not device.kernel.version.release_ends_server or bool(device.info.flags & Feature.UNPRIVILEGED_DEV)


def request_timed_out(device: SimDevice, queue: SimQueue) -> None:
    """A request was not answered in time: an ordinary user's server is killed; root's may go on, if it lives."""
    if device.info.flags & Feature.UNPRIVILEGED_DEV:
        if device.char is not None or device.rings:
            device.kernel.crash_server(device.dev_id)
        return
    if not device.server_died:
        return
    # No command is left whose cancelling would tell: the timeout itself does.
    if _is_news(device, queue):
        _end_server(device, [queue])
