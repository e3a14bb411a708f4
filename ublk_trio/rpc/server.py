"""The server: a task that listens, decides who may connect, and gives each client a `Connection`."""

from __future__ import annotations

import errno
import logging
import os

import attrs
import trio

from ublk_trio.errors import error_line
from ublk_trio.nursery import open_plain_nursery
from ublk_trio.rpc.bounds import Bounds
from ublk_trio.rpc.connection import Connection, Counts
from ublk_trio.rpc.dispatcher import Dispatcher
from ublk_trio.rpc.peer import Peer, peer_of
from ublk_trio.rpc.socket_file import listening_socket

logger = logging.getLogger("ublk_trio.rpc")

#: Seconds to wait when there is no descriptor or no memory for another connection.
ACCEPT_PAUSE_SECONDS = 0.1
_FULL = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


@attrs.frozen(kw_only=True)
class RpcStatistics:
    """What a server did so far, and has now."""

    #: Connected now.
    connections: int
    #: Requests that came, each of a batch counted; and those that were answered with an error.
    requests: int
    errors: int
    #: Connections of somebody who may not.
    refused: int


class RpcServer:
    """Made by `serve_rpc`, never directly."""

    def __init__(
        self, path: str, dispatcher: Dispatcher, bounds: Bounds, uids: frozenset[int], gid: int | None
    ) -> None:
        self.path = path
        self._dispatcher = dispatcher
        self._bounds = bounds
        self._uids = uids
        self._gid = gid
        self._free = trio.Semaphore(bounds.connections)
        self._connections: set[Connection] = set()
        self._counts = Counts()
        self._refused = 0

    def statistics(self) -> RpcStatistics:
        """What it did so far, and has now."""
        return RpcStatistics(
            connections=len(self._connections),
            requests=self._counts.requests,
            errors=self._counts.errors,
            refused=self._refused,
        )

    async def _accept_for_ever(self, listener: trio.socket.SocketType, nursery: trio.Nursery) -> None:
        while True:
            if not self._free.value:
                logger.warning("%s: %d connections: the next one waits", self.path, self._bounds.connections)
            await self._free.acquire()
            sock = None
            try:
                sock = await self._accept(listener)
            finally:
                if sock is None:
                    self._free.release()
            # Nothing below waits, so a connection that was accepted is never lost.
            peer = self._admit(sock)
            if peer is None:
                sock.close()
                self._free.release()
                continue
            connection = Connection(trio.SocketStream(sock), peer, self._dispatcher, self._bounds, self._counts)
            self._connections.add(connection)
            nursery.start_soon(self._serve, connection)

    async def _accept(self, listener: trio.socket.SocketType) -> trio.socket.SocketType:
        while True:
            try:
                sock, _ = await listener.accept()
                return sock
            except OSError as error:
                if error.errno in _FULL:
                    logger.error("%s: cannot accept a connection: %s", self.path, error.strerror)
                    await trio.sleep(ACCEPT_PAUSE_SECONDS)
                elif error.errno != errno.ECONNABORTED:
                    raise

    def _admit(self, sock: trio.socket.SocketType) -> Peer | None:
        """Who connected, or None if it may not."""
        peer = peer_of(sock)
        if peer.uid in self._uids or self._gid in peer.groups:
            return peer
        self._refused += 1
        logger.warning("%s: %s may not connect", self.path, peer)
        return None

    async def _serve(self, connection: Connection) -> None:
        try:
            await connection.run()
        except OSError as error:
            logger.error("%s: a connection failed: %s", self.path, error_line(error))
        except Exception:
            logger.exception("%s: a connection failed, which is a bug", self.path)
        finally:
            self._connections.discard(connection)
            self._free.release()

    def _stop(self) -> None:
        for connection in self._connections:
            connection.stop()


async def serve_rpc(
    path: str,
    dispatcher: Dispatcher,
    *,
    mode: int = 0o600,
    owner: int | None = None,
    group: int | None = None,
    bounds: Bounds | None = None,
    task_status: trio.TaskStatus[RpcServer] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer calls on a Unix socket until cancelled: ``server = await nursery.start(serve_rpc, path, dispatcher)``.

    The file gets ``mode``, and ``owner`` and ``group`` (numbers) if given, before anybody can connect. Besides root, this
    process' user and the owner may connect, and with ``group`` its members. Nothing that a client does, and no
    exception of a method, ends the server.

    Cancelled, it accepts and reads no more, removes the socket file, gives calls in progress `Bounds.grace_seconds`, then
    cancels them and says so to their clients. What a method shields from cancellation is waited for.

    Raises `UsageError` when the path cannot be used or another server is there, `OSError` when the system refuses.
    """
    uids = frozenset({0, os.geteuid()} | ({owner} if owner is not None else set()))
    server = RpcServer(path, dispatcher, bounds or Bounds(), uids, group)
    # Connections are shielded, each by itself; this task and its accepting are not. So the socket goes first.
    async with open_plain_nursery() as nursery:
        try:
            with listening_socket(path, mode=mode, owner=owner, group=group) as listener:
                task_status.started(server)
                await server._accept_for_ever(trio.socket.from_stdlib_socket(listener), nursery)
        finally:
            server._stop()
