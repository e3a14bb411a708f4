"""A Ceph cluster of one monitor and one storage daemon, in memory, of an ordinary user, on 127.0.0.1 alone."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import trio

#: What there must be, and the Debian packages with it: `tools/setup.sh` installs them.
PROGRAMS = {"ceph-mon": "ceph-mon", "ceph-osd": "ceph-osd", "ceph": "ceph-common", "rbd": "ceph-common"}
#: Seconds for the whole start; three on a quiet machine.
START_SECONDS_MAX = 120.0
#: Seconds for a command of Ceph's.
COMMAND_SECONDS_MAX = 60.0
#: The pool that there is.
POOL = "disks"
MIB = 1 << 20

# One copy of everything; no authentication; nothing outside the directory. Ceph waits a second here and five there for more to come,
# which is wasted on a cluster of one.
_CONFIGURATION = """
[global]
fsid = {fsid}
mon host = v2:127.0.0.1:{port}
auth cluster required = none
auth service required = none
auth client required = none
public network = 127.0.0.0/8
run dir = {directory}
admin socket =
log file =
pid file =
crash dir = {directory}
mon data = {directory}/mon
mon allow pool size one = true
mon data avail crit = 0
mon tick interval = 1
paxos propose interval = 0.05
osd data = {directory}/osd
osd objectstore = memstore
osd pool default size = 1
osd pool default min size = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
"""


def missing() -> list[str]:
    """The packages of the programs that are not there."""
    return sorted({package for program, package in PROGRAMS.items() if shutil.which(program) is None})


class Ceph:
    """A cluster; made by `started`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        #: Its configuration file.
        self.config_file = str(directory / "ceph.conf")
        self._port = _free_port()
        self._deadline = time.monotonic() + START_SECONDS_MAX
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._numbers = itertools.count()

    @property
    def mon_host(self) -> str:
        """Where its monitor is, as Ceph's option of that name takes it."""
        return f"v2:127.0.0.1:{self._port}"

    def start(self) -> None:
        """Raises AssertionError with the daemons' words when it does not start in time."""
        for name in ("mon", "osd"):
            (self.directory / name).mkdir()
        fsid, osd = str(uuid.uuid4()), str(uuid.uuid4())
        text = _CONFIGURATION.format(fsid=fsid, port=self._port, directory=self.directory)
        Path(self.config_file).write_text(text)
        monmap = str(self.directory / "monmap")
        self._run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[{self.mon_host}]", monmap)
        self._run("ceph-mon", "-c", self.config_file, "--mkfs", "-i", "a", "--monmap", monmap)
        self._daemon("ceph-mon", "-i", "a")
        self.ceph("osd", "new", osd)
        self._run("ceph-osd", "-c", self.config_file, "-i", "0", "--mkfs", "--osd-uuid", osd)
        self._daemon("ceph-osd", "-i", "0")
        while "1 up" not in self.ceph("osd", "stat"):
            assert time.monotonic() < self._deadline, self._words()
            time.sleep(0.1)
        self.ceph("osd", "pool", "create", POOL, "1")
        # Waits until the pool serves.
        self.rbd("pool", "init", POOL)

    def image(self, size: int = 8 * MIB) -> str:
        """A new image in `POOL`, of so many bytes; its name."""
        name = f"image{next(self._numbers)}"
        self.rbd("create", "--size", f"{size}B", f"{POOL}/{name}")
        return name

    def ceph(self, *arguments: str) -> str:
        """A command for the monitor; what it printed."""
        return self._run("ceph", "-c", self.config_file, "--connect-timeout", "60", *arguments)

    def rbd(self, *arguments: str) -> str:
        """A command about images; what it printed."""
        return self._run("rbd", "-c", self.config_file, *arguments)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The storage daemon stands still."""
        daemon = self._daemons[1].pid
        os.kill(daemon, signal.SIGSTOP)
        try:
            # Its threads go on for a moment.
            end = time.monotonic() + COMMAND_SECONDS_MAX
            while not _stands_still(daemon):
                assert time.monotonic() < end, "it does not stop"
                time.sleep(0.001)
            yield
        finally:
            os.kill(daemon, signal.SIGCONT)

    def kill(self) -> None:
        """The end of all its daemons, at once. Repeatable."""
        for daemon in self._daemons:
            daemon.kill()
            daemon.wait()

    def _daemon(self, program: str, *arguments: str) -> None:
        # It ends with the tests, whatever these die of.
        command = ["setpriv", "--pdeathsig", "KILL", program, "-c", self.config_file, "-f", *arguments]
        with open(self.directory / f"{program}.log", "wb") as log:
            self._daemons.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log))

    def _run(self, *command: str) -> str:
        # Ceph's programs are the system's Python's: ours is not to reach into it.
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "CEPH"))}
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=COMMAND_SECONDS_MAX, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"{command} does not end: {self._words()}") from error
        assert done.returncode == 0, f"{command}: {done.stderr}{self._words()}"
        return done.stdout

    def _words(self) -> str:
        return "\n".join(f"{log.name}:\n{log.read_text()}" for log in sorted(self.directory.glob("*.log")))


def threads_of_ceph() -> set[int]:
    """Those of this process that are not Python's."""
    # Python's last: one that it begins meanwhile is none of Ceph's.
    threads = {int(task) for task in os.listdir("/proc/self/task")}
    return threads - {thread.native_id for thread in threading.enumerate()}


async def failure(request: Callable[[], Awaitable[None]]) -> int | None:
    """The errno with which a request fails in the end, however often it succeeds before: what comes over the network comes when it does."""
    with trio.fail_after(COMMAND_SECONDS_MAX):
        while True:
            try:
                await request()
            except OSError as error:
                return error.errno
            await trio.sleep(0.02)


@contextmanager
def started(directory: Path) -> Iterator[Ceph]:
    """A cluster that runs."""
    ceph = Ceph(directory)
    try:
        ceph.start()
        yield ceph
    finally:
        ceph.kill()


def _stands_still(process: int) -> bool:
    """Whether all its threads are stopped."""
    tasks = Path(f"/proc/{process}/task").glob("*/stat")
    # Behind the name, which may hold anything, comes the state.
    return all(task.read_text().rpartition(")")[2].split()[0] == "T" for task in tasks)


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port
