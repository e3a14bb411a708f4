"""Commands that the kernel holds: what they wait for, and that they go on without their callers."""

from __future__ import annotations

import errno

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.sim.mini import Machine, RawQueue, basic_params, live, machine, opened
from ublk_trio.errors import KernelError
from ublk_trio.kernel_sim import SeededChoices, SimKernel
from ublk_trio.kernel_sim.waits import Steps, Wait
from ublk_trio.ring import pack_answer
from ublk_trio.uapi import ControlCommand, DeviceState, Feature, IoCommand, IoOp


class Sent:
    """A command that was sent by a task of its own."""

    def __init__(self) -> None:
        self.result: int | None = None
        self.scope = trio.CancelScope()

    @property
    def pending(self) -> bool:
        return self.result is None

    async def run(self, m: Machine, command: ControlCommand, dev_id: int, data: int) -> None:
        with self.scope:
            self.result = await m.command(command, dev_id, data=data)


async def send(nursery: trio.Nursery, m: Machine, command: ControlCommand, dev_id: int = 0, data: int = 0) -> Sent:
    """Send it and give it the time to end or to get stuck."""
    sent = Sent()
    nursery.start_soon(sent.run, m, command, dev_id, data)
    await wait_all_tasks_blocked()
    return sent


START, STOP, DEL, ADD = (
    ControlCommand.START_DEV,
    ControlCommand.STOP_DEV,
    ControlCommand.DEL_DEV,
    ControlCommand.ADD_DEV,
)


async def test_start_waits_for_the_last_tag() -> None:
    """START_DEV ends when the last tag of the last queue is fetched, and not before."""
    kernel = SimKernel(partition_scan=False)
    async with machine(kernel) as m, opened(m, queues=2, depth=2) as device, trio.open_nursery() as nursery:
        start = await send(nursery, m, START, data=kernel.server_pid)
        device.queues[1].fetch_all()
        device.queues[0].ring.commit([pack_answer(IoCommand.FETCH_REQ, 1)])
        await wait_all_tasks_blocked()
        assert start.pending
        assert kernel.held_commands() == ["START_DEV of device 0, waiting for every tag of device 0 to be fetched"]
        device.queues[0].ring.commit([pack_answer(IoCommand.FETCH_REQ, 0)])
        await wait_all_tasks_blocked()
        assert start.result == 0
        assert (await m.info()).state is DeviceState.LIVE


async def test_start_scans_partitions_through_the_server() -> None:
    """START_DEV of an older release reads the disk before it ends: the server must be answering by then."""
    kernel = SimKernel(version=(6, 12))
    async with machine(kernel) as m, opened(m) as device, trio.open_nursery() as nursery:
        device.queue.fetch_all()
        start = await send(nursery, m, START, data=kernel.server_pid)
        event = device.queue.event()
        assert (event.op, event.start_sector, event.length) == (IoOp.READ, 0, 4096)
        assert start.pending
        device.queue.commit(event.tag, 4096)
        await wait_all_tasks_blocked()
        assert start.result == 0


async def test_start_does_not_wait_for_the_partition_scan() -> None:
    """Since 7.0 the disk is read after START_DEV has ended."""
    kernel = SimKernel()
    async with machine(kernel) as m, opened(m) as device:
        device.queue.fetch_all()
        assert await m.start() == 0
        event = device.queue.event()
        assert (event.op, event.start_sector, event.length) == (IoOp.READ, 0, 4096)


async def test_failed_partition_scan_starts_all_the_same() -> None:
    """A disk whose first sectors cannot be read is a disk without partitions."""
    kernel = SimKernel(version=(6, 12))
    async with machine(kernel) as m, opened(m) as device, trio.open_nursery() as nursery:
        device.queue.fetch_all()
        start = await send(nursery, m, START, data=kernel.server_pid)
        # Who looks for a GPT reads them, and then who looks for an MBR.
        for _ in range(2):
            assert start.pending
            device.queue.commit(device.queue.event().tag, -errno.EIO)
            await wait_all_tasks_blocked()
        assert start.result == 0
        assert device.disk.partitions == []


async def test_partition_scan_may_be_switched_off() -> None:
    """NO_AUTO_PART_SCAN: nothing is read."""
    kernel = SimKernel()
    async with machine(kernel) as m, opened(m, flags=Feature.NO_AUTO_PART_SCAN) as device:
        device.queue.fetch_all()
        assert await m.start() == 0
        assert device.queue.events() == []


