"""Per-tag commands: their checks in order; a refusal changes nothing."""

from __future__ import annotations

import errno

import pytest
import trio

from tests.sim.mini import COMMIT, FETCH, GET_DATA, Started, basic_params, live, machine, opened
from ublk_trio.errors import KernelError
from ublk_trio.kernel_sim import SimKernel
from ublk_trio.kernel_sim.ring import SimQueueRing
from ublk_trio.ring import NO_SLOT, pack_answer
from ublk_trio.uapi import Feature, IoCommand, IoOp


def answer(device: Started, command: int, tag: int, result: int = 0, *, queue: int = 0) -> int | None:
    """Send one command: the result of its immediate completion, or None when it is pending."""
    device.queues[queue].ring.commit([pack_answer(command, tag, result)])  # type: ignore[arg-type]
    events = device.queues[queue].events()
    return events[0].result if events else None


def commit_from_here(device: Started) -> tuple[SimQueueRing, int]:
    """Open another ring in this thread and commit tag 0: the ring and the result."""
    ring = device.char.open_queue(0, buffers=2)
    ring.commit([pack_answer(COMMIT, 0)])
    return ring, ring.reap()[4:8].cast("i")[0]


def calm() -> SimKernel:
    return SimKernel(partition_scan=False)


async def test_fetch_refusals_in_order() -> None:
    """FETCH_REQ: tag out of range, no address, then all queues ready, then already active."""
    kernel = calm()
    async with machine(kernel) as m, opened(m, queues=2, depth=2) as device:
        assert answer(device, FETCH, 2) == -errno.EINVAL
        device.queue.ring.slots[0] = NO_SLOT
        assert answer(device, FETCH, 0) == -errno.EINVAL
        device.queue.ring.slots[0] = 0
        assert answer(device, FETCH, 0) is None
        assert answer(device, FETCH, 0) == -errno.EINVAL
        assert answer(device, FETCH, 1) is None
        # This queue is ready, the other is not: still "active".
        assert answer(device, FETCH, 1) == -errno.EINVAL
        device.queues[1].fetch_all()
        assert answer(device, FETCH, 1) == -errno.EBUSY
        device.queue.ring.slots[1] = NO_SLOT
        assert answer(device, FETCH, 1) == -errno.EINVAL
    assert [violation.kind for violation in kernel.violations] == ["no-such-tag"] + ["refused"] * 5


async def test_commit_refusals_in_order() -> None:
    """COMMIT: the tag's daemon, then ownership, then NEED_GET_DATA's state, then the address."""
    kernel = calm()
    async with machine(kernel) as m, live(m, depth=2) as device:
        other, result = await trio.to_thread.run_sync(commit_from_here, device)
        assert result == -errno.EINVAL
        with pytest.raises(KernelError) as caught:
            other.commit([pack_answer(COMMIT, 0)])
        assert caught.value.errno == errno.EEXIST
        other.close()
        # A second ring of the daemon's own thread is as good as the first.
        other = device.char.open_queue(0, buffers=2)
        other.commit([pack_answer(COMMIT, 0)])
        assert other.reap()[4:8].cast("i")[0] == -errno.EBUSY
        other.close()
    async with machine(kernel) as m, live(m, depth=2) as device:
        assert answer(device, COMMIT, 0) == -errno.EBUSY
        bio = device.disk.submit(IoOp.READ, 0, 512)
        tag = device.queue.event().tag
        assert answer(device, GET_DATA, tag) == -errno.EINVAL
        assert answer(device, IoCommand.REGISTER_IO_BUF, tag) == -errno.EINVAL
        assert answer(device, 0x2F, tag) == -errno.EINVAL
        assert answer(device, 0x1F, tag) == -errno.EINVAL
        device.queue.ring.slots[tag] = NO_SLOT
        assert answer(device, COMMIT, tag, 512) == -errno.EINVAL
        assert not bio.done
        device.queue.ring.slots[tag] = tag
        assert answer(device, COMMIT, tag, 512) is None
        assert bio.result == 512
        assert answer(device, COMMIT, tag, 512) == -errno.EBUSY
        # A WRITE's next request needs a buffer, too.
        device.disk.submit(IoOp.WRITE, 0, bytes(512))
        tag = device.queue.event().tag
        device.queue.ring.slots[tag] = NO_SLOT
        assert answer(device, COMMIT, tag, 512) == -errno.EINVAL
    assert {violation.kind for violation in kernel.violations} == {"not-owned", "refused"}


@pytest.mark.parametrize("command", [IoCommand.PREP_IO_CMDS, IoCommand.COMMIT_IO_CMDS, IoCommand.FETCH_IO_CMDS])
async def test_batch_commands_are_unknown(command: IoCommand) -> None:
    """Without BATCH_IO its commands are like any unknown one: EINVAL, after all other checks."""
    async with machine(calm()) as m, live(m, depth=1) as device:
        assert answer(device, command, 99) == -errno.EINVAL
        assert answer(device, command, 0) == -errno.EBUSY
        device.disk.submit(IoOp.READ, 0, 512)
        assert answer(device, command, device.queue.event().tag) == -errno.EINVAL


