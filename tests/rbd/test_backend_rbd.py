"""`Rbd` and `CephCluster` on a real cluster of one monitor and one storage daemon."""

# ruff: noqa: ASYNC110, ASYNC240
# Tests wait for what happens in threads and other processes, without a trio.Event; a test may block, nothing else runs in its loop.

from __future__ import annotations

import errno
import json
import os
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, Phase, example, given, settings

from tests.backends.backend_model import Step, check_against_model, scripts
from tests.rbd.ceph import MIB, POOL, Ceph, failure, started, threads_of_ceph
from ublk_trio import DeviceOptions, SimKernel, open_target
from ublk_trio.backends import CephCluster, Rbd, _librbd, capabilities, check_geometry, parse_backend, rbd
from ublk_trio.errors import BackendError, UsageError

#: Blocks of 4 KiB; not a multiple of the 64 KiB that a discard frees.
SIZE = MIB + 3 * 4096
#: Writes stay in librbd's cache until somebody flushes.
WRITE_BACK = {
    "rbd_cache_policy": "writeback",
    "rbd_cache_writethrough_until_flush": "false",
    "rbd_cache_max_dirty_age": "1000",
}
#: Seconds of a bound, where it is certain that there will be no answer.
IMPATIENT = {"client_mount_timeout": "1", "rados_osd_op_timeout": "1", "rados_mon_op_timeout": "1"}
#: All written, then a piece in the middle gone in each way: what goes too far, or not far enough, shows.
EVERY_WAY_TO_ZERO = [
    Step(op="write", offset=0, length=SIZE, value=1, flag=False),
    Step(op="discard", offset=64 << 10, length=64 << 10, value=0, flag=False),
    Step(op="discard", offset=512, length=512, value=0, flag=False),
    Step(op="write_zeroes", offset=3 << 10, length=1 << 10, value=0, flag=True),
    Step(op="write_zeroes", offset=6 << 10, length=1 << 10, value=0, flag=False),
    Step(op="flush", offset=0, length=512, value=0, flag=False),
]
#: Seconds: what takes longer hangs.
HANGS = 60.0


def connection(ceph: Ceph, **config: str) -> CephCluster:
    return CephCluster(config_file=ceph.config_file, config=config)


def set_bound(cluster: CephCluster, seconds: int) -> None:
    """Ceph takes another bound at any time: so it can be short only while nothing has to succeed."""
    library = _librbd.load()
    assert library.rados.rados_conf_set(cluster._handle, b"rados_osd_op_timeout", str(seconds).encode()) == 0


@asynccontextmanager
async def opened(ceph: Ceph, image: str, *, config: dict[str, str] | None = None, **options: Any) -> AsyncIterator[Rbd]:
    backend = Rbd(POOL, image, cluster=connection(ceph, **(config or {})), **options)
    await backend.open()
    try:
        yield backend
    finally:
        await backend.aclose()


async def read(backend: Rbd, offset: int, length: int) -> bytes:
    content = bytearray(b"?" * length)
    await backend.read(offset, memoryview(content))
    return bytes(content)


async def write(backend: Rbd, offset: int, data: bytes, *, fua: bool = False) -> None:
    await backend.write(offset, memoryview(data), fua=fua)


def in_use() -> tuple[int, set[str]]:
    """Open files, and the names of threads that are not Trio's or Python's; those of Ceph have names of their own."""
    files, threads = 0, set()
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            files += os.readlink(f"/proc/self/fd/{descriptor}") != "anon_inode:[eventpoll]"
        except OSError:
            continue  # the directory's own
    for task in os.listdir("/proc/self/task"):
        try:
            threads.add(Path(f"/proc/self/task/{task}/comm").read_text().strip())
        except OSError:
            continue
    return files, {
        name for name in threads if name.startswith(("msgr", "ms_", "rados", "io_context", "service", "log"))
    }


@contextmanager
def nothing_left() -> Iterator[None]:
    """Ceph's threads end a moment after the call that ends them."""
    wait_until(lambda: not in_use()[1])
    files, _ = in_use()
    yield
    wait_until(lambda: in_use() == (files, set()))


def wait_until(condition: Callable[[], bool]) -> None:
    """Outside of Trio, which has files of its own."""
    end = time.monotonic() + HANGS
    while not condition():
        assert time.monotonic() < end, in_use()
        time.sleep(0.02)


# As a disk


def run_scripts(ceph: Ceph, examples: int) -> None:
    """Hypothesis' scripts, each on the zeroed image; a discard frees every block, as the model has it."""
    image = ceph.image(SIZE)

    async def run(script: list[Step]) -> None:
        async with opened(ceph, image, config={"rbd_skip_partial_discard": "false"}) as backend:
            await backend.write_zeroes(0, SIZE, unmap=True)
            await check_against_model(backend, script, size=SIZE)

    # A failure is not explained or shrunk for minutes: what fails is a planted bug, or worth a look by itself.
    @settings(
        deadline=None,
        max_examples=examples,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
    )
    @example(EVERY_WAY_TO_ZERO)
    @given(scripts(SIZE, 512))
    def checked(script: list[Step]) -> None:
        trio.run(run, script)

    checked()


