"""Bugs to plant in the simulator: each breaks it in one place, and its own tests must find it.

Every function is a context manager under which the simulator has the bug that the first line of its docstring names. What is
named here of the simulator is imported or patched by name: a name that is not there any more is an error, never a bug that nobody planted.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Generic, TypeVar
from unittest import mock

import attrs

from ublk_trio.kernel_sim import checks
from ublk_trio.kernel_sim import queue as queue_module
from ublk_trio.kernel_sim.block import Request
from ublk_trio.kernel_sim.block import tags as tags_module
from ublk_trio.kernel_sim.block.tags import HardwareQueue
from ublk_trio.kernel_sim.device import SimDevice
from ublk_trio.kernel_sim.kernel import SimKernel
from ublk_trio.kernel_sim.queue import CommandRing, SimQueue
from ublk_trio.kernel_sim.ring import SimControlRing, SimQueueRing
from ublk_trio.kernel_sim.tag import OWNED_BY_SRV, SimTag
from ublk_trio.kernel_sim.uring_commands import QueueCommands
from ublk_trio.kernel_sim.version import KernelVersion
from ublk_trio.kernel_sim.waits import SimMutex, Steps, Wait
from ublk_trio.uapi import IO_RES_ABORT, DeviceState, IoCommand

T = TypeVar("T")


@attrs.frozen
class Plant:
    """A bug, and the file of tests/sim that must notice it."""

    name: str
    plant: Callable[[], AbstractContextManager[None]]
    tests: str


PLANTED: list[Plant] = []


def _planted(tests: str) -> Callable[[Callable[[], Iterator[None]]], None]:
    def decorate(function: Callable[[], Iterator[None]]) -> None:
        PLANTED.append(Plant(function.__name__, contextmanager(function), f"tests/sim/{tests}"))

    return decorate


# ---------------------------------------------------------------------- per-tag commands


@_planted("test_tag_commands.py")
def wrong_errno() -> Iterator[None]:
    """A tag that is fetched twice gets EBUSY instead of EINVAL."""
    command = SimQueue.command

    def wrong(queue: SimQueue, ring: CommandRing, number: int, tag: int, *rest: Any) -> int:
        result = command(queue, ring, number, tag, *rest)
        active = tag < queue.depth and queue.tags[tag].flags
        return -errno.EBUSY if number == IoCommand.FETCH_REQ and result == -errno.EINVAL and active else result

    with mock.patch.object(SimQueue, "command", wrong):
        yield


@_planted("test_tag_commands.py")
def any_task_may_commit() -> Iterator[None]:
    """A tag's commands are taken from a ring that did not fetch it."""
    command = SimQueue.command

    def careless(queue: SimQueue, ring: CommandRing, number: int, tag: int, *rest: Any) -> int:
        owner = queue.tags[tag].ring if tag < queue.depth else None
        return command(queue, owner if owner is not None else ring, number, tag, *rest)

    with mock.patch.object(SimQueue, "command", careless):
        yield


@_planted("test_tag_commands.py")
def refusal_changes_the_tag() -> Iterator[None]:
    """A refused COMMIT takes the request from the server."""
    command = SimQueue.command

    def changing(queue: SimQueue, ring: CommandRing, number: int, tag: int, *rest: Any) -> int:
        result = command(queue, ring, number, tag, *rest)
        if result < 0 and number == IoCommand.COMMIT_AND_FETCH_REQ and tag < queue.depth:
            queue.tags[tag].flags &= ~OWNED_BY_SRV
        return result

    with mock.patch.object(SimQueue, "command", changing):
        yield


@_planted("test_tag_commands.py")
def write_not_announced() -> Iterator[None]:
    """With NEED_GET_DATA a WRITE comes with result 0, as if its data were there."""
    deliver = SimQueue.deliver

    def hasty(queue: SimQueue, ring: CommandRing, tag: int) -> int | None:
        result = deliver(queue, ring, tag)
        return result and 0

    with mock.patch.object(SimQueue, "deliver", hasty):
        yield


