"""The socket's place in the file system: made with the right mode and owner, guarded by a lock, removed at the end.

Facts:

- A server that dies leaves its socket file behind, and bind() fails with EADDRINUSE on it whether or not anybody listens.
- A lock of flock() goes with the process. SPDK locks ``PATH.lock``, and so do we: the two notice each other.
- The lock's file is removed by whoever holds it. So somebody else may have opened it before and lock it after it is gone;
  the lock counts only if the file is still the one at that path.
- On Linux bind() makes the file with the mode of the socket's own inode, which fchmod() sets; umask, which the whole process
  shares, need not be touched.
- connect() fails with ECONNREFUSED on a socket that does not listen. So mode and owner are set before listen().
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ublk_trio.errors import UsageError, errno_text

#: sockaddr_un has 108 bytes, the last of which is 0.
PATH_BYTES_MAX = 107
#: Connections that wait to be accepted.
BACKLOG = 512


@contextmanager
def listening_socket(
    path: str, *, mode: int = 0o600, owner: int | None = None, group: int | None = None
) -> Iterator[socket.socket]:
    """A socket that listens at ``path``; at the end of the block it is closed and its file and lock are removed.

    A file that a dead server left is replaced. Raises `UsageError` when another server is there, when what is there is
    no socket, or when the path is too long; `OSError` when the system refuses.
    """
    if not 0 < len(os.fsencode(path)) <= PATH_BYTES_MAX:
        raise UsageError(f"socket {path!r}: a socket's path has 1 to {PATH_BYTES_MAX} bytes: choose a shorter one")
    with _lock(path), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)
        _remove_stale(path)
        os.fchmod(sock.fileno(), 0)
        _bind(sock, path)
        made = os.lstat(path)
        try:
            if owner is not None or group is not None:
                os.chown(path, -1 if owner is None else owner, -1 if group is None else group, follow_symlinks=False)
            os.chmod(path, mode)
            sock.listen(BACKLOG)
            yield sock
        finally:
            _remove_own(path, made)


@contextmanager
def _lock(path: str) -> Iterator[None]:
    lock_path = f"{path}.lock"
    while True:
        lock = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise _in_use(path) from None
            if not _is_at(lock_path, os.fstat(lock)):
                continue  # its last holder removed it meanwhile
            try:
                yield
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(lock_path)
            return
        finally:
            os.close(lock)


def _in_use(path: str) -> UsageError:
    return UsageError(f"socket {path}: another server is there: stop it, or choose another path")


def _is_at(path: str, made: os.stat_result) -> bool:
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return False
    return (found.st_dev, found.st_ino) == (made.st_dev, made.st_ino)


def _remove_own(path: str, made: os.stat_result) -> None:
    if _is_at(path, made):
        os.unlink(path)


def _remove_stale(path: str) -> None:
    """Remove the socket file of a server that is gone. Others that use no lock are found by connecting."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise UsageError(f"socket {path}: what is there is not a socket: move it, or choose another path")
    # Without permissions it has not got as far as listening: its server died before.
    number = _connect(path) if stat.S_IMODE(found.st_mode) else errno.ECONNREFUSED
    if number in (0, errno.EAGAIN):  # EAGAIN: it listens, and more wait already than it allows
        raise _in_use(path)
    if number not in (errno.ECONNREFUSED, errno.ENOENT):
        raise OSError(number, f"socket {path}: cannot tell whether a server is there: {errno_text(number)}")
    _remove_own(path, found)


def _connect(path: str) -> int:
    """The errno of a connection, or 0."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        return probe.connect_ex(path)


def _bind(sock: socket.socket, path: str) -> None:
    try:
        sock.bind(path)
    except OSError as error:
        # Python names no file here.
        raise OSError(error.errno, f"socket {path}: {errno_text(error.errno or 0)}") from error
