"""A disk whose server is killed lives on, if it was started so: another server takes it over, and who uses it goes on."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from tests.kernel.programs import (
    Server,
    make_file,
    recover_server,
    requests_done,
    run,
    start_server,
    ublk_trio,
    wait_until,
)
from ublk_trio import RealKernel
from ublk_trio.control import open_control
from ublk_trio.uapi import Feature

SIZE = 16 << 20
OPTIONS = ["--queues", "2", "--depth", "16", "--max-io", "64K"]


async def kernel_has(feature: Feature) -> bool:
    async with open_control(RealKernel()) as control:
        return control.features is not None and feature in control.features


async def kill(server: Server) -> None:
    server.process.kill()
    assert await server.wait() == -signal.SIGKILL


async def progress(disk: str, requests: int) -> None:
    """Wait until so many more requests are done."""
    before = requests_done(disk)
    await wait_until(lambda: requests_done(disk) >= before + requests)


async def state_of(disk: str) -> str:
    (entry,) = [row for row in json.loads((await ublk_trio("list", "--json")).check().stdout) if row["disk"] == disk]
    return str(entry["state"])


@asynccontextmanager
async def killed_server(backend: str, *options: str) -> AsyncIterator[str]:
    """The path of a disk whose server was killed; whoever serves it in the end must have stopped it."""
    async with start_server(backend, options=[*OPTIONS, *options]) as server:
        disk = server.disk
        await kill(server)
    yield disk


async def test_fail_until_recovered(tmp_path: Path) -> None:
    """With `fail`, everything fails, with EREMOTEIO, while there is no server, and works again with the next one."""
    backend = f"file:{make_file(tmp_path / 'image', SIZE)}"
    if not await kernel_has(Feature.USER_RECOVERY_FAIL_IO):
        refused = await ublk_trio("start", "--backend", backend, "--recovery", "fail")
        assert (refused.code, refused.stderr.count("\n")) == (2, 1)
        assert "does not do recovery fail" in refused.stderr
        return
    read = ["dd", "of=/dev/null", "bs=4096", "count=1", "iflag=direct", "status=none"]
    async with killed_server(backend, "--recovery", "fail") as disk:
        await trio.sleep(0.5)
        assert await state_of(disk) == "FAIL_IO"
        failed = await run(*read, f"if={disk}")
        assert failed.code == 1
        assert "Remote I/O error" in failed.stderr
        async with recover_server(disk, backend):
            (await run(*read, f"if={disk}")).check()


@pytest.mark.parametrize("mode", ["get-data", "user-copy"])
async def test_content_is_there_again(tmp_path: Path, mode: str) -> None:
    """What was written before the kill is read after the recovery; the device is as it was: queues, depth, mode, flags."""
    backend = f"file:{make_file(tmp_path / 'image', SIZE)}"
    content = tmp_path / "content"
    content.write_bytes(os.urandom(1 << 20))
    async with start_server(backend, options=[*OPTIONS, "--mode", mode, "--recovery", "requeue"]) as server:
        disk = server.disk
        (await run("dd", f"if={content}", f"of={disk}", "bs=64K", "oflag=direct", "status=none")).check()
        (before,) = json.loads((await ublk_trio("list", "--json")).check().stdout)
        await kill(server)
    async with recover_server(disk, backend) as server:
        (after,) = json.loads((await ublk_trio("list", "--json")).check().stdout)
        same = ("queues", "depth", "size", "flags", "state", "backend")
        assert {key: after[key] for key in same} == {key: before[key] for key in same}
        assert after["pid"] == server.pid
        (await run("cmp", "-n", str(1 << 20), content, disk)).check()


async def test_refused_and_untouched(tmp_path: Path) -> None:
    """A backend of another size or block size, a device without recovery, a live one: one line, and the disk stays as it was."""
    backend = f"file:{make_file(tmp_path / 'image', SIZE)}"
    other = f"file:{make_file(tmp_path / 'other', SIZE // 2)}"
    async with killed_server(backend, "--recovery", "reissue") as disk:
        number = disk.removeprefix("/dev/ublkb")
        for wrong, why in [
            (other, f"is a disk of {SIZE} bytes"),
            (f"{backend},block_size=4096", "has blocks of 512 bytes"),
            (f"{backend},read_only=on", "offers discards"),
        ]:
            refused = await ublk_trio("recover", number, "--backend", wrong)
            assert (refused.code, refused.stderr.count("\n")) == (2, 1), refused
            assert why in refused.stderr
            assert await state_of(disk) == "QUIESCED"
        async with recover_server(disk, backend) as server:
            refused = await ublk_trio("recover", number, "--backend", backend)
            assert (refused.code, refused.stderr.count("\n")) == (2, 1), refused
            assert f"process {server.pid} serves it" in refused.stderr
    gone = await ublk_trio("recover", number, "--backend", backend)
    assert (gone.code, "ENODEV" in gone.stderr) == (1, True)
    async with start_server("memory:16M") as server:
        refused = await ublk_trio("recover", server.disk.removeprefix("/dev/ublkb"), "--backend", "memory:16M")
        assert (refused.code, "without recovery" in refused.stderr) == (2, True), refused
