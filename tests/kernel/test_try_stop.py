"""`stop --if-unused`: a disk that a program has open goes on, and the command says which program that is."""

from __future__ import annotations

import os

import trio

from tests.kernel.programs import exists, run, start_server, ublk_trio
from ublk_trio import RealKernel
from ublk_trio.control import open_control
from ublk_trio.uapi import Feature


async def test_stop_if_unused() -> None:
    """In use: exit code 1 and the user's pid, and the disk works; not in use: it goes. Too old a kernel: 2, and nothing is stopped."""
    async with open_control(RealKernel()) as control:
        able = control.features is not None and Feature.SAFE_STOP_DEV in control.features
    async with start_server("memory:16M") as server:
        disk = server.disk
        command = ("stop", "--if-unused", disk.removeprefix("/dev/ublkb"))
        fd = await trio.to_thread.run_sync(os.open, disk, os.O_RDONLY)
        try:
            refused = await ublk_trio(*command)
            assert refused.stderr.count("\n") == 1
            if not able:
                assert (refused.code, "SAFE_STOP_DEV" in refused.stderr) == (2, True), refused
            else:
                assert refused.code == 1, refused
                assert "is in use" in refused.stderr
                assert f"process {os.getpid()} (" in refused.stderr
            (await run("dd", f"if={disk}", "of=/dev/null", "bs=4096", "count=1", "iflag=direct", "status=none")).check()
        finally:
            await trio.to_thread.run_sync(os.close, fd)
        if able:
            (await ublk_trio(*command)).check()
            assert await server.wait() == 0
            assert not exists(disk)
