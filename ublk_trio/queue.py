"""A queue: a ring, its tags, and the task that serves them.

Facts it rests on:

- A tag has at most one command with the kernel, so ``depth`` ring entries always suffice.
- STOP_DEV blocks until every delivered request is committed, and removing a disk writes its dirty pages back first:
  so a queue must go on
  **serving** while it is being stopped, and it ends not when it is told to but when the kernel has aborted every tag.
- READ data is copied out of the buffer while the commit is being submitted; until then the buffer is in use.
- Where the server moves the data (user copy), kernels since 7.2 take a short READ for a whole one, with whatever was in the
  application's memory behind it. So a short READ is not committed there: the rest is asked of the backend.
- A backend may be out of resources for a moment (ENOMEM): that request waits, see `back_pressure`.

What this means: `Queue.run` shields itself from the scopes around it. It ends when all tags have ended. If serving
itself fails, the queue first answers everything with EIO until the kernel has ended every tag, and only then lets the
error out.
"""

from __future__ import annotations

import errno
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterator

import attrs
import trio

from ublk_trio.back_pressure import WaitingLine
from ublk_trio.buffer_pool import BufferPool, PoolStatistics
from ublk_trio.errors import KernelError, errno_text
from ublk_trio.handlers import Handlers, Outcome, Serve
from ublk_trio.options import DataMode
from ublk_trio.request import Request
from ublk_trio.ring import EVENT, NO_SLOT, QueueRing, RingStatistics, pack_answer
from ublk_trio.serve_async import serve_async
from ublk_trio.serve_inline import serve_inline
from ublk_trio.tag import SERVER_OWES, TagEvent, Tags, TagState
from ublk_trio.uapi import IO_RES_ABORT, IO_RES_NEED_GET_DATA, IO_RES_OK, IoCommand, IoOp

logger = logging.getLogger("ublk_trio.queue")

#: tag, padding, result, op_flags, nr_sectors, start_sector
Event = tuple[int, int, int, int, int, int]

_COMMIT = pack_answer(IoCommand.COMMIT_AND_FETCH_REQ, 0)
_EVENT_OF_RESULT = {
    IO_RES_OK: TagEvent.DELIVERED,
    IO_RES_NEED_GET_DATA: TagEvent.WRITE_ANNOUNCED,
    IO_RES_ABORT: TagEvent.ABORTED,
}
_NOT_FETCHED = frozenset({TagState.UNFETCHED})
_UNDER_WAY = SERVER_OWES | {TagState.GETTING_DATA}
_HAS_DATA = frozenset({int(IoOp.READ), int(IoOp.WRITE)})
_READ = int(IoOp.READ)
# Python 3.11 looks an enum's member up through a function call: what runs once a request keeps it at hand.
_OK = IO_RES_OK
_DELIVERED = TagEvent.DELIVERED
_COMMITTED = TagEvent.COMMIT
_OUT_OF_RESOURCES = -errno.ENOMEM


def _only_closed(error: BaseException) -> bool:
    """Whether all that went wrong is that the ring was closed: several tasks that use it may have met that at once."""
    if isinstance(error, BaseExceptionGroup):
        return error.split(trio.ClosedResourceError)[1] is None
    return isinstance(error, trio.ClosedResourceError)


@attrs.frozen(kw_only=True)
class QueueStatistics:
    """What a queue did so far: requests by operation, bytes, and how its calls batched."""

    queue_id: int
    requests: dict[str, int]
    bytes_read: int
    bytes_written: int
    failed: int
    in_flight: int
    #: Requests that the backend had no resources for (ENOMEM) and that wait to be tried again; and how many ever did.
    waiting: int
    waited_total: int
    ring: RingStatistics
    pool: PoolStatistics | None
    #: Where the worker runs that owns the queue's ring; None without workers.
    cpu: int | None


