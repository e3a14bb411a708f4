"""However a server ends while a disk is busy, nothing hangs and nothing is left that cannot be removed."""

from __future__ import annotations

import json
import signal
import time

import pytest
import trio

from tests.kernel.programs import Load, Server, exists, start_server, ublk_trio

GRACE_SECONDS = 5
OPTIONS = ["--queues", "2", "--grace", str(GRACE_SECONDS)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_signal_under_load(number: signal.Signals) -> None:
    """SIGINT and SIGTERM end a busy server with 0 within its grace time; who uses the disk gets errors, and ends."""
    async with start_server("memory:64M", "memory:64M", options=OPTIONS) as server, trio.open_nursery() as nursery:
        load = Load(server.disks[0])
        await nursery.start(load.run)
        begin = time.monotonic()
        assert await server.stop(number) == 0
        assert time.monotonic() - begin < GRACE_SECONDS * 2
        assert server.stderr() == ""
        assert not any(exists(disk) for disk in server.disks)
    load.check_disk_went_away()


async def listed() -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads((await ublk_trio("list", "--json")).check().stdout)
    return found


def id_of(server: Server) -> str:
    return server.disk.removeprefix("/dev/ublkb")


async def test_killed_under_load() -> None:
    """After SIGKILL fio ends, `list` shows what is left, `stop` removes it, and a second `stop` says that it is gone."""
    async with start_server("memory:64M", options=OPTIONS) as server, trio.open_nursery() as nursery:
        load = Load(server.disk)
        await nursery.start(load.run)
        server.process.kill()
        assert await server.wait() == -signal.SIGKILL
    load.check_disk_went_away()
    (left,) = await listed()
    assert (left["id"], left["state"], left["daemon_alive"]) == (int(id_of(server)), "DEAD", False)
    assert (await ublk_trio("stop", id_of(server))).check().stderr == ""
    again = await ublk_trio("stop", id_of(server))
    assert again.code == 1
    assert again.stderr.count("\n") == 1
    assert "ENODEV" in again.stderr
    assert "there is no such device" in again.stderr


async def test_stopped_from_outside_under_load() -> None:
    """`stop` of somebody else's busy device takes it away, and its server notices and exits with 0."""
    async with start_server("memory:64M", options=OPTIONS) as server, trio.open_nursery() as nursery:
        # A load that leaves the commands some time: Python starts slowly where the CPU is emulated.
        load = Load(server.disk, "--rate_iops=50")
        await nursery.start(load.run)
        (entry,) = await listed()
        assert (entry["state"], entry["backend"], entry["pid"]) == ("LIVE", "memory:64M", server.pid)
        assert (await ublk_trio("stop", "--all")).check().stderr == ""
        assert await server.wait() == 0
        assert server.stderr() == ""
    load.check_disk_went_away()
    assert await listed() == []
