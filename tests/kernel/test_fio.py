"""fio, with every byte checked, on each backend and in each way of serving, through the command line."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.kernel.programs import fio_verify, make_file, start_server


def queue_count(disk: str) -> int:
    """How many the kernel gave it."""
    return len(list(Path("/sys/block", Path(disk).name, "mq").iterdir()))


@pytest.mark.parametrize(
    ("serve", "queues", "mode"),
    [
        ("inline", 1, "copy"),
        ("async", 4, "copy"),
        ("inline", 4, "get-data"),
        ("async", 1, "get-data"),
        ("inline", 4, "user-copy"),
        ("async", 1, "user-copy"),
    ],
)
async def test_every_byte(tmp_path: Path, serve: str, queues: int, mode: str) -> None:
    """What fio writes, sequentially and at random, 512 bytes to 1 MiB at a time, is what it reads: memory and file."""
    image = make_file(tmp_path / "image", 64 << 20)
    options = ["--serve", serve, "--queues", str(queues), "--mode", mode]
    ends_with = signal.SIGINT if queues == 1 else signal.SIGTERM
    async with start_server("memory:64M", f"file:{image}", options=options, ends_with=ends_with) as server:
        for disk in server.disks:
            assert queue_count(disk) == min(queues, os.cpu_count() or 1)
            await fio_verify(disk)
