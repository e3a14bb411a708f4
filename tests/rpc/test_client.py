"""The client, as a function and as a command."""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, NoReturn

import pytest
import trio
import trio.testing

from tests.rpc.fake_table import Named
from tests.rpc.harness import open_files, served, socket_path
from ublk_trio import UsageError, cli
from ublk_trio.cli.exit_codes import ExitCode
from ublk_trio.cli.rpc import _parse_parameters
from ublk_trio.cli.rpc import rpc as rpc_command
from ublk_trio.rpc import NoServerError, RpcError, call, client

Clock = trio.testing.MockClock


async def test_a_call(autojump_clock: Clock) -> None:
    """What the method returns comes back as JSON has it; mappings and structs are parameters."""
    before = open_files()
    async with served() as run:
        assert await call(run.path, "echo", {"value": {"a": ["é", None, 1.5]}}) == {"a": ["é", None, 1.5]}
        assert await call(run.path, "echo") is None
        assert await call(run.path, "note", Named(name="x")) == 1
        assert len(await call(run.path, "fill", {"length": 5_000_000})) == 5_000_000
    assert open_files() == before


async def test_an_error(autojump_clock: Clock) -> None:
    """A server's error has its code, its name and its text."""
    async with served() as run:
        with pytest.raises(RpcError) as caught:
            await call(run.path, "fail", {"errno_name": "ENODEV", "text": "there is no disk 7"})
        assert (caught.value.code, caught.value.message) == (-errno.ENODEV, "there is no disk 7")
        assert str(caught.value) == "ENODEV (-19): there is no disk 7"
        with pytest.raises(RpcError, match=r"^INVALID_PARAMS \(-32602\): params.seconds: missing$"):
            await call(run.path, "sleep")


async def test_a_request_that_is_too_long(autojump_clock: Clock) -> None:
    """A server that refuses a request before it has all of it is heard all the same."""
    async with served() as run:
        with pytest.raises(RpcError, match="longer than 262144 bytes"):
            await call(run.path, "echo", {"value": "x" * 20_000_000})


async def test_a_cancelled_call(autojump_clock: Clock) -> None:
    """Cancelling the wait leaves the call to the server."""
    async with served() as run:
        with trio.move_on_after(1) as scope:
            await call(run.path, "sleep", {"seconds": 5})
        assert scope.cancelled_caught
        await trio.sleep(5)
        assert run.service.ended == ["?"]


async def test_not_for_this_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket that one may not use is not taken for a missing server."""

    async def refuse(_path: object) -> NoReturn:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(client, "_connect", refuse)
    with pytest.raises(
        NoServerError, match=r"/run/x is not for this user: EACCES \(Permission denied\); call as the server's user"
    ):
        await call("/run/x", "spdk_get_version")


async def test_nobody_is_there() -> None:
    """Without a server, or with a dead one's file, the error says what to start."""
    with socket_path() as path:
        wanted = f"no server answers at {path}: ENOENT (No such file or directory); start one with `ublk-trio start --rpc-socket {path}`"
        with pytest.raises(NoServerError) as caught:
            await call(path, "echo")
        assert str(caught.value) == wanted
    with pytest.raises(NoServerError, match="too long"):
        await call("/" + "x" * 200, "echo")


@asynccontextmanager
async def somebody(behave: Callable[[trio.SocketStream], Awaitable[object]]) -> AsyncIterator[str]:
    """Something that listens, and behaves in some way towards each client."""

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            await behave(stream)

    with socket_path() as path:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen()
        async with trio.open_nursery() as nursery:
            listeners = [trio.SocketListener(trio.socket.from_stdlib_socket(listener))]
            nursery.start_soon(trio.serve_listeners, serve, listeners)
            yield path
            nursery.cancel_scope.cancel()
        os.unlink(path)


