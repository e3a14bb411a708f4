"""Discard frees, zeroing zeroes, and what has to be on stable storage reaches the backend as such."""

from __future__ import annotations

from pathlib import Path

import trio

from tests.kernel.programs import exists, make_file, make_filesystem, mounted, run, start_server
from ublk_trio import DeviceOptions, Memory, RealKernel, open_target

MIB = 1 << 20


async def fill(disk: str, mebibytes: int) -> None:
    """Write something that is not zero, past the page cache."""
    script = f"tr '\\0' x < /dev/zero | dd of={disk} bs=1M count={mebibytes} iflag=fullblock oflag=direct status=none"
    (await run("sh", "-c", script)).check()


async def outline(disk: str, mebibytes: int) -> str:
    """The beginning of a disk, past the page cache, each run of equal bytes as one; zero bytes as 0."""
    script = f"dd if={disk} bs=1M count={mebibytes} iflag=direct status=none | tr '\\0' 0 | tr -s 0x"
    return (await run("sh", "-c", script)).check().stdout


def allocated_bytes(image: Path) -> int:
    return image.stat().st_blocks * 512


async def test_discard_frees_memory_and_file(tmp_path: Path) -> None:
    """blkdiscard gives a memory disk's pages and a file's blocks back, and only those of its range."""
    image = make_file(tmp_path / "image", 64 * MIB)
    # Few and small buffers: where huge pages are always given, a buffer used for the first time takes 2 MiB, which would
    # hide what the disk gives back.
    options = ["--depth", "8", "--max-io", "64K"]
    async with start_server("memory:64M", f"file:{image}", options=options) as server:
        for disk in server.disks:
            await fill(disk, 48)
        memory_bytes, file_bytes = server.resident_bytes(), allocated_bytes(image)
        assert file_bytes >= 48 * MIB
        for disk in server.disks:
            (await run("blkdiscard", "--offset", str(8 * MIB), "--length", str(40 * MIB), disk)).check()
        assert server.resident_bytes() < memory_bytes - 32 * MIB
        assert allocated_bytes(image) <= file_bytes - 40 * MIB
        for disk in server.disks:
            assert await outline(disk, 10) == "x0"


async def test_zeroing(tmp_path: Path) -> None:
    """blkdiscard -z and fallocate -z make a range read zeroes, and nothing else."""
    image = make_file(tmp_path / "image", 16 * MIB)
    async with start_server("memory:16M", f"file:{image}", options=["--serve", "async"]) as server:
        for disk in server.disks:
            await fill(disk, 8)
            (await run("blkdiscard", "--zeroout", "--offset", str(MIB), "--length", str(MIB), disk)).check()
            zero_range = [
                "fallocate",
                "--zero-range",
                "--keep-size",
                "--offset",
                str(4 * MIB),
                "--length",
                str(MIB),
                disk,
            ]
            (await run(*zero_range)).check()
            assert await outline(disk, 8) == "x0x0x"


class Counting(Memory):
    """A memory disk with a pretended cache: counts how often it was told to be durable."""

    def __init__(self) -> None:
        super().__init__(64 * MIB)
        self.flushes = self.fua_writes = self.writes = 0

    def write(self, offset: int, data: memoryview, *, fua: bool) -> int | None:
        self.writes += 1
        self.fua_writes += fua
        return super().write(offset, data, fua=fua)

    def flush(self) -> None:
        self.flushes += 1


async def test_durability_reaches_the_backend(tmp_path: Path) -> None:
    """fsync of the disk and of a file on it becomes FLUSH; O_DSYNC writes carry FUA; an ordinary write has neither."""
    backend = Counting()
    with trio.fail_after(120):
        async with open_target(RealKernel()) as target:
            device = await target.start_device(backend, DeviceOptions(queues=2))
            one_write = ["dd", "if=/dev/zero", f"of={device.path}", "bs=4k", "count=1", "status=none"]
            (await run(*one_write, "oflag=direct")).check()
            assert (backend.flushes, backend.fua_writes, backend.writes) == (0, 0, 1)
            (await run(*one_write, "oflag=direct,dsync")).check()
            assert (backend.fua_writes, backend.writes) == (1, 2)
            before = backend.flushes
            (await run(*one_write, "conv=fsync")).check()
            assert backend.flushes > before, "fsync of the disk"

            await make_filesystem(device.path)
            async with mounted(device.path, tmp_path / "mount") as directory:
                (await run("dd", "if=/dev/zero", f"of={directory / 'file'}", "bs=4k", "count=8", "status=none")).check()
                before = backend.flushes + backend.fua_writes
                writes = backend.writes
                (await run("sync", directory / "file")).check()
                assert backend.flushes + backend.fua_writes > before, "fsync of a file"
                assert backend.writes > writes
            await target.stop_device(device)
            assert not exists(device.path)
