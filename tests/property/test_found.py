"""What the state machine found, as the shortest scenario of each."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from ublk_trio import DeviceOptions, Memory, SimKernel, open_target
from ublk_trio.control import open_control

BYTES = 1 << 16


class SlowToClose(Memory):
    """Closing it waits."""

    def __init__(self) -> None:
        super().__init__(BYTES)
        self.may_close = trio.Event()

    async def aclose(self) -> None:
        await self.may_close.wait()
        await super().aclose()


async def test_an_id_is_given_away_while_its_last_owner_closes() -> None:
    """A device stays in the target's list, whatever becomes of another that had its id before."""
    slow = SlowToClose()
    with trio.fail_after(30):
        async with open_target(SimKernel()) as target:
            first = await target.start_device(slow)
            first.ask_to_stop()
            await trio.testing.wait_all_tasks_blocked()
            second = await target.start_device(Memory(BYTES))
            assert second.dev_id == first.dev_id
            assert set(target.devices) == {first, second}
            slow.may_close.set()
            await target.wait_device(first)
            assert target.devices == (second,)


@pytest.mark.parametrize("version", [(6, 0), (6, 1), (6, 4), (6, 5)])
async def test_kernels_that_cannot_be_asked_for_features(version: tuple[int, int]) -> None:
    """A driver from before GET_FEATURES says ENODEV, because it looks for the device first; it can be used all the same."""
    kernel = SimKernel(version=version)
    with trio.fail_after(30):
        async with open_target(kernel) as target:
            await target.start_device(Memory(BYTES), DeviceOptions(depth=2))
    assert kernel.leftovers() == []


@pytest.mark.parametrize("version", [(6, 0), (6, 5), (6, 8), (6, 12), (7, 3)])
async def test_stopped_by_somebody_else(version: tuple[int, int]) -> None:
    """A device that another program stops ends cleanly, whatever errno a driver has for a command that it does not know."""
    kernel = SimKernel(version=version)
    with trio.fail_after(30):
        async with open_target(kernel) as target, open_control(kernel) as control:
            device = await target.start_device(Memory(BYTES), DeviceOptions(depth=2))
            await control.stop_device(device.dev_id)
            await target.wait_device(device)
            assert kernel.device_ids() == []
    assert kernel.leftovers() == []