@pytest.mark.parametrize("answer", ["", '{"jsonrpc": "2.0", "id": 1, "res'])
async def test_a_server_that_goes_away(answer: str) -> None:
    """A server that closes before it has answered is an error; unless it was to be killed."""

    async def behave(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.send_all(answer.encode())

    async with somebody(behave) as path:
        with pytest.raises(NoServerError, match="went away before it answered"):
            await call(path, "echo")
        assert await call(path, "spdk_kill_instance", {"sig_name": "SIGKILL"}) is True


@pytest.mark.parametrize(
    "answer",
    ["HTTP/1.1 400 Bad Request\r\n", "[]", "1 ", '{"a": 1}', '{"jsonrpc": "2.0", "error": 5}', "{]", '{"a": nope}'],
)
async def test_somebody_else_listens(answer: str) -> None:
    """What does not speak JSON-RPC is an error of one line."""
    async with somebody(lambda stream: stream.send_all(answer.encode())) as path:
        with pytest.raises(NoServerError, match=r"not JSON|does not speak JSON-RPC") as caught:
            await call(path, "echo")
        assert "\n" not in str(caught.value)


async def test_a_server_without_room() -> None:
    """A client that has to wait for its place in the queue does so."""
    with socket_path() as path, socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(path)
        listener.listen(0)
        first.connect(path)
        async with trio.open_nursery() as nursery:

            async def serve_later() -> None:
                await trio.sleep(0.2)
                for _ in range(2):
                    connections.append(listener.accept()[0])
                    await trio.sleep(0.2)
                connections[1].send(b'{"jsonrpc": "2.0", "id": 1, "result": "at last"}')

            connections: list[socket.socket] = []
            nursery.start_soon(serve_later)
            assert await call(path, "echo") == "at last"
        for connection in connections:
            connection.close()
        os.unlink(path)


# The command ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pairs", "json_text", "wanted"),
    [
        ((), None, {}),
        (("a=1", "b=x", "c=true", "d=null", "e=1.5"), None, {"a": 1, "b": "x", "c": True, "d": None, "e": 1.5}),
        (('a="1"', "b=[1, 2]", 'c={"d": 1}'), None, {"a": "1", "b": [1, 2], "c": {"d": 1}}),
        (("name=Malloc0", "path=/a=b", "empty="), None, {"name": "Malloc0", "path": "/a=b", "empty": ""}),
        (("a=NaN", "b=-Infinity", "c=True", "d=0x10", "e=01"), None,
         {"a": "NaN", "b": "-Infinity", "c": "True", "d": "0x10", "e": "01"}),
        (("a=1",), '{"b": [1]}', {"a": 1, "b": [1]}),
    ],
)  # fmt: skip
def test_parameters(pairs: tuple[str, ...], json_text: str | None, wanted: dict[str, Any]) -> None:
    """A value that is JSON counts as that, anything else is a string; an object may come in one piece."""
    assert _parse_parameters(pairs, json_text) == wanted


@pytest.mark.parametrize(
    ("pairs", "json_text", "says"),
    [
        (("a",), None, "'a' is not a parameter: write key=value"),
        (("=1",), None, "write key=value"),
        (("a=1", "a=2"), None, "'a' is given twice"),
        (("a=1",), '{"a": 2}', "'a' is given twice"),
        ((), "{", "--json is not JSON"),
        ((), '{"a": NaN}', "NaN is not JSON"),
        ((), "[1]", "--json is not an object"),
    ],
)
def test_wrong_parameters(pairs: tuple[str, ...], json_text: str | None, says: str) -> None:
    """What cannot be sent is a usage error, before anybody is asked."""
    with pytest.raises(UsageError, match=says):
        _parse_parameters(pairs, json_text)


async def test_the_command(autojump_clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """The result is printed as JSON, on a line."""
    async with served() as run:
        code = await rpc_command("echo", 'value={"a": [1, "x"]}', socket=run.path)
    assert (code, json.loads(capsys.readouterr().out)) == (ExitCode.OK, {"a": [1, "x"]})


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (RpcError(-19, "there is no disk 7"), ExitCode.FAILED, "ENODEV (-19): there is no disk 7"),
        (RpcError(-32602, "params.x: missing"), ExitCode.USAGE, "INVALID_PARAMS (-32602): params.x: missing"),
        (RpcError(-32601, "Method not found: 'x'"), ExitCode.USAGE, "METHOD_NOT_FOUND (-32601): Method not found: 'x'"),
        (RpcError(-32603, "internal error"), ExitCode.FAILED, "INTERNAL_ERROR (-32603): internal error"),
        (RpcError(-1, "too early"), ExitCode.FAILED, "EPERM (-1): too early"),
        (RpcError(-16, "EBUSY (Device or resource busy)"), ExitCode.FAILED, "EBUSY (Device or resource busy)"),
        (NoServerError("no server answers"), ExitCode.UNAVAILABLE, "no server answers"),
    ],
)
def test_errors_of_the_command(error: Exception, code: ExitCode, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each error is a line with its name, and has its exit code."""
    assert cli._is_expected(error)
    assert cli._report(error) == code
    assert capsys.readouterr().err == f"ublk-trio: {line}\n"
