"""Who is at the other end of a Unix socket, and whether it is still there.

Facts (Linux):

- SO_PEERCRED says which process, user and group connected, SO_PEERGROUPS (4.13) the further groups. Both are those of the moment of
  connect() and cannot be forged.
- A peer that closed its socket shows as EPOLLHUP; one that only said that it will send no more shows as end of file, and still
  reads. An epoll descriptor that watches for nothing still reports EPOLLHUP, and is itself readable then.
"""

from __future__ import annotations

import select
import socket
import struct
from typing import Final

import attrs
import trio

#: asm-generic/socket.h; Python has no name for it.
SO_PEERGROUPS: Final = 59
_CREDENTIALS: Final = struct.Struct("iII")
#: The most that Python's getsockopt takes: 256 groups.
_GROUPS_BYTES_MAX: Final = 1024


@attrs.frozen(kw_only=True)
class Peer:
    """The process that connected."""

    pid: int
    uid: int
    gid: int
    groups: frozenset[int]

    def __str__(self) -> str:
        return f"pid {self.pid}, uid {self.uid}, gid {self.gid}"


def peer_of(sock: trio.socket.SocketType) -> Peer:
    """Who connected. Raises `OSError` where the system does not tell."""
    pid, uid, gid = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    try:
        packed = sock.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, _GROUPS_BYTES_MAX)
    except OSError:  # more groups than fit, or an old kernel: only the first group counts then
        packed = b""
    return Peer(pid=pid, uid=uid, gid=gid, groups=frozenset({gid, *struct.unpack(f"{len(packed) // 4}I", packed)}))


async def wait_hung_up(sock: trio.socket.SocketType) -> None:
    """Wait until the peer has closed its socket. Merely having shut down its sending side does not count."""
    with select.epoll(1) as watching:
        watching.register(sock.fileno(), 0)
        await trio.lowlevel.wait_readable(watching.fileno())
