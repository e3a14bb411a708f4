"""Bugs to plant: each breaks the engine in one place, and the suite must find it.

Every function is a context manager under which the engine has the bug that the first line of its docstring names. They
are the mistakes that servers of this kind make in earnest; most do nothing in a calm, sequential run.
"""

from __future__ import annotations

import errno
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from typing import Any
from unittest import mock

import trio

from ublk_trio.back_pressure import WaitingLine
from ublk_trio.device import Device
from ublk_trio.handlers import Handlers, Outcome
from ublk_trio.kernel_sim import ring as sim_ring
from ublk_trio.kernel_sim.ring import SimQueueRing
from ublk_trio.queue import Queue
from ublk_trio.request import Request
from ublk_trio.ring import NO_SLOT, CharDevice, pack_answer, unpack_answer
from ublk_trio.serve_async import _Crew, _Worker
from ublk_trio.tag import Tags
from ublk_trio.target import Target
from ublk_trio.uapi import IoCommand, IoFlag, IoOp, user_copy_offset

_DATA_OPS = (IoOp.READ, IoOp.WRITE)
Plant = Callable[[], AbstractContextManager[None]]
PLANTED: list[Plant] = []


def _planted(function: Callable[[], Iterator[None]]) -> Plant:
    plant = contextmanager(function)
    PLANTED.append(plant)
    return plant


@_planted
def lost_answer() -> Iterator[None]:
    """An answer is dropped when three or more go out together."""
    commit = SimQueueRing.commit

    def dropping(ring: SimQueueRing, answers: list[int]) -> None:
        commit(ring, answers[:-1] if len(answers) > 2 and _command(answers[-1]) != IoCommand.FETCH_REQ else answers)

    with mock.patch.object(SimQueueRing, "commit", dropping):
        yield


@_planted
def double_commit() -> Iterator[None]:
    """The last of several answers is sent twice."""
    commit = SimQueueRing.commit

    def doubling(ring: SimQueueRing, answers: list[int]) -> None:
        again = answers[-1:] if len(answers) > 1 and _command(answers[-1]) == IoCommand.COMMIT_AND_FETCH_REQ else []
        commit(ring, answers + again)

    with mock.patch.object(SimQueueRing, "commit", doubling):
        yield


def _command(answer: int) -> int:
    return unpack_answer(answer)[0]


@_planted
def off_by_one_tag() -> Iterator[None]:
    """The answer to a range request goes to the next tag."""
    answer = Queue.answer

    def shifted(queue: Queue, request: Request, result: int) -> None:
        answer(queue, request, result)
        if request.op in (IoOp.DISCARD, IoOp.WRITE_ZEROES):
            queue._answers[-1] = pack_answer(
                IoCommand.COMMIT_AND_FETCH_REQ, (request.tag + 1) % queue.tags.depth, result
            )

    with mock.patch.object(Queue, "answer", shifted):
        yield


@_planted
def early_buffer_reuse() -> Iterator[None]:
    """A pooled buffer is free again before the commit that uses it was submitted."""
    answer, flush = Queue.answer, Queue.flush

    def early(queue: Queue, request: Request, result: int) -> None:
        answer(queue, request, result)
        if queue._released and queue._pool is not None:
            queue._released.pop()
            queue._pool.give_back(queue.ring.slots[request.tag])

    def late(queue: Queue) -> None:
        committed = [unpack_answer(one)[1] for one in queue._answers if _command(one) == IoCommand.COMMIT_AND_FETCH_REQ]
        flush(queue)
        if queue._pool is not None:
            for tag in committed:
                queue.ring.slots[tag] = NO_SLOT

    with mock.patch.object(Queue, "answer", early), mock.patch.object(Queue, "flush", late):
        yield