async def test_unregister_is_refused_first() -> None:
    """UNREGISTER_IO_BUF without ZERO_COPY is EINVAL."""
    async with machine(calm()) as m, opened(m) as device:
        assert answer(device, IoCommand.UNREGISTER_IO_BUF, 0) == -errno.EINVAL


async def test_need_get_data_takes_two_steps() -> None:
    """A WRITE is announced with 1 and delivered with 0 after NEED_GET_DATA; a READ is delivered at once."""
    kernel = calm()
    async with machine(kernel) as m, live(m, flags=Feature.NEED_GET_DATA, buffers=1) as device:
        ring = device.queue.ring
        assert list(ring.slots) == [NO_SLOT] * 4
        bio = device.disk.submit(IoOp.WRITE, 0, b"w" * 1024)
        event = device.queue.event()
        assert (event.result, event.op, event.nr_sectors) == (1, IoOp.WRITE, 2)
        assert answer(device, COMMIT, event.tag, 1024) == -errno.EINVAL
        ring.slots[event.tag] = 0
        device.queue.get_data(event.tag)
        again = device.queue.event()
        assert (again.tag, again.result, again.nr_sectors) == (event.tag, 0, 2)
        assert device.queue.buffer(event.tag)[:1024] == b"w" * 1024
        ring.slots[event.tag] = NO_SLOT
        assert answer(device, COMMIT, event.tag, 1024) is None
        assert bio.result == 1024

        bio = device.disk.submit(IoOp.READ, 0, 512)
        event = device.queue.event()
        assert event.result == 0
        assert answer(device, COMMIT, event.tag, 512) == -errno.EINVAL
        ring.slots[event.tag] = 0
        device.queue.buffer(event.tag)[:512] = b"r" * 512
        assert answer(device, COMMIT, event.tag, 512) is None
        assert bytes(bio.data) == b"r" * 512


async def test_tags_are_reused_and_shared_fairly() -> None:
    """Requests beyond the depth wait in order, and every tag is one of the queue's."""
    async with machine(calm()) as m, live(m, depth=2) as device:
        bios = [device.disk.submit(IoOp.READ, 512 * i, 512) for i in range(6)]
        seen = []
        while not all(bio.done for bio in bios):
            events = device.queue.events()
            assert len(events) <= 2
            for event in events:
                seen.append(event.start_sector)
                device.queue.commit(event.tag, 512)
        assert seen == list(range(6))


async def test_char_device_rules() -> None:
    """One opener; a queue that there is not is EINVAL; a closed one can be opened again."""
    kernel = calm()
    async with machine(kernel) as m:
        info = await m.add()
        char = await kernel.open_char_device(info, ioctl_encoded=True)
        with pytest.raises(KernelError) as caught:
            await kernel.open_char_device(info, ioctl_encoded=True)
        assert caught.value.errno == errno.EBUSY
        with pytest.raises(KernelError) as caught:
            char.open_queue(1, buffers=4)
        assert caught.value.errno == errno.EINVAL
        char.close()
        char.close()
        (await kernel.open_char_device(info, ioctl_encoded=True)).close()
        assert await m.delete() == 0
        with pytest.raises(KernelError) as caught:
            await kernel.open_char_device(info, ioctl_encoded=True)
        assert caught.value.errno == errno.ENOENT


async def test_a_tag_cannot_be_fetched_after_abort() -> None:
    """After ABORT a tag is over until the char device was closed: 7.0 says ENODEV, older releases EBUSY."""
    for version, refusal in (((7, 3), errno.ENODEV), ((6, 12), errno.EBUSY)):
        kernel = SimKernel(version=version, partition_scan=False)
        async with machine(kernel) as m, live(m, depth=1) as device:
            await m.stop()
            assert device.queue.event().result == -errno.ENODEV
            assert answer(device, FETCH, 0) == -refusal
            assert answer(device, COMMIT, 0) == -errno.EBUSY


async def test_a_device_can_be_served_again_after_its_server_left() -> None:
    """The last close makes the device fresh: a second server may fetch and start it."""
    kernel = calm()
    async with machine(kernel) as m:
        info = await m.add()
        await m.set_params(0, basic_params())
        for _ in range(2):
            char = await kernel.open_char_device(info, ioctl_encoded=True)
            ring = char.open_queue(0, buffers=4)
            ring.commit([pack_answer(FETCH, tag) for tag in range(4)])
            assert await m.start() == 0
            ring.close()
            char.close()
        assert await m.delete() == 0
    assert kernel.leftovers() == []
