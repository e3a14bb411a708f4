"""SIGUSR2: a server hands its disks over to the next one while fio uses them, and fio sees no error."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import trio

from tests.kernel.programs import Load, make_file, recover_server, start_server, ublk_trio
from tests.kernel.test_recovery import OPTIONS, SIZE, kernel_has, progress, state_of
from ublk_trio.uapi import Feature

HANDOVERS = 3
#: Queues deeper than fio goes: before Linux 6.15 one that has no idle tag left learns of its server's end 30 s late.
DEEP = ["--queues", "2", "--depth", "32", "--max-io", "64K"]


async def _hand_over_under_load(backend: str, *options: str) -> None:
    async with trio.open_nursery() as nursery:
        async with start_server(backend, options=[*DEEP, *options]) as server:
            load = Load(server.disk, "--verify=crc32c", "--verify_fatal=1", "--size=8M")
            await nursery.start(load.run)
            disk = server.disk
            await progress(disk, 50)
            assert (await server.stop(signal.SIGUSR2), server.stderr()) == (0, "")
        for number in range(HANDOVERS):
            async with recover_server(disk, backend) as server:
                await progress(disk, 50)
                assert load.is_running
                if number < HANDOVERS - 1:
                    assert (await server.stop(signal.SIGUSR2), server.stderr()) == (0, "")
                else:
                    load.interrupt()
                    await load.ended.wait()
                    load.check_disk_was_fine()


@pytest.mark.parametrize(
    ("recovery", "mode"),
    [("requeue", "copy"), ("requeue", "user-copy"), ("reissue", "get-data"), ("reissue", "user-copy")],
)
async def test_handed_over_under_fio(tmp_path: Path, recovery: str, mode: str) -> None:
    """However often the server is replaced, fio goes on without an error, and every byte that it verifies is right."""
    if recovery == "requeue" and not await kernel_has(Feature.QUIESCE):
        return  # test_without_quiesce has what is said then
    backend = f"file:{make_file(tmp_path / 'image', SIZE)}"
    await _hand_over_under_load(backend, "--recovery", recovery, "--mode", mode)


async def test_idle_disk(tmp_path: Path) -> None:
    """A disk that nobody uses just now is handed over on every kernel, and waits meanwhile."""
    backend = f"file:{make_file(tmp_path / 'image', SIZE)}"
    async with start_server(backend, options=[*OPTIONS, "--recovery", "reissue"]) as server:
        disk = server.disk
        assert (await server.stop(signal.SIGUSR2), server.stderr()) == (0, "")
    (entry,) = json.loads((await ublk_trio("list", "--json")).check().stdout)
    assert (entry["disk"], entry["daemon_alive"]) == (disk, False)
    async with recover_server(disk, backend):
        assert await state_of(disk) == "LIVE"


async def test_without_recovery_it_is_stopped() -> None:
    """A disk that cannot outlive its server is stopped, and that is said."""
    async with start_server("memory:16M") as server:
        assert await server.stop(signal.SIGUSR2) == 0
        assert "was made without recovery" in server.stderr()
    assert json.loads((await ublk_trio("list", "--json")).check().stdout) == []


async def test_without_quiesce(tmp_path: Path) -> None:
    """Where the kernel cannot hold requests back, `requeue` would fail some: it is stopped instead, and that is said."""
    if await kernel_has(Feature.QUIESCE):
        return
    backend = f"file:{make_file(tmp_path / 'image', SIZE)}"
    async with start_server(backend, options=["--recovery", "requeue"]) as server:
        assert await server.stop(signal.SIGUSR2) == 0
        assert "with recovery reissue older kernels can do it" in server.stderr()