@_planted
def buffer_touched_after_commit() -> Iterator[None]:
    """A READ's buffer is wiped after its commit, when the kernel owns it."""
    flush = Queue.flush

    def wiping(queue: Queue) -> None:
        committed = [unpack_answer(one)[1] for one in queue._answers if _command(one) == IoCommand.COMMIT_AND_FETCH_REQ]
        buffers = [queue._requests[tag].buffer for tag in committed if queue._requests[tag].op == IoOp.READ]
        flush(queue)
        if queue._pool is None:
            for buffer in buffers:
                buffer[:512] = bytes(512)

    with mock.patch.object(Queue, "flush", wiping):
        yield


@_planted
def flush_answered_early() -> Iterator[None]:
    """A FLUSH is answered while the backend's flush still runs."""
    start = Queue.start

    async def finish(flushing: Awaitable[Outcome]) -> None:
        try:
            await flushing
        except Exception:
            return

    def early(queue: Queue, request: Request) -> int | Awaitable[Outcome]:
        result = start(queue, request)
        if request.op == IoOp.FLUSH and not isinstance(result, int):
            trio.lowlevel.spawn_system_task(finish, result)
            return 0
        return result

    with mock.patch.object(Queue, "start", early):
        yield


@_planted
def flush_forgotten() -> Iterator[None]:
    """A FLUSH is answered without a word to the backend."""
    start = Queue.start

    def forgetting(queue: Queue, request: Request) -> int | Awaitable[Outcome]:
        return 0 if request.op == IoOp.FLUSH else start(queue, request)

    with mock.patch.object(Queue, "start", forgetting):
        yield


@_planted
def delete_before_close() -> Iterator[None]:
    """DEL_DEV is sent while the char device is still open."""

    @asynccontextmanager
    async def opened_char(device: Device) -> AsyncIterator[CharDevice]:
        device._char = char = await device._kernel.open_char_device(
            device.info, ioctl_encoded=device._control.ioctl_encoded
        )
        try:
            yield char
        finally:
            with trio.CancelScope(shield=True):
                await device._delete(device.dev_id)
            char.close()

    def close_rings(device: Device) -> None:
        for queue in device._queues:
            queue.ring.close()

    with (
        mock.patch.object(Device, "_opened_char", opened_char),
        mock.patch.object(Device, "_close_rings", close_rings),
    ):
        yield


@_planted
def short_write_is_success() -> Iterator[None]:
    """A write that the backend did only in part is answered as done."""
    finish = Handlers.finish

    def forgiving(handlers: Handlers, request: Request, outcome: Outcome) -> int:
        return finish(handlers, request, None if request.op == IoOp.WRITE else outcome)

    with mock.patch.object(Handlers, "finish", forgiving):
        yield


@_planted
def lost_wake_up() -> Iterator[None]:
    """A wait does not look whether something is ready already."""

    async def wait(ring: SimQueueRing) -> None:
        await ring._lot.park()
        if ring._closed:
            raise trio.ClosedResourceError

    with mock.patch.object(SimQueueRing, "wait", wait):
        yield


@_planted
def answered_twice_when_cancelled() -> Iterator[None]:
    """A handler that is cancelled answers its request, and so does its worker."""
    serve = _Worker._serve

    async def twice(worker: _Worker, request: Request) -> None:
        try:
            await serve(worker, request)
        except trio.Cancelled:
            worker.crew.queue.answer(request, -errno.EIO)
            raise

    with mock.patch.object(_Worker, "_serve", twice):
        yield


@_planted
def wrong_offset_of_a_part() -> Iterator[None]:
    """The offset of a request is rounded down to 4 KiB."""
    load = Request.load

    def rounding(request: Request, op_flags: int, nr_sectors: int, start_sector: int) -> None:
        load(request, op_flags, nr_sectors, start_sector & ~7)

    with mock.patch.object(Request, "load", rounding):
        yield


@_planted
def no_successor() -> Iterator[None]:
    """A leader whose handler suspends names a successor only if one is idle."""

    def hand_over(crew: _Crew) -> None:
        crew.turn += 1
        crew.idle.unpark()

    with mock.patch.object(_Crew, "hand_over", hand_over):
        yield


