"""Who has a disk open: programs, mounts, swap, and other block devices on top of it. For messages, and never for decisions.

Facts: /proc lists a process's files to its owner and to root only, and what the kernel itself has open (a mount, swap,
a device-mapper table) not at all. So all four are looked up, and a list that is empty says nothing.
"""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Iterator
from pathlib import Path


def users_of(path: str) -> list[str]:
    """``process 123 (fio)``, ``mounted at /mnt``, ``swap``, ``dm-0``: for the disk at ``path`` and its partitions."""
    nodes = [path, *sorted(glob.glob(f"{path}p*"))]
    numbers = set()
    for node in nodes:
        with contextlib.suppress(OSError):
            numbers.add(os.stat(node).st_rdev)
    return [*_processes(numbers), *_mounts(numbers), *_swap(nodes), *_holders(nodes)]


def _processes(numbers: set[int]) -> Iterator[str]:
    for process in sorted(Path("/proc").glob("[0-9]*"), key=lambda path: int(path.name)):
        with contextlib.suppress(OSError):
            if any(_is_one_of(file, numbers) for file in (process / "fd").iterdir()):
                yield f"process {process.name} ({(process / 'comm').read_text().strip()})"


def _is_one_of(file: Path, numbers: set[int]) -> bool:
    try:
        return os.stat(file).st_rdev in numbers
    except OSError:
        return False


def _mounts(numbers: set[int]) -> Iterator[str]:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            fields = line.split()
            major, minor = map(int, fields[2].split(":"))
            if os.makedev(major, minor) in numbers:
                yield f"mounted at {fields[4]}"


def _swap(nodes: list[str]) -> Iterator[str]:
    with contextlib.suppress(OSError):
        for line in Path("/proc/swaps").read_text().splitlines()[1:]:
            if line.split()[0] in nodes:
                yield f"swap on {line.split()[0]}"


def _holders(nodes: list[str]) -> Iterator[str]:
    for node in nodes:
        with contextlib.suppress(OSError):
            yield from sorted(os.listdir(f"/sys/class/block/{os.path.basename(node)}/holders"))
