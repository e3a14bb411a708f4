"""A filesystem on a disk of ours: what a user copies there is there, after caches are dropped, and fsck finds it clean."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest

from tests.kernel.programs import drop_caches, fsck, make_file, make_filesystem, mounted, run, start_server

FILES_PER_DIRECTORY = 100


def make_tree(root: Path, files: int) -> Path:
    """Small files, a few of them empty and some larger than a block, in directories of a hundred."""
    chance = random.Random(1)
    content = chance.randbytes(1 << 16)
    for number in range(files):
        directory = root / f"directory-{number // FILES_PER_DIRECTORY}"
        if number % FILES_PER_DIRECTORY == 0:
            directory.mkdir(parents=True)
        start = chance.randrange(len(content))
        directory.joinpath(f"file-{number}").write_bytes(content[start : start + chance.randrange(6000)])
    return root


@pytest.mark.parametrize(
    ("kind", "serve", "queues", "mode", "files"),
    # Every two of the first three together. Many files take long in an emulated guest: once.
    [
        ("memory", "inline", 1, "user-copy", 2000),
        ("memory", "async", 4, "get-data", 600),
        ("file", "inline", 4, "copy", 600),
        ("file", "async", 1, "user-copy", 600),
    ],
)
async def test_tree_survives(tmp_path: Path, kind: str, serve: str, queues: int, mode: str, files: int) -> None:
    """ext4: copy thousands of files, unmount, fsck clean, mount again, and every byte is there; also after a second fsck."""
    tree = make_tree(tmp_path / "tree", files)
    spec = "memory:96M" if kind == "memory" else f"file:{make_file(tmp_path / 'image', 96 << 20)}"
    async with start_server(
        spec, options=["--serve", serve, "--queues", str(queues), "--mode", mode], ends_with=signal.SIGINT
    ) as server:
        await make_filesystem(server.disk)
        async with mounted(server.disk, tmp_path / "mount") as directory:
            (await run("cp", "--archive", tree, directory)).check()
        drop_caches()
        await fsck(server.disk)
        async with mounted(server.disk, tmp_path / "mount") as directory:
            (await run("diff", "--recursive", tree, directory / "tree")).check()
            (await run("fstrim", directory)).check()
        drop_caches()
        await fsck(server.disk)
