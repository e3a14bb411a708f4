"""A server that is told what to serve by remote calls: real disks come, go, are saved, restored and recovered."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.kernel.programs import Server, exists, fio_verify, make_file, operated_server, ublk_trio, wait_until
from ublk_trio.rpc import call

MIB = 1 << 20
#: As many as people run in one process; more is a matter of memory.
MANY = 128


class Client:
    """Calls of one server."""

    def __init__(self, socket: str) -> None:
        self.socket = socket

    async def __call__(self, method: str, **params: Any) -> Any:
        with trio.fail_after(120):
            return await call(self.socket, method, params or None)

    async def malloc(self, name: str, size: int) -> None:
        await self("bdev_malloc_create", name=name, block_size=512, num_blocks=size // 512)

    async def saved(self) -> str:
        """As SPDK's program does: by subsystem."""
        names = [each["subsystem"] for each in await self("framework_get_subsystems")]
        subsystems = [{"subsystem": name, "config": await self("framework_get_config", name=name)} for name in names]
        return json.dumps({"subsystems": subsystems})


def write(disk: str, data: bytes) -> None:
    descriptor = os.open(disk, os.O_WRONLY)
    try:
        assert os.pwrite(descriptor, data, 0) == len(data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(disk: str, length: int) -> bytes:
    descriptor = os.open(disk, os.O_RDONLY)
    try:
        return os.pread(descriptor, length, 0)
    finally:
        os.close(descriptor)


async def test_disks_by_call(tmp_path: Path) -> None:
    """A disk of a stack of bdevs is a disk like any other; what it did is counted; without its bdev it goes."""
    socket = str(tmp_path / "rpc.sock")
    async with operated_server(socket) as server:
        client = Client(socket)
        await client("ublk_create_target")
        await client.malloc("m", 64 * MIB)
        await client("bdev_passthru_create", name="p", base_bdev_name="m")
        disk_id = await client("ublk_start_disk", bdev_name="p", ublk_id=5, num_queues=2)
        assert disk_id == 5
        await fio_verify("/dev/ublkb5")
        (counted,) = (await client("bdev_get_iostat", name="m"))["bdevs"]
        assert counted["bytes_written"] > MIB
        await client("bdev_malloc_delete", name="m")
        server.expected_stderr += "WARNING: bdev p is made again as soon as there is m\n"
        assert await client("ublk_get_disks") == []
        assert await client("bdev_get_bdevs") == []
        assert not exists("/dev/ublkb5")


@pytest.mark.any_kernel
async def test_saved_and_restored(tmp_path: Path) -> None:
    """What a saved configuration makes is what was saved, with the data of what keeps it; a signal by call ends it."""
    socket, saved = str(tmp_path / "rpc.sock"), tmp_path / "saved.json"
    image = make_file(tmp_path / "image", 16 * MIB)
    async with operated_server(socket) as server:
        client = Client(socket)
        await client("bdev_aio_create", name="a", filename=str(image), fallocate=True)
        await client("bdev_null_create", name="n", block_size=4096, num_blocks=4096)
        await client("ublk_create_target", cpumask="0x1")
        await client("ublk_start_disk", bdev_name="a", ublk_id=3, queue_depth=32)
        await client("ublk_start_disk", bdev_name="n", ublk_id=4)
        await trio.to_thread.run_sync(write, "/dev/ublkb3", b"kept" * 1024)
        before = await client("ublk_get_disks")
        text = await client.saved()
        await trio.Path(saved).write_text(text, encoding="utf-8")
        await client("spdk_kill_instance", sig_name="SIGTERM")
        assert await server.wait() == 0
    async with operated_server(socket, config=saved, disks=2) as server:
        client = Client(socket)
        assert server.disks == ["/dev/ublkb3", "/dev/ublkb4"]
        assert await client("ublk_get_disks") == before
        assert await trio.to_thread.run_sync(read, "/dev/ublkb3", 4096) == b"kept" * 1024
        assert await client.saved() == text


async def _recover(client: Client, image: Path) -> None:
    await client("bdev_aio_create", name="a", filename=str(image))
    await client("ublk_create_target")
    assert await client("ublk_recover_disk", bdev_name="a", ublk_id=6) == 6


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR2])
async def test_recovered_by_call(tmp_path: Path, number: signal.Signals) -> None:
    """A disk whose server was killed, or let go of it, is taken over by another, with its data."""
    socket = str(tmp_path / "rpc.sock")
    image = make_file(tmp_path / "image", 16 * MIB)
    async with operated_server(socket) as server:
        client = Client(socket)
        await client("bdev_aio_create", name="a", filename=str(image))
        await client("ublk_create_target")
        await client("ublk_start_disk", bdev_name="a", ublk_id=6)
        await trio.to_thread.run_sync(write, "/dev/ublkb6", b"kept" * 1024)
        code = await server.stop(number)
        assert code == (0 if number is signal.SIGUSR2 else -signal.SIGKILL)
    (entry,) = json.loads((await ublk_trio("list", "--json")).check().stdout)
    assert (entry["disk"], entry["daemon_alive"]) == ("/dev/ublkb6", False)
    async with operated_server(socket):
        client = Client(socket)
        await _recover(client, image)
        assert await trio.to_thread.run_sync(read, "/dev/ublkb6", 4096) == b"kept" * 1024


async def _run_many(server: Server, client: Client) -> list[float]:
    seconds = [time.monotonic()]
    await client("ublk_create_target")
    for number in range(MANY):
        await client("bdev_null_create", name=f"n{number}", block_size=512, num_blocks=2048)
        await client("ublk_start_disk", bdev_name=f"n{number}", ublk_id=number, queue_depth=2)
    seconds.append(time.monotonic())
    assert [disk["id"] for disk in await client("ublk_get_disks")] == list(range(MANY))
    assert all(exists(f"/dev/ublkb{number}") for number in range(MANY))
    for number in range(0, MANY, 16):
        assert await trio.to_thread.run_sync(read, f"/dev/ublkb{number}", 4096) == bytes(4096)
    seconds.append(time.monotonic())
    await client("ublk_destroy_target")
    seconds.append(time.monotonic())
    await wait_until(lambda: not any(exists(f"/dev/ublkb{number}") for number in range(MANY)))
    return [round(after - before, 1) for before, after in itertools.pairwise(seconds)]


async def test_many_disks_in_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """So many disks are live at once, and one call takes them all away; the conftest looks for what is left."""
    socket = str(tmp_path / "rpc.sock")
    async with operated_server(socket) as server:
        client = Client(socket)
        started, listed, destroyed = await _run_many(server, client)
    with capsys.disabled():
        print(f" {MANY} disks: {started} s to start, {listed} s to list and read, {destroyed} s to destroy", end=" ")
