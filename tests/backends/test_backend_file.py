"""`File` and `ThreadedFile`: on real files, with the errors that a kernel really gives."""

# ruff: noqa: ASYNC230, ASYNC240, ASYNC110
# A test may block, nothing else runs in its event loop. What is polled for happens in a thread, without a trio.Event.

from __future__ import annotations

import errno
import mmap
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings

from tests.backends.backend_model import Step, check_against_model, scripts
from ublk_trio.backends import File, ThreadedFile, _linux, capabilities, check_geometry
from ublk_trio.errors import BackendError, UsageError

#: Neither a multiple of the page nor of a filesystem's block.
SIZE = 5 * 4096 + 3 * 512


@asynccontextmanager
async def opened(backend: File) -> Any:
    await backend.open()
    try:
        yield backend
    finally:
        await backend.aclose()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    disk = tmp_path / "disk"
    disk.write_bytes(b"")
    os.truncate(disk, 1 << 20)
    return disk


async def refusal(backend: File) -> BackendError:
    """The error with which `open` refuses; nothing stays open."""
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(BackendError) as caught:
        await backend.open()
    assert len(os.listdir("/proc/self/fd")) == before
    assert backend.fileno() == -1
    assert "\n" not in str(caught.value)
    return caught.value


def read(file: File, offset: int, length: int) -> bytes:
    content = bytearray(b"?" * length)
    assert file.read(offset, memoryview(content)) is None
    return bytes(content)


# As a disk


@pytest.mark.parametrize("kind", [File, ThreadedFile])
def test_a_file_is_a_bytearray(kind: type[File], tmp_path: Path) -> None:
    """Whatever is written, discarded and zeroed: reads give what a bytearray would."""

    async def run(script: list[Step]) -> None:
        disk = tmp_path / "disk"
        disk.write_bytes(b"")
        os.truncate(disk, SIZE)
        async with opened(kind(disk)) as backend:
            await check_against_model(backend, script, size=SIZE)

    @settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
    @given(scripts(SIZE, 512))
    def checked(script: list[Step]) -> None:
        trio.run(run, script)

    checked()


@pytest.mark.parametrize("missing", [set(), {"ZERO_RANGE"}, {"ZERO_RANGE", "PUNCH_HOLE"}], ids=str)
@pytest.mark.parametrize("unmap", [False, True])
async def test_zeroes_whatever_the_filesystem_can_do(
    path: Path, monkeypatch: pytest.MonkeyPatch, missing: set[str], unmap: bool
) -> None:
    """Without ZERO_RANGE, and without PUNCH_HOLE too, the range is zeroed all the same, and only the range."""
    real = _linux.fallocate
    path.write_bytes(b"x" * (3 << 20))

    def fallocate(fd: int, mode: _linux.Fallocate, offset: int, length: int) -> None:
        if any(_linux.Fallocate[name] in mode for name in missing):
            raise OSError(errno.EOPNOTSUPP, "not here")
        real(fd, mode, offset, length)

    monkeypatch.setattr(_linux, "fallocate", fallocate)
    async with opened(File(path)) as file:
        assert ("discard" in capabilities(file)) == ("PUNCH_HOLE" not in missing)
        file.write_zeroes(512, 2 << 20, unmap=unmap)
    assert path.read_bytes() == b"x" * 512 + bytes(2 << 20) + b"x" * ((1 << 20) - 512)


async def test_discard_frees_space_and_keeps_the_size(path: Path) -> None:
    """A punched file has fewer blocks, the same length, and zeroes there."""
    path.write_bytes(b"x" * (1 << 20))
    async with opened(File(path)) as file:
        if "discard" not in capabilities(file):
            pytest.skip("this filesystem can't punch holes")
        file.flush()
        before = path.stat()
        file.discard(0, 1 << 19)
        assert path.stat().st_blocks < before.st_blocks
        assert path.stat().st_size == before.st_size
        assert read(file, 0, 1 << 20) == bytes(1 << 19) + b"x" * (1 << 19)


async def test_probing_changes_nothing(path: Path) -> None:
    """Opening leaves content, length and blocks as they were."""
    path.write_bytes(b"x" * (1 << 20))
    os.sync()
    before = path.stat()
    async with opened(File(path)):
        pass
    after = path.stat()
    assert (after.st_size, after.st_blocks) == (before.st_size, before.st_blocks)
    assert path.read_bytes() == b"x" * (1 << 20)


