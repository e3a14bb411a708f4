"""The calls in any order and at any moment: each is answered as the model says, and nothing hangs or is left."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable
from functools import partial

import attrs
import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings

from tests.search import check_noticed
from tests.service.surface import BOUND_SECONDS, LEFT, Step, run_steps, steps
from tests.service.test_disks import SIZE
from tests.service.test_expected import (
    deletion_does_not_forget,
    it_claims_nothing,
    it_keeps_its_claims,
    what_is_lost_is_forgotten,
)
from tests.sim.mini import basic_params, live, machine
from ublk_trio import BackendError, Recovery, SimKernel
from ublk_trio.bdev import Bdev
from ublk_trio.options import RECOVERY_FLAGS
from ublk_trio.service import disks as disks_module
from ublk_trio.service import methods_raid
from ublk_trio.service.disks import Disk, Disks

STEPS = steps(30)


@attrs.frozen
class SimArm:
    """`surface.Arm` on the simulator."""

    kernel: SimKernel

    @property
    def resizes(self) -> bool:
        return self.kernel.version >= (6, 16)

    async def read(self, number: int) -> None:
        await self.kernel.block_device(number).read(0, 512)

    def size(self, number: int) -> int:
        return self.kernel.block_device(number).size


async def run_on_simulator(version: tuple[int, int], taken: list[Step]) -> None:
    kernel = SimKernel(version=version, partition_scan=False, paranoid=True)
    flags = RECOVERY_FLAGS[Recovery.REISSUE]
    async with (
        machine(kernel) as control,
        live(control, params=basic_params(size=SIZE), flags=flags, dev_id=LEFT),
    ):
        kernel.crash_server(LEFT)
        kernel.partition_scan = True
        with trio.fail_after(BOUND_SECONDS * len(taken)):
            await run_steps(SimArm(kernel), taken)
    assert not kernel.leftovers()
    assert not kernel.violations


def run_in_own_time(version: tuple[int, int], taken: list[Step]) -> None:
    trio.run(run_on_simulator, version, taken, clock=trio.testing.MockClock(autojump_threshold=0.001))


@pytest.mark.parametrize("version", [(6, 12), (7, 3)])
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(taken=STEPS)
def test_any_order(version: tuple[int, int], taken: list[Step]) -> None:
    """As the module says."""
    run_in_own_time(version, taken)


# Planted bugs -----------------------------------------------------------------------------------------------------------


def an_id_may_be_used_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    def planted(disks: Disks, disk: Disk) -> None:
        if disk.device is None:
            disks._disks.remove(disk)
        disk.gone.set()

    monkeypatch.setattr(Disks, "_forget", planted)


def stop_answers_too_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    async def planted(disks: Disks, ublk_id: int, *, only_if_unused: bool = False) -> None:
        disks.get(ublk_id).end()

    monkeypatch.setattr(Disks, "stop_disk", planted)


def removal_leaves_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def planted(bdev: Bdev) -> None:
        bdev.removing = True
        bdev._descriptors.clear()
        bdev._unused.set()

    monkeypatch.setattr(Bdev, "remove", planted)


def destroy_forgets_the_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    async def planted(disks: Disks) -> None:
        if disks._running is None:
            raise BackendError(errno.ENOENT, "there is no target")
        disks._running = None

    monkeypatch.setattr(Disks, "destroy_target", planted)


def another_errno_for_an_id_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disks_module, "_explained", lambda dev_id: contextlib.nullcontext())


def disks_keep_their_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    async def planted(disk: Disk) -> None:
        pass

    monkeypatch.setattr(Disk, "follow_size", planted)


def an_offline_raid_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods_raid, "_offline", lambda service, params, bdev: None)


PLANTED: list[Callable[[pytest.MonkeyPatch], None]] = [
    an_id_may_be_used_twice,
    stop_answers_too_soon,
    removal_leaves_the_disk,
    destroy_forgets_the_disks,
    another_errno_for_an_id_in_use,
    disks_keep_their_sizes,
    what_is_lost_is_forgotten,
    an_offline_raid_is_forgotten,
    it_claims_nothing,
    it_keeps_its_claims,
    deletion_does_not_forget,
]


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: str(plant.__name__))
def test_a_planted_bug_is_found(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The model notices each of these bugs."""
    plant(monkeypatch)
    check_noticed(partial(run_in_own_time, (7, 3)), STEPS, examples=400)