@_planted
def fua_forgotten() -> Iterator[None]:
    """A write that must be durable is handed over as an ordinary one."""
    load = Request.load

    def forgetting(request: Request, op_flags: int, nr_sectors: int, start_sector: int) -> None:
        load(request, op_flags & ~IoFlag.FUA, nr_sectors, start_sector)

    with mock.patch.object(Request, "load", forgetting):
        yield


@_planted
def cancelled_start_leaves_a_device() -> Iterator[None]:
    """A device whose start was cancelled before START_DEV is not deleted."""
    delete = Device._delete

    async def sparing(device: Device, dev_id: int) -> None:
        if device._start_ended.is_set():
            await delete(device, dev_id)

    with mock.patch.object(Device, "_delete", sparing):
        yield


@_planted
def late_answers_wait_for_the_leader() -> Iterator[None]:
    """A handler that finishes while the leader is parked leaves its answer to the leader."""
    with mock.patch.object(_Crew, "submit_late"):
        yield


@_planted
def stop_forgets_the_refusal() -> Iterator[None]:
    """A stop that has lost its patience does not cancel the handlers that still run."""

    def refuse(queue: Queue) -> None:
        queue._refusing = queue.pressed = True

    with mock.patch.object(Queue, "refuse", refuse):
        yield


@_planted
def buffer_never_returned() -> Iterator[None]:
    """A pooled buffer whose request failed does not go back to the pool."""
    answer = Queue.answer

    def keeping(queue: Queue, request: Request, result: int) -> None:
        released = len(queue._released)
        answer(queue, request, result)
        if result < 0:
            del queue._released[released:]

    with mock.patch.object(Queue, "answer", keeping):
        yield


@_planted
def data_of_another_buffer() -> Iterator[None]:
    """A request that takes a pooled buffer is shown the data of the one that its tag had before."""
    assign = Queue._assign

    def stale(queue: Queue, request: Request, slot: int) -> None:
        before = request.data
        assign(queue, request, slot)
        if before:
            request.data = before

    with mock.patch.object(Queue, "_assign", stale):
        yield


@_planted
def get_data_without_a_buffer() -> Iterator[None]:
    """A WRITE that has to wait for a buffer asks for its data at once."""
    take = Queue._take_buffer

    def careless(queue: Queue, request: Request) -> bool:
        return take(queue, request) or request.op == IoOp.WRITE

    with mock.patch.object(Queue, "_take_buffer", careless):
        yield


@_planted
def short_read_taken_for_whole() -> Iterator[None]:
    """A short READ is committed as it is, also where the kernel takes any result for all of it."""
    answer = Queue.answer

    def content(queue: Queue, request: Request, result: int) -> None:
        asks_again, queue._user_copy = queue._user_copy, False
        try:
            answer(queue, request, result)
        finally:
            queue._user_copy = asks_again

    with mock.patch.object(Queue, "answer", content):
        yield


@_planted
def rest_over_the_beginning() -> Iterator[None]:
    """The rest of a short READ is put over its beginning in the buffer."""
    read_on = Request.read_on

    def back(request: Request, count: int) -> None:
        buffer = request.buffer
        read_on(request, count)
        request.buffer = buffer

    with mock.patch.object(Request, "read_on", back):
        yield


@_planted
def unfetched_data() -> Iterator[None]:
    """With user copy the backend is given a WRITE whose data nobody has fetched."""
    with mock.patch.object(Queue, "_copy_in", return_value=True):
        yield


@_planted
def copied_after_the_answer() -> Iterator[None]:
    """With user copy a READ is answered first, and its data moved then."""
    send, copy_out = SimQueueRing._send, SimQueueRing._copy_out

    def late(ring: SimQueueRing, answer: int, slot: int) -> None:
        with mock.patch.object(SimQueueRing, "_copy_out", lambda ring, number, tag, slot, result: result):
            send(ring, answer, slot)
        if ring._user_copy:
            copy_out(ring, _command(answer), answer & 0xFFFF, slot, answer >> 32)

    with mock.patch.object(SimQueueRing, "_send", late):
        yield


