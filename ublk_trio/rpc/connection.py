"""One client: its requests are read as they come, carried out side by side, and answered as they end.

What ends what:

- A request that is JSON but wrong is answered, and the connection goes on. After bytes that are no JSON, or break a bound, nobody
  knows where a request begins: that is answered with the id null, nothing more is read, and the connection is closed when the calls
  in progress have been answered.
- A client that goes away ends nothing but the calls whose method says so: what was asked for is carried out, as by SPDK's server.
- `Connection.stop` ends the reading at once, the calls after a bounded time.
"""

from __future__ import annotations

import errno
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import attrs
import trio

from ublk_trio.nursery import open_plain_nursery
from ublk_trio.rpc.bounds import Bounds
from ublk_trio.rpc.dispatcher import Dispatcher
from ublk_trio.rpc.errors import ErrorCode, RpcError, explain
from ublk_trio.rpc.messages import NO_ID, decode, error_text, id_of, parse_request, result_text
from ublk_trio.rpc.peer import Peer, wait_hung_up
from ublk_trio.rpc.splitter import MalformedError, Splitter

logger = logging.getLogger("ublk_trio.rpc")

#: Bytes that are read at once.
READ_BYTES = 1 << 16
#: Seconds for sending the last answers when the server stops, after the calls' grace time.
LAST_WORDS_SECONDS = 1.0


@attrs.define(kw_only=True)
class Counts:
    """What was done so far, of all connections."""

    requests: int = 0
    errors: int = 0


