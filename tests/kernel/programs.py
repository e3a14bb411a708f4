"""Programs as the tests run them: the command line of ublk_trio, fio, and whatever else uses a disk."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO

import attrs
import trio

from tests.kernel.forking import ForkedProcess, fork_ublk_trio

CHECKOUT = Path(__file__).resolve().parents[2]
JOBS = Path(__file__).with_name("verify.fio")
#: The program itself. Slow to start: only where it cannot be forked.
UBLK_TRIO = (sys.executable, "-m", "ublk_trio")
#: Of the kernel that runs: its first two numbers.
RELEASE = tuple(int(number) for number in os.uname().release.split(".")[:2])

#: Seconds. Python needs 5 to 15 s to start in an emulated guest, and much longer when the machine is busy.
START_SECONDS_MAX = 180.0
COMMAND_SECONDS_MAX = 180.0
#: Whole seconds; long enough that only its disk or `Load.interrupt` ends a load.
LOAD_SECONDS_MAX = 400
#: More than a server's grace time with all its further bounds.
STOP_SECONDS_MAX = 60.0


@attrs.frozen(kw_only=True)
class Finished:
    """How a program ended."""

    command: str
    code: int
    stdout: str
    stderr: str

    def check(self) -> Finished:
        """Raise unless it ended well."""
        assert self.code == 0, f"{self.command} exited with {self.code}:\n{self.stdout}\n{self.stderr}"
        return self


async def run(*command: str | Path, seconds: float = COMMAND_SECONDS_MAX, stdin: str = "") -> Finished:
    """Run a program to its end, whatever that is. Raises `trio.TooSlowError`, with the program killed."""
    with trio.fail_after(seconds):
        done = await trio.run_process(
            [str(word) for word in command],
            stdin=stdin.encode(),
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            cwd=CHECKOUT,
            deliver_cancel=_kill,
        )
    return Finished(
        command=" ".join(str(word) for word in command),
        code=done.returncode,
        stdout=done.stdout.decode(errors="replace"),
        stderr=done.stderr.decode(errors="replace"),
    )


async def _kill(process: trio.Process) -> None:
    process.kill()


async def ublk_trio(*arguments: str) -> Finished:
    """One command of the command line, to its end. Raises as `run`."""
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr, trio.fail_after(COMMAND_SECONDS_MAX):
        process = fork_ublk_trio(arguments, stdout=stdout.fileno(), stderr=stderr.fileno())
        try:
            code = await process.wait()
        finally:
            process.kill()
        said = [_content(file) for file in (stdout, stderr)]
    return Finished(command=" ".join(("ublk_trio", *arguments)), code=code, stdout=said[0], stderr=said[1])


def _content(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


async def fio_verify(disk: str, *, seconds: float = COMMAND_SECONDS_MAX) -> None:
    """Every way of using a disk that `verify.fio` has, with every byte checked."""
    done = (await run("env", f"DISK={disk}", "fio", "--output-format=terse", JOBS, seconds=seconds)).check()
    assert "verify" not in done.stderr, done.stderr


class Load:
    """fio on a disk, at random, reading and writing, until it is interrupted or the disk goes away."""

    #: What it does.
    pattern: tuple[str, ...] = (
        *("--rw=randrw", "--bsrange=512-64K"),
        *("--time_based", f"--runtime={LOAD_SECONDS_MAX}"),
    )

    def __init__(self, disk: str, *options: str) -> None:
        self.disk = disk
        self.output = ""
        self.code: int | None = None
        self.ended = trio.Event()
        self._process: trio.Process | None = None
        self._command = [
            *("fio", "--name=load", f"--filename={disk}", *self.pattern, "--iodepth=16"),
            *("--direct=1", "--ioengine=libaio", "--thread", "--minimal"),
            # Trying out the CPU's clock costs as much as all the rest of fio's start.
            "--clocksource=clock_gettime",
            # Where the disk's node was, it must not make a file.
            "--allow_file_create=0",
            *options,
        ]

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Report when requests flow; return when fio has ended."""
        with tempfile.TemporaryFile() as output, trio.fail_after(LOAD_SECONDS_MAX + COMMAND_SECONDS_MAX):
            self._process = process = await trio.lowlevel.open_process(
                self._command, stdout=output, stderr=subprocess.STDOUT
            )
            try:
                before = requests_done(self.disk)
                await wait_until(lambda: process.poll() is not None or requests_done(self.disk) >= before + 10)
                task_status.started()
                self.code = await process.wait()
            finally:
                if process.returncode is None:
                    process.kill()
                output.seek(0)
                self.output = output.read().decode(errors="replace")
                self.ended.set()

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def interrupt(self) -> None:
        """Let it end now, as with Ctrl-C."""
        assert self._process is not None
        self._process.send_signal(signal.SIGINT)

    async def pause(self) -> None:
        """Let it ask for nothing more; what it asked for goes on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        # A thread that is asking just now stops after that.
        await wait_until(lambda: self._is_stopped() or not self.is_running)

    def _is_stopped(self) -> bool:
        assert self._process is not None
        stats = [path.read_text(encoding="ascii") for path in Path(f"/proc/{self._process.pid}/task").glob("*/stat")]
        # The state follows the name, which is in parentheses.
        return all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)

    def resume(self) -> None:
        """The end of a pause."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    @property
    def error(self) -> int:
        """The errno of the first thing that went wrong on its disk; 0 if all went well."""
        lines = [line for line in self.output.splitlines() if line.startswith("3;")]
        assert len(lines) == 1, self.output
        return int(lines[0].split(";")[4])

    def check_disk_went_away(self) -> None:
        """fio must have ended by itself, because its disk failed.

        A disk that is going away has a size of 0 as well: a write then lies beyond its end, which is ENOSPC.
        """
        assert self.code not in (None, 0), self.output
        assert self.error in (errno.EIO, errno.ENODEV, errno.ENXIO, errno.ENOSPC), self.output

    def check_disk_was_fine(self) -> None:
        """fio must have ended because it was interrupted, with every byte right."""
        assert self.code in (0, 128), self.output
        assert self.error == 0, self.output