async def test_geometry_is_what_the_kernel_takes(path: Path) -> None:
    """Size and blocks are known after open and pass the check, buffered and read-only alike."""
    for read_only in (False, True):
        async with opened(File(path, read_only=read_only)) as file:
            check_geometry(file)
            assert (file.size, file.block_size) == (1 << 20, 512)
            assert capabilities(file) >= {"read"} if read_only else {"read", "write", "flush", "write_zeroes"}


async def test_short_transfers_are_continued(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that moves a little at a time still moves all of it, to the right place."""
    real_read, real_write = os.preadv, os.pwritev
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real_read(fd, [buffers[0][:700]], offset))
    monkeypatch.setattr(os, "pwritev", lambda fd, data, offset, flags=0: real_write(fd, [data[0][:700]], offset, flags))
    data = os.urandom(4096)
    async with opened(File(path)) as file:
        file.write(512, memoryview(data), fua=False)
        assert read(file, 512, 4096) == data


async def test_fua_is_a_synchronous_write_and_nothing_else_is(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RWF_DSYNC goes with `fua` and only with it; `flush` is fdatasync."""
    real = os.pwritev
    flags_seen: list[int] = []
    synced: list[int] = []

    def pwritev(fd: int, data: list[Any], offset: int, flags: int = 0) -> int:
        flags_seen.append(flags)
        return real(fd, data, offset, flags)

    monkeypatch.setattr(os, "pwritev", pwritev)
    monkeypatch.setattr(os, "fdatasync", synced.append)
    async with opened(File(path)) as file:
        file.write(0, memoryview(bytes(512)), fua=True)
        file.write(0, memoryview(bytes(512)), fua=False)
        assert flags_seen == [os.RWF_DSYNC, 0]
        assert synced == []
        file.flush()
        assert synced == [file.fileno()]


async def test_a_file_that_shrank_is_eio(path: Path) -> None:
    """What is gone is an error and never zeroes; what is there can still be read."""
    path.write_bytes(b"x" * (1 << 20))
    async with opened(File(path)) as file:
        os.truncate(path, 1024)
        assert read(file, 0, 1024) == b"x" * 1024
        for offset in (1024, 512, 4096):
            with pytest.raises(OSError, match="shorter than the disk") as caught:
                file.read(offset, memoryview(bytearray(1024)))
            assert caught.value.errno == errno.EIO


async def test_a_full_filesystem_is_enospc(path: Path) -> None:
    """The kernel's ENOSPC passes through: /dev/full gives it to anybody."""
    async with opened(File(path)) as file:
        with open("/dev/full", "wb") as full:
            os.dup2(full.fileno(), file.fileno())
        with pytest.raises(OSError, match="No space left") as caught:
            file.write(0, memoryview(bytes(512)), fua=False)
        assert caught.value.errno == errno.ENOSPC


def test_a_file_size_limit_is_efbig(path: Path) -> None:
    """RLIMIT_FSIZE: writing beyond gives EFBIG, not a signal; below it works."""
    program = """
        import resource, sys, trio
        from ublk_trio.backends import File
        from ublk_trio.errors import errno_name
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
        file = File(sys.argv[1])
        trio.run(file.open)
        file.write(0, memoryview(b"x" * 4096), fua=True)
        try:
            file.write(65536, memoryview(bytes(512)), fua=False)
        except OSError as error:
            print(errno_name(error.errno))
    """
    arguments = [sys.executable, "-W", "error", "-c", textwrap.dedent(program), str(path)]
    assert subprocess.run(arguments, capture_output=True, text=True, check=True).stdout == "EFBIG\n"
    assert path.read_bytes()[:4097] == b"x" * 4096 + b"\0"


# Direct


async def open_direct(path: Path) -> File:
    file = File(path, direct=True)
    try:
        await file.open()
    except BackendError as error:
        pytest.skip(str(error))
    return file


async def test_direct_serves_aligned_and_other_buffers(path: Path) -> None:
    """With O_DIRECT a page-aligned buffer is served, and one that is not gets there through a copy."""
    file = await open_direct(path)
    try:
        check_geometry(file)
        data = os.urandom(8192)
        with mmap.mmap(-1, 8192) as mapping, memoryview(mapping) as aligned:
            aligned[:] = data
            file.write(4096, aligned, fua=True)
            aligned[:] = bytes(8192)
            file.read(4096, aligned)
            assert aligned == data
        odd = memoryview(bytearray(8193))[1:]
        file.read(4096, odd)
        assert odd == data
        odd[:] = bytes(reversed(data))
        file.write(16384, odd, fua=False)
        assert path.read_bytes()[16384 : 16384 + 8192] == odd
        file.write_zeroes(4096, 4096, unmap=False)
        assert path.read_bytes()[4096:8192] == bytes(4096)
    finally:
        await file.aclose()


async def test_direct_beyond_a_shrunk_end_is_eio(path: Path) -> None:
    """A direct read that ends inside a block does not go round in circles."""
    file = await open_direct(path)
    try:
        os.truncate(path, 4096 + 100)
        with mmap.mmap(-1, 8192) as mapping, memoryview(mapping) as view:
            with pytest.raises(OSError, match="shorter than the disk"):
                file.read(0, view)
            with pytest.raises(OSError, match="shorter than the disk"):
                file.read(8192, view)
    finally:
        await file.aclose()


async def test_a_filesystem_without_direct_access_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EINVAL from open, and a kernel that says "never" by statx, both end in the same mend."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", _failing(errno.EINVAL))
        error = await refusal(File(path, direct=True))
        assert str(error) == (
            f"file:{path}: EINVAL (Invalid argument): its filesystem has no direct access: leave direct=on out"
        )
    monkeypatch.setattr(_linux, "direct_alignment", lambda fd: (0, 0))
    monkeypatch.setattr(os, "O_DIRECT", 0)
    error = await refusal(File(path, direct=True))
    assert str(error) == (
        f"file:{path}: EINVAL (Invalid argument): this file can't be opened with direct=on: leave that out"
    )


