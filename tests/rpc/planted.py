"""Bugs to plant in the wire: each breaks it in one place, and its own tests must find it.

Every function is a context manager under which the package has the bug that the first line of its docstring names.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import attrs
import trio
import trio.lowlevel

from ublk_trio.rpc import connection as connection_module
from ublk_trio.rpc import messages, server, socket_file
from ublk_trio.rpc.connection import Connection
from ublk_trio.rpc.dispatcher import Dispatcher
from ublk_trio.rpc.errors import explain
from ublk_trio.rpc.messages import Request
from ublk_trio.rpc.peer import peer_of
from ublk_trio.rpc.splitter import Splitter


@attrs.frozen
class Plant:
    """A bug, and the tests of tests/rpc that must notice it, as pytest takes them."""

    name: str
    plant: Callable[[], AbstractContextManager[None]]
    tests: tuple[str, ...]


PLANTED: list[Plant] = []


def _planted(tests: str, only: str = "") -> Callable[[Callable[[], Iterator[None]]], None]:
    def decorate(function: Callable[[], Iterator[None]]) -> None:
        PLANTED.append(Plant(function.__name__, contextmanager(function), (f"tests/rpc/{tests}", "-k", only)))

    return decorate


# The stream -----------------------------------------------------------------------------------------------------------


@_planted("test_splitter.py", "tricky")
def string_ends_with_the_piece() -> Iterator[None]:
    """A piece of the stream begins outside of strings, wherever the last one ended."""
    feed = Splitter.feed

    def forgetful(self: Splitter, data: bytes) -> None:
        self._in_string = self._in_string and not self._closers
        feed(self, data)

    with mock.patch.object(Splitter, "feed", forgetful):
        yield


@_planted("test_splitter.py", "tricky")
def backslash_at_the_cut() -> Iterator[None]:
    """A backslash that ends a piece escapes nothing."""
    find = Splitter._find_bracket

    def careless(self: Splitter) -> int | None:
        end = find(self)
        if end is None and self._in_string and self._buffer.endswith(b"\\"):
            self._scanned = len(self._buffer)
        return end

    with mock.patch.object(Splitter, "_find_bracket", careless):
        yield


@_planted("test_splitter.py", "at_once")
def any_bracket_closes() -> Iterator[None]:
    """A closing bracket closes whatever is open."""
    step = Splitter._step

    def lenient(self: Splitter, byte: int) -> None:
        step(self, self._closers[-1] if byte in b"]}" else byte)

    with mock.patch.object(Splitter, "_step", lenient):
        yield


@_planted("test_splitter_any_cut.py", "linear and quotes")
def looks_again() -> Iterator[None]:
    """A value that is not whole is looked at from its beginning with every piece."""
    find = Splitter._find_end

    def again(self: Splitter) -> int | None:
        self._scanned, self._in_string = 0, False
        self._closers.clear()
        return find(self)

    with mock.patch.object(Splitter, "_find_end", again):
        yield


@_planted("test_corpus.py", "truncated")
def cut_off_request_is_silent() -> Iterator[None]:
    """A stream that ends within a request ends without a word."""

    def silent(self: Splitter) -> bytes | None:
        return None

    with mock.patch.object(Splitter, "finish", silent):
        yield


@_planted("test_corpus.py", "bounds")
def one_level_too_many() -> Iterator[None]:
    """Nesting is bounded one level late."""
    made = Splitter.__init__

    def deeper(self: Splitter, *, bytes_max: int, depth_max: int) -> None:
        made(self, bytes_max=bytes_max, depth_max=depth_max + 1)

    with mock.patch.object(Splitter, "__init__", deeper):
        yield


# Messages -------------------------------------------------------------------------------------------------------------


@_planted("test_corpus.py", "parameters")
def keys_twice() -> Iterator[None]:
    """The last of two equal keys wins, without a word."""
    with mock.patch.object(messages, "_object", messages._Object):
        yield


@_planted("test_corpus.py", "no-json")
def lenient_json() -> Iterator[None]:
    """What Python's own parser takes is good enough: NaN, lone surrogates."""
    with mock.patch("msgspec.json.decode"):
        yield


@_planted("test_corpus.py", "pipelined")
def notifications_are_answered() -> Iterator[None]:
    """A notification gets an answer with the id null."""
    parse = messages.parse_request

    def chatty(value: Any) -> Request:
        return attrs.evolve(parse(value), notification=False)

    with mock.patch.object(connection_module, "parse_request", chatty):
        yield


# Calls ----------------------------------------------------------------------------------------------------------------


