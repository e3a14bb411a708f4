"""The socket file: who can connect, from which moment on, and what is in the way."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import trio
import trio.testing

from tests.rpc.harness import Client, open_files, served, socket_path
from ublk_trio import UsageError
from ublk_trio.rpc import Dispatcher, serve_rpc
from ublk_trio.rpc.peer import Peer, peer_of
from ublk_trio.rpc.socket_file import listening_socket

Clock = trio.testing.MockClock


@pytest.fixture
def path() -> Iterator[str]:
    with socket_path() as path:
        yield path


def permissions(path: str) -> int:
    return stat.S_IMODE(os.lstat(path).st_mode)


def can_connect(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(path) == 0


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666])
def test_mode_and_owner_are_set_before_anybody_can_connect(path: str, mode: int) -> None:
    """Until mode and owner are right the file has no permissions and nobody listens; the umask plays no part."""
    seen: list[tuple[str, int, bool]] = []
    chown, chmod, umask = os.chown, os.chmod, os.umask(0o022)
    os.umask(umask)

    def see(what: str, function: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> None:
            seen.append((what, permissions(path), can_connect(path)))
            function(*args, **kwargs)

        return wrapper

    with (
        mock.patch("os.chown", see("chown", chown)),
        mock.patch("os.chmod", see("chmod", chmod)),
        mock.patch("os.umask", side_effect=AssertionError("other threads make files, too")),
        listening_socket(path, mode=mode, owner=os.getuid(), group=os.getgid()),
    ):
        assert seen == [("chown", 0, False), ("chmod", 0, False)]
        assert permissions(path) == mode
        assert permissions(f"{path}.lock") == 0o600
        assert (os.lstat(path).st_uid, os.lstat(path).st_gid) == (os.getuid(), os.getgid())
        assert can_connect(path)


def test_a_failure_leaves_nothing(path: str) -> None:
    """When the owner cannot be set, there is no socket, no lock, and no open file."""
    before = open_files()
    with (
        mock.patch("os.chown", side_effect=PermissionError(errno.EPERM, "no")),
        pytest.raises(PermissionError),
        listening_socket(path, owner=1),
    ):
        pass
    assert open_files() == before
    assert os.listdir(os.path.dirname(path)) == []


def test_a_dead_server_is_replaced(path: str) -> None:
    """The files of a server that was killed are no obstacle."""
    program = (
        "import sys, time\nfrom ublk_trio.rpc.socket_file import listening_socket\n"
        "with listening_socket(sys.argv[1]):\n    print(flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, path], stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        server.stdout.readline()
        with pytest.raises(UsageError, match="another server is there"), listening_socket(path):
            pass
        assert can_connect(path), "the attempt has not harmed it"
        server.kill()
    assert sorted(os.listdir(os.path.dirname(path))) == ["s", "s.lock"]
    with listening_socket(path):
        assert can_connect(path)


def test_a_server_that_died_before_it_listened(path: str) -> None:
    """A socket file without permissions never had a server that listened; it is replaced, though nobody could connect to it."""
    with socket.socket(socket.AF_UNIX) as dead:
        os.fchmod(dead.fileno(), 0)
        dead.bind(path)
    with mock.patch.object(socket.socket, "connect_ex", return_value=errno.EACCES), listening_socket(path):
        assert permissions(path) == 0o600


def test_a_server_of_somebody_else(path: str) -> None:
    """Where nobody can tell whether a server lives, the socket is left alone, and the error names it."""
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(path)
    with (
        mock.patch.object(socket.socket, "connect_ex", return_value=errno.EACCES),
        pytest.raises(PermissionError, match=f"socket {path}: cannot tell whether a server is there: EACCES"),
        listening_socket(path),
    ):
        pass
    assert os.path.exists(path)
    os.unlink(path)


def test_two_servers_in_one_process(path: str) -> None:
    """A second server at the same path is refused, and the first one stays."""
    with listening_socket(path):
        with pytest.raises(UsageError, match=f"socket {path}: another server is there"), listening_socket(path):
            pass
        assert can_connect(path)


@pytest.mark.parametrize("backlog", [0, 5])
def test_a_live_server_without_a_lock(path: str, backlog: int) -> None:
    """A server that knows nothing of locks is found by connecting to it, also when its queue is full."""
    with socket.socket(socket.AF_UNIX) as foreign, socket.socket(socket.AF_UNIX) as first:
        foreign.bind(path)
        foreign.listen(backlog)
        first.connect(path)
        with pytest.raises(UsageError, match="another server is there"), listening_socket(path):
            pass
        assert os.path.exists(path)
    os.unlink(path)


def test_a_server_that_holds_only_the_lock(path: str) -> None:
    """A server that is just starting, as SPDK's would, is respected though it does not listen yet."""
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="another server is there"), listening_socket(path):
            pass
        assert os.path.exists(lock.name)
    os.unlink(f"{path}.lock")


