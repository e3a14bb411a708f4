"""The remote calls of disks in any order, on the real kernel: each is answered as the model says, nothing hangs or is left."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import pytest
import trio
from hypothesis import HealthCheck, Phase, given, settings

from tests.kernel.forked_servers import forked_servers
from tests.kernel.test_remote_calls import read
from tests.search import broken_invariant
from tests.service.surface import LEFT, Step, run_steps, steps
from tests.service.test_disks import SIZE
from tests.service.test_surface import removal_leaves_the_disk, stop_answers_too_soon
from ublk_trio import DeviceOptions, Memory, RealKernel, Recovery
from ublk_trio.control import open_control
from ublk_trio.device import already_gone_is_fine
from ublk_trio.service import disks, methods_ublk
from ublk_trio.uapi import Feature

#: So many sequences, of up to so many steps besides those that each begins with.
SEQUENCES = 20
STEPS_MAX = 12
#: Seconds for one; the machine's own bounds are below it.
SEQUENCE_SECONDS_MAX = 180.0
GONE_SECONDS_MAX = 30.0
#: A start of the slow bdev that is stopped ends when its requests have failed: not ten seconds each time.
GRACE_SECONDS = 1.0


@attrs.frozen
class RealArm:
    """`surface.Arm` on this machine's kernel."""

    resizes: bool
    kernel: RealKernel = attrs.field(factory=RealKernel)

    async def read(self, number: int) -> None:
        # In a thread that is left to itself on cancellation: only the disk's end may free it.
        await trio.to_thread.run_sync(read, self.kernel.disk_path(number), 512, abandon_on_cancel=True)

    def size(self, number: int) -> int:
        return int(Path(f"/sys/block/ublkb{number}/size").read_text(encoding="ascii")) * 512


@asynccontextmanager
async def left_disk() -> AsyncIterator[RealArm]:
    """The kernel with a disk whose server was killed, which goes at the end if it is still there."""
    async with forked_servers() as servers:
        options = DeviceOptions(dev_id=LEFT, depth=4, recovery=Recovery.REISSUE)
        server = await servers.start(functools.partial(Memory, SIZE), options)
        await server.kill()
    async with open_control(RealKernel()) as control:
        assert control.features is not None
        try:
            yield RealArm(resizes=Feature.UPDATE_SIZE in control.features)
        finally:
            with trio.move_on_after(GONE_SECONDS_MAX, shield=True), already_gone_is_fine():
                await control.stop_device(LEFT)
                await control.delete_device(LEFT)


async def run_on_kernel(taken: list[Step]) -> None:
    with trio.fail_after(SEQUENCE_SECONDS_MAX):
        async with left_disk() as arm:
            await run_steps(arm, taken)
        assert arm.kernel.device_ids() == []


@pytest.fixture(autouse=True)
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    options = functools.partial(DeviceOptions, grace_seconds=GRACE_SECONDS)
    monkeypatch.setattr(disks, "DeviceOptions", options)
    monkeypatch.setattr(methods_ublk, "DeviceOptions", options)


@settings(
    max_examples=SEQUENCES,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(taken=steps(STEPS_MAX))
def test_any_order(taken: list[Step]) -> None:
    """As the module says; what is left in the machine after all of them, the conftest looks for."""
    trio.run(run_on_kernel, taken)


@pytest.mark.parametrize(
    ("plant", "step"),
    [(stop_answers_too_soon, ("stop", "a", 0, True)), (removal_leaves_the_disk, ("delete", "a", 0, True))],
    ids=["stop", "removal"],
)
async def test_a_planted_bug_is_found(plant: object, step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model notices a stop that is answered too soon, and a disk that stays without its bdev."""
    assert callable(plant)
    plant(monkeypatch)
    with broken_invariant():
        await run_on_kernel([step])
