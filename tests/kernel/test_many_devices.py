"""Eight disks at once, under load, coming and going in random order: each time everything of them goes."""

from __future__ import annotations

import random

import pytest
import trio

from tests.kernel.leftovers import Leftovers
from tests.kernel.programs import COMMAND_SECONDS_MAX, Load, ublk_trio, wait_until
from ublk_trio import DataMode, DeviceOptions, Memory, RealKernel, Target, open_target

STARTS = 50
AT_ONCE = 8
OPTIONS = [
    DeviceOptions(serve=serve, mode=mode, queues=queues, depth=16, max_io_bytes=64 * 1024, grace_seconds=20.0)
    for serve in ("inline", "async")
    for mode in DataMode
    for queues in (1, 2)
]


class Crowd:
    """Eight tasks that each start a disk, load it, and stop it under that load, again and again."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._numbers = iter(range(STARTS))
        self._chance = random.Random(5)
        self.live = self.live_max = 0
        self.loads: list[Load] = []

    async def run(self) -> None:
        """Until there were enough starts."""
        async with trio.open_nursery() as nursery:
            for _ in range(AT_ONCE):
                nursery.start_soon(self._come_and_go)

    async def _come_and_go(self) -> None:
        for number in self._numbers:
            device = await self._target.start_device(Memory(1 << 20), OPTIONS[number % len(OPTIONS)])
            # Eight of them must leave an emulated machine some time for starting and stopping.
            load = Load(device.path, "--rate_iops=20", "--bsrange=512-16K")
            async with trio.open_nursery() as nursery:
                await nursery.start(load.run)
                self.live += 1
                self.live_max = max(self.live_max, self.live)
                if number < AT_ONCE:
                    await wait_until(lambda: self.live_max == AT_ONCE, seconds=COMMAND_SECONDS_MAX)
                await trio.sleep(self._chance.uniform(0, 2))
                await self._target.stop_device(device)
                self.live -= 1
            self.loads.append(load)


@pytest.mark.any_kernel
async def test_fifty_starts_and_stops() -> None:
    """Eight busy disks at once, 50 in all, in random order; no node, entry, process, descriptor or mapping is left."""
    before = Leftovers.look()
    with trio.fail_after(600):
        async with open_target(RealKernel()) as target:
            crowd = Crowd(target)
            await crowd.run()
            assert target.devices == ()
    assert (len(crowd.loads), crowd.live_max) == (STARTS, AT_ONCE)
    for load in crowd.loads:
        load.check_disk_went_away()
    assert before.wait_for_new() == []
    assert (await ublk_trio("list", "--json")).check().stdout == "[]\n"