@_planted("test_server.py", "order")
def any_order() -> Iterator[None]:
    """Some calls take a turn of the scheduler before they begin."""
    handle = Connection._handle

    async def late(self: Connection, value: Any, *, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        if value["method"] == "sleep":
            await trio.lowlevel.checkpoint()
            await trio.lowlevel.checkpoint()
            await trio.lowlevel.checkpoint()
        await handle(self, value, task_status=trio.TASK_STATUS_IGNORED)

    with mock.patch.object(Connection, "_handle", late):
        yield


@_planted("test_server.py")
def one_at_a_time() -> Iterator[None]:
    """A connection's next request is read when the last one is answered."""

    async def begin(self: Connection, calls: trio.Nursery, value: Any) -> None:
        await self._free.acquire()
        await self._handle(value, task_status=trio.TASK_STATUS_IGNORED)

    with mock.patch.object(Connection, "_begin", begin):
        yield


@_planted("test_server.py")
def no_back_pressure() -> Iterator[None]:
    """Every request is begun as soon as it is read."""
    acquire = trio.Semaphore.acquire

    async def at_once(self: trio.Semaphore) -> None:
        if self.value == 0 and self._max_value is None:
            self.release()
        await acquire(self)

    with mock.patch.object(trio.Semaphore, "acquire", at_once):
        yield


@_planted("test_server.py", "mixed")
def answers_are_mixed() -> Iterator[None]:
    """Whoever has an answer sends it, also while another is being sent."""

    class NoLock:
        async def __aenter__(self) -> None:
            await trio.lowlevel.checkpoint()

        async def __aexit__(self, *exc: object) -> None:
            await trio.lowlevel.checkpoint()

    made = Connection.__init__

    def unlocked(self: Connection, *args: Any) -> None:
        made(self, *args)
        self._sending = NoLock()  # type: ignore[assignment]

    with mock.patch.object(Connection, "__init__", unlocked):
        yield


@_planted("test_server.py")
def calls_end_with_their_client() -> Iterator[None]:
    """A client that goes takes its calls with it."""

    def lose_all(self: Connection) -> None:
        self._client_gone = True
        for scope in self._calls:
            scope.cancel()

    with mock.patch.object(Connection, "_lose_client", lose_all):
        yield


@_planted("test_server.py")
def waits_outlive_their_client() -> Iterator[None]:
    """A mere wait goes on for a client that is gone."""
    scope = Connection._call_scope

    def for_ever(self: Connection, *, ends_with_client: bool) -> AbstractContextManager[trio.CancelScope]:
        return scope(self, ends_with_client=False)

    with mock.patch.object(Connection, "_call_scope", for_ever):
        yield


@_planted("test_server.py")
def cut_off_at_the_stop() -> Iterator[None]:
    """A stop cancels the calls in progress at once."""

    def at_once(self: Connection) -> None:
        self._scope.cancel()

    with mock.patch.object(Connection, "stop", at_once):
        yield


@_planted("test_server.py", "moment")
def started_unshielded() -> Iterator[None]:
    """A call that begins in the moment of a stop is cancelled with the reading."""

    async def begin(self: Connection, calls: trio.Nursery, value: Any) -> None:
        await self._free.acquire()
        await calls.start(self._handle, value)

    with mock.patch.object(Connection, "_begin", begin):
        yield


@_planted("test_cancelled_calls.py")
def connections_are_cancelled() -> Iterator[None]:
    """A connection is cancelled with the server, in the middle of its calls."""
    made = Connection.__init__

    def unshielded(self: Connection, *args: Any) -> None:
        made(self, *args)
        self._scope.shield = False

    with mock.patch.object(Connection, "__init__", unshielded):
        yield


@_planted("test_corpus.py", "slow")
def the_clock_begins_anew() -> Iterator[None]:
    """The time for a request is counted from its last byte."""
    receive = Connection._receive

    async def patient(self: Connection, deadline: float) -> bytes:
        return await receive(self, trio.current_time() + self._bounds.request_seconds)

    with mock.patch.object(Connection, "_receive", patient):
        yield


@_planted("test_corpus.py", "no-json")
def goes_on_after_garbage() -> Iterator[None]:
    """After something that is not JSON the server waits for the next request."""
    read = Connection._read

    async def again(self: Connection, calls: trio.Nursery) -> None:
        await read(self, calls)
        await trio.sleep_forever()

    with mock.patch.object(Connection, "_read", again):
        yield


@_planted("test_corpus.py", "failures")
def errors_are_told() -> Iterator[None]:
    """A client is told the text of an exception that nobody expected."""
    told_to_clients = explain

    def talkative(error: BaseException) -> Any:
        told = told_to_clients(error)
        told.message = str(error)
        return told

    with mock.patch("ublk_trio.rpc.connection.explain", talkative):
        yield


@_planted("test_server.py")
def no_states() -> Iterator[None]:
    """Every method can be called at any time."""
    find = Dispatcher._find

    def anything(self: Dispatcher, name: str) -> Any:
        return self._methods.get(name) or find(self, name)

    with mock.patch.object(Dispatcher, "_find", anything):
        yield


# The socket -----------------------------------------------------------------------------------------------------------


@_planted("test_socket_file.py")
def open_to_all_at_first() -> Iterator[None]:
    """The socket file is made with the umask's mode, and changed later."""
    with mock.patch("os.fchmod"):
        yield


@_planted("test_socket_file.py")
def removes_anything() -> Iterator[None]:
    """Whatever is at the path is removed."""
    with mock.patch("stat.S_ISSOCK", return_value=True):
        yield


@_planted("test_socket_file.py")
def no_lock() -> Iterator[None]:
    """The lock is not asked."""
    with mock.patch("fcntl.flock"):
        yield


@_planted("test_socket_file.py")
def lock_of_a_removed_file() -> Iterator[None]:
    """A lock counts although its file is gone."""
    is_at = socket_file._is_at

    def trusting(path: str, made: os.stat_result) -> bool:
        return path.endswith(".lock") or is_at(path, made)

    with mock.patch.object(socket_file, "_is_at", trusting):
        yield


@_planted("test_socket_file.py")
def everybody_may() -> Iterator[None]:
    """Whoever can open the socket may call."""

    def admit(self: server.RpcServer, sock: trio.socket.SocketType) -> Any:
        return peer_of(sock)

    with mock.patch.object(server.RpcServer, "_admit", admit):
        yield
