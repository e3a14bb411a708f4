"""A backend that raises, hangs or answers short, while fio uses the rest of the disk: one request fails, the rest go on."""

from __future__ import annotations

import errno
import logging
import time

import pytest
import trio

from tests.both.arms import RealArm
from tests.kernel.programs import Load, requests_done, wait_until
from ublk_trio import DeviceOptions, Memory, RealKernel, open_target
from ublk_trio.workload import Disk

MIB = 1 << 20
SIZE = 16 * MIB
BLOCK = 4096
GRACE_SECONDS = 3.0
#: The load keeps off the first MiB, where the faults are.
ELSEWHERE = ["--offset=1M", "--size=8M", "--verify=crc32c", "--verify_backlog=64", "--rate_iops=200"]


class Faulty(Memory):
    """A memory disk that does what its `fault` says to requests for its first block."""

    def __init__(self) -> None:
        super().__init__(SIZE)
        self.fault: BaseException | int | None = None

    def _answer(self, offset: int) -> int | None:
        if offset or self.fault is None:
            return None
        if isinstance(self.fault, BaseException):
            raise self.fault
        return self.fault

    def read(self, offset: int, buffer: memoryview) -> int | None:
        super().read(offset, buffer)
        return self._answer(offset)

    def write(self, offset: int, data: memoryview, *, fua: bool) -> int | None:
        super().write(offset, data, fua=fua)
        return self._answer(offset)


FAULTS: list[tuple[BaseException | int, int]] = [
    (OSError(errno.ENOSPC, "planted"), errno.ENOSPC),
    (OSError(errno.EIO, "planted"), errno.EIO),
    (OSError(errno.ETIMEDOUT, "planted"), errno.ETIMEDOUT),
    (OSError(errno.EACCES, "has no status of the block layer's"), errno.EIO),
    (ZeroDivisionError("planted"), errno.EIO),
    (512, errno.EIO),
    (0, errno.EIO),
    (2 * BLOCK, errno.EIO),
]


async def fails_with(disk: Disk) -> int | None:
    """The errno of one direct write of the first block."""
    try:
        await disk.write(0, bytes(BLOCK))
    except OSError as error:
        return error.errno
    return None


@pytest.mark.parametrize("serve", ["inline", "async"])
async def test_only_the_faulty_request_fails(serve: str, caplog: pytest.LogCaptureFixture) -> None:
    """Each fault fails its own request with the errno that belongs to it; fio beside it does not notice."""
    caplog.set_level(logging.CRITICAL)
    backend = Faulty()
    options = DeviceOptions(serve="async" if serve == "async" else "inline", queues=2, grace_seconds=GRACE_SECONDS)
    with trio.fail_after(180):
        async with open_target(RealKernel()) as target:
            device = await target.start_device(backend, options)
            load = Load(device.path, *ELSEWHERE)
            async with RealArm().open_disk(device) as disk, trio.open_nursery() as nursery:
                await nursery.start(load.run)
                seen = []
                for backend.fault, _ in FAULTS:
                    seen.append(await fails_with(disk))
                assert seen == [expected for _, expected in FAULTS]
                backend.fault = 512
                assert len(await disk.read(0, BLOCK)) == BLOCK, "the kernel asks for the rest of a short read"
                backend.fault = None
                assert await fails_with(disk) is None
                before = requests_done(device.path)
                await wait_until(lambda: requests_done(device.path) >= before + 50 or not load.is_running)
                load.interrupt()
            assert device.statistics().failed == len(FAULTS)
    load.check_disk_was_fine()


class Hanging(Memory):
    """A memory disk whose first block never answers while `hangs`."""

    def __init__(self) -> None:
        super().__init__(SIZE)
        self.hangs = False
        self.hanging = trio.Event()

    async def read(self, offset: int, buffer: memoryview) -> int | None:  # type: ignore[override]
        if offset == 0 and self.hangs:
            self.hanging.set()
            await trio.sleep_forever()
        return super().read(offset, buffer)


async def test_hanging_request(caplog: pytest.LogCaptureFixture) -> None:
    """A request that never ends holds up neither fio nor, beyond the grace time, the device's end; it fails with EIO."""
    backend = Hanging()
    seen: list[int | None] = []

    async def read_first_block(disk: Disk) -> None:
        try:
            await disk.read(0, BLOCK)
        except OSError as error:
            seen.append(error.errno)

    with trio.fail_after(180):
        async with open_target(RealKernel()) as target:
            device = await target.start_device(backend, DeviceOptions(queues=2, grace_seconds=GRACE_SECONDS))
            load = Load(device.path, *ELSEWHERE)
            async with RealArm().open_disk(device) as disk, trio.open_nursery() as nursery:
                backend.hangs = True
                nursery.start_soon(read_first_block, disk)
                await backend.hanging.wait()
                await nursery.start(load.run)
                load.interrupt()
                await load.ended.wait()
                begin = time.monotonic()
                device.ask_to_stop()
            await target.wait_device(device)
            assert GRACE_SECONDS <= time.monotonic() - begin < 2 * GRACE_SECONDS + 10
    assert seen == [errno.EIO]
    load.check_disk_was_fine()
    assert "not answered within the grace time" in caplog.text
