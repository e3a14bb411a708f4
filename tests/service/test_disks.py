"""Every order of create, start, stop, remove and destroy has its answer, and none of them leaves anything."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import attrs
import pytest
import trio
import trio.testing

from tests.errnos import raises
from tests.test_recover import calm_kernel, dead_device
from ublk_trio import Backend, Device, DeviceOptions, KernelError, Memory, Recovery, SimKernel, Target, UsageError
from ublk_trio.bdev import Registry, open_registry
from ublk_trio.service.cpumask import format_list
from ublk_trio.service.disks import Disk, Disks, DiskState, open_disks

SIZE = 64 * 1024


@attrs.frozen
class Bench:
    kernel: SimKernel
    registry: Registry
    disks: Disks

    async def bdev(self, name: str, backend: Backend | None = None) -> None:
        await self.registry.add(name, backend or Memory(SIZE), product_name="Memory disk")

    def ids(self) -> list[int | None]:
        return [disk.ublk_id for disk in self.disks]


@asynccontextmanager
async def open_bench(*, target: bool = True, version: tuple[int, int] = (7, 3)) -> AsyncIterator[Bench]:
    kernel = SimKernel(paranoid=True, version=version)
    async with open_registry() as registry, open_disks(kernel, registry) as disks:
        bench = Bench(kernel, registry, disks)
        for name in "ab":
            await bench.bdev(name)
        if target:
            await disks.create_target()
        yield bench
    assert not kernel.leftovers()
    assert not kernel.violations


class Gate(Memory):
    """Its requests wait until it is opened: so a disk stays starting, where the kernel looks for partitions first."""

    def __init__(self) -> None:
        super().__init__(SIZE)
        self.reached, self.gate = trio.Event(), trio.Event()

    async def read(self, offset: int, buffer: memoryview) -> int | None:  # type: ignore[override]
        self.reached.set()
        await self.gate.wait()
        return super().read(offset, buffer)


async def test_targets_are_created_once() -> None:
    """A second create is EBUSY, destroy without one ENOENT; without a target nothing starts."""
    async with open_bench(target=False) as bench:
        disks = bench.disks
        with raises(errno.ENOENT):
            await disks.destroy_target()
        with raises(errno.ENODEV):
            await disks.start_disk("a", DeviceOptions())
        with raises(errno.ENODEV):
            await disks.recover_disk("a", 0)
        await disks.create_target()
        with raises(errno.EBUSY):
            await disks.create_target()
        await disks.destroy_target()
        await disks.create_target(disable_user_copy=True)
        assert disks.disable_user_copy
        await disks.destroy_target()
        with pytest.raises(UsageError, match="cpumask"):
            await disks.create_target(cpumask="0x0")


async def test_the_mask_holds_while_the_target_does() -> None:
    """The thread that serves runs on the mask's CPUs, each has a worker, and all is as it was before when the target is gone."""
    before = os.sched_getaffinity(0)
    first = min(before)
    async with open_bench(target=False) as bench:
        await bench.disks.create_target(cpumask=f"[{first}]")
        assert os.sched_getaffinity(0) == {first}
        assert bench.disks.cpus == frozenset({first})
        assert [worker.cpu for worker in bench.kernel.workers] == [first]
        disk = await bench.disks.start_disk("a", DeviceOptions(queues=2))
        assert disk.device is not None
        assert [queue.cpu for queue in disk.device.statistics().queues] == [first, first]
        await bench.disks.destroy_target()
        assert os.sched_getaffinity(0) == before
        assert bench.disks.cpus is None


async def test_without_a_mask_there_is_no_worker() -> None:
    """A target that is created without one is served by one thread alone."""
    async with open_bench(target=False) as bench:
        await bench.disks.create_target()
        assert bench.kernel.workers == []


async def test_a_mask_with_a_cpu_that_is_offline() -> None:
    """It is EINVAL, and then there is no target, no worker, and the thread runs where it ran before."""
    before = os.sched_getaffinity(0)
    async with open_bench(target=False) as bench:
        bench.kernel.offline_cpus.add(max(before))
        with pytest.raises(KernelError) as raised:
            await bench.disks.create_target(cpumask=format_list(before))
        assert raised.value.errno == errno.EINVAL
        assert (bench.kernel.workers, bench.disks.cpus, os.sched_getaffinity(0)) == ([], None, before)
        await bench.disks.create_target()