@pytest.mark.parametrize("kind", ["file", "directory", "link", "link to a socket", "pipe"])
def test_what_is_not_a_socket_is_left_alone(path: str, kind: str) -> None:
    """Nothing but a socket is ever removed."""
    place = Path(path)
    target = Path(f"{path}-target")
    match kind:
        case "file":
            place.write_text("precious")
        case "directory":
            place.mkdir()
        case "link":
            place.symlink_to(target)
        case "link to a socket":
            with socket.socket(socket.AF_UNIX) as stale:
                stale.bind(str(target))
            place.symlink_to(target)
        case "pipe":
            os.mkfifo(path)
    before = os.lstat(path)
    with pytest.raises(UsageError, match="is not a socket"), listening_socket(path):
        pass
    assert os.lstat(path) == before
    place.rmdir() if kind == "directory" else place.unlink()
    target.unlink(missing_ok=True)


def test_a_lock_that_is_a_link_is_not_followed(path: str) -> None:
    """Where others may make files, a link in the lock's place must not make us open theirs."""
    os.symlink(f"{path}-elsewhere", f"{path}.lock")
    with pytest.raises(OSError, match="symbolic") as caught, listening_socket(path):
        pass
    assert caught.value.errno == errno.ELOOP
    assert not os.path.exists(f"{path}-elsewhere")
    os.unlink(f"{path}.lock")


def test_only_its_own_socket_is_removed(path: str) -> None:
    """If somebody put another file in the socket's place, that one stays."""
    with listening_socket(path):
        os.unlink(path)
        Path(path).write_text("somebody's")
    assert Path(path).read_text() == "somebody's"
    os.unlink(path)


def test_a_lock_that_vanished_does_not_count(path: str) -> None:
    """Who waited for a lock file that its holder removed takes a new one, so that there are never two holders."""
    flock = fcntl.flock
    removed: list[bool] = []

    def remove_first(file: int, operation: int) -> None:
        flock(file, operation)
        if not removed:
            removed.append(True)
            os.unlink(f"{path}.lock")

    with mock.patch("fcntl.flock", remove_first), listening_socket(path):
        assert os.path.exists(f"{path}.lock")
        with pytest.raises(UsageError, match="another server"), listening_socket(path):
            pass


def test_many_servers_at_once(path: str) -> None:
    """Of servers that start at the same moment one has the path, at any time."""
    holders: list[int] = []
    most: list[int] = []

    def try_often() -> None:
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            try:
                with listening_socket(path):
                    holders.append(1)
                    most.append(len(holders))
                    time.sleep(0.001)
                    holders.pop()
            except UsageError:
                pass

    threads = [threading.Thread(target=try_often) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1}


@pytest.mark.parametrize("path", ["", "x" * 108, "é" * 54])
def test_a_path_that_is_no_socket_s(path: str) -> None:
    """A path that is too long, or empty, is refused with the bound."""
    with pytest.raises(UsageError, match="1 to 107 bytes"), listening_socket(path):
        pass


async def test_a_missing_directory_is_named() -> None:
    """What the system refuses comes out with the path, and plainly, of the call that starts a server."""
    async with trio.open_nursery() as nursery:
        with pytest.raises(FileNotFoundError, match=r"/nowhere/s\.lock"):
            await nursery.start(serve_rpc, "/nowhere/s", Dispatcher())


# Who may connect ------------------------------------------------------------------------------------------------------


async def test_the_peer_is_who_it_is(path: str) -> None:
    """What the kernel says of a client is this process, with all of its groups."""
    with listening_socket(path) as listener:
        async with Client(await trio.open_unix_socket(path)):
            accepted, _ = await trio.socket.from_stdlib_socket(listener).accept()
            with accepted:
                peer = peer_of(accepted)
    assert (peer.pid, peer.uid, peer.gid) == (os.getpid(), os.geteuid(), os.getegid())
    assert peer.groups == {os.getegid(), *os.getgroups()}


ME, OTHER, GROUP = os.geteuid(), 54321, 7777


@pytest.mark.parametrize(
    ("uid", "groups", "options", "may"),
    [
        (ME, {1}, {}, True),
        (0, {1}, {}, True),
        (OTHER, {1}, {}, False),
        (OTHER, {GROUP}, {}, False),
        (OTHER, {1, GROUP}, {"group": GROUP}, True),
        (OTHER, {1}, {"group": GROUP}, False),
        (OTHER, {1}, {"owner": OTHER}, True),
        (OTHER + 1, {1}, {"owner": OTHER}, False),
        (OTHER, {0}, {}, False),
    ],
)
async def test_who_may_connect(
    uid: int,
    groups: set[int],
    options: dict[str, Any],
    may: bool,
    autojump_clock: Clock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Root, this process' user, the owner and the group may; anybody else is closed, logged in a line, and counted."""
    peer = Peer(pid=99, uid=uid, gid=1, groups=frozenset(groups))
    with mock.patch("ublk_trio.rpc.server.peer_of", return_value=peer), mock.patch("os.chown"):
        async with served(**options) as run, await run.connect() as client:
            if may:
                assert (await client.call("echo", {"value": 1}))["result"] == 1
            else:
                assert await client.is_closed()
                assert [r.getMessage() for r in caplog.records] == [
                    f"{run.path}: pid 99, uid {uid}, gid 1 may not connect"
                ]
            assert run.server.statistics().refused == (not may)