class Queue:
    """One queue of a device. `run` serves it; everything else is for the two ways of serving."""

    def __init__(self, ring: QueueRing, handlers: Handlers, *, serve: Serve, mode: DataMode) -> None:
        """In `DataMode.COPY` the ring has one buffer per tag, in the others its buffers are a pool."""
        self.ring = ring
        self.queue_id = ring.queue_id
        self.tags = Tags(queue_id=ring.queue_id, depth=ring.depth)
        self.handlers = handlers
        #: Events that were reaped and not looked at yet. Shared by all who serve: whoever leads goes on with it.
        self.events: Iterator[Event] = iter(())
        #: Requests that waited for a buffer and have it now.
        self.ready: deque[Request] = deque()
        #: Requests that the backend had no resources for.
        self.line = WaitingLine()
        #: New requests are not simply handed to the backend: they are refused, or others wait.
        self.pressed = False
        self._refusing = False
        #: The ring cannot be served to its end: it must be closed.
        self.must_close = False
        self.ended = trio.Event()
        self._answers: list[int] = []
        self._serve = serve_async if serve == "async" else serve_inline
        self._pool = BufferPool(len(ring.buffers)) if mode is not DataMode.COPY else None
        self._user_copy = mode is DataMode.USER_COPY
        #: Tags whose answers give a buffer back and were not sent yet; and of those that were sent, how many answers had been then.
        self._released: list[int] = []
        self._lent: deque[tuple[int, int]] = deque()
        self._sent = 0
        self._requests = [Request(tag) for tag in range(ring.depth)]
        self._read_only_views = [view.toreadonly() for view in ring.buffers]
        for request in self._requests:
            if self._pool is not None:
                ring.slots[request.tag] = NO_SLOT
            else:
                self._assign(request, request.tag)
        self._counts = [0] * 256
        self._bytes = [0] * 256
        self._failed = 0
        self._cancel_handlers: Callable[[], None] | None = None

    async def run(self, failed: Callable[[Queue, BaseException], None]) -> None:
        """Fetch every tag, serve until the kernel has ended them all.

        ``failed`` is called at once when serving fails; the error itself is raised when every tag has ended. Not
        cancellable: stop the device instead, or close the ring.
        """
        with trio.CancelScope(shield=True):
            try:
                self._fetch_all()
                await self._serve(self)
            except BaseException as exception:
                if _only_closed(exception):
                    self._close_tags()
                    return
                # The kernel never ends a tag that it does not have; and a START_DEV that waits for one never ends either.
                self.must_close |= isinstance(exception, KernelError) or self.tags.count(_NOT_FETCHED) > 0
                failed(self, exception)
                await self._refuse_until_ended()
                raise
            finally:
                self.ended.set()

    def refuse(self) -> None:
        """From now on answer requests with EIO instead of calling the backend, and cancel the calls that still run."""
        self._refusing = self.pressed = True
        if self._cancel_handlers is not None:
            self._cancel_handlers()

    def hold(self) -> None:
        """From now on begin nothing: what comes, and what waits for resources, is left for the next server."""
        self.line.hold()
        self.pressed = True

    @property
    def is_done(self) -> bool:
        """Whether every request that the kernel gave us is answered; after `hold`: every one that was begun."""
        if self._answers:
            return False
        return not self.line.under_way if self.line.held else self.tags.count(_UNDER_WAY) == 0

    def on_refuse(self, cancel_handlers: Callable[[], None] | None) -> None:
        """Register how to cancel the handlers that are suspended (async serving only)."""
        self._cancel_handlers = cancel_handlers

    # What the two ways of serving are made of ------------------------------------------------------------------------

    def start(self, request: Request) -> int | Awaitable[Outcome]:
        """Begin to serve a request: its result, or what the backend wants awaited."""
        return self._refusal() if self.pressed else self.handlers.start(request)

    def _refusal(self) -> int:
        """Instead of calling the backend: EIO, or what makes the request stand in line."""
        return -errno.EIO if self._refusing else _OUT_OF_RESOURCES

    def next_try(self) -> Request | None:
        """The request whose turn it is to be tried again, if there is one now; see `try_again` and `answer_late`."""
        return self.line.take()

    def try_again(self, request: Request) -> int | Awaitable[Outcome]:
        """As `start`, for what `next_try` gave."""
        return -errno.EIO if self._refusing else self.handlers.start(request)

    def serve_again(self, request: Request) -> None:
        """As `serve`, for what `next_try` gave."""
        result = self.try_again(request)
        if not isinstance(result, int):
            result = self.handlers.not_inline(request, result)
        self.answer_late(request, result)

    def serve(self, request: Request) -> None:
        """Serve a request inline, and answer it."""
        result = self.start(request)
        if not isinstance(result, int):
            result = self.handlers.not_inline(request, result)
        self.answer(request, result)

    def reap(self) -> bool:
        """Take in the completions that are ready. False when there are none."""
        packed = self.ring.reap()
        if not packed:
            return False
        self.events = EVENT.iter_unpack(packed)
        return True

    def receive(self, event: Event) -> Request | None:
        """Step an event's tag; the request if there is now one to serve."""
        tag, _, result, op_flags, nr_sectors, start_sector = event
        if result == _OK:
            self.tags.step(tag, _DELIVERED)
            request = self._requests[tag]
            request.load(op_flags, nr_sectors, start_sector)
            if self._pool is None or request.op not in _HAS_DATA:
                return request
            if request.op != _READ and not self._user_copy:
                return request  # its buffer came with NEED_GET_DATA
            return request if self._take_buffer(request) and self._copy_in(request) else None
        happened = _EVENT_OF_RESULT.get(result, TagEvent.REFUSED)
        self.tags.step(tag, happened)
        if happened is TagEvent.WRITE_ANNOUNCED:
            request = self._requests[tag]
            request.load(op_flags, nr_sectors, start_sector)
            if self._take_buffer(request):
                self._get_data(request)
        elif happened is TagEvent.REFUSED:
            raise KernelError(
                -result,
                f"the kernel refused a command for queue {self.queue_id} tag {tag}: {errno_text(result)}",
            )
        return None

    def answer(self, request: Request, result: int) -> None:
        """Queue a request's commit and change its tag's state, with no await between: a commit is atomic.

        Goes out with the next `flush`. The result ENOMEM is no answer: the request stands in line instead. Nor is a short READ where
        it must be whole: the request is `ready` for its rest.
        """
        tag, op = request.tag, request.op
        if result < 0:
            if result == _OUT_OF_RESOURCES and not self._refusing:
                self._wait(request)
                return
            self._failed += 1
        else:
            if self._user_copy and op == _READ:
                if result < request.length:
                    request.read_on(result)
                    self.ready.append(request)
                    return
                result += request.done
            self._bytes[op] += result
        self.tags.step(tag, _COMMITTED)
        self._answers.append((result << 32) | _COMMIT | tag)
        self._counts[op] += 1
        if self._pool is not None and op in _HAS_DATA:
            self._released.append(tag)

    def answer_late(self, request: Request, result: int) -> None:
        """As `answer`, for a request that the backend worked on for a while, or that stood in line."""
        if result == _OUT_OF_RESOURCES and not self._refusing:
            self.pressed = True
            self.line.refused(request)
            return
        self.answer(request, result)
        self.line.answered(request)
        if self.pressed:
            self.pressed = self._refusing or self.line.closed_to_new

    def _wait(self, request: Request) -> None:
        if self.pressed:
            self.line.join(request)
        else:
            self.pressed = True
            self.line.refused(request)

    def flush(self) -> None:
        """Send all answers in one call; then hand the buffers that came free to the requests that wait for one."""
        while self._answers or self._lent:
            if self._answers:
                answers, self._answers = self._answers, []
                self.ring.commit(answers)
                self._sent += len(answers)
            if self._pool is not None:
                self._lend_released()
                self._pass_buffers_on(self._pool)
                if not self._answers:
                    return

    # Buffers ---------------------------------------------------------------------------------------------------------

    def _assign(self, request: Request, slot: int) -> None:
        try:
            request.buffer = self.ring.buffers[slot]
        except IndexError:
            # Closed between the reap and now, while the task that serves let others run: there are no buffers any more.
            raise trio.ClosedResourceError("the queue ring is closed") from None
        request.data = self._read_only_views[slot]
        self.ring.slots[request.tag] = slot

    def _take_buffer(self, request: Request) -> bool:
        assert self._pool is not None, "without a pool every tag has its buffer"
        slot = self._pool.take(request.tag)
        if slot is None:
            return False
        self._assign(request, slot)
        return True

    def _get_data(self, request: Request) -> None:
        self.tags.step(request.tag, TagEvent.GET_DATA)
        self._answers.append(pack_answer(IoCommand.NEED_GET_DATA, request.tag))

    def _copy_in(self, request: Request) -> bool:
        """With user copy, get the WRITE's data into its buffer. False when that failed: then the request is answered."""
        if request.op == _READ:
            return True
        result = self.ring.copy_in(request.tag)
        if result < 0:
            logger.warning(
                "queue %d: the data of a %s did not come: %s; it fails", self.queue_id, request, errno_text(result)
            )
            self.answer(request, -errno.EIO)
        return result == 0

    def _lend_released(self) -> None:
        slots = self.ring.slots
        for tag in self._released:
            self._lent.append((self._sent, slots[tag]))
            slots[tag] = NO_SLOT
        self._released.clear()

    def _pass_buffers_on(self, pool: BufferPool) -> None:
        # A buffer is free once the kernel has its answer: it takes the data out of it then.
        if self._lent:
            taken = self._sent - self.ring.untaken
            while self._lent and self._lent[0][0] <= taken:
                pool.give_back(self._lent.popleft()[1])
        while (waiter := pool.next_waiter()) is not None:
            tag, slot = waiter
            request = self._requests[tag]
            self._assign(request, slot)
            if self.tags[tag] is TagState.ANNOUNCED:
                self._get_data(request)
            elif self._copy_in(request):
                self.ready.append(request)

    # Beginning and end -----------------------------------------------------------------------------------------------

    def _fetch_all(self) -> None:
        for tag in range(self.ring.depth):
            self.tags.step(tag, TagEvent.FETCH)
            self._answers.append(pack_answer(IoCommand.FETCH_REQ, tag))
        self.flush()

    async def _refuse_until_ended(self) -> None:
        """After a failure: every delivered request is answered with EIO, as long as the ring works."""
        self.refuse()
        try:
            self._answer_what_is_owed()
            if not self.must_close:
                await serve_inline(self)
        except trio.ClosedResourceError:
            self._close_tags()
        except Exception:
            logger.exception("queue %d cannot even refuse requests; its ring must be closed", self.queue_id)
            self.must_close = True

    def _answer_what_is_owed(self) -> None:
        """Nobody serves any more, all handlers are gone: refuse what they left, but for requests that stand in line
        for a buffer.

        These get one as the others are answered, and are then refused like any new request.
        """
        self.ready.clear()
        self.line.clear()
        for tag in list(self.tags.in_states(SERVER_OWES)):
            request = self._requests[tag]
            if self._pool is None or request.op not in _HAS_DATA or self.ring.slots[tag] != NO_SLOT:
                self.answer(request, -errno.EIO)
        self.flush()

    def _close_tags(self) -> None:
        for tag in range(self.ring.depth):
            self.tags.step(tag, TagEvent.RING_CLOSED)

    @property
    def answered(self) -> int:
        """How many requests were answered so far."""
        return sum(self._counts)

    def unanswered(self) -> list[Request]:
        """The requests that the server holds now."""
        return [self._requests[tag] for tag in self.tags.in_states(SERVER_OWES)]

    def statistics(self) -> QueueStatistics:
        """A snapshot; costs a walk over the tags."""
        ring = self.ring.statistics()
        return QueueStatistics(
            queue_id=self.queue_id,
            requests={op.name: self._counts[op] for op in IoOp if self._counts[op]},
            bytes_read=self._bytes[IoOp.READ],
            bytes_written=self._bytes[IoOp.WRITE],
            failed=self._failed + ring.copies_failed,
            in_flight=self.tags.count(SERVER_OWES),
            waiting=len(self.line),
            waited_total=self.line.waited_total,
            ring=ring,
            pool=self._pool.statistics() if self._pool is not None else None,
            cpu=self.ring.worker.cpu if self.ring.worker is not None else None,
        )
