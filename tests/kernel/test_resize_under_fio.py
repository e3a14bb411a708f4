"""A disk grows and shrinks while fio uses it, and the programs of the system see its size."""

from __future__ import annotations

from pathlib import Path

import trio

from tests.both.test_resize import MIB, Rubber
from tests.kernel.programs import Load, run
from ublk_trio import DeviceOptions, RealKernel, open_target
from ublk_trio.control import open_control
from ublk_trio.uapi import SECTOR_SHIFT, Feature


async def _sizes(disk: str) -> tuple[int, int]:
    """What sysfs and an ioctl say, bytes."""
    asked = (await run("blockdev", "--getsize64", disk)).check()
    sectors = await trio.Path("/sys/block", Path(disk).name, "size").read_text()
    return int(sectors) << SECTOR_SHIFT, int(asked.stdout)


async def test_resized_under_fio() -> None:
    """fio, which keeps within the smallest size, sees no error; sysfs and ioctls follow each change."""
    async with open_control(RealKernel()) as control:
        if control.features is None or Feature.UPDATE_SIZE not in control.features:
            return  # what is said then is seen by tests/both/test_resize.py
    backend = Rubber(16 * MIB)
    with trio.fail_after(600):
        async with open_target(RealKernel()) as target, trio.open_nursery() as nursery:
            device = await target.start_device(backend, DeviceOptions(queues=2, depth=16, max_io_bytes=64 * 1024))
            load = Load(device.path, "--size=8M", "--verify=crc32c")
            await nursery.start(load.run)
            for mib in (64, 8, 20, 16):
                backend.resize(mib * MIB)
                await device.update_size()
                assert await _sizes(device.path) == (mib * MIB, mib * MIB)
                assert load.is_running
            load.interrupt()
            await load.ended.wait()
            load.check_disk_was_fine()