class Connection:
    """Serves one stream until its client is done, it breaks, or `stop`."""

    def __init__(
        self, stream: trio.SocketStream, peer: Peer, dispatcher: Dispatcher, bounds: Bounds, counts: Counts
    ) -> None:
        self._stream = stream
        self._peer = peer
        self._dispatcher = dispatcher
        self._bounds = bounds
        self._counts = counts
        self._free = trio.Semaphore(bounds.requests)
        self._sending = trio.Lock()
        self._scope = trio.CancelScope(shield=True)
        self._reading = trio.CancelScope()
        self._calls: set[trio.CancelScope] = set()
        #: Those among them that end with the client.
        self._waits: set[trio.CancelScope] = set()
        self._calls_deadline = math.inf
        self._client_gone = False

    async def run(self) -> None:
        """Serve. Only `stop` ends it early: it is shielded from cancellation, so that calls are not cut off."""
        with self._scope:
            try:
                async with open_plain_nursery() as nursery:
                    nursery.start_soon(self._watch_client)
                    async with trio.open_nursery() as calls:
                        await self._read(calls)
                    nursery.cancel_scope.cancel()
            finally:
                await trio.aclose_forcefully(self._stream)

    def stop(self) -> None:
        """Read no more; calls in progress have `grace_seconds` left, and are then cancelled and answered so."""
        self._reading.cancel()
        self._calls_deadline = trio.current_time() + self._bounds.grace_seconds
        for scope in self._calls:
            scope.deadline = self._calls_deadline
        self._scope.deadline = self._calls_deadline + LAST_WORDS_SECONDS

    async def _watch_client(self) -> None:
        await wait_hung_up(self._stream.socket)
        self._lose_client()

    def _lose_client(self) -> None:
        self._client_gone = True
        for scope in self._waits:
            scope.cancel()

    # Reading -----------------------------------------------------------------------------------------------------------

    async def _read(self, calls: trio.Nursery) -> None:
        try:
            with self._reading:
                await self._read_requests(calls)
        except RpcError as error:
            logger.warning("%s: %s; closing the connection", self._peer, error.message)
            await self._send(self._error(NO_ID, error))

    async def _read_requests(self, calls: trio.Nursery) -> None:
        """Until the stream ends. Raises `RpcError` when there is no sense in reading on."""
        splitter = Splitter(bytes_max=self._bounds.request_bytes, depth_max=self._bounds.nesting)
        deadline = math.inf
        while True:
            data = await self._receive(deadline)
            splitter.feed(data)
            for value in _values(splitter, ended=not data):
                await self._begin(calls, decode(value))
                deadline = math.inf
            if not data:
                return
            # From a request's first byte to its last, however it trickles in. While we don't read, the client is not late.
            deadline = (
                min(deadline, trio.current_time() + self._bounds.request_seconds) if splitter.partial else math.inf
            )

    async def _receive(self, deadline: float) -> bytes:
        with trio.move_on_at(deadline) as scope:
            try:
                return bytes(await self._stream.receive_some(READ_BYTES))
            except trio.BrokenResourceError:
                return b""
        assert scope.cancelled_caught
        seconds = self._bounds.request_seconds
        raise RpcError(ErrorCode.PARSE_ERROR, f"parse error: the request did not end within {seconds:g} s")

    async def _begin(self, calls: trio.Nursery, value: Any) -> None:
        await self._free.acquire()
        # A task that is started this way has run to its first wait when we are back: calls begin in the order of their
        # requests, and what needs no waiting is answered before anything that we say next. Without the shield a stop in
        # this very moment would cancel the call instead of letting it finish.
        with trio.CancelScope(shield=True):
            await calls.start(self._handle, value)

    # Calling -----------------------------------------------------------------------------------------------------------

    async def _handle(self, value: Any, *, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        try:
            text = await (self._answer_batch(value) if isinstance(value, list) else self._answer(value))
            if text is not None:
                await self._send(text)
        finally:
            self._free.release()

    async def _answer_batch(self, values: list[Any]) -> str | None:
        """One after the other, in their order: whoever sends a batch expects what follows to build on what precedes."""
        try:
            if not values:
                raise RpcError(ErrorCode.INVALID_REQUEST, "invalid request: a batch has at least one request")
            if len(values) > self._bounds.batch:
                raise RpcError(
                    ErrorCode.INVALID_REQUEST, f"invalid request: a batch has at most {self._bounds.batch} requests"
                )
        except RpcError as error:
            return self._error(NO_ID, error)
        answers = [await self._answer(value) for value in values]
        given = [answer for answer in answers if answer is not None]
        return f"[{','.join(given)}]" if given else None

    async def _answer(self, value: Any) -> str | None:
        """The answer to one request; None for a notification. Every exception of the method becomes an answer."""
        self._counts.requests += 1
        try:
            request = parse_request(value)
        except RpcError as error:
            return self._error(id_of(value), error)
        logger.debug("%s calls %s, id %r", self._peer, request.method, request.id)
        try:
            text = result_text(request.id, await self._call(request.method, request.params))
        except Exception as error:
            text = self._error(request.id, explain(error))
        return None if request.notification else text

    async def _call(self, name: str, params: Any) -> object:
        ends_with_client = self._dispatcher.find(name).ends_with_client
        with self._call_scope(ends_with_client=ends_with_client) as scope:
            if not scope.cancel_called:
                return await self._dispatcher.call(name, params)
        why = "the client is gone" if ends_with_client and self._client_gone else "the server stops"
        raise RpcError(-errno.ECANCELED, f"{why}: the call was cancelled")

    @contextmanager
    def _call_scope(self, *, ends_with_client: bool) -> Iterator[trio.CancelScope]:
        with trio.CancelScope(deadline=self._calls_deadline) as scope:
            self._calls.add(scope)
            if ends_with_client:
                self._waits.add(scope)
                if self._client_gone:
                    scope.cancel()
            try:
                yield scope
            finally:
                self._calls.discard(scope)
                self._waits.discard(scope)

    # Answering ---------------------------------------------------------------------------------------------------------

    def _error(self, id: str | int | float | None, error: RpcError) -> str:
        self._counts.errors += 1
        return error_text(id, error)

    async def _send(self, text: str) -> None:
        async with self._sending:
            if self._client_gone:
                return
            with trio.move_on_after(self._bounds.answer_seconds) as scope:
                try:
                    await self._stream.send_all(f"{text}\n".encode("ascii"))
                except trio.BrokenResourceError:
                    self._lose_client()
            if scope.cancelled_caught:
                seconds = self._bounds.answer_seconds
                logger.warning("%s: did not read its answers for %g s; closing the connection", self._peer, seconds)
                self._lose_client()
                self._reading.cancel()


def _values(splitter: Splitter, *, ended: bool) -> Iterator[bytes]:
    """The values that are whole, and at the end of the stream the last one. Raises `RpcError` instead of the splitter's."""
    try:
        while (value := splitter.next_value()) is not None:
            yield value
        if ended and (value := splitter.finish()) is not None:
            yield value
    except MalformedError as error:
        raise RpcError(ErrorCode.PARSE_ERROR, f"parse error: {error}") from error
