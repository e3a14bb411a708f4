"""A sparse file on a filesystem that is full."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from tests.both.arms import RealDisk
from tests.kernel.programs import make_file, run, start_server

MIB = 1 << 20


@asynccontextmanager
async def small_filesystem(directory: Path) -> AsyncIterator[Path]:
    """A tmpfs of 8 MiB."""
    await trio.Path(directory).mkdir()
    (await run("mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", directory)).check()
    try:
        yield directory
    finally:
        with trio.CancelScope(shield=True):
            done = await run("umount", directory)
    done.check()


@pytest.mark.any_kernel
@pytest.mark.parametrize("serve", ["inline", "async"])
async def test_full_disk(tmp_path: Path, serve: str) -> None:
    """A write that the server's filesystem has no room for gets ENOSPC; what is there is read and rewritten as before."""
    async with small_filesystem(tmp_path / "small") as directory:
        image = make_file(directory / "image", 64 * MIB)
        async with start_server(f"file:{image}", options=["--serve", serve]) as server:
            disk = await trio.to_thread.run_sync(RealDisk, server.disk)
            with trio.fail_after(120):
                try:
                    number = await first_error(disk)
                    assert number == errno.ENOSPC
                    await disk.write(0, b"y" * MIB)
                    assert await disk.read(0, MIB) == b"y" * MIB
                    assert await disk.read(MIB, MIB) == b"x" * MIB
                    assert await disk.read(63 * MIB, MIB) == bytes(MIB)
                    # Room again: the same write succeeds.
                    await disk.discard(4 * MIB, 2 * MIB)
                    await disk.write(32 * MIB, b"z" * MIB)
                    assert await disk.read(32 * MIB, MIB) == b"z" * MIB
                finally:
                    await trio.to_thread.run_sync(disk.close)


async def first_error(disk: RealDisk) -> int | None:
    """Write from the beginning, MiB by MiB, until one fails: its errno."""
    for offset in range(0, 16 * MIB, MIB):
        try:
            await disk.write(offset, b"x" * MIB)
        except OSError as error:
            assert offset >= 4 * MIB, "there was room for this"
            return error.errno
    return None
