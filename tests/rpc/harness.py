"""A server in the same process, and a client that sends whatever it is told to."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import attrs
import trio
import trio.testing

from tests.rpc.fake_table import FAKE_METHODS, Service
from ublk_trio.rpc import FRAMEWORK_METHODS, Bounds, Dispatcher, Framework, RpcServer, State, serve_rpc
from ublk_trio.rpc.splitter import Splitter

#: Long enough for everything that a test waits for: virtual seconds, mostly.
SECONDS_MAX = 20_000.0
#: Of a splitter.
BOUNDS = {"bytes_max": 1 << 20, "depth_max": 64}


@attrs.define
class Served:
    """A server under test, and what it works on."""

    path: str
    service: Service
    dispatcher: Dispatcher
    server: RpcServer
    nursery: trio.Nursery
    signals: list[signal.Signals]

    async def connect(self) -> Client:
        return Client(await trio.open_unix_socket(self.path))

    async def is_well(self) -> bool:
        """Whether a new client gets the right answer."""
        async with await self.connect() as client:
            answer = await client.call("echo", {"value": "ping"})
            return bool(answer == {"jsonrpc": "2.0", "id": 1, "result": "ping"})

    def stop(self) -> None:
        """Cancel the server, as a signal would."""
        self.nursery.cancel_scope.cancel()


class Client:
    """A connection that is written to and read from as the test likes."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._buffer = ""

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await trio.aclose_forcefully(self.stream)

    async def send(self, data: bytes | str) -> None:
        await self.stream.send_all(data.encode() if isinstance(data, str) else data)

    async def ask(self, method: str, params: Any = None, *, id: Any = 1) -> None:
        """Send a request without waiting."""
        await self.send(json.dumps({"jsonrpc": "2.0", "method": method, "params": params, "id": id}))

    async def call(self, method: str, params: Any = None, *, id: Any = 1) -> Any:
        """Send a request; the next answer."""
        await self.ask(method, params, id=id)
        return await self.answer()

    async def answer(self) -> Any:
        """The next answer; None when the server has closed the connection."""
        while "\n" not in self._buffer:
            try:
                data = await self.stream.receive_some(1 << 16)
            except trio.BrokenResourceError:
                data = b""
            if not data:
                assert not self._buffer, f"the server closed in the middle of an answer: {self._buffer[:200]}"
                return None
            self._buffer += data.decode("ascii")
        line, _, self._buffer = self._buffer.partition("\n")
        return json.loads(line)

    async def answers(self, number: int) -> list[Any]:
        return [await self.answer() for _ in range(number)]

    async def is_closed(self) -> bool:
        """Whether the server closes the connection without saying more."""
        return await self.answer() is None

    async def finish(self) -> None:
        """Say that nothing more will be sent."""
        await self.stream.send_eof()


@contextmanager
def socket_path() -> Iterator[str]:
    """A path for a socket, short enough for one; nothing may be left beside it."""
    with tempfile.TemporaryDirectory(prefix="rpc-") as directory:
        yield os.path.join(directory, "s")
        assert os.listdir(directory) == [], "the socket and its lock are gone"


def make_dispatcher(service: Service, signals: list[signal.Signals], *, state: State = State.RUNTIME) -> Dispatcher:
    dispatcher = Dispatcher(state=state)
    dispatcher.register(FRAMEWORK_METHODS, Framework(dispatcher=dispatcher, kill=signals.append))
    dispatcher.register(FAKE_METHODS, service)
    return dispatcher


@asynccontextmanager
async def served(
    *, bounds: Bounds | None = None, state: State = State.RUNTIME, **options: Any
) -> AsyncIterator[Served]:
    """A server for the block; then it is cancelled, and must end by itself."""
    service = Service()
    signals: list[signal.Signals] = []
    dispatcher = make_dispatcher(service, signals, state=state)
    with socket_path() as path:
        with trio.move_on_after(SECONDS_MAX) as bound:
            async with trio.open_nursery() as nursery:
                server = await nursery.start(
                    lambda task_status: serve_rpc(path, dispatcher, bounds=bounds, task_status=task_status, **options)
                )
                yield Served(path, service, dispatcher, server, nursery, signals)
                nursery.cancel_scope.cancel()
        assert not bound.cancelled_caught, "nothing hangs"
        assert server.statistics().connections == 0, "no connection is left"


async def settle() -> None:
    """Let every task run until it waits for something that is still to come."""
    await trio.testing.wait_all_tasks_blocked()


def split(pieces: Iterable[bytes], **bounds: int) -> Iterator[bytes]:
    """The values of a stream that comes in these pieces."""
    splitter = Splitter(**{**BOUNDS, **bounds})
    for piece in pieces:
        splitter.feed(piece)
        while (value := splitter.next_value()) is not None:
            yield value
    if (value := splitter.finish()) is not None:
        yield value


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))