async def test_stop_wakes_start() -> None:
    """A STOP_DEV while START_DEV waits for tags ends it with EBUSY, aborts the idle tags and refuses new ones."""
    kernel = SimKernel()
    async with machine(kernel) as m, opened(m, depth=2) as device, trio.open_nursery() as nursery:
        device.queue.ring.commit([pack_answer(IoCommand.FETCH_REQ, 0)])
        start = await send(nursery, m, START, data=kernel.server_pid)
        assert await m.stop() == 0
        await wait_all_tasks_blocked()
        assert start.result == -errno.EBUSY
        assert device.queue.event().result == -errno.ENODEV
        device.queue.ring.commit([pack_answer(IoCommand.FETCH_REQ, 1)])
        assert device.queue.event().result == -errno.ENODEV
    kernel.check()
    assert kernel.leftovers() == []


async def test_stop_without_a_server_does_not_spoil_the_next() -> None:
    """A STOP_DEV before the char device was opened refuses nothing later."""
    kernel = SimKernel(partition_scan=False)
    async with machine(kernel) as m:
        info = await m.add(dev_id=1)
        await m.set_params(1, basic_params())
        assert await m.stop(1) == 0
        char = await kernel.open_char_device(info, ioctl_encoded=True)
        ring = char.open_queue(0, buffers=4)
        ring.commit([pack_answer(IoCommand.FETCH_REQ, tag) for tag in range(4)])
        assert await m.start(1) == 0
        ring.close()
        char.close()
        assert await m.delete(1) == 0
    assert kernel.leftovers() == []


async def test_stop_waits_for_what_is_in_flight() -> None:
    """STOP_DEV ends only when the last delivered request was answered; new ones fail EIO meanwhile; then idle tags are aborted."""
    kernel = SimKernel(partition_scan=False)
    async with machine(kernel) as m, live(m, depth=2) as device, trio.open_nursery() as nursery:
        bio = device.disk.submit(IoOp.READ, 0, 512)
        event = device.queue.event()
        stop = await send(nursery, m, STOP)
        late = device.disk.submit(IoOp.READ, 0, 512)
        assert late.result == -errno.EIO
        assert stop.pending
        assert device.queue.events() == []
        assert (await m.info()).state is DeviceState.LIVE
        device.queue.commit(event.tag, 512)
        await wait_all_tasks_blocked()
        assert stop.result == 0
        assert bio.result == 512
        assert sorted(event.tag for event in device.queue.events()) == [0, 1]
        assert (await m.info()).state is DeviceState.DEAD
    kernel.check()


async def test_a_fetch_during_a_stop_is_noted() -> None:
    """FETCH_REQ while STOP_DEV holds the device: on 7.3 both may sleep for ever, and `notes` says so; on 6.12 it is refused."""
    for version, noted in (((7, 3), True), ((6, 12), False)):
        kernel = SimKernel(version=version, partition_scan=False)
        async with machine(kernel) as m, live(m, depth=2) as device, trio.open_nursery() as nursery:
            device.disk.submit(IoOp.READ, 0, 512)
            event = device.queue.event()
            device.queue.ring.commit([pack_answer(IoCommand.FETCH_REQ, event.tag)])
            assert kernel.notes == []
            stop = await send(nursery, m, STOP)
            device.queue.ring.commit([pack_answer(IoCommand.FETCH_REQ, event.tag)])
            assert any("FETCH_REQ waits for the control command" in note for note in kernel.notes) == noted
            device.queue.events()
            device.queue.commit(event.tag, 512)
            await wait_all_tasks_blocked()
            assert stop.result == 0


async def test_requests_that_wait_for_a_tag_are_served_before_a_stop_ends() -> None:
    """What was accepted before STOP_DEV is answered, tag or no tag."""
    kernel = SimKernel(partition_scan=False)
    async with machine(kernel) as m, live(m, depth=1) as device, trio.open_nursery() as nursery:
        bios = [device.disk.submit(IoOp.READ, 512 * i, 512) for i in range(3)]
        stop = await send(nursery, m, STOP)
        for i in range(3):
            assert stop.pending
            event = device.queue.event()
            assert event.start_sector == i
            device.queue.commit(event.tag, 512)
        await wait_all_tasks_blocked()
        assert stop.result == 0
        assert [bio.result for bio in bios] == [512] * 3


async def test_delete_waits_for_rings_and_char_device() -> None:
    """DEL_DEV ends with the last of them; the id is taken until then, and the char device cannot be opened again."""
    kernel = SimKernel(partition_scan=False)
    async with machine(kernel) as m, live(m) as device, trio.open_nursery() as nursery:
        delete = await send(nursery, m, DEL)
        assert delete.pending
        assert "DEL_DEV of device 0 waits for its char device and rings to be closed" in kernel.notes
        again = await send(nursery, m, DEL)
        device.queue.ring.close()
        await wait_all_tasks_blocked()
        assert delete.pending
        assert again.pending
        with pytest.raises(KernelError) as caught:
            await kernel.open_char_device(device.info, ioctl_encoded=True)
        assert caught.value.errno == errno.ENOENT
        assert kernel.device_ids() == [0]
        device.char.close()
        await wait_all_tasks_blocked()
        assert (delete.result, again.result) == (0, 0)
        assert kernel.device_ids() == []
    assert kernel.leftovers() == []


