"""Async serving: leader and followers.

Facts:

- A Trio task a request costs about as much as everything else together; most requests never suspend (they are
  answered from memory or a cache).
- A coroutine that has begun to run in one task cannot be handed to another: cancel scopes and context belong to the
  task.

What follows: the task that reaps (the **leader**) also runs the handlers, driving each coroutine itself. If one
suspends, the leader first names a successor (an idle worker, or a new one), and only then lets the suspension through
to Trio. The successor goes on with the very same batch; the old leader finishes its one request as an ordinary task,
answers it, and becomes idle. No request pays for a task that it does not need, and there are never more workers than
requests that wait at the same time, plus one.

There is always exactly one leader, until the kernel has ended every tag. A follower that has an answer while the
leader is parked submits it at once; otherwise the leader will, since it always flushes before it parks.
"""

from __future__ import annotations

import errno
import math
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import TYPE_CHECKING, Any

import trio

from ublk_trio.handlers import Outcome
from ublk_trio.nursery import open_plain_nursery
from ublk_trio.request import Request

if TYPE_CHECKING:
    from ublk_trio.queue import Queue


async def serve_async(queue: Queue) -> None:
    """Serve until the kernel has ended every tag. Goes on with `queue.events` if a batch was left unfinished."""
    async with open_plain_nursery() as nursery:
        crew = _Crew(queue, nursery)
        queue.on_refuse(crew.cancel_suspended)
        try:
            nursery.start_soon(_Worker(crew).work, name=f"ublk queue {queue.queue_id} worker")
            await crew.finished.wait()
        finally:
            queue.on_refuse(None)


@types.coroutine
def _drive(coroutine: Coroutine[Any, Any, Outcome], on_suspend: Callable[[], None]) -> Generator[Any, Any, Outcome]:
    """Await a coroutine in this task, calling ``on_suspend`` just before its first suspension becomes one of the
    task."""
    try:
        trap = coroutine.send(None)
        on_suspend()
        while True:
            try:
                value = yield trap
            except BaseException as exception:
                trap = coroutine.throw(exception)
            else:
                trap = coroutine.send(value)
    except StopIteration as stop:
        outcome: Outcome = stop.value
        return outcome


async def _as_coroutine(awaitable: Awaitable[Outcome]) -> Outcome:
    return await awaitable


class _Crew:
    """What the workers of one queue share."""

    def __init__(self, queue: Queue, nursery: trio.Nursery) -> None:
        self.queue = queue
        self.nursery = nursery
        #: Goes up with every change of the leader: a worker that remembers another number has lost the lead.
        self.turn = 0
        #: Workers without anything to do. A cancelled one leaves the lot by itself.
        self.idle = trio.lowlevel.ParkingLot()
        #: Set while the leader is parked in the ring.
        self.leader_parked: trio.CancelScope | None = None
        self.suspended: set[_Worker] = set()
        self.finished = trio.Event()

    def hand_over(self) -> None:
        """Name the next leader. It starts when the present one suspends."""
        self.turn += 1
        if self.idle:
            self.idle.unpark()
        else:
            self.nursery.start_soon(_Worker(self).work, name=f"ublk queue {self.queue.queue_id} worker")

    def submit_late(self) -> None:
        """Send a follower's answer, unless the leader is about to do so."""
        if self.leader_parked is not None:
            self.queue.flush()
            if self.queue.ready or self.queue.pressed:
                self.leader_parked.cancel()

    def cancel_suspended(self) -> None:
        for worker in self.suspended:
            worker.scope.cancel()


class _Worker:
    """One task of the crew: leads, or finishes the request that made it lose the lead, or is idle."""

    def __init__(self, crew: _Crew) -> None:
        self.crew = crew
        self.scope = trio.CancelScope()
        self.request: Request | None = None

    async def work(self) -> None:
        crew = self.crew
        with self.scope:
            while not crew.finished.is_set():
                await self._lead()
                if not crew.finished.is_set():
                    await crew.idle.park()
        if self.request is not None:
            # Cancelled in the middle of a handler, which has no answer any more.
            crew.suspended.discard(self)
            crew.queue.answer_late(self.request, -errno.EIO)
            crew.submit_late()

    async def _lead(self) -> None:
        """Reap and serve until the lead is lost, and the request that lost it is answered; or until the end."""
        crew, queue = self.crew, self.crew.queue
        turn = crew.turn
        while True:
            for event in queue.events:
                request = queue.receive(event)
                if request is not None:
                    await self._serve(request)
                    if crew.turn != turn:
                        crew.submit_late()
                        return
            queue.flush()
            while queue.ready:
                await self._serve(queue.ready.popleft())
                if crew.turn != turn:
                    crew.submit_late()
                    return
                queue.flush()
            if queue.pressed and (again := queue.next_try()) is not None:
                await self._serve(again, again=True)
                if crew.turn != turn:
                    crew.submit_late()
                    return
                continue
            if queue.reap():
                await trio.lowlevel.checkpoint()
            elif queue.tags.all_ended:
                crew.finished.set()
                crew.idle.unpark_all()
                return
            else:
                await self._park()
                queue.reap()

    async def _serve(self, request: Request, *, again: bool = False) -> None:
        queue = self.crew.queue
        result = queue.try_again(request) if again else queue.start(request)
        if not isinstance(result, int):
            self.request = request
            coroutine = result if isinstance(result, Coroutine) else _as_coroutine(result)
            try:
                result = queue.handlers.finish(request, await _drive(coroutine, self._suspended))
            except Exception as exception:
                result = queue.handlers.failed(request, exception)
            self.request = None
            if self in self.crew.suspended:
                self.crew.suspended.remove(self)
                again = True
        if again:
            queue.answer_late(request, result)
        else:
            queue.answer(request, result)

    def _suspended(self) -> None:
        assert self.request is not None
        self.crew.suspended.add(self)
        self.crew.queue.line.began(self.request)
        self.crew.hand_over()

    async def _park(self) -> None:
        crew = self.crew
        deadline = crew.queue.line.deadline if crew.queue.pressed else math.inf
        with trio.CancelScope(deadline=deadline) as crew.leader_parked:
            try:
                await crew.queue.ring.wait()
            finally:
                crew.leader_parked = None
