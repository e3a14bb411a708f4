"""An ordinary user makes, serves, lists and stops disks; the nodes are given away by udev's rule, or by the test in its place."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from tests.kernel.programs import (
    CHECKOUT,
    UBLK_TRIO,
    Finished,
    exists,
    operated_server,
    run,
    start_server,
    ublk_trio,
)
from tests.kernel.test_remote_calls import Client
from ublk_trio import Memory, RealKernel, open_target
from ublk_trio.control import open_control
from ublk_trio.errors import KernelError
from ublk_trio.rpc import RpcError
from ublk_trio.uapi import CONTROL_PATH, Feature

USER = 65534


@functools.cache
def user_words() -> tuple[str, ...]:
    """What stands before a command to run it as an ordinary user.

    Where Python is in root's home, the user is given leave to read everything; write, still, only what is its own. The driver
    wants a disk's nodes to be writable.
    """
    words = ("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", "--no-new-privs")
    tried = subprocess.run([*words, *UBLK_TRIO, "--version"], cwd=CHECKOUT, capture_output=True, check=False)
    if tried.returncode == 0:
        return words
    read = "dac_read_search"
    return (*words, f"--inh-caps=-all,+{read}", f"--ambient-caps=+{read}", f"--bounding-set=-all,+{read}")


async def as_user(*command: str, seconds: float = 180.0, stdin: str = "") -> Finished:
    """Run a program as an ordinary user."""
    return await run(*user_words(), *command, seconds=seconds, stdin=stdin)


async def _give_away() -> None:
    """What the rule does: the nodes of each unprivileged device become its owner's.

    In this process: another Python may need longer to start in an emulated guest than a server waits for its node.
    """
    known: set[str] = set()
    async with open_control(RealKernel()) as control:
        while True:
            for node in {name for name in os.listdir("/dev") if name.startswith(("ublkc", "ublkb"))} - known:
                with contextlib.suppress(KernelError, FileNotFoundError):  # gone already
                    info = await control.device_info(int(node[5:]))
                    if Feature.UNPRIVILEGED_DEV in info.flags:
                        os.chown(f"/dev/{node}", info.owner_uid, info.owner_gid)
                        known.add(node)
            await trio.sleep(0.2)


@asynccontextmanager
async def users_let_in() -> AsyncIterator[None]:
    """As if the rule were installed and udev ran."""
    mode = os.stat(CONTROL_PATH).st_mode & 0o777
    os.chmod(CONTROL_PATH, 0o666)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_give_away)
            yield
            nursery.cancel_scope.cancel()
    finally:
        os.chmod(CONTROL_PATH, mode)


async def test_a_users_disk() -> None:
    """The user serves it, uses it, lists it and stops it; every byte is right, and nothing is left."""
    options = ["--unprivileged", "--max-io", "64K"]
    async with users_let_in(), start_server("memory:16M", options=options, prefix=user_words()) as server:
        disk = server.disk
        fio = [
            *("fio", "--name=verify", f"--filename={disk}", "--rw=randwrite", "--bs=4K", "--size=2M", "--direct=1"),
            *("--ioengine=psync", "--verify=crc32c", "--verify_fatal=1", "--allow_file_create=0", "--minimal"),
            *("--thread", "--clocksource=clock_gettime", "--verify_state_save=0"),
        ]
        (await as_user(*fio, seconds=400)).check()
        for node in ("ublkc", "ublkb"):
            owner = (await ublk_trio("node-owner", node + disk.removeprefix("/dev/ublkb"))).check()
            assert owner.stdout == f"{USER} {USER}\n"
        listed = (await as_user(*UBLK_TRIO, "list", "--json")).check()
        (entry,) = json.loads(listed.stdout)
        assert (entry["disk"], entry["state"], entry["pid"]) == (disk, "LIVE", server.pid)
        assert "UNPRIVILEGED_DEV" in entry["flags"]
        (await as_user(*UBLK_TRIO, "stop", disk.removeprefix("/dev/ublkb"))).check()
        assert await server.wait() == 0
        assert not exists(disk)


async def test_a_users_disk_by_call() -> None:
    """A user's server makes disks of that user's by call; one of root's it neither replaces nor takes over."""
    async with users_let_in(), open_target(RealKernel()) as target:
        roots = await target.start_device(Memory(1 << 20))
        with tempfile.TemporaryDirectory() as directory:
            os.chown(directory, USER, USER)
            socket = f"{directory}/rpc.sock"
            async with operated_server(socket, prefix=user_words()):
                await use_by_call(Client(socket), roots.dev_id)
        assert exists(roots.path)


async def use_by_call(client: Client, roots: int) -> None:
    await client("ublk_create_target")
    await client.malloc("m", 1 << 20)
    for method, code in (("ublk_start_disk", errno.EBUSY), ("ublk_recover_disk", errno.EPERM)):
        unprivileged = {"unprivileged": True} if method == "ublk_start_disk" else {}
        with pytest.raises(RpcError) as refused:
            await client(method, bdev_name="m", ublk_id=roots, **unprivileged)
        assert refused.value.code == -code, refused.value
    number = await client("ublk_start_disk", bdev_name="m", unprivileged=True)
    disk = f"/dev/ublkb{number}"
    data = "".join(f"{line:15}\n" for line in range(4096))
    (await as_user("dd", f"of={disk}", "oflag=direct", "bs=64K", "iflag=fullblock", "status=none", stdin=data)).check()
    read = (await as_user("dd", f"if={disk}", "iflag=direct", "bs=64K", "count=1", "status=none")).check()
    assert read.stdout == data
    assert await client("ublk_stop_disk", ublk_id=number) is True
    assert not exists(disk)


async def test_what_a_user_may_not() -> None:
    """Without `--unprivileged`, or with it as root: one line that says so, and nothing is left."""
    async with users_let_in():
        refused = await as_user(*UBLK_TRIO, "start", "--backend", "memory:16M")
        assert (refused.code, refused.stderr.count("\n")) == (1, 1), refused
        assert "an ordinary user can make an unprivileged one" in refused.stderr
    refused = await ublk_trio("start", "--unprivileged", "--backend", "memory:16M")
    assert (refused.code, "root's disks are never unprivileged" in refused.stderr) == (2, True), refused