async def test_disks_by_id() -> None:
    """An id of one's own or a free one; a taken one is EBUSY, an unknown one ENODEV; a claimed bdev EPERM, no bdev ENODEV."""
    async with open_bench() as bench:
        disks = bench.disks
        disk = await disks.start_disk("a", DeviceOptions(dev_id=7))
        assert (disk.ublk_id, disk.bdev_name, disk.state) == (7, "a", DiskState.LIVE)
        with raises(errno.EBUSY):
            await disks.start_disk("b", DeviceOptions(dev_id=7))
        with raises(errno.EPERM):
            await disks.start_disk("a", DeviceOptions(dev_id=8))
        with raises(errno.ENODEV):
            await disks.start_disk("c", DeviceOptions(dev_id=8))
        with raises(errno.ENODEV):
            await disks.stop_disk(8)
        other = await disks.start_disk("b", DeviceOptions())
        assert bench.ids() == [7, other.ublk_id]
        await disks.stop_disk(7)
        with raises(errno.ENODEV):
            await disks.stop_disk(7)
        await disks.start_disk("a", DeviceOptions(dev_id=7))
        await disks.destroy_target()
        assert bench.ids() == []
        assert bench.registry.get("a").claimed_by is None


async def test_a_disk_of_another_program_is_busy_and_stays() -> None:
    """An id that somebody else has is EBUSY, and theirs is not touched."""
    async with open_bench() as bench, open_disks(bench.kernel, bench.registry) as others:
        await others.create_target()
        await others.start_disk("b", DeviceOptions(dev_id=3))
        with raises(errno.EBUSY):
            await bench.disks.start_disk("a", DeviceOptions(dev_id=3))
        assert await bench.kernel.block_device(3).read(0, 512) == bytes(512)


async def test_stop_twice_and_stop_cancelled() -> None:
    """The second stop is EBUSY while the first lasts; one whose caller went away goes on."""
    gate = Gate()
    async with open_bench() as bench, trio.open_nursery() as nursery:
        await bench.bdev("slow", gate)
        gate.gate.set()
        await bench.disks.start_disk("slow", DeviceOptions(dev_id=1))
        gate.gate = trio.Event()
        nursery.start_soon(bench.kernel.block_device(1).read, 0, 512)
        await trio.testing.wait_all_tasks_blocked()
        with trio.move_on_after(0.01):
            await bench.disks.stop_disk(1)
        with raises(errno.EBUSY):
            await bench.disks.stop_disk(1)
        disk = bench.disks.get(1)
        gate.gate.set()
        await disk.gone.wait()
        assert bench.ids() == []


@pytest.mark.parametrize("way", ["stop", "remove", "destroy"])
async def test_the_end_while_it_starts(way: str) -> None:
    """Stopped, its bdev removed, or its target destroyed while it starts: the starter gets ECANCELED, the other an answer."""
    gate = Gate()
    # Newer ones look for partitions when the disk is live.
    async with open_bench(version=(6, 12)) as bench, trio.open_nursery() as nursery:
        await bench.bdev("slow", gate)
        ended = trio.Event()

        async def start() -> None:
            with raises(errno.ECANCELED):
                await bench.disks.start_disk("slow", DeviceOptions(dev_id=1, grace_seconds=0.01))
            ended.set()

        nursery.start_soon(start)
        await gate.reached.wait()
        with trio.fail_after(10):
            if way == "stop":
                await bench.disks.stop_disk(1)
            elif way == "remove":
                await bench.registry.remove("slow")
            else:
                await bench.disks.destroy_target()
            await ended.wait()
        assert bench.ids() == []


async def test_nothing_starts_while_the_target_goes() -> None:
    """Start is ENODEV, create and destroy EBUSY, until the last disk is gone."""
    gate = Gate()
    async with open_bench() as bench, trio.open_nursery() as nursery:
        await bench.bdev("slow", gate)
        gate.gate.set()
        await bench.disks.start_disk("slow", DeviceOptions())
        gate.gate = trio.Event()
        nursery.start_soon(bench.kernel.block_device(0).read, 0, 512)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(bench.disks.destroy_target)
        await trio.testing.wait_all_tasks_blocked()
        with raises(errno.ENODEV):
            await bench.disks.start_disk("a", DeviceOptions())
        with raises(errno.EBUSY):
            await bench.disks.destroy_target()
        with raises(errno.EBUSY):
            await bench.disks.create_target()
        gate.gate.set()