# ---------------------------------------------------------------------- tags and requests


@_planted("test_tag_commands.py")
def tag_freed_twice() -> Iterator[None]:
    """A tag whose request ended is entered twice among the free ones."""
    release = HardwareQueue._release

    def twice(queue: HardwareQueue, tag: SimTag) -> None:
        queue._free.append(tag.tag)
        release(queue, tag)

    with mock.patch.object(HardwareQueue, "_release", twice):
        yield


class _Tail(deque[T], Generic[T]):
    """What was to stand first stands last."""

    def appendleft(self, x: T) -> None:
        self.append(x)


@_planted("test_block.py")
def requeued_at_the_tail() -> Iterator[None]:
    """The rest of a short READ waits behind all the others."""
    with mock.patch.object(tags_module, "deque", _Tail):
        yield


@_planted("test_block.py")
def rest_begins_where_the_whole_did() -> Iterator[None]:
    """The rest of a short READ is delivered with the sector of the whole."""
    advance = Request.advance

    def standing(request: Request, moved_bytes: int) -> int | None:
        sector = request.start_sector
        left = advance(request, moved_bytes)
        request.start_sector = sector
        return left

    with mock.patch.object(Request, "advance", standing):
        yield


@_planted("test_block.py")
def any_errno_survives() -> Iterator[None]:
    """An application sees errnos that have no block status."""
    with mock.patch.object(queue_module, "through_block_status", lambda result: -result):
        yield


@_planted("test_block.py")
def short_write_is_whole_everywhere() -> Iterator[None]:
    """Old releases take a short WRITE for a whole one, too."""
    with mock.patch.object(KernelVersion, "short_write_is_whole", True):
        yield


# ---------------------------------------------------------------------- stopping and deleting


@_planted("test_held_commands.py")
def abort_lost() -> Iterator[None]:
    """One of the idle tags is cancelled without a completion."""
    post_result = SimQueueRing.post_result

    def losing(ring: SimQueueRing, tag: int, result: int) -> None:
        if result != IO_RES_ABORT or tag != 1:
            post_result(ring, tag, result)

    with mock.patch.object(SimQueueRing, "post_result", losing):
        yield


@_planted("test_held_commands.py")
def abort_comes_again() -> Iterator[None]:
    """Every STOP_DEV aborts the idle tags, though they are aborted already."""
    cancel_idle = SimQueue.cancel_idle

    def again(queue: SimQueue) -> None:
        before = [tag.flags for tag in queue.tags]
        cancel_idle(queue)
        for tag, flags in zip(queue.tags, before, strict=True):
            tag.flags = flags

    with mock.patch.object(SimQueue, "cancel_idle", again):
        yield


@_planted("test_rings.py")
def cancel_misses_a_queue() -> Iterator[None]:
    """STOP_DEV aborts the idle tags of all queues but the last."""
    cancel = SimDevice.cancel

    def forgetful(device: SimDevice) -> None:
        queues = device.queues
        if len(queues) > 1:
            device.queues = queues[:-1]
        try:
            cancel(device)
        finally:
            device.queues = queues

    with mock.patch.object(SimDevice, "cancel", forgetful):
        yield


@_planted("test_held_commands.py")
def stop_does_not_wait() -> Iterator[None]:
    """STOP_DEV takes the disk away while the server still has requests."""
    stop = SimDevice.stop

    def impatient(device: SimDevice) -> Steps:
        yield from ()
        steps = stop(device)
        while True:
            try:
                next(steps)
            except StopIteration as stopped:
                return int(stopped.value)

    with mock.patch.object(SimDevice, "stop", impatient):
        yield


