"""Partition tables: the kernel reads them through us while the device starts."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from tests.kernel.programs import make_file, run, start_server, wait_until

MIB = 1 << 20
TABLE = """label: {label}
start=1MiB, size=16MiB
start=17MiB, size=32MiB
"""


def partition_bytes(disk: str) -> dict[str, int]:
    """The kernel's partitions of a disk that have a device node, with their sizes."""
    found = {}
    for path in Path("/sys/block", Path(disk).name).glob(f"{Path(disk).name}p*"):
        if Path("/dev", path.name).is_block_device():
            found[path.name.removeprefix(Path(disk).name)] = int(path.joinpath("size").read_text()) * 512
    return found


def has_partitions(disk: str) -> bool:
    return len(partition_bytes(disk)) == 2


async def test_partitions_appear(tmp_path: Path) -> None:
    """A GPT and an MBR in a file become /dev/ublkbNp1 and p2 of the right sizes, before anybody asks; a partition works."""
    images = [make_file(tmp_path / label, 64 * MIB) for label in ("gpt", "dos")]
    for image in images:
        (await run("sfdisk", "--quiet", image, stdin=TABLE.format(label=image.name))).check()
    async with start_server(*(f"file:{image}" for image in images), options=["--queues", "2"]) as server:
        for disk in server.disks:
            await wait_until(partial(has_partitions, disk))
            assert partition_bytes(disk) == {"p1": 16 * MIB, "p2": 32 * MIB}
            script = f"echo of a partition | dd of={disk}p2 conv=fsync status=none"
            (await run("sh", "-c", script)).check()
    for image in images:
        with image.open("rb") as file:
            file.seek(17 * MIB)
            assert file.read(14) == b"of a partition"