async def test_hot_removal_stops_the_disk() -> None:
    """The bdev goes when the disk has; the disk's failure, if any, is nobody's but the disk's."""
    async with open_bench() as bench:
        await bench.disks.start_disk("a", DeviceOptions())
        await bench.disks.start_disk("b", DeviceOptions())
        await bench.registry.remove("a")
        assert [disk.bdev_name for disk in bench.disks] == ["b"]


async def test_recover_takes_over_what_a_server_left() -> None:
    """With the kernel's own queues and depth; a wrong bdev is refused and the disk stays recoverable."""
    kernel = calm_kernel()
    async with dead_device(kernel, Recovery.REISSUE) as dead, open_registry() as registry:
        size = dead.disk.size
        for name, each in (("a", size), ("small", size // 2)):
            await registry.add(name, Memory(each), product_name="Memory disk")
        async with open_disks(kernel, registry) as disks:
            await disks.create_target()
            with pytest.raises(UsageError, match="bytes"):
                await disks.recover_disk("small", 0)
            disk = await disks.recover_disk("a", 0)
            assert disk.device is not None
            assert (disk.device.info.queue_depth, disk.device.info.nr_hw_queues) == (4, 2)
            assert await dead.results() == [4096, 4096]
            with raises(errno.EBUSY):
                await disks.recover_disk("a", 0)
            await disks.stop_disk(0)


async def test_a_cancelled_owner_takes_everything_along() -> None:
    """The scope around it all is cancelled: disks stop, bdevs close, nothing is left."""
    kernel = SimKernel(paranoid=True)
    with trio.CancelScope() as scope:
        async with open_registry() as registry, open_disks(kernel, registry) as disks:
            await registry.add("a", Memory(SIZE), product_name="Memory disk")
            await disks.create_target()
            await disks.start_disk("a", DeviceOptions())
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert not kernel.leftovers()


async def test_asked_to_end_in_the_moment_in_which_it_is_live(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cancellation comes too late then: the disk stops, and the starter gets ECANCELED."""
    start = Target.start_device
    async with open_bench() as bench:

        async def start_device(target: Target, backend: Backend, options: DeviceOptions | None = None) -> Device:
            device = await start(target, backend, options)
            bench.disks.get(4).end()
            return device

        monkeypatch.setattr(Target, "start_device", start_device)
        with trio.fail_after(30), raises(errno.ECANCELED):
            await bench.disks.start_disk("a", DeviceOptions(dev_id=4))
        assert bench.ids() == []
        assert bench.kernel.device_ids() == []
        assert bench.registry.get("a").claimed_by is None


async def test_each_live_disk_is_attended_to() -> None:
    """Once, from when it is live; one that does not start is not."""
    attended: list[int | None] = []
    kernel = SimKernel(paranoid=True)

    async def attend(disk: Disk) -> None:
        assert disk.state is DiskState.LIVE
        attended.append(disk.ublk_id)
        await disk.gone.wait()

    async with open_registry() as registry, open_disks(kernel, registry, attend=attend) as disks:
        await registry.add("a", Memory(SIZE), product_name="Memory disk")
        await disks.create_target()
        await disks.start_disk("a", DeviceOptions(dev_id=2))
        with raises(errno.EPERM):
            await disks.start_disk("a", DeviceOptions(dev_id=3))
        await trio.testing.wait_all_tasks_blocked()
        assert attended == [2]


async def test_a_resize_while_it_starts() -> None:
    """A bdev that gets another size while its disk is starting is not forgotten: the disk is live with the new one."""
    async with open_bench() as bench:
        gate = Gate()
        await bench.bdev("slow", gate)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(bench.disks.start_disk, "slow", DeviceOptions(dev_id=3))
            await gate.reached.wait()
            gate.resize(2 * SIZE)
            await bench.registry.get("slow").resized()
            gate.gate.set()
        assert bench.kernel.block_device(3).size == 2 * SIZE
