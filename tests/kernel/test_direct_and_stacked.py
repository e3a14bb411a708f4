"""File backends past the page cache: on a real filesystem, and on a block device, which here is another disk of ours."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.kernel.programs import (
    drop_caches,
    fio_verify,
    fsck,
    make_file,
    make_filesystem,
    mounted,
    run,
    start_server,
)


@asynccontextmanager
async def lower_disk(tmp_path: Path, kind: str) -> AsyncIterator[str]:
    """A block device to build on: the machine's scratch disk, or one served by another process of ours."""
    if kind == "scratch":
        yield os.environ["UBLK_TRIO_SCRATCH"]
    else:
        async with start_server("memory:96M", options=["--queues", "2"]) as server:
            yield server.disk


KINDS = ["ublk", "scratch"] if "UBLK_TRIO_SCRATCH" in os.environ else ["ublk"]


@pytest.mark.parametrize("kind", KINDS)
async def test_direct_file_on_ext4(tmp_path: Path, kind: str) -> None:
    """direct=on serves a file of an ext4 past the page cache, every byte right, and the file holds what was written."""
    async with lower_disk(tmp_path, kind) as lower:
        await make_filesystem(lower)
        async with mounted(lower, tmp_path / "mount") as directory:
            image = make_file(directory / "image", 48 << 20)
            async with start_server(f"file:{image},direct=on", options=["--queues", "2", "--serve", "async"]) as server:
                await fio_verify(server.disk)
                assert cached_pages(image) == 0
                (await run("sh", "-c", f"echo marked | dd of={server.disk} conv=fsync status=none")).check()
            with image.open("rb") as file:
                assert file.read(6) == b"marked"
        drop_caches()
        await fsck(lower)


def cached_pages(image: Path) -> int:
    """How many of a file's pages are in the page cache, by mincore(2)."""
    with image.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapping:
        cached = (ctypes.c_ubyte * (len(mapping) // mmap.PAGESIZE))()
        first = ctypes.c_char.from_buffer(mapping)
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mincore(ctypes.byref(first), ctypes.c_size_t(len(mapping)), cached) == 0, ctypes.get_errno()
        del first
    return sum(page & 1 for page in cached)


def is_in_use(disk: str) -> bool:
    """Whether somebody has it to themselves."""
    try:
        os.close(os.open(disk, os.O_RDONLY | os.O_EXCL))
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return True
    return False


async def test_disk_on_a_disk(tmp_path: Path) -> None:
    """A disk of ours on a disk of ours: verified, and a discard goes all the way down."""
    async with lower_disk(tmp_path, "ublk") as lower:
        async with start_server(f"file:{lower},direct=on", options=["--queues", "2"]) as server:
            await fio_verify(server.disk)
            assert is_in_use(lower)
            (await run("blkdiscard", server.disk)).check()
        (await run("cmp", "--bytes", str(27 << 20), lower, "/dev/zero")).check()
