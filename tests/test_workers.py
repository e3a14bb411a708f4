"""Workers on the simulated kernel: where queues are placed, who sends their commands, and that none is left over."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import trio
import trio.testing

from ublk_trio import DataMode, Device, DeviceOptions, KernelError, Memory, SimKernel, UsageError, open_target
from ublk_trio.handlers import Serve
from ublk_trio.kernel_sim.choices import DrawnChoices
from ublk_trio.kernel_sim.ring import SimQueueRing
from ublk_trio.uapi import IoOp
from ublk_trio.workers import open_workers

BLOCK = 4096
BLOCKS = 64


def late_kernel() -> SimKernel:
    """One whose workers are late whenever they can, and that is calm otherwise."""
    return SimKernel(
        DrawnChoices(lambda what, options: options - 1 if what == "worker-late" else 0),
        faults={"worker-late"},
        partition_scan=False,
    )


def numbered() -> Memory:
    """A disk of which no two blocks are alike."""
    memory = Memory(BLOCKS * BLOCK)
    for block in range(BLOCKS):
        memory.write(block * BLOCK, memoryview(bytes([block + 1]) * BLOCK), fua=False)
    return memory


def placement(device: Device) -> list[int | None]:
    return [queue.cpu for queue in device.statistics().queues]


def test_workers_take_turns() -> None:
    """Each CPU has one worker, in the order of their numbers, and after the last one it is the first one's turn again."""
    kernel = SimKernel()
    with open_workers(kernel, [5, 2, 5]) as workers:
        assert workers is not None
        assert [worker.cpu for worker in workers.all] == [2, 5]
        assert [workers.next().cpu for _ in range(5)] == [2, 5, 2, 5, 2]
        assert len({worker.thread_id for worker in workers.all} | {kernel.server_pid}) == 3
    assert kernel.leftovers() == []


async def test_queues_are_placed_in_turn_across_devices() -> None:
    """The turn goes on from one device to the next, whatever ended meanwhile; statistics say where each queue is."""
    kernel = SimKernel(cpus=4)
    async with open_target(kernel, cpus=[0, 1, 2]) as target:
        first = await target.start_device(Memory(1 << 20), DeviceOptions(queues=2))
        second = await target.start_device(Memory(1 << 20), DeviceOptions(queues=2))
        await target.stop_device(first)
        third = await target.start_device(Memory(1 << 20), DeviceOptions(queues=4))
        assert [placement(device) for device in (second, third)] == [[2, 0], [1, 2, 0, 1]]
        assert target.workers == tuple(kernel.workers)
        for device in (second, third):
            for queue in kernel.devices[device.dev_id].queues:
                (task,) = {tag.task for tag in queue.tags}
                assert task is kernel.workers[placement(device)[queue.queue_id] or 0]
    assert kernel.leftovers() == []
    kernel.check()


async def test_without_cpus_there_is_no_worker() -> None:
    """A target that was not asked for workers has none."""
    kernel = SimKernel()
    async with open_target(kernel) as target:
        device = await target.start_device(Memory(1 << 20), DeviceOptions(queues=2))
        assert (placement(device), target.workers, kernel.workers) == ([None, None], (), [])


async def test_cpus_that_cannot_be() -> None:
    """One that is offline is EINVAL in one line, none at all a mistake; the workers that there were already are gone."""
    kernel = SimKernel()
    kernel.offline_cpus.add(3)
    with pytest.raises(KernelError, match="CPU 3") as raised:
        async with open_target(kernel, cpus=[0, 3]):
            pass
    assert raised.value.errno == errno.EINVAL
    assert "\n" not in str(raised.value)
    for none in ([], [0, -1]):
        with pytest.raises(UsageError):
            async with open_target(kernel, cpus=none):
                pass
    assert kernel.leftovers() == []


@pytest.mark.parametrize("serve", ["inline", "async"])
@pytest.mark.parametrize("mode", list(DataMode))
async def test_late_workers_move_the_right_bytes(mode: DataMode, serve: Serve) -> None:
    """However late a worker sends, reads and writes end, with their own bytes; also with fewer buffers than requests."""
    await _read_and_write(late_kernel(), mode, serve)


async def _read_and_write(kernel: SimKernel, mode: DataMode, serve: Serve) -> None:
    memory = numbered()
    options = DeviceOptions(queues=2, depth=4, mode=mode, pool_buffers=1, serve=serve)
    with trio.fail_after(10):
        async with open_target(kernel, cpus=[0, 1]) as target:
            device = await target.start_device(memory, options)
            disk = kernel.block_device(device.dev_id)
            reads = [disk.submit(IoOp.READ, block * BLOCK, BLOCK) for block in range(BLOCKS)]
            for block, bio in enumerate(reads):
                await bio.wait()
                assert bytes(bio.data) == bytes([block + 1]) * BLOCK, f"block {block}"
            async with trio.open_nursery() as nursery:
                for block in range(BLOCKS):
                    nursery.start_soon(disk.write, block * BLOCK, bytes([200 - block]) * BLOCK)
        for block in range(BLOCKS):
            found = bytearray(BLOCK)
            memory.read(block * BLOCK, memoryview(found))
            assert found == bytes([200 - block]) * BLOCK, f"block {block}"
    assert kernel.leftovers() == []
    kernel.check()


@contextmanager
def buffers_free_too_soon() -> Iterator[None]:
    """A planted bug: buffers are given on as soon as their answer was handed to the worker."""
    with mock.patch.object(SimQueueRing, "untaken", 0):
        yield


async def test_a_buffer_that_is_free_too_soon_is_noticed() -> None:
    """The test above fails if a buffer is used for another request before the worker has sent the first one's answer."""
    with buffers_free_too_soon(), pytest.raises(AssertionError, match="block"):
        await _read_and_write(late_kernel(), DataMode.GET_DATA, "inline")


async def test_a_commit_from_another_worker_is_refused() -> None:
    """A planted bug, commits that come from another worker than the fetches, is EINVAL: the driver knows the threads apart."""
    kernel = SimKernel(partition_scan=False)
    async with open_target(kernel, cpus=[0, 1]) as target:
        wrong, right = [await target.start_device(numbered(), DeviceOptions(depth=2)) for _ in range(2)]
        (ring,) = kernel.devices[wrong.dev_id].rings
        ring.task = kernel.workers[1]
        disk = kernel.block_device(wrong.dev_id)
        bio = disk.submit(IoOp.READ, 0, BLOCK)
        with pytest.raises(KernelError) as raised:
            await target.wait_device(wrong)
        assert raised.value.errno == errno.EINVAL
        assert bio.result == -errno.EIO
        assert await kernel.block_device(right.dev_id).read(0, BLOCK) == b"\x01" * BLOCK
    assert {violation.kind for violation in kernel.violations} == {"refused"}
    assert kernel.leftovers() == []