async def test_delete_waits_for_the_disks_openers() -> None:
    """A mounted disk keeps its deleted device's id."""
    kernel = SimKernel(partition_scan=False)
    async with machine(kernel) as m, live(m) as device, trio.open_nursery() as nursery:
        with device.disk.open():
            delete = await send(nursery, m, DEL)
            device.close()
            await wait_all_tasks_blocked()
            assert delete.pending
        await wait_all_tasks_blocked()
        assert delete.result == 0


async def test_delete_async_does_not_wait() -> None:
    """DEL_DEV_ASYNC returns at once; the device goes with its last user."""
    kernel = SimKernel(partition_scan=False)
    async with machine(kernel) as m, live(m) as device:
        assert await m.command(ControlCommand.DEL_DEV_ASYNC) == 0
        assert kernel.device_ids() == [0]
        device.close()
        assert kernel.device_ids() == []


async def test_a_stuck_delete_holds_up_every_add() -> None:
    """One request that is never answered stops the adding of all devices: ADD and DEL share a lock."""
    kernel = SimKernel(partition_scan=False)
    async with machine(kernel) as m, live(m) as device, trio.open_nursery() as nursery:
        device.disk.submit(IoOp.READ, 0, 512)
        event = device.queue.event()
        delete = await send(nursery, m, DEL)
        added: list[int] = []

        async def add() -> None:
            added.append((await m.add(9)).dev_id)

        nursery.start_soon(add)
        await wait_all_tasks_blocked()
        assert added == []
        device.queue.commit(event.tag, 512)
        await wait_all_tasks_blocked()
        assert added == [9]
        assert delete.pending
        device.close()


async def test_cancelled_caller_leaves_the_command_running() -> None:
    """Cancelling the wait for STOP_DEV does not recall it."""
    kernel = SimKernel(partition_scan=False)
    async with machine(kernel) as m, live(m) as device, trio.open_nursery() as nursery:
        device.disk.submit(IoOp.READ, 0, 512)
        event = device.queue.event()
        stop = await send(nursery, m, STOP)
        stop.scope.cancel()
        await wait_all_tasks_blocked()
        assert stop.pending
        assert len(kernel.held_commands()) == 1
        device.queue.commit(event.tag, 512)
        assert kernel.held_commands() == []
        assert (await m.info()).state is DeviceState.DEAD


async def test_a_cancelled_command_was_sent_or_was_not() -> None:
    """Whether a command with a cancelled caller took effect is a choice: both must be reachable."""
    outcomes = set()
    for seed in range(20):
        kernel = SimKernel(SeededChoices(seed))
        async with machine(kernel) as m:
            with trio.CancelScope() as scope:
                scope.cancel()
                await m.add()
            outcomes.add(len(kernel.device_ids()))
    assert outcomes == {0, 1}


async def test_closing_the_control_ring_interrupts() -> None:
    """The ring's exit ends START_DEV (EINTR), which can be interrupted, and not STOP_DEV, which cannot."""
    kernel = SimKernel(partition_scan=False)
    async with machine(kernel) as m, opened(m), live(m) as device, trio.open_nursery() as nursery:
        device.disk.submit(IoOp.READ, 0, 512)
        event = device.queue.event()
        async with machine(kernel) as other:
            start = await send(nursery, other, START, data=kernel.server_pid)
            stop = await send(nursery, other, STOP, device.info.dev_id)
        await wait_all_tasks_blocked()
        assert start.result == -errno.EINTR
        assert stop.pending
        device.queue.commit(event.tag, 512)
        await wait_all_tasks_blocked()
        assert stop.result == 0


async def test_a_held_command_keeps_a_deleted_device() -> None:
    """After DEL_DEV_ASYNC the id becomes free when the last command that works on the device has ended."""
    kernel = SimKernel(partition_scan=False)
    async with machine(kernel) as m, trio.open_nursery() as nursery:
        await m.add()
        assert await m.set_params(0, basic_params()) == 0
        async with machine(kernel) as other:
            await send(nursery, other, START, data=kernel.server_pid)
            assert await m.command(ControlCommand.DEL_DEV_ASYNC) == 0
            assert kernel.device_ids() == [0]
        assert kernel.device_ids() == []


