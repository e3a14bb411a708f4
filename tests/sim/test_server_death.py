"""What becomes of requests, and of the device, when the server goes."""

from __future__ import annotations

import errno

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.sim.mini import live, machine, opened, served
from ublk_trio.kernel_sim import SeededChoices, SimBlockDevice, SimKernel, scheduled_by
from ublk_trio.uapi import ControlCommand, DeviceState, IoOp


async def test_crash_fails_everything_and_kills_the_disk() -> None:
    """Without recovery a crash fails delivered, undelivered and waiting requests with EIO; the device is DEAD, and stays."""
    kernel = SimKernel(partition_scan=False)
    async with machine(kernel) as m, live(m, depth=2) as device:
        bios = [device.disk.submit(IoOp.READ, 0, 512)]
        assert len(device.queue.events()) == 1
        bios += [device.disk.submit(IoOp.WRITE, 0, bytes(512)) for _ in range(4)]
        kernel.crash_server(0)
        assert [bio.result for bio in bios] == [-errno.EIO] * 5
        assert not device.disk.exists
        assert (await m.info()).state is DeviceState.DEAD
        assert kernel.device_ids() == [0]
        assert await m.delete() == 0
    kernel.check()
    assert kernel.leftovers() == []


async def test_a_closed_ring_keeps_its_requests_until_the_last_close() -> None:
    """A ring's exit fails what was not delivered and what comes; what the server held fails with the last close of the char device."""
    kernel = SimKernel(partition_scan=False)
    async with machine(kernel) as m, live(m, queues=2, depth=3) as device:
        held = [device.disk.submit(IoOp.READ, 0, 512) for _ in range(2)]
        assert all(len(queue.events()) == 1 for queue in device.queues)
        undelivered = [device.disk.submit(IoOp.READ, 0, 512) for _ in range(2)]
        device.queues[0].ring.close()
        new = [device.disk.submit(IoOp.READ, 0, 512) for _ in range(2)]
        assert [bio.result for bio in new] == [-errno.EIO] * 2
        assert [bio.result for bio in held] == [None, None]
        assert undelivered[0].result == -errno.EIO
        # The other ring still answers.
        assert not undelivered[1].done
        event = device.queues[1].event()
        device.queues[1].commit(event.tag, 512)
        assert undelivered[1].result == 512
        device.queues[1].ring.close()
        assert [bio.result for bio in held] == [None, None]
        device.char.close()
        assert [bio.result for bio in held] == [-errno.EIO] * 2


async def test_stop_is_freed_by_the_servers_death() -> None:
    """A STOP_DEV that waits for a request ends when the server dies."""
    kernel = SimKernel(partition_scan=False)
    async with machine(kernel) as m, live(m) as device, trio.open_nursery() as nursery:
        bio = device.disk.submit(IoOp.READ, 0, 512)
        assert device.queue.events()
        nursery.start_soon(m.stop)
        await wait_all_tasks_blocked()
        assert kernel.held_commands()
        kernel.crash_server(0)
        assert bio.result == -errno.EIO
        assert kernel.held_commands() == []


async def test_death_during_the_partition_scan() -> None:
    """START_DEV of an older release holds the mutex while it scans: the death of the server fails the scan, START_DEV ends,
    and then the disk goes."""
    kernel = SimKernel(version=(6, 12))
    results: list[int] = []
    async with machine(kernel) as m, opened(m) as device, trio.open_nursery() as nursery:
        device.queue.fetch_all()

        async def start() -> None:
            results.append(await m.start())

        nursery.start_soon(start)
        await wait_all_tasks_blocked()
        assert results == []
        kernel.crash_server(0)
        await wait_all_tasks_blocked()
        assert results == [0]
        assert (await m.info()).state is DeviceState.DEAD
        assert kernel.held_commands() == []


async def test_waiters_on_a_closed_ring() -> None:
    """Whoever waits on a ring that closes gets ClosedResourceError, and so does every later call."""
    kernel = SimKernel(partition_scan=False)
    async with machine(kernel) as m, live(m) as device, trio.open_nursery() as nursery:
        ring = device.queue.ring

        async def wait() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await ring.wait()

        nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        ring.close()
        ring.close()
        await wait()
        for call in (ring.reap, lambda: ring.commit([])):
            with pytest.raises(trio.ClosedResourceError):
                call()
        assert ring.buffers == ()


async def test_control_ring_closed() -> None:
    """A command on a closed control ring is ClosedResourceError."""
    kernel = SimKernel()
    async with machine(kernel) as m:
        pass
    with pytest.raises(trio.ClosedResourceError):
        await m.command(ControlCommand.STOP_DEV)


async def test_char_device_closed_before_its_rings_is_a_violation() -> None:
    """The server is gone with the last ring, but the order was wrong."""
    kernel = SimKernel(partition_scan=False)
    async with machine(kernel) as m, live(m) as device:
        bio = device.disk.submit(IoOp.READ, 0, 512)
        device.queue.events()
        device.char.close()
        assert not bio.done
        device.queue.ring.close()
        assert bio.result == -errno.EIO
    assert [violation.kind for violation in kernel.violations] == ["char-closed-before-ring"]


@pytest.mark.parametrize("seed", range(20))
def test_crash_at_any_time_leaves_nothing(seed: int) -> None:
    """Whenever the server dies, every operation ends, and the device can be deleted."""
    choices = SeededChoices(seed)
    kernel = SimKernel(choices)
    ended = 0
    codes: set[int | None] = set()

    async def work(disk: SimBlockDevice, block: int) -> None:
        nonlocal ended
        for _ in range(3):
            try:
                await disk.write(512 * block, bytes([block]) * 512)
            except OSError as error:
                codes.add(error.errno)
            ended += 1

    async def run() -> None:
        async with machine(kernel) as m, served(m, queues=2, depth=2) as device, trio.open_nursery() as nursery:
            for block in range(8):
                nursery.start_soon(work, device.disk, block)
            for _ in range(choices.choose("crash after", 30)):
                await trio.lowlevel.checkpoint()
            kernel.crash_server(device.info.dev_id)

    with scheduled_by(choices):
        trio.run(run)
    assert ended == 24
    # ENXIO: the disk was gone before it was ever used.
    assert codes <= {errno.EIO, errno.ENXIO}
    kernel.check()
    assert kernel.leftovers() == []