async def test_direct_alignment_sets_the_block_size(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The block is never smaller than direct access needs; what the kernel can't take is refused."""
    monkeypatch.setattr(os, "O_DIRECT", 0)
    monkeypatch.setattr(_linux, "direct_alignment", lambda fd: (4, 4096))
    async with opened(File(path, direct=True)) as file:
        assert file.block_size == 4096
    error = await refusal(File(path, direct=True, block_size=512))
    assert str(error) == (
        f"file:{path}: EINVAL (Invalid argument): block_size 512 is too small, direct access needs 4096: "
        "use block_size=4096 or leave it out"
    )
    monkeypatch.setattr(_linux, "direct_alignment", lambda fd: (4, 65536))
    assert "blocks of 65536 bytes, the kernel takes 4096 at most" in str(await refusal(File(path, direct=True)))
    monkeypatch.setattr(_linux, "direct_alignment", lambda fd: None)
    async with opened(File(path, direct=True)) as file:
        assert 512 <= file.block_size <= 4096


# Locks


async def test_a_second_writer_is_refused_while_the_first_has_it(path: Path) -> None:
    """One writer at a time, and nobody reads beside it; closing frees the file."""
    first = File(path)
    async with opened(first):
        assert str(await refusal(File(path))) == (
            f"file:{path}: EAGAIN (Resource temporarily unavailable): in use, its lock is held by another opener: "
            "stop that one, or open both with read_only=on"
        )
        assert "stop the writer" in str(await refusal(File(path, read_only=True)))
    async with opened(File(path)):
        pass


async def test_readers_share(path: Path) -> None:
    """Any number of readers, no writer beside them."""
    async with opened(File(path, read_only=True)), opened(File(path, read_only=True)):
        assert (await refusal(File(path))).errno == errno.EAGAIN


async def test_a_filesystem_without_locks_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Serving without a lock would be a risk that nobody asked for."""

    def lock(fd: int, *, shared: bool) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(_linux, "lock_whole", lock)
    assert str(await refusal(File(path))) == (
        f"file:{path}: ENOLCK (No locks available): this filesystem can't lock files: use a file on a local filesystem"
    )


async def test_one_object_is_opened_once_and_may_be_reopened(path: Path) -> None:
    """A second open of an open object is the caller's error; a closed one may be opened, and closed, again."""
    file = File(path)
    async with opened(file):
        with pytest.raises(UsageError, match="open already"):
            await file.open()
    await file.aclose()
    async with opened(file):
        assert read(file, 0, 512) == bytes(512)


# Refusals


def _failing(number: int) -> Callable[..., Any]:
    def fail(*arguments: object, **options: object) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


async def test_missing(tmp_path: Path) -> None:
    """ENOENT says how to make the file."""
    path = tmp_path / "no"
    error = await refusal(File(path))
    assert error.errno == errno.ENOENT
    assert str(error) == f"file:{path}: ENOENT (No such file or directory): create it with truncate -s 1G {path}"


async def test_directory(tmp_path: Path) -> None:
    """EISDIR."""
    assert str(await refusal(File(tmp_path))) == (
        f"file:{tmp_path}: EISDIR (Is a directory): a directory: name a file in it"
    )


async def test_neither_file_nor_block_device(tmp_path: Path) -> None:
    """A FIFO is refused without waiting for its other end, a character device without being opened."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (fifo, Path("/dev/null")):
        assert str(await refusal(File(path))) == (
            f"file:{path}: ENOTBLK (Block device required): neither a regular file nor a block device: "
            "name one of those"
        )


async def test_size_0(tmp_path: Path) -> None:
    """An empty file can't be a disk."""
    path = tmp_path / "empty"
    path.touch()
    assert str(await refusal(File(path))) == (
        f"file:{path}: EINVAL (Invalid argument): size 0: give it one with truncate -s 1G {path}"
    )


async def test_size_is_not_whole_blocks(tmp_path: Path) -> None:
    """The mend rounds up, so that following it loses nothing."""
    path = tmp_path / "odd"
    path.write_bytes(b"x" * 1000)
    assert str(await refusal(File(path, block_size=4096))) == (
        f"file:{path}: EINVAL (Invalid argument): size 1000 is not a multiple of block_size 4096: "
        f"make it one with truncate -s 4096 {path}"
    )


@pytest.mark.parametrize(
    ("number", "read_only", "text"),
    [
        (
            errno.EACCES,
            False,
            "EACCES (Permission denied): not permitted to write it: chmod it, be root, or pass read_only=on",
        ),
        (errno.EACCES, True, "EACCES (Permission denied): not permitted to read it: chmod it, or be root"),
        (
            errno.EROFS,
            False,
            "EROFS (Read-only file system): its filesystem is read-only: remount it, or pass read_only=on",
        ),
        (
            errno.EBUSY,
            False,
            "EBUSY (Device or resource busy): in use, mounted or part of another device: "
            "unmount it, or pass read_only=on",
        ),
        (errno.ETXTBSY, False, "ETXTBSY (Text file busy): a program or swap file that is in use: name another"),
        (errno.EMFILE, False, "EMFILE (Too many open files): too many open files: raise ulimit -n"),
        (errno.EIO, False, "EIO (Input/output error): it can't be opened: check the path and the disk that it is on"),
    ],
)
async def test_every_refusal_of_open_has_its_mend(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: int, read_only: bool, text: str
) -> None:
    """One line: the file, the errno by name, the mend."""
    monkeypatch.setattr(os, "open", _failing(number))
    assert str(await refusal(File(path, read_only=read_only))) == f"file:{path}: {text}"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anything")
async def test_a_file_that_may_only_be_read(path: Path) -> None:
    """The real EACCES; read_only=on, as the line says, helps."""
    path.chmod(0o444)
    assert (await refusal(File(path))).errno == errno.EACCES
    async with opened(File(path, read_only=True)) as file:
        assert capabilities(file) == {"read"}


async def test_a_path_through_a_file_is_no_path(path: Path) -> None:
    """ENOTDIR."""
    assert "ENOTDIR (Not a directory): no file can have this path" in str(await refusal(File(path / "x")))


async def test_writing_to_a_read_only_disk_fails(path: Path) -> None:
    """The descriptor itself is read-only, so even a bug could not write."""
    async with opened(File(path, read_only=True)) as file:
        with pytest.raises(OSError, match="Bad file descriptor"):
            file.write(0, memoryview(bytes(512)), fua=False)


async def test_a_closed_file_is_ebadf(path: Path) -> None:
    """Never another file that got the same descriptor."""
    file = File(path)
    async with opened(file):
        pass
    with pytest.raises(OSError, match="Bad file descriptor"):
        file.read(0, memoryview(bytearray(512)))


def test_impossible_arguments_are_usage_errors() -> None:
    """Said when the object is made."""
    with pytest.raises(UsageError, match="block_size 513 is not possible"):
        File("/x", block_size=513)
    with pytest.raises(UsageError, match="threads 0 is not possible"):
        ThreadedFile("/x", threads=0)


# Threads


async def test_threaded_requests_let_others_run_up_to_the_limit(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many requests as `threads` are in the kernel at once, the next one waits, and Trio goes on meanwhile."""
    release, running = threading.Semaphore(0), []

    def slow(fd: int) -> None:
        running.append(fd)
        release.acquire()

    monkeypatch.setattr(os, "fdatasync", slow)
    async with opened(ThreadedFile(path, threads=2)) as file, trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(file.flush)
        await trio.testing.wait_all_tasks_blocked()
        with trio.fail_after(10):
            while len(running) < 2:
                await trio.sleep(0.001)
        assert file.limiter.statistics().tasks_waiting == 1
        assert len(running) == 2
        release.release(3)
    assert len(running) == 3


async def test_a_cancelled_request_finishes_with_its_buffer_first(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancellation returns only when no thread uses the buffer any more; one that has no thread yet never starts."""
    release, started, real, finished = threading.Semaphore(0), threading.Event(), os.preadv, []

    def slow(fd: int, buffers: list[Any], offset: int) -> int:
        started.set()
        release.acquire()
        finished.append(offset)
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", slow)
    async with opened(ThreadedFile(path, threads=1)) as file, trio.open_nursery() as nursery:
        nursery.start_soon(file.read, 0, memoryview(bytearray(512)))
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(file.read, 512, memoryview(bytearray(512)))
        await trio.to_thread.run_sync(started.wait)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        await trio.lowlevel.cancel_shielded_checkpoint()
        assert finished == []
        release.release(2)
    assert finished == [0]


async def test_a_cancelled_open_leaves_nothing(path: Path) -> None:
    """Cancelled before it began: no descriptor, no lock."""
    before = len(os.listdir("/proc/self/fd"))
    with trio.CancelScope() as scope:
        scope.cancel()
        await File(path).open()
    assert scope.cancelled_caught
    assert len(os.listdir("/proc/self/fd")) == before
    async with opened(File(path)):
        pass


async def test_closing_works_in_a_cancelled_shielded_scope(path: Path) -> None:
    """As the device does it: aclose under a shield, with everything around it cancelled."""
    file = File(path)
    await file.open()
    with trio.CancelScope() as scope:
        scope.cancel()
        with trio.CancelScope(shield=True):
            await file.aclose()
    assert file.fileno() == -1


# Block devices


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0 or shutil.which("losetup") is None:
        pytest.skip("needs root and losetup")
    backing = tmp_path / "backing"
    backing.write_bytes(b"x" * (1 << 20))
    done = subprocess.run(["losetup", "-f", "--show", str(backing)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"no loop device: {done.stderr.strip()}")
    device = done.stdout.strip()
    yield Path(device)
    subprocess.run(["losetup", "-d", device], check=True)


@pytest.mark.any_kernel
@pytest.mark.parametrize("direct", [False, True])
async def test_a_block_device_is_a_disk(loop_device: Path, direct: bool) -> None:
    """Size and blocks come from the device; it is written, zeroed and discarded."""
    async with opened(File(loop_device, direct=direct)) as file:
        check_geometry(file)
        assert file.size == 1 << 20
        assert capabilities(file) >= {"read", "write", "flush", "write_zeroes"}
        assert read(file, 0, 4096) == b"x" * 4096
        data = os.urandom(4096)
        file.write(8192, memoryview(data), fua=True)
        file.flush()
        for offset, unmap in ((16384, False), (32768, True)):
            file.write_zeroes(offset, 4096, unmap=unmap)
            assert read(file, offset - 4096, 12288) == b"x" * 4096 + bytes(4096) + b"x" * 4096
        if "discard" in capabilities(file):
            file.discard(65536, 4096)
            assert read(file, 65536 - 4096, 4096) + read(file, 65536 + 4096, 4096) == b"x" * 8192
        assert read(file, 8192, 4096) == data


@pytest.mark.any_kernel
async def test_a_block_device_has_one_writer(loop_device: Path) -> None:
    """O_EXCL: a second writer gets EBUSY; a reader may look."""
    async with opened(File(loop_device)):
        assert str(await refusal(File(loop_device))) == (
            f"file:{loop_device}: EBUSY (Device or resource busy): in use, mounted or part of another device: "
            "unmount it, or pass read_only=on"
        )
        async with opened(File(loop_device, read_only=True)) as file:
            assert capabilities(file) == {"read"}


@pytest.mark.any_kernel
async def test_a_block_device_is_rescanned(loop_device: Path) -> None:
    """When the device gets another size, a rescan finds it; before, the disk has the old one."""
    backing = loop_device_file(loop_device)
    async with opened(File(loop_device)) as file:
        os.truncate(backing, 2 << 20)
        await trio.run_process(["losetup", "-c", str(loop_device)])
        assert file.size == 1 << 20
        assert await file.rescan() == 2 << 20
        file.write(1 << 20, memoryview(b"y" * 4096), fua=False)
        assert read(file, 1 << 20, 4096) == b"y" * 4096


def loop_device_file(device: Path) -> str:
    command = ["losetup", "-n", "-O", "BACK-FILE", str(device)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


# Resizing


@pytest.mark.parametrize("kind", [File, ThreadedFile])
async def test_a_file_is_rescanned(kind: type[File], path: Path) -> None:
    """Grown and shrunk, as soon as `rescan` is called and not before; what was there is kept, what is new is zeroes."""
    path.write_bytes(b"x" * (1 << 20))
    async with opened(kind(path)) as file:
        assert await file.rescan() == 1 << 20
        os.truncate(path, 2 << 20)
        assert file.size == 1 << 20
        assert await file.rescan() == file.size == 2 << 20
        check_geometry(file)
        buffer = bytearray(1024)
        if (result := file.read((1 << 20) - 512, memoryview(buffer))) is not None:
            await result
        assert buffer == b"x" * 512 + bytes(512)
        os.truncate(path, 4096)
        assert await file.rescan() == file.size == 4096


@pytest.mark.parametrize("kind", [File, ThreadedFile])
async def test_beyond_the_end_nothing_is_touched(kind: type[File], path: Path) -> None:
    """A request that was under way when the file was cut off fails with EIO, and makes it no longer than it is."""
    path.write_bytes(b"x" * 8192)
    async with opened(kind(path)) as file:
        os.truncate(path, 4096)
        await file.rescan()
        data = memoryview(bytearray(1024))
        requests: list[Callable[[], Any]] = [
            lambda: file.read(3584, data),
            lambda: file.write(3584, data, fua=False),
            lambda: file.write(4096, data, fua=True),
            lambda: file.discard(3584, 1024),
            lambda: file.write_zeroes(3584, 1024, unmap=False),
            lambda: file.write_zeroes(4096, 1024, unmap=True),
        ]
        for request in requests:
            with pytest.raises(OSError, match="is beyond the end of the disk") as caught:
                await request()
            assert caught.value.errno == errno.EIO
    assert path.read_bytes() == b"x" * 4096


@pytest.mark.parametrize("size", [0, 1000])
async def test_a_size_that_no_disk_has_is_not_taken_over(path: Path, size: int) -> None:
    """The caller is told, and the disk keeps its size until the file has a better one."""
    async with opened(File(path)) as file:
        os.truncate(path, size)
        with pytest.raises(UsageError, match=f"size {size} is not"):
            await file.rescan()
        assert file.size == 1 << 20
        os.truncate(path, 1024)
        assert await file.rescan() == 1024


async def test_a_closed_file_is_not_rescanned(path: Path) -> None:
    """There is nothing to ask, before and after."""
    file = File(path)
    with pytest.raises(UsageError, match="not open: rescan it while it is"):
        await file.rescan()
    async with opened(file):
        pass
    with pytest.raises(UsageError, match="not open"):
        await file.rescan()


async def test_a_rescan_that_is_cancelled_or_fails_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The size is the old one, and the file closes."""
    async with opened(File(path)) as file:
        os.truncate(path, 2 << 20)
        with trio.CancelScope() as scope:
            scope.cancel()
            await file.rescan()
        assert scope.cancelled_caught
        with monkeypatch.context() as patch:
            patch.setattr(os, "fstat", _failing(errno.EIO))
            with pytest.raises(OSError, match=r"."):
                await file.rescan()
        assert file.size == 1 << 20
        assert await file.rescan() == 2 << 20