async def test_stop_waits_for_start() -> None:
    """START_DEV of an older release holds the device's mutex while it scans partitions; a STOP_DEV comes after it."""
    kernel = SimKernel(version=(6, 12))
    async with machine(kernel) as m, opened(m) as device, trio.open_nursery() as nursery:
        device.queue.fetch_all()
        start = await send(nursery, m, START, data=kernel.server_pid)
        stop = await send(nursery, m, STOP)
        assert start.pending
        assert stop.pending
        device.queue.commit(device.queue.event().tag, 4096)
        await wait_all_tasks_blocked()
        assert (start.result, stop.result) == (0, 0)
        assert (await m.info()).state is DeviceState.DEAD


async def test_two_held_commands_end_in_any_order() -> None:
    """Which of two commands goes on first is a choice; both go on, and over the seeds each is first once."""
    results = set()
    for seed in range(10):
        kernel = SimKernel(SeededChoices(seed), partition_scan=False)
        async with machine(kernel) as m, opened(m) as device, trio.open_nursery() as nursery:
            first = await send(nursery, m, START, data=kernel.server_pid)
            second = await send(nursery, m, START, data=kernel.server_pid)
            device.queue.fetch_all()
            await wait_all_tasks_blocked()
            results.add((first.result, second.result))
    assert results == {(0, -errno.EEXIST), (-errno.EEXIST, 0)}


async def test_interrupted_delete_deletes_all_the_same() -> None:
    """A DEL_DEV whose ring exits ends with EINTR, and the device goes with its last user."""
    kernel = SimKernel(partition_scan=False)
    async with machine(kernel) as m, live(m) as device, trio.open_nursery() as nursery:
        async with machine(kernel) as other:
            delete = await send(nursery, other, DEL)
        await wait_all_tasks_blocked()
        assert delete.result == -errno.EINTR
        assert kernel.device_ids() == [0]
        device.close()
        assert kernel.device_ids() == []


async def test_a_tag_is_aborted_once() -> None:
    """A second STOP_DEV finds nothing more to cancel."""
    async with machine(SimKernel(partition_scan=False)) as m, live(m, depth=2) as device:
        assert await m.stop() == 0
        assert await m.stop() == 0
        assert [event.result for event in device.queue.events()] == [-errno.ENODEV] * 2


async def test_stopping_ends_with_the_last_close() -> None:
    """A stopped device refuses its old server's tags, and takes the next server's."""
    kernel = SimKernel(partition_scan=False)
    async with machine(kernel) as m, live(m) as device:
        await m.stop()
        device.close()
        char = await kernel.open_char_device(device.info, ioctl_encoded=True)
        ring = char.open_queue(0, buffers=4)
        ring.commit([pack_answer(IoCommand.FETCH_REQ, tag) for tag in range(4)])
        assert await m.start() == 0
        ring.close()
        char.close()


async def test_leftovers_name_everything() -> None:
    """What a server forgot is named."""
    kernel = SimKernel(partition_scan=False)
    async with machine(kernel) as m, live(m) as device, trio.open_nursery() as nursery:
        device.disk.submit(IoOp.READ, 0, 512)
        await send(nursery, m, STOP)
        assert kernel.leftovers() == [
            "held command: STOP_DEV of device 0, waiting for 1 operations on /dev/ublkb0",
            "open control ring",
            "device 0: LIVE",
            "open char device: /dev/ublkc0",
            "open ring: ring of queue 0 of device 0",
            "unfinished operation: <bio 1 READ 0+512 None>",
        ]
        device.close()
    assert kernel.leftovers() == []


async def test_start_lets_go_of_a_device_that_was_reset() -> None:
    """START_DEV looks again once it has the device: when the tags are gone it waits for the next server, and holds nobody up."""
    kernel = SimKernel(partition_scan=False)
    async with machine(kernel) as m, opened(m, depth=2) as device, trio.open_nursery() as nursery:
        device.queue.fetch_all()
        mutex = kernel.devices[0].mutex
        is_over = False

        def hold() -> Steps:
            yield from mutex.lock()
            yield Wait("the test", lambda: is_over)
            mutex.unlock()
            return 0

        kernel.run("somebody", hold())
        device.close()
        start = await send(nursery, m, START, data=kernel.server_pid)
        assert len(kernel.held_commands()) == 3
        is_over = True
        kernel.changed()
        await wait_all_tasks_blocked()
        assert kernel.held_commands() == ["START_DEV of device 0, waiting for every tag of device 0 to be fetched"]
        assert await m.set_params(0, basic_params()) == 0
        device.char = await kernel.open_char_device(device.info, ioctl_encoded=True)
        device.queues = [RawQueue(device.char.open_queue(0, buffers=2))]
        device.queue.fetch_all()
        await wait_all_tasks_blocked()
        assert start.result == 0
