"""Wrong input through the command line: exit code, one line on stderr that names the thing and the mend, no traceback."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from tests.kernel.programs import UBLK_TRIO, Finished, make_file, run, ublk_trio
from ublk_trio import DeviceOptions, File, Memory, RealKernel, open_target
from ublk_trio.cli.exit_codes import ExitCode

#: Python starts slowly in an emulated guest, and the commands have nothing to do with each other.
AT_ONCE = 4
#: Everything but reading, so that a checkout in a private directory can be run.
UNPRIVILEGED = [
    *("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"),
    *("--inh-caps=-all,+dac_read_search", "--ambient-caps=+dac_read_search", "--bounding-set=-all,+dac_read_search"),
]


def check_refused(done: Finished, code: ExitCode, message: str) -> None:
    """One line, as documented, and nothing on stdout."""
    assert (done.code, done.stdout) == (code, ""), done
    assert done.stderr.count("\n") == 1, done.stderr
    assert re.fullmatch(f"ublk-trio: .*{message}.*\n", done.stderr), done.stderr


class Commands:
    """Commands that are all refused; run a few at a time."""

    def __init__(self) -> None:
        self.wanted: list[tuple[ExitCode, str, tuple[str, ...]]] = []

    def add(self, code: ExitCode, message: str, *arguments: str) -> None:
        self.wanted.append((code, message, arguments))

    async def run(self) -> None:
        limit = trio.CapacityLimiter(AT_ONCE)
        done: dict[int, Finished] = {}

        async def one(index: int) -> None:
            async with limit:
                done[index] = await ublk_trio(*self.wanted[index][2])

        async with trio.open_nursery() as nursery:
            for index in range(len(self.wanted)):
                nursery.start_soon(one, index)
        for index, (code, message, _) in enumerate(self.wanted):
            check_refused(done[index], code, message)


@pytest.mark.any_kernel
async def test_numbers_and_names() -> None:
    """Numbers out of range, unknown backends, bad sizes and unknown ids are refused, each with its own line."""
    commands = Commands()
    memory = ("start", "--backend", "memory:16M")
    commands.add(ExitCode.USAGE, "depth is 4097: give 1 to 4096", *memory, "--depth", "4097")
    commands.add(ExitCode.USAGE, "queues is 0: give 1 to 4096", *memory, "--queues", "0")
    commands.add(ExitCode.USAGE, "the device id is 1048576", *memory, "--id", "1048576")
    commands.add(ExitCode.USAGE, "unknown backend 'memroy'.*did you mean memory", "start", "--backend", "memroy:1G")
    commands.add(ExitCode.USAGE, "'1.5G' is not a size", "start", "--backend", "memory:1.5G")
    commands.add(ExitCode.USAGE, "size 1000 is not a multiple of block_size 512", "start", "--backend", "memory:1000")
    commands.add(ExitCode.FAILED, "ENODEV.*there is no such device", "stop", "77")
    await commands.run()


@asynccontextmanager
async def in_use(path: Path) -> AsyncIterator[None]:
    """As another server has its file."""
    file = File(path)
    await file.open()
    try:
        yield
    finally:
        await file.aclose()


@asynccontextmanager
async def read_only(path: Path) -> AsyncIterator[None]:
    """A file that not even root may write: root heeds no mode, but a read-only mount."""
    (await run("mount", "--bind", path, path)).check()
    try:
        (await run("mount", "-o", "remount,bind,ro", path)).check()
        yield
    finally:
        with trio.CancelScope(shield=True):
            await run("umount", path)


@pytest.mark.any_kernel
async def test_files(tmp_path: Path) -> None:
    """A file that is missing, read-only, locked, empty, of a bad size, or no file at all is refused, with the mend."""
    good = make_file(tmp_path / "good", 1 << 20)
    busy = make_file(tmp_path / "busy", 1 << 20)
    empty = make_file(tmp_path / "empty", 0)
    uneven = make_file(tmp_path / "uneven", (1 << 20) + 100)
    commands = Commands()

    def add(path: Path, message: str) -> None:
        commands.add(ExitCode.FAILED, f"{path.name}.*{message}", "start", "--backend", f"file:{path}")

    add(tmp_path / "missing", "ENOENT.*create it with truncate")
    add(tmp_path, "EISDIR.*a directory")
    add(Path("/dev/null"), "neither a regular file nor a block device")
    add(busy, "lock is held by another opener")
    add(empty, "EINVAL.*size 0: give it one with truncate")
    add(uneven, "EINVAL.*size 1048676 is not a multiple of block_size 512: make it one with truncate -s 1049088")
    add(good, "EROFS.*read-only")
    async with read_only(good), in_use(busy):
        await commands.run()


async def test_id_in_use() -> None:
    """An id that is taken is refused by name, and the device that has it is untouched."""
    with trio.fail_after(120):
        async with open_target(RealKernel()) as target:
            device = await target.start_device(Memory(1 << 20), DeviceOptions(depth=4))
            done = await ublk_trio("start", "--backend", "memory:1M", "--id", str(device.dev_id))
            check_refused(done, ExitCode.FAILED, "EEXIST.*the id is in use; choose another")
            (await run("dd", f"if={device.path}", "of=/dev/null", "bs=4k", "count=1", "iflag=direct")).check()


async def test_no_permission() -> None:
    """An ordinary user is told that it takes root, by `start` and by `list`."""
    for arguments in (("start", "--backend", "memory:1M"), ("list",)):
        done = await run(*UNPRIVILEGED, *UBLK_TRIO, *arguments)
        check_refused(done, ExitCode.UNAVAILABLE, "/dev/ublk-control: EACCES.*run as root")


async def unload() -> None:
    """Take the driver away; skips where it cannot be."""
    if (await run("rmmod", "ublk_drv")).code:
        pytest.skip("ublk_drv is in use or built in")


@pytest.mark.any_kernel
async def test_no_module() -> None:
    """Without the driver `start` says to load it, and `doctor` does too."""
    await unload()
    try:
        done = await ublk_trio("start", "--backend", "memory:1M")
        check_refused(done, ExitCode.UNAVAILABLE, "/dev/ublk-control.*modprobe ublk_drv")
        doctor = await ublk_trio("doctor")
        assert doctor.code == ExitCode.UNAVAILABLE
        assert "FAIL  driver ublk_drv is not loaded: modprobe ublk_drv" in doctor.stdout
        assert doctor.stderr == ""
    finally:
        (await run("modprobe", "ublk_drv")).check()
    assert (await ublk_trio("doctor")).check().stdout.count("ok ") == 7