@_planted
def copied_one_block_off() -> Iterator[None]:
    """With user copy data is moved from and to one block behind its place."""

    def beside(*, queue_id: int, tag: int, offset: int) -> int:
        return user_copy_offset(queue_id=queue_id, tag=tag, offset=offset + 512)

    with mock.patch.object(sim_ring, "user_copy_offset", beside):
        yield


@_planted
def error_swallowed() -> Iterator[None]:
    """A flush that the backend failed is answered as done."""
    failed = Handlers.failed

    def forgiving(handlers: Handlers, request: Request, exception: BaseException) -> int:
        result = failed(handlers, request, exception)
        return 0 if request.op == IoOp.FLUSH else result

    with mock.patch.object(Handlers, "failed", forgiving):
        yield


@_planted
def range_too_long() -> Iterator[None]:
    """A discard of several blocks reaches one block too far."""
    load = Request.load

    def stretching(request: Request, op_flags: int, nr_sectors: int, start_sector: int) -> None:
        more = op_flags & 0xFF in (IoOp.DISCARD, IoOp.WRITE_ZEROES) and nr_sectors > 1
        load(request, op_flags, nr_sectors + more, start_sector)

    with mock.patch.object(Request, "load", stretching):
        yield


@_planted
def ended_too_early() -> Iterator[None]:
    """A queue is taken for ended while one of its tags is still open."""
    with mock.patch.object(Tags, "all_ended", property(lambda tags: tags._open <= 1)):
        yield


@_planted
def answer_kept_for_company() -> Iterator[None]:
    """A single answer is held back until another one comes."""
    flush = Queue.flush

    def patient(queue: Queue) -> None:
        if len(queue._answers) != 1 or queue.tags.depth == 1:
            flush(queue)

    with mock.patch.object(Queue, "flush", patient):
        yield


@_planted
def backend_closed_before_its_calls_end() -> Iterator[None]:
    """A backend is closed as soon as the stop is asked for."""
    stop_serving = Device._stop_serving

    async def hasty(device: Device) -> None:
        await device.backend.aclose()
        await stop_serving(device)

    with mock.patch.object(Device, "_stop_serving", hasty):
        yield


@_planted
def gone_device_still_listed() -> Iterator[None]:
    """A target keeps listing a device that is gone."""
    hold = Target._hold

    async def keeping(target: Target, *arguments: Any, **keywords: Any) -> None:
        listed = set(target._devices)
        try:
            await hold(target, *arguments, **keywords)
        finally:
            target._devices |= listed

    with mock.patch.object(Target, "_hold", keeping):
        yield


@_planted
def out_of_resources_is_an_error() -> Iterator[None]:
    """A request that the backend has no resources for is answered with ENOMEM."""
    failed = Handlers.failed

    def impatient(handlers: Handlers, request: Request, exception: BaseException) -> int:
        result = failed(handlers, request, exception)
        return -errno.EIO if result == -errno.ENOMEM else result

    with mock.patch.object(Handlers, "failed", impatient):
        yield


@_planted
def waits_for_an_answer_that_never_comes() -> Iterator[None]:
    """A request that waits for resources is tried again only when another one was answered."""
    with mock.patch.object(WaitingLine, "deadline", math.inf):
        yield


@_planted
def second_buffer_for_a_retry() -> Iterator[None]:
    """A request that is tried again takes another buffer from the pool."""
    try_again = Queue.try_again

    def greedy(queue: Queue, request: Request) -> int | Awaitable[Outcome]:
        if queue._pool is not None and request.op in _DATA_OPS and queue._pool._free:
            queue._take_buffer(request)
        return try_again(queue, request)

    with mock.patch.object(Queue, "try_again", greedy):
        yield


def name_of(plant: Plant) -> str:
    """The bug's name."""
    named: Any = plant
    return str(named.__name__)
