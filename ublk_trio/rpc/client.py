"""The client: one call."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from typing import Any, Literal

import msgspec
import trio

from ublk_trio.errors import error_line
from ublk_trio.rpc.errors import NoServerError, RpcError
from ublk_trio.rpc.messages import decode, request_text
from ublk_trio.rpc.splitter import MalformedError, Splitter

#: Where SPDK's programs have it.
DEFAULT_PATH = "/var/tmp/spdk.sock"
#: Bytes of an answer, and how deep it may be nested.
ANSWER_BYTES_MAX = 32 << 20
ANSWER_NESTING_MAX = 64
_READ_BYTES = 1 << 16
_ROOM_POLL_SECONDS = 0.05


class _Failure(msgspec.Struct):
    code: int
    message: str = ""


class _Answer(msgspec.Struct):
    jsonrpc: Literal["2.0"]
    result: Any = None
    error: _Failure | None = None


async def call(path: str | os.PathLike[str], method: str, params: object = None) -> Any:
    """Call a method of the server at ``path``; returns its result, as JSON has it.

    ``params`` is a mapping, a `msgspec.Struct`, or None. Raises `RpcError` when the server answers with an error and
    `NoServerError` when it does not answer at all. Takes as long as the call does; cancelling it leaves the call to
    the server, which carries it out.

    A server that is killed by ``spdk_kill_instance`` may be gone before it can answer. That counts as done.
    """
    try:
        stream = await _connect(path)
    except PermissionError as error:
        raise NoServerError(
            f"{os.fspath(path)} is not for this user: {error_line(error)}; call as the server's user, or as root"
        ) from error
    except OSError as error:
        raise NoServerError(
            f"no server answers at {os.fspath(path)}: {error_line(error)}; "
            f"start one with `ublk-trio start --rpc-socket {os.fspath(path)}`"
        ) from error
    async with stream:
        answer = await _exchange(stream, request_text(method, params, 1))
    if answer is None:
        if method == "spdk_kill_instance":
            return True
        raise NoServerError(f"the server at {os.fspath(path)} went away before it answered: see its log")
    try:
        checked = msgspec.convert(answer, _Answer)
    except msgspec.ValidationError as error:
        raise NoServerError(f"what answers at {os.fspath(path)} does not speak JSON-RPC: {error}") from error
    if checked.error is not None:
        raise RpcError(checked.error.code, checked.error.message)
    return checked.result


async def _connect(path: str | os.PathLike[str]) -> trio.SocketStream:
    """Connect; wait for room where more clients wait already than the server's socket holds.

    Linux then answers EAGAIN at once, which Trio takes for a connection that is being made.
    """
    while True:
        stream = await trio.open_unix_socket(path)
        try:
            stream.socket.getpeername()
            return stream
        except OSError as error:
            await trio.aclose_forcefully(stream)
            if error.errno != errno.ENOTCONN:
                raise
        await trio.sleep(_ROOM_POLL_SECONDS)


async def _exchange(stream: trio.SocketStream, request: str) -> Any:
    """Send, and return the first value that comes back; None if none does."""
    splitter = Splitter(bytes_max=ANSWER_BYTES_MAX, depth_max=ANSWER_NESTING_MAX)
    try:
        # A server that refuses a request half way answers and closes: the answer can be read all the same.
        with suppress(trio.BrokenResourceError):
            await stream.send_all(request.encode("ascii"))
        while data := await stream.receive_some(_READ_BYTES):
            splitter.feed(data)
            value = splitter.next_value()
            if value is not None:
                return decode(value)
    except trio.BrokenResourceError:
        return None
    except (MalformedError, RpcError) as error:
        raise NoServerError(f"the answer is not JSON: {error}") from error
    return None