def requests_done(disk: str) -> int:
    """How many requests a disk has finished, by the kernel's count."""
    reads, _, _, _, writes = Path("/sys/block", Path(disk).name, "stat").read_text(encoding="ascii").split()[:5]
    return int(reads) + int(writes)


class Server:
    """`ublk_trio start` or `recover` as a process of its own. Made by `start_server`, `operated_server` and
    `recover_server`."""

    def __init__(
        self, process: trio.Process | ForkedProcess, stdout: trio.abc.ReceiveStream, stderr: IO[bytes]
    ) -> None:
        self.process = process
        self.disks: list[str] = []
        self.expected_stderr = ""
        self._stdout = stdout
        self._stderr = stderr

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def disk(self) -> str:
        """The path of its only disk."""
        (disk,) = self.disks
        return disk

    def stderr(self) -> str:
        """What it said so far."""
        return _content(self._stderr)

    async def wait_until_live(self, disks: int) -> None:
        """Wait for the line on stdout that each disk gets."""
        said = b""
        with trio.move_on_after(START_SECONDS_MAX):
            while said.count(b"\n") < disks:
                more = await self._stdout.receive_some()
                if not more:
                    break
                said += more
        self.disks = said.decode().splitlines()
        assert len(self.disks) == disks, f"not live: {said!r}\n{self.stderr()}"

    async def wait(self) -> int:
        """Its exit code, once it ended."""
        with trio.fail_after(STOP_SECONDS_MAX):
            return await self.process.wait()

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Ask it to stop; its exit code."""
        self.process.send_signal(number)
        return await self.wait()

    def resident_bytes(self) -> int:
        """How much memory it uses."""
        lines = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii").splitlines()
        (kib,) = [int(line.split()[1]) for line in lines if line.startswith("VmRSS:")]
        return kib * 1024


@asynccontextmanager
async def start_server(
    *backends: str, options: Sequence[str] = (), ends_with: signal.Signals = signal.SIGTERM, prefix: Sequence[str] = ()
) -> AsyncIterator[Server]:
    """A live server. If the block has not ended it, it must exit with 0 when it gets the signal, silently.

    ``prefix``: the words before the command, to run it as another user.
    """
    arguments = [word for spec in backends for word in ("--backend", spec)]
    words = ["start", *arguments, *options]
    async with _serving(words, disks=len(backends), ends_with=ends_with, prefix=prefix) as server:
        yield server


@asynccontextmanager
async def operated_server(
    socket: str, *, config: str | Path | None = None, disks: int = 0, prefix: Sequence[str] = ()
) -> AsyncIterator[Server]:
    """A server that listens at a socket for remote calls; ``disks``: how many the configuration has."""
    more = [] if config is None else ["--config", str(config)]
    words = ["start", "--rpc-socket", socket, *more]
    async with _serving(words, disks=disks, ends_with=signal.SIGTERM, prefix=prefix) as server:
        # Not until the socket is there: a server that was killed has left one.
        server.expected_stderr = f"ublk-trio: listening at {socket}\n"
        await wait_until(lambda: server.stderr() == server.expected_stderr, seconds=START_SECONDS_MAX)
        yield server


@asynccontextmanager
async def recover_server(disk: str, backend: str, *, options: Sequence[str] = ()) -> AsyncIterator[Server]:
    """As `start_server`, for a disk whose server was killed."""
    words = ["recover", disk.removeprefix("/dev/ublkb"), "--backend", backend, *options]
    async with _serving(words, disks=1, ends_with=signal.SIGTERM) as server:
        yield server


@asynccontextmanager
async def _serving(
    arguments: Sequence[str], *, disks: int, ends_with: signal.Signals, prefix: Sequence[str] = ()
) -> AsyncIterator[Server]:
    said, say = os.pipe()
    async with trio.lowlevel.FdStream(said) as stdout:
        with tempfile.TemporaryFile() as stderr:
            try:
                process = await _start(arguments, prefix, stdout=say, stderr=stderr.fileno())
            finally:
                os.close(say)
            try:
                server = Server(process, stdout, stderr)
                await server.wait_until_live(disks)
                yield server
                if process.returncode is None:
                    code = await server.stop(ends_with)
                    assert (code, server.stderr()) == (0, server.expected_stderr)
            finally:
                with trio.CancelScope(shield=True):
                    await _end(process)


async def _start(
    arguments: Sequence[str], prefix: Sequence[str], *, stdout: int, stderr: int
) -> trio.Process | ForkedProcess:
    if not prefix:
        return fork_ublk_trio(arguments, stdout=stdout, stderr=stderr)
    command = [*prefix, *UBLK_TRIO, *arguments]
    return await trio.lowlevel.open_process(command, stdout=stdout, stderr=stderr, cwd=CHECKOUT)


async def _end(process: trio.Process | ForkedProcess) -> None:
    """For a test that failed: politely first, so that what it leaves is not the failure's own noise."""
    if process.returncode is None:
        process.terminate()
        with trio.move_on_after(STOP_SECONDS_MAX):
            await process.wait()
    if process.returncode is None:
        process.kill()
        await process.wait()