def test_an_image_is_a_bytearray(ceph: Ceph) -> None:
    """Whatever is written, discarded and zeroed: reads give what a bytearray would."""
    run_scripts(ceph, 30)


async def run_disk(ceph: Ceph) -> None:
    """Every block of a simulated kernel's disk, written in any order by many at once; read there, and as Ceph's own program has it."""
    image = ceph.image(8 * MIB)
    kernel = SimKernel(paranoid=True)
    chances = random.Random(4)
    content = chances.randbytes(8 * MIB)
    piece = 32 << 10
    async with open_target(kernel) as target:
        backend = Rbd(POOL, image, cluster=connection(ceph), block_size=4096)
        device = await target.start_device(backend, DeviceOptions(queues=2, depth=64))
        disk = kernel.block_device(device.dev_id)
        offsets = list(range(0, len(content), piece))
        chances.shuffle(offsets)
        async with trio.open_nursery() as nursery:
            for offset in offsets:
                nursery.start_soon(disk.write, offset, content[offset : offset + piece])
        # Objects are 4 MiB: one request of each kind goes across.
        content = content[: 4 * MIB - 4096] + bytes(8192) + content[4 * MIB + 4096 :]
        await disk.write_zeroes(4 * MIB - 4096, 8192)
        await disk.discard(MIB, 4 * MIB)
        content = content[:MIB] + bytes(4 * MIB) + content[5 * MIB :]
        across = chances.randbytes(64 << 10)
        await disk.write(4 * MIB - len(across) // 2, across)
        at = 4 * MIB - len(across) // 2
        content = content[:at] + across + content[at + len(across) :]
        await disk.flush()
        for offset in range(0, len(content), MIB):
            assert await disk.read(offset, MIB) == content[offset : offset + MIB], f"MiB {offset // MIB}"
    kernel.check()
    assert not kernel.leftovers()
    exported = ceph.directory / f"{image}.bin"
    ceph.rbd("export", "--no-progress", f"{POOL}/{image}", str(exported))
    assert exported.read_bytes() == content


async def test_every_byte_of_a_disk(ceph: Ceph) -> None:
    """What applications write is in the image, byte for byte, and nothing else is."""
    await run_disk(ceph)


async def run_durability(ceph: Ceph) -> None:
    """A writer with a write-back cache; a reader with a connection of its own sees what the cluster has."""
    image = ceph.image()

    async def in_cluster(offset: int) -> bytes:
        async with opened(ceph, image, read_only=True) as reader:
            return await read(reader, offset, 4096)

    async with opened(ceph, image, config=WRITE_BACK) as writer:
        await write(writer, 0, b"a" * 4096)
        assert await in_cluster(0) == bytes(4096), "there is a cache to flush"
        await writer.flush()
        assert await in_cluster(0) == b"a" * 4096, "flushed"
        await write(writer, 8192, b"b" * 4096)
        await write(writer, 4096, b"c" * 4096, fua=True)
        assert await in_cluster(4096) == b"c" * 4096, "with fua"
        await write(writer, 12288, b"d" * 4096)
    assert await in_cluster(12288) == b"d" * 4096, "closing writes back"


async def test_flushed_is_in_the_cluster(ceph: Ceph) -> None:
    """What was flushed, or written with fua, survives this process and its cache; what was not may not."""
    await run_durability(ceph)


async def test_more_at_once_than_a_batch(ceph: Ceph) -> None:
    """Five hundred requests at once all come back, each with its own bytes."""
    async with opened(ceph, ceph.image()) as backend:

        async def there_and_back(number: int) -> None:
            data = number.to_bytes(2, "big") * 256
            await write(backend, number * 512, data)
            assert await read(backend, number * 512, 512) == data

        async with trio.open_nursery() as nursery:
            for number in range(500):
                nursery.start_soon(there_and_back, number)


async def test_geometry(ceph: Ceph) -> None:
    """An image is a disk that a kernel takes; what it can do depends on whether it may be written."""
    image = ceph.image()
    async with opened(ceph, image, block_size=4096) as backend:
        check_geometry(backend)
        assert (backend.size, backend.block_size, backend.discard_granularity) == (8 * MIB, 4096, 64 << 10)
        assert capabilities(backend) == {"read", "write", "flush", "discard", "write_zeroes"}
        assert str(backend) == f"rbd:{POOL}/{image}"
    async with opened(ceph, image, read_only=True) as backend:
        assert capabilities(backend) == {"read"}
        with pytest.raises(OSError, match="write: EROFS"):
            await write(backend, 0, bytes(512))


async def test_zeroes_take_space_or_give_it_back(ceph: Ceph) -> None:
    """Zeroing with unmap frees objects, without takes their space; both read as zeroes."""
    image = ceph.image()

    def used() -> int:
        (described,) = json.loads(ceph.rbd("du", "--format", "json", f"{POOL}/{image}"))["images"]
        return int(described["used_size"])

    async with opened(ceph, image) as backend:
        await backend.write_zeroes(0, 8 * MIB, unmap=False)
        assert await read(backend, 0, 8 * MIB) == bytes(8 * MIB)
        assert used() == 8 * MIB
        await backend.write_zeroes(0, 4 * MIB, unmap=True)
        assert used() == 4 * MIB
        await backend.discard(4 * MIB, 4 * MIB)
        assert used() == 0
        assert await read(backend, 0, 8 * MIB) == bytes(8 * MIB)


def test_spec() -> None:
    """The command line's form has all that a connection needs; what is no image is refused."""
    backend = parse_backend("rbd:disks/vm/one,user=me,config_file=/etc/ceph/other.conf,read_only=on,block_size=4K")
    assert isinstance(backend, Rbd)
    assert (backend.pool, backend.namespace, backend.image) == ("disks", "vm", "one")
    assert (backend.read_only, backend.block_size) == (True, 4096)
    assert (backend.cluster.user, backend.cluster.config_file) == ("me", "/etc/ceph/other.conf")
    for wrong in ("one", "/one", "disks/", "a/b/c/d"):
        with pytest.raises(UsageError, match="POOL/IMAGE"):
            parse_backend(f"rbd:{wrong}")
    with pytest.raises(UsageError, match="block_size 8192"):
        parse_backend("rbd:disks/one,block_size=8K")


# Sizes


async def test_resize(ceph: Ceph) -> None:
    """It grows, and what is new reads as zeroes and can be written; making it smaller is refused, and loses nothing."""
    async with opened(ceph, ceph.image(MIB)) as backend:
        await write(backend, MIB - 512, b"x" * 512)
        with pytest.raises(OSError, match="shorter than the disk"):
            await write(backend, MIB, b"y" * 512)
        await backend.resize(2 * MIB)
        assert backend.size == 2 * MIB
        assert await read(backend, MIB - 512, 1024) == b"x" * 512 + bytes(512)
        await write(backend, 2 * MIB - 512, b"z" * 512)
        with pytest.raises(UsageError, match="would lose data: rbd resize --allow-shrink"):
            await backend.resize(MIB)
        assert await backend.rescan() == 2 * MIB


async def test_resize_loses_nothing(ceph: Ceph) -> None:
    """A size that is less than the image really has, whoever made it larger, or that no disk has, leaves it as it is."""
    image = ceph.image(2 * MIB)
    async with opened(ceph, image, block_size=4096) as backend:
        await trio.to_thread.run_sync(lambda: ceph.rbd("resize", "--no-progress", "--size", "4M", f"{POOL}/{image}"))
        backend.size = 2 * MIB
        for size in (2 * MIB, 3 * MIB):
            with pytest.raises(UsageError, match="would lose data: rbd resize --allow-shrink"):
                await backend.resize(size)
        for size, says in ((4 * MIB + 512, "not a multiple"), (1 << 63, r"smaller than 2\*\*63"), (1 << 70, "smaller")):
            with pytest.raises(UsageError, match=says):
                await backend.resize(size)
        assert await backend.rescan() == 4 * MIB
    async with opened(ceph, image, read_only=True) as backend:
        with pytest.raises(OSError, match="open for reading alone, open it without read_only") as caught:
            await backend.resize(8 * MIB)
        assert caught.value.errno == errno.EROFS


async def test_resize_loses_nothing_in_a_race(ceph: Ceph, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither does one when the image grows between question and call."""
    right = Rbd._ask_size
    image = ceph.image(2 * MIB)
    async with opened(ceph, image) as backend:

        def before_it_grew(backend: Rbd, image: Any) -> int:
            return min(right(backend, image), 2 * MIB)

        await trio.to_thread.run_sync(lambda: ceph.rbd("resize", "--no-progress", "--size", "4M", f"{POOL}/{image}"))
        with monkeypatch.context() as patched:
            patched.setattr(Rbd, "_ask_size", before_it_grew)
            with pytest.raises(UsageError, match="would lose data"):
                await backend.resize(3 * MIB)
        assert await backend.rescan() == 4 * MIB


async def test_resized_elsewhere(ceph: Ceph) -> None:
    """Another program's resize is told; beyond a smaller size requests fail with EIO, and a size that no disk has changes nothing."""
    image = ceph.image(2 * MIB)
    async with opened(ceph, image, block_size=4096) as backend:

        async def resize(*arguments: str) -> int:
            async with trio.open_nursery() as nursery:
                command = ("resize", "--no-progress", *arguments, f"{POOL}/{image}")
                nursery.start_soon(trio.to_thread.run_sync, lambda: ceph.rbd(*command))
                with trio.fail_after(HANGS):
                    return await backend.next_size()

        assert await resize("--size", "3M") == 3 * MIB
        assert await resize("--size", "1M", "--allow-shrink") == backend.size == MIB
        for request in (read(backend, MIB, 4096), write(backend, MIB, bytes(4096)), backend.discard(MIB, 4096)):
            with pytest.raises(OSError, match="shorter than the disk") as caught:
                await request
            assert caught.value.errno == errno.EIO
        await trio.to_thread.run_sync(
            lambda: ceph.rbd("resize", "--no-progress", "--size", "1049088B", f"{POOL}/{image}")
        )
        with pytest.raises(UsageError, match="not a multiple of block_size 4096"):
            await backend.rescan()
        assert backend.size == MIB
        assert await resize("--size", "4M") == 4 * MIB
        async with trio.open_nursery() as nursery:

            async def wait() -> None:
                with pytest.raises(trio.ClosedResourceError):
                    await backend.next_size()

            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            await backend.aclose()


async def test_shrunk_with_nobody_waiting(ceph: Ceph) -> None:
    """Beyond the end of an image that another program made smaller requests fail soon, whether a disk may have its size or not."""
    image = ceph.image(2 * MIB)
    async with opened(ceph, image, block_size=4096) as backend:
        for size, accepted in ((MIB + 512, 2 * MIB), (MIB, MIB), (3 * 4096 + 512, MIB), (0, MIB)):
            command = ("resize", "--no-progress", "--allow-shrink", "--size", f"{size}B", f"{POOL}/{image}")
            await trio.to_thread.run_sync(ceph.rbd, *command)
            last = size - size % 4096
            assert await failure(partial(write, backend, last, b"x" * 4096)) == errno.EIO
            assert backend.size == accepted
            if last:
                await write(backend, last - 4096, b"y" * 4096)
                assert await read(backend, last - 4096, 4096) == b"y" * 4096


async def test_a_size_is_told_once(ceph: Ceph) -> None:
    """A size that came while nobody waited is told by the next call; then there is nothing to tell."""
    async with opened(ceph, ceph.image(MIB)) as backend:
        await backend.resize(2 * MIB)
        assert await backend.next_size() == 2 * MIB
        with trio.move_on_after(0.05) as scope:
            await backend.next_size()
        assert scope.cancelled_caught


async def test_resized_while_it_is_opened(ceph: Ceph, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resize in any moment of opening is seen: none falls between the question for the size and the watch."""
    image = ceph.image(MIB)
    right = Rbd._ask_size
    asked: list[int] = []

    def resized_then(backend: Rbd, handle: Any) -> int:
        asked.append(right(backend, handle))
        if len(asked) == 1:
            ceph.rbd("resize", "--no-progress", "--size", "2M", f"{POOL}/{image}")
        return asked[0] if len(asked) == 1 else right(backend, handle)

    monkeypatch.setattr(Rbd, "_ask_size", resized_then)
    async with opened(ceph, image) as backend:
        with trio.fail_after(HANGS):
            while backend.size != 2 * MIB:
                await trio.sleep(0.02)
        assert await backend.next_size() == 2 * MIB


async def test_opening_fails_at_the_size(ceph: Ceph, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image whose size can't be had is closed again, watch and all."""

    def fails(backend: Rbd, image: Any) -> int:
        raise OSError(errno.EIO, "no size")

    image = ceph.image(MIB)
    cluster = connection(ceph)
    with monkeypatch.context() as patched:
        patched.setattr(Rbd, "_ask_size", fails)
        with pytest.raises(OSError, match="no size"):
            await Rbd(POOL, image, cluster=cluster).open()
    assert not cluster.is_open
    async with opened(ceph, image) as backend:
        assert backend.size == MIB


async def run_reader(ceph: Ceph, within: float = HANGS) -> None:
    """An image that is open for reading alone, while another program gives it other sizes."""
    image = ceph.image(MIB)
    async with opened(ceph, image, read_only=True) as backend:
        for size in ("2M", "1M"):
            command = ("resize", "--no-progress", "--allow-shrink", "--size", size, f"{POOL}/{image}")
            await trio.to_thread.run_sync(ceph.rbd, *command)
            with trio.fail_after(within):
                assert await backend.next_size() == int(size[0]) * MIB
        with pytest.raises(OSError, match="discard: EROFS"):
            await backend.discard(0, 64 << 10)
        with pytest.raises(OSError, match="write_zeroes: EROFS"):
            await backend.write_zeroes(0, 512, unmap=True)


async def test_a_reader_follows(ceph: Ceph) -> None:
    """One that is open for reading alone is told of another size, too, and writes in no way."""
    await run_reader(ceph)


@pytest.mark.parametrize("why", ["not permitted", "journal"])
async def test_a_reader_that_may_not_write(ceph: Ceph, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without the capability to write reads all the same; so does one of an image with a journal, and its writer keeps the lock."""
    image = ceph.image(MIB)
    if why == "journal":
        ceph.rbd("feature", "enable", f"{POOL}/{image}", "journaling")
    right, refusals = Rbd._open_by, []

    def open_by(backend: Rbd, opening: Any, ioctx: Any) -> Any:
        if opening == _librbd.load().rbd.rbd_open and why == "not permitted":
            refusals.append(backend)
            raise BackendError(errno.EPERM, "not permitted")
        return right(backend, opening, ioctx)

    async with opened(ceph, image) as writer:
        await write(writer, 0, b"x" * 512, fua=True)
        monkeypatch.setattr(Rbd, "_open_by", open_by)
        async with opened(ceph, image, read_only=True) as reader:
            assert refusals == ([reader] if why == "not permitted" else [])
            assert await read(reader, 0, 512) == b"x" * 512
            (owner,) = json.loads(ceph.rbd("lock", "ls", "--format", "json", f"{POOL}/{image}"))
            await write(writer, 0, b"y" * 512, fua=True)
            assert json.loads(ceph.rbd("lock", "ls", "--format", "json", f"{POOL}/{image}")) == [owner]


# Connections


async def test_shared_connection(ceph: Ceph) -> None:
    """Images share an open cluster, which stays open with the last of them; it cannot be closed under them."""
    first, second = ceph.image(), ceph.image()
    cluster = connection(ceph)
    await cluster.open()
    with pytest.raises(UsageError, match="open already"):
        await cluster.open()
    backends = [Rbd(POOL, image, cluster=cluster) for image in (first, second)]
    for backend in backends:
        await backend.open()
    assert cluster.images == 2
    with pytest.raises(UsageError, match="2 images open"):
        await cluster.aclose()
    await write(backends[0], 0, b"x" * 512)
    await backends[0].aclose()
    assert await read(backends[1], 0, 512) == bytes(512)
    await backends[1].aclose()
    assert cluster.images == 0
    assert cluster.is_open
    await cluster.aclose()


async def test_disconnecting_when_cancelled(ceph: Ceph) -> None:
    """A cancelled task disconnects all the same: nobody else has the handle."""
    cluster = connection(ceph)
    await cluster.open()
    with trio.CancelScope() as scope:
        scope.cancel()
        await cluster.aclose()
    assert not cluster.is_open
    with trio.fail_after(HANGS):
        while in_use()[1]:
            await trio.sleep(0.02)


async def test_a_connection_goes_with_its_last_image(ceph: Ceph) -> None:
    """One that an image opened is closed with the last image on it, and can be opened again."""
    first, second = ceph.image(), ceph.image()
    cluster = connection(ceph)
    backends = [Rbd(POOL, image, cluster=cluster) for image in (first, second)]
    await backends[0].open()
    with pytest.raises(UsageError, match="open already"):
        await backends[0].open()
    await backends[1].open()
    seen = [cluster.is_open]
    for step in (backends[0].aclose, backends[1].aclose, backends[0].open, backends[0].aclose):
        await step()
        seen.append(cluster.is_open)
    assert seen == [True, True, False, True, False]


async def test_bounds_are_ours_where_nobody_set_them(ceph: Ceph, tmp_path: Path) -> None:
    """Without a word a request ends after a minute; a file's value and a given one stay, 0 too."""
    file = tmp_path / "ceph.conf"
    file.write_text(Path(ceph.config_file).read_text() + "\nclient mount timeout = 33\n")
    cluster = CephCluster(config_file=file, config={"rados_osd_op_timeout": "0"})
    await cluster.open()
    shown = {
        name: cluster.option(name) for name in ("client_mount_timeout", "rados_osd_op_timeout", "rados_mon_op_timeout")
    }
    await cluster.aclose()
    assert {name: float(value or -1) for name, value in shown.items()} == {
        "client_mount_timeout": 33, "rados_osd_op_timeout": 0, "rados_mon_op_timeout": 60
    }  # fmt: skip


async def test_cpus(ceph: Ceph) -> None:
    """Ceph's threads run on the CPUs that were given, and nobody else is moved."""
    before = os.sched_getaffinity(0)
    cpu = min(before)
    others = threads_of_ceph()
    cluster = CephCluster(config_file=ceph.config_file, cpus={cpu})
    await cluster.open()
    confined = [os.sched_getaffinity(thread) for thread in threads_of_ceph() - others]
    await cluster.aclose()
    assert confined
    assert all(cpus == {cpu} for cpus in confined)
    assert os.sched_getaffinity(0) == before
    assert await trio.to_thread.run_sync(os.sched_getaffinity, 0) == before


async def refusal(backend: Rbd) -> BackendError:
    """The error with which `open` refuses; it can be tried again, and nothing is open."""
    with trio.fail_after(HANGS), pytest.raises(BackendError) as caught:
        await backend.open()
    assert not backend.cluster.is_open
    assert backend.cluster.images == 0
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("pool", "namespace", "config", "number", "says"),
    [
        ("nopool", "", {}, errno.ENOENT, "pool 'nopool': there is none of that name"),
        (POOL, "", {}, errno.ENOENT, "the image: there is none of that name"),
        (POOL, "elsewhere", {}, errno.ENOENT, "rbd:disks/elsewhere/none"),
        (POOL, "", {"bogus": "1"}, errno.ENOENT, "Ceph does not take bogus = '1'"),
        (POOL, "", {"rados_osd_op_timeout": "soon"}, errno.EINVAL, "does not take rados_osd_op_timeout = 'soon'"),
        (POOL, "", {"auth_client_required": "cephx"}, errno.ENOENT, "no key for the user"),
    ],
)
async def test_refusals(ceph: Ceph, pool: str, namespace: str, config: dict[str, str], number: int, says: str) -> None:
    """What is missing is named in one line, with its errno."""
    error = await refusal(Rbd(pool, "none", namespace=namespace, cluster=connection(ceph, **config)))
    assert error.errno == number
    assert says in str(error)


async def test_no_such_file(ceph: Ceph) -> None:
    """A configuration or a key that is not there is named; nothing is asked over the network."""
    error = await refusal(Rbd(POOL, "none", cluster=CephCluster(config_file="/nowhere/ceph.conf")))
    assert error.errno == errno.ENOENT
    assert "config_file /nowhere/ceph.conf can't be read" in str(error)


async def test_no_cluster(ceph: Ceph) -> None:
    """A port that nobody listens on: an error that names it, in the time that was given."""
    cluster = CephCluster(config_file="/dev/null", config={"mon_host": "v2:127.0.0.1:1", **IMPATIENT})
    error = await refusal(Rbd(POOL, "none", cluster=cluster))
    assert error.errno == errno.ETIMEDOUT
    assert "no monitor answered within 1 s: " in str(error)
    assert "127.0.0.1:1" in str(error)


async def test_names_that_c_would_cut_off(ceph: Ceph) -> None:
    """A zero byte in a name is refused: what stands before it may be another image's name."""
    image = ceph.image()
    for backend in (
        Rbd(POOL, f"{image}\0x", cluster=connection(ceph)),
        Rbd(f"{POOL}\0x", image, cluster=connection(ceph)),
        Rbd(POOL, image, cluster=connection(ceph, rbd_cache="true\0")),
    ):
        with pytest.raises(UsageError, match="zero byte"):
            await backend.open()
        assert not backend.cluster.is_open


async def test_a_size_that_no_disk_has(ceph: Ceph) -> None:
    """An image that is no multiple of the block size, or is empty, is refused with the mend, and closed again."""
    with_rest = ceph.image(MIB + 512)
    error = await refusal(Rbd(POOL, with_rest, cluster=connection(ceph), block_size=4096))
    assert error.errno == errno.EINVAL
    assert "size 1049088 is not a multiple of block_size 4096: use a smaller block_size" in str(error)
    async with opened(ceph, with_rest) as backend:
        assert backend.size == MIB + 512
    empty = ceph.image(0)
    assert "rbd resize" in str(await refusal(Rbd(POOL, empty, cluster=connection(ceph))))


@pytest.mark.parametrize("library", ["LIBRADOS", "LIBRBD"])
async def test_no_library(ceph: Ceph, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Ceph's libraries the package works; opening an image says which one is missing, and where it is to be had."""
    name = getattr(_librbd, library)
    package = _librbd._DEBIAN[name]
    monkeypatch.setattr(_librbd, library, f"{name}.gone")
    monkeypatch.setitem(_librbd._DEBIAN, f"{name}.gone", package)
    _librbd.load.cache_clear()
    try:
        error = await refusal(Rbd(POOL, "none"))
    finally:
        _librbd.load.cache_clear()
    assert error.errno == errno.ENOTSUP
    assert f"{name}.gone does not load" in str(error)
    assert f"apt-get install {package}" in str(error)


# Time, and ends


async def run_timeout(ceph: Ceph) -> None:
    """Every kind of request, on a cluster that has stopped to answer."""
    async with opened(ceph, ceph.image()) as backend:
        await write(backend, 0, b"x" * 512)
        with ceph.paused(), trio.fail_after(HANGS):
            set_bound(backend.cluster, 1)
            requests: list[Callable[[], Any]] = [
                lambda: read(backend, 0, 512),
                lambda: write(backend, 0, b"y" * 512, fua=True),
                lambda: backend.write_zeroes(0, 512, unmap=True),
                lambda: backend.discard(0, 64 << 10),
            ]

            numbers: list[int | None] = []

            async def fails(request: Callable[[], Any]) -> None:
                try:
                    await request()
                    numbers.append(None)
                except OSError as error:
                    numbers.append(error.errno)

            async with trio.open_nursery() as nursery:
                for request in requests:
                    nursery.start_soon(fails, request)
            assert numbers == [errno.ETIMEDOUT] * 4
            with pytest.raises(OSError, match="ETIMEDOUT"):
                await Rbd(POOL, "none", cluster=connection(ceph, rados_osd_op_timeout="1")).open()
            set_bound(backend.cluster, 60)
        await write(backend, 4096, b"z" * 512, fua=True)
        assert await read(backend, 4096, 512) == b"z" * 512


async def test_requests_end_in_time(ceph: Ceph) -> None:
    """A cluster that does not answer: each request fails with ETIMEDOUT; when it is back they are carried out again."""
    await run_timeout(ceph)


async def test_requests_wait(ceph: Ceph) -> None:
    """A cluster that stands still for less than the bound: requests wait, nobody else does, and all is as asked then."""
    async with opened(ceph, ceph.image()) as backend:
        await write(backend, 0, b"x" * 4096)
        answers: list[bytes] = []
        async with trio.open_nursery() as nursery:

            async def again() -> None:
                await write(backend, 0, b"y" * 4096, fua=True)
                answers.append(await read(backend, 0, 4096))

            with ceph.paused():
                nursery.start_soon(again)
                await trio.sleep(0.2)
                assert answers == []
        assert answers == [b"y" * 4096]


async def run_cancelled(ceph: Ceph) -> None:
    """Requests that are cancelled while the cluster stands still, and what becomes of them when it goes on."""
    async with opened(ceph, ceph.image()) as backend:
        await write(backend, 0, b"x" * 4096, fua=True)
        buffer = bytearray(b"?" * 4096)
        data = bytearray(b"y" * 4096)
        with ceph.paused():
            async with trio.open_nursery() as nursery:

                async def written() -> None:
                    await backend.write(8192, memoryview(data), fua=True)

                nursery.start_soon(backend.read, 0, memoryview(buffer))
                nursery.start_soon(written)
                await trio.testing.wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
            # As in the engine: the next request has the buffers.
            data[:] = b"n" * 4096
            assert backend._opened().requests, "they are with the library still"
        with trio.fail_after(HANGS):
            while backend._opened().requests:
                await trio.sleep(0.02)
        assert buffer == b"?" * 4096, "nobody else's by now"
        assert await read(backend, 8192, 4096) == b"y" * 4096


async def test_cancelled_requests_go_at_once(ceph: Ceph) -> None:
    """A cancelled task does not wait for the cluster; its request ends by itself, and leaves the buffer alone."""
    await run_cancelled(ceph)


async def test_closing_waits_for_requests(ceph: Ceph) -> None:
    """What was cancelled and is still under way is over when the image is closed."""
    image = ceph.image()
    backend = Rbd(POOL, image, cluster=connection(ceph))
    await backend.open()
    async with trio.open_nursery() as nursery:
        with ceph.paused():
            with trio.move_on_after(0.1):
                await write(backend, 0, b"x" * 4096, fua=True)
            requests = backend._opened().requests
            assert requests
            nursery.start_soon(backend.aclose)
            await trio.sleep(0.1)
            assert requests
    assert not requests
    async with opened(ceph, image) as backend:
        assert await read(backend, 0, 4096) == b"x" * 4096


async def test_closing_answers_requests(ceph: Ceph) -> None:
    """Whoever waits for a request when the image is closed gets its result, and the close waits for it."""
    image = ceph.image()
    backend = Rbd(POOL, image, cluster=connection(ceph))
    await backend.open()
    order: list[str] = []

    async def written(offset: int) -> None:
        await write(backend, offset, b"x" * 4096)
        order.append("written")

    async def close() -> None:
        await backend.aclose()
        order.append("closed")

    with trio.fail_after(HANGS):
        async with trio.open_nursery() as nursery:
            with ceph.paused():
                # The cache answers no write before the first flush.
                for number in range(3):
                    nursery.start_soon(written, number * 4096)
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(close)
                await trio.testing.wait_all_tasks_blocked()
                assert order == []
    assert order == ["written"] * 3 + ["closed"]
    async with opened(ceph, image) as backend:
        assert await read(backend, 0, 3 * 4096) == b"x" * 3 * 4096


async def test_closing_waits_for_calls(ceph: Ceph) -> None:
    """An image is not closed under a thread that asks it something; who asks later is told that it is closed."""
    order: list[str] = []
    asking, gate = threading.Event(), threading.Event()
    backend = Rbd(POOL, ceph.image(), cluster=connection(ceph))
    await backend.open()

    def ask(image: Any) -> int:
        asking.set()
        assert gate.wait(HANGS)
        order.append("asked")
        return backend._ask_size(image)

    async def close() -> None:
        await backend.aclose()
        order.append("closed")

    opened = backend._opened()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(backend._call, opened, ask)
        await trio.to_thread.run_sync(asking.wait, HANGS)
        nursery.start_soon(close)
        await trio.testing.wait_all_tasks_blocked()
        gate.set()
    assert order == ["asked", "closed"]
    with pytest.raises(UsageError, match="not open"):
        await backend._call(opened, ask)
    with pytest.raises(UsageError, match="not open"):
        await backend.rescan()


def test_closing_is_bounded(ceph: Ceph, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster that does not answer holds up a close for a bounded time, which says so; the rest happens when it is back."""
    monkeypatch.setattr(rbd, "CLOSE_SECONDS", 0.3)
    image = ceph.image()

    async def run() -> CephCluster:
        backend = Rbd(POOL, image, cluster=connection(ceph))
        await backend.open()
        with trio.fail_after(HANGS), ceph.paused():
            with trio.move_on_after(0.1):
                await write(backend, 0, bytes(4096), fua=True)
            numbers: list[int | None] = []

            async def waits() -> None:
                with pytest.raises(OSError, match="write: ETIMEDOUT") as caught:
                    await write(backend, 4096, bytes(4096), fua=True)
                numbers.append(caught.value.errno)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(waits)
                await trio.testing.wait_all_tasks_blocked()
                with pytest.raises(BackendError, match=r"not closed after 0\.3 s") as caught:
                    await backend.aclose()
            assert [caught.value.errno, *numbers] == [errno.ETIMEDOUT] * 2
        return backend.cluster

    cluster = trio.run(run)
    wait_until(lambda: not cluster.is_open and not in_use()[1])


def test_opening_can_be_given_up(ceph: Ceph) -> None:
    """A create that is cancelled returns at once, and what it was about to open does not stay."""

    async def run() -> None:
        cluster = CephCluster(config_file="/dev/null", config={"mon_host": "v2:127.0.0.1:1", **IMPATIENT})
        with trio.fail_after(HANGS), ceph.paused():
            for backend in (Rbd(POOL, "none", cluster=cluster), Rbd(POOL, image, cluster=connection(ceph))):
                with trio.move_on_after(0.3) as scope:
                    await backend.open()
                assert scope.cancelled_caught
                clusters.append(backend.cluster)

    clusters: list[CephCluster] = []
    image = ceph.image()
    with nothing_left():
        trio.run(run)
    assert not any(cluster.is_open for cluster in clusters)


def test_nothing_is_left(ceph: Ceph) -> None:
    """After an image is closed there is no file of Ceph's, and no thread; nor after one that could not be opened."""
    image = ceph.image()

    async def run() -> None:
        async with opened(ceph, image) as backend:
            await write(backend, 0, bytes(512), fua=True)
            assert in_use()[1], "they are known by these names"
        await refusal(Rbd(POOL, "none", cluster=connection(ceph)))

    trio.run(run)
    with nothing_left():
        trio.run(run)


def test_a_cluster_that_dies(ceph: Ceph, tmp_path: Path) -> None:
    """All its daemons are killed while a disk is written: applications get errors in time, and the target ends."""
    with started(tmp_path) as mortal:
        image = mortal.image()

        async def run() -> None:
            kernel = SimKernel(paranoid=True)
            failures = []
            with trio.fail_after(HANGS):
                async with open_target(kernel) as target:
                    cluster = connection(mortal)
                    device = await target.start_device(Rbd(POOL, image, cluster=cluster))
                    disk = kernel.block_device(device.dev_id)
                    await disk.write(0, bytes(4096))
                    mortal.kill()
                    set_bound(cluster, 1)
                    for request in (disk.write(0, b"x" * 4096), disk.read(4096, 4096)):
                        with pytest.raises(OSError) as caught:  # noqa: PT011 - whatever errno: ETIMEDOUT, mostly
                            await request
                        failures.append(caught.value.errno)
            assert failures == [errno.ETIMEDOUT] * 2
            assert not kernel.leftovers()

        trio.run(run)


# Planted bugs -----------------------------------------------------------------------------------------------------------


def flush_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def flush(backend: Rbd) -> None:
        await trio.lowlevel.checkpoint()

    monkeypatch.setattr(Rbd, "flush", flush)


def fua_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Rbd.write

    async def write(backend: Rbd, offset: int, data: memoryview, *, fua: bool) -> None:
        await right(backend, offset, data, fua=False)

    monkeypatch.setattr(Rbd, "write", write)


def written_a_block_too_far(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Rbd.write

    async def write(backend: Rbd, offset: int, data: memoryview, *, fua: bool) -> None:
        further = offset + backend.block_size
        await right(backend, further if further + len(data) <= backend.size else offset, data, fua=fua)

    monkeypatch.setattr(Rbd, "write", write)


def read_and_write_a_block_too_far(monkeypatch: pytest.MonkeyPatch) -> None:
    written_a_block_too_far(monkeypatch)
    right = Rbd.read

    async def read(backend: Rbd, offset: int, buffer: memoryview) -> None:
        further = offset + backend.block_size
        await right(backend, further if further + len(buffer) <= backend.size else offset, buffer)

    monkeypatch.setattr(Rbd, "read", read)


def discards_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Rbd.discard

    async def discard(backend: Rbd, offset: int, length: int) -> None:
        await right(backend, offset, min(length + backend.block_size, backend.size - offset))

    monkeypatch.setattr(Rbd, "discard", discard)


def results_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rbd, "_check", lambda backend, result, operation: None)


def reads_go_to_the_caller_s_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    async def read(backend: Rbd, offset: int, buffer: memoryview) -> None:
        library = _librbd.load()
        content = library.ffi.from_buffer("char[]", buffer)
        image = backend._opened().image
        length = len(buffer)
        await backend._finish(
            backend._opened(), "read", content, lambda c: library.rbd.rbd_aio_read(image, offset, length, content, c)
        )

    monkeypatch.setattr(Rbd, "read", read)


async def run_bytes(ceph: Ceph) -> None:
    await trio.to_thread.run_sync(run_scripts, ceph, 30)


def readers_are_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Rbd, "_open_for_reading", lambda backend, io: backend._open_by(_librbd.load().rbd.rbd_open_read_only, io)
    )


@pytest.mark.parametrize(
    ("plant", "run"),
    [
        (readers_are_not_told, lambda ceph: run_reader(ceph, within=0.5)),
        (flush_does_nothing, run_durability),
        (fua_is_forgotten, run_durability),
        (written_a_block_too_far, run_bytes),
        (written_a_block_too_far, run_disk),
        (read_and_write_a_block_too_far, run_disk),
        (discards_too_much, run_bytes),
        (results_are_not_looked_at, run_timeout),
        (reads_go_to_the_caller_s_buffer, run_cancelled),
    ],
)
async def test_a_planted_bug_is_found(
    ceph: Ceph, plant: Callable[[pytest.MonkeyPatch], None], run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lost flushes, shifted and forgotten requests, results that nobody looks at: a test above notices each."""
    plant(monkeypatch)
    with pytest.raises((AssertionError, pytest.fail.Exception, trio.TooSlowError)):
        await run(ceph)