@_planted("test_held_commands.py")
def delete_does_not_wait() -> Iterator[None]:
    """A deleted device is gone at once, whoever still has it open."""

    def put_device(kernel: SimKernel, device: SimDevice) -> None:
        if device.removed and kernel.devices.pop(device.dev_id, None) is not None:
            kernel.changed()

    with mock.patch.object(SimKernel, "put_device", put_device):
        yield


@_planted("test_held_commands.py")
def start_waits_for_one_queue() -> Iterator[None]:
    """START_DEV goes on when the tags of any queue are fetched."""
    with mock.patch.object(
        SimDevice, "all_fetched", property(lambda device: any(queue.ready for queue in device.queues))
    ):
        yield


@_planted("test_held_commands.py")
def commands_do_not_exclude_each_other() -> Iterator[None]:
    """A device's mutex can be taken by two commands."""

    def lock(mutex: SimMutex) -> Iterator[Wait]:
        mutex.locked = True
        yield from ()

    with mock.patch.object(SimMutex, "lock", lock), mock.patch.object(SimMutex, "unlock"):
        yield


@_planted("test_held_commands.py")
def nothing_is_interrupted() -> Iterator[None]:
    """The exit of a control ring leaves its commands waiting."""

    def interrupt(kernel: SimKernel, ring: SimControlRing, **rest: Any) -> None:
        return None

    with mock.patch.object(SimKernel, "interrupt", interrupt):
        yield


# ---------------------------------------------------------------------- the server's death


@_planted("test_server_death.py")
def dead_servers_device_stays_live() -> Iterator[None]:
    """A device whose server died is still called LIVE."""
    set_state = SimDevice.set_state

    def stays(device: SimDevice, state: DeviceState, *rest: Any) -> None:
        if state is not DeviceState.DEAD or not device.releasing:
            set_state(device, state, *rest)

    with mock.patch.object(SimDevice, "set_state", stays):
        yield


@_planted("test_server_death.py")
def held_requests_fail_too_early() -> Iterator[None]:
    """What the server holds fails with its ring, and not with the last close of the char device."""
    ring_closed = SimQueue.ring_closed

    def early(queue: SimQueue, ring: CommandRing) -> None:
        ring_closed(queue, ring)
        if not queue.delivering:
            queue.abort_owned()

    with mock.patch.object(SimQueue, "ring_closed", early):
        yield


# ---------------------------------------------------------------------- the next server


@_planted("test_recovery.py")
def held_requests_stay_held() -> Iterator[None]:
    """END_USER_RECOVERY leaves the requests waiting that were held for the next server."""
    with mock.patch.object(SimDevice, "redispatch"):
        yield


@_planted("test_recovery.py")
def reissued_at_the_tail() -> Iterator[None]:
    """What a dead server had is reissued behind all that came since."""
    abort_owned = SimQueue.abort_owned

    def behind(queue: SimQueue) -> None:
        before = len(queue.held)
        abort_owned(queue)
        if queue.device.reissues:
            queue.held.rotate(before - len(queue.held))

    with mock.patch.object(SimQueue, "abort_owned", behind):
        yield


@_planted("test_registered_buffers.py")
def commit_leaves_the_buffer_registered() -> Iterator[None]:
    """With AUTO_BUF_REG a commit does not take the request's buffer out of its ring."""
    with mock.patch.object(QueueCommands, "is_same_ring", return_value=False):
        yield


# ---------------------------------------------------------------------- what it finds in servers


@_planted("test_paranoid.py")
def touched_buffer_not_noticed() -> Iterator[None]:
    """A server may write to buffers that the kernel owns."""
    with mock.patch.object(checks, "damage", return_value=None):
        yield


@_planted("test_rings.py")
def completions_in_order() -> Iterator[None]:
    """A reap finds everything, in order, whatever Choices says."""

    def all_of_it(ring: SimQueueRing, ready: list[int]) -> list[int]:
        taken = list(ready)
        ready.clear()
        return taken

    with mock.patch.object(SimQueueRing, "_choose_ready", all_of_it):
        yield