@asynccontextmanager
async def mounted(disk: str, directory: Path) -> AsyncIterator[Path]:
    """A filesystem that is there, mounted; unmounted at the end."""
    await trio.Path(directory).mkdir(exist_ok=True)
    (await run("mount", disk, directory)).check()
    try:
        yield directory
    finally:
        with trio.CancelScope(shield=True):
            done = await run("umount", directory)
    done.check()


async def make_filesystem(disk: str) -> None:
    """An empty ext4 that writes everything while it is being made."""
    (await run("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", disk)).check()


async def fsck(disk: str) -> None:
    """Raise unless the filesystem is clean."""
    (await run("fsck.ext4", "-f", "-n", disk)).check()


async def wait_until(condition: Callable[[], bool], *, seconds: float = 60.0) -> None:
    """Wait for something that nobody announces. Raises `trio.TooSlowError`."""
    with trio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110 - there is no event to wait for
            await trio.sleep(0.05)


def exists(path: str) -> bool:
    """Whether there is something of this name. For devices: waits for nothing."""
    return os.path.lexists(path)


def make_file(path: Path, size: int) -> Path:
    """A sparse file."""
    with path.open("wb") as file:
        file.truncate(size)
    return path


def drop_caches() -> None:
    Path("/proc/sys/vm/drop_caches").write_text("3", encoding="ascii")
