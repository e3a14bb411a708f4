"""raid0, concat and raid1 of files under fio; a mirror that loses a member, goes on, and rebuilds it."""

from __future__ import annotations

import errno
import logging
from pathlib import Path

import pytest
import trio

from tests.kernel.programs import Load, fio_verify, make_file, requests_done, run, wait_until
from ublk_trio import Backend, DeviceOptions, File, RealKernel, open_target
from ublk_trio.backends import Concat, MemberState, Raid0, Raid1, ThreadedFile

MIB = 1 << 20
OPTIONS = DeviceOptions(queues=2, depth=32)
#: Seconds for one test, in an emulated guest.
SECONDS_MAX = 600.0


class Lossy(ThreadedFile):
    """A file that fails every write while it is `lost`."""

    lost = False

    async def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        if self.lost:
            raise OSError(errno.EIO, "planted")
        await super().write(offset, data, fua=fua)


def files(directory: Path, *sizes: int) -> list[Backend]:
    return [File(str(make_file(directory / f"member{number}", size))) for number, size in enumerate(sizes)]


@pytest.mark.any_kernel
@pytest.mark.parametrize("kind", ["raid0", "concat", "raid1"])
async def test_every_byte(tmp_path: Path, kind: str) -> None:
    """What fio writes, sequentially and at random, 512 bytes to 1 MiB at a time, is what it reads."""
    backend: Backend
    if kind == "raid0":
        backend = Raid0(files(tmp_path, 12 * MIB, 12 * MIB, 16 * MIB), 65536)
    elif kind == "concat":
        backend = Concat(files(tmp_path, 5 * MIB, 20 * MIB, 7 * MIB + 4096))
    else:
        backend = Raid1(files(tmp_path, 32 * MIB, 32 * MIB))
    with trio.fail_after(SECONDS_MAX):
        async with open_target(RealKernel()) as target:
            device = await target.start_device(backend, OPTIONS)
            await fio_verify(device.path)
    if kind == "raid1":
        (await run("cmp", tmp_path / "member0", tmp_path / "member1")).check()


async def test_a_mirror_loses_a_member_and_rebuilds_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """fio, which verifies what it wrote, notices nothing: not the loss, not the rebuild; afterwards the members are equal."""
    caplog.set_level(logging.CRITICAL)
    first, second = (make_file(tmp_path / name, 16 * MIB) for name in ("first", "second"))
    lossy = Lossy(str(second))
    mirror = Raid1([File(str(first)), lossy])

    def state_of_second() -> MemberState:
        return mirror.status().members[1].state

    with trio.fail_after(SECONDS_MAX):
        async with open_target(RealKernel()) as target:
            device = await target.start_device(mirror, OPTIONS)
            load = Load(device.path, "--size=12M", "--verify=crc32c", "--verify_backlog=64", "--rate_iops=400")

            async def progress(requests: int) -> None:
                before = requests_done(device.path)
                await wait_until(lambda: requests_done(device.path) >= before + requests or not load.is_running)

            async with trio.open_nursery() as nursery:
                await nursery.start(load.run)
                await progress(100)
                lossy.lost = True
                await wait_until(lambda: state_of_second() is MemberState.FAILED)
                await progress(100)
                lossy.lost = False
                await mirror.rebuild(lossy)
                assert state_of_second() is MemberState.IN_SYNC
                assert load.is_running
                await progress(100)
                load.interrupt()
            load.check_disk_was_fine()
            assert device.statistics().failed == 0
    (await run("cmp", first, second)).check()
