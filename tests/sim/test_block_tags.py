"""Tags: who gets one, who waits, and which queue it is."""

from __future__ import annotations

import errno

import pytest

from tests.sim.mini import basic_params, live, machine
from ublk_trio.kernel_sim import DrawnChoices, KernelVersion, SimKernel
from ublk_trio.kernel_sim.block.mapping import queue_of_cpu, spread
from ublk_trio.uapi import ControlCommand, IoOp

READ = IoOp.READ


def chosen(**answers: int) -> DrawnChoices:
    return DrawnChoices(lambda what, options: answers.get(what.replace("-", "_"), 0))


async def test_waiting_is_in_the_order_of_arrival() -> None:
    """With all tags taken operations wait, and each that ends lets the oldest in."""
    kernel = SimKernel(partition_scan=False)
    async with machine(kernel) as m, live(m, depth=2) as device:
        for sector in range(6):
            device.disk.submit(READ, sector * 512, 512)
        order = []
        while events := device.queue.events():
            assert len(events) <= 2
            order += [event.start_sector for event in events]
            device.queue.commit(events[0].tag, 512)
            for event in events[1:]:
                device.queue.commit(event.tag, 512)
        assert order == list(range(6))


async def test_choices_may_wake_another() -> None:
    """Linux's wait queues are not one line: another of the first eight may be served first, the ninth not."""
    for waiters, expected in ((3, 3), (12, 8)):
        asked: list[int] = []

        def draw(what: str, options: int, asked: list[int] = asked) -> int:
            if what == "waiter":
                asked.append(options)
                return options - 1
            return 0

        kernel = SimKernel(DrawnChoices(draw), partition_scan=False)
        async with machine(kernel) as m, live(m, depth=1) as device:
            for sector in range(waiters + 1):
                device.disk.submit(READ, sector * 2 * 512, 512)
            device.queue.commit(device.queue.event().tag, 512)
            assert device.queue.event().start_sector == 2 * expected
            assert asked == [expected]


@pytest.mark.parametrize("queues", [1, 2])
async def test_a_requeued_request_keeps_its_tag_unless_a_scheduler_may_be_there(queues: int) -> None:
    """The rest of a short read comes on its own tag; only on a disk with one queue may it be another that is free."""
    kernel = SimKernel(chosen(tag=1), partition_scan=False)
    async with machine(kernel) as m, live(m, depth=4, queues=queues) as device:
        device.disk.submit(READ, 0, 4096)
        first = device.queue.event()
        device.queue.commit(first.tag, 512)
        rest = device.queue.event()
        assert rest.start_sector == 1
        assert (rest.tag == first.tag) == (queues == 2)


async def test_a_requeued_request_goes_before_those_that_wait() -> None:
    """Its rest is delivered before an operation that found no tag."""
    kernel = SimKernel(partition_scan=False)
    async with machine(kernel) as m, live(m, depth=1) as device:
        device.disk.submit(READ, 0, 4096)
        device.disk.submit(READ, 8192, 512)
        device.queue.commit(device.queue.event().tag, 512)
        assert device.queue.event().start_sector == 1


async def test_one_queue_full_does_not_hold_up_another() -> None:
    """Tags belong to their queue: an application on another queue's CPU goes on."""
    kernel = SimKernel(partition_scan=False)
    async with machine(kernel) as m, live(m, depth=1, queues=2) as device:
        for _ in range(3):
            device.disk.submit(READ, 0, 512, cpu=0)
        other = device.disk.submit(READ, 0, 512, cpu=3)
        assert len(device.queues[0].events()) == 1
        device.queues[1].commit(device.queues[1].event().tag, 512)
        assert other.done


async def test_many_waiters_fail_at_once_when_the_server_dies() -> None:
    """A thousand waiting operations end with EIO, however deep the line is."""
    kernel = SimKernel(partition_scan=False)
    async with machine(kernel) as m, live(m, depth=1, params=basic_params()) as device:
        bios = [device.disk.submit(READ, 0, 512) for _ in range(5000)]
        kernel.crash_server(0)
        assert {bio.result for bio in bios} == {-errno.EIO}


@pytest.mark.parametrize(
    ("version", "cpus", "queues", "expected"),
    [
        ((7, 3), 4, 2, [0, 0, 1, 1]),
        ((7, 3), 8, 3, [0, 0, 0, 1, 1, 1, 2, 2]),
        ((6, 3), 4, 2, [0, 0, 1, 1]),
        ((6, 1), 4, 2, [0, 1, 0, 1]),
        ((6, 1), 5, 3, [0, 1, 2, 0, 1]),
    ],
)
def test_which_queue_a_cpu_uses(version: tuple[int, int], cpus: int, queues: int, expected: list[int]) -> None:
    """Neighbouring CPUs share a queue; on old kernels the queues take turns."""
    assert queue_of_cpu(cpus=cpus, queues=queues, version=KernelVersion(*version)) == expected


@pytest.mark.parametrize(("cpus", "queues"), [(4, 2), (8, 3), (3, 3), (4, 1)])
async def test_affinity_is_where_requests_go(cpus: int, queues: int) -> None:
    """GET_QUEUE_AFFINITY and an application on each CPU agree."""
    kernel = SimKernel(cpus=cpus, partition_scan=False)
    async with machine(kernel) as m, live(m, queues=queues, depth=8) as device:
        masks = []
        for queue in range(queues):
            buffer = bytearray(8)
            assert await m.command(ControlCommand.GET_QUEUE_AFFINITY, data=queue, buffer=buffer) == 0
            masks.append(int.from_bytes(buffer, "little"))
        assert sum(masks) == (1 << cpus) - 1
        for cpu in range(cpus):
            device.disk.submit(READ, cpu * 512, 512, cpu=cpu)
            (queue,) = [queue for queue in range(queues) if masks[queue] >> cpu & 1]
            assert device.queues[queue].event().start_sector == cpu


def test_applications_take_turns_on_the_queues() -> None:
    """On a calm machine consecutive applications run on CPUs of different queues."""
    assert spread([0, 0, 0, 1, 1, 1, 2, 2]) == [0, 3, 6, 1, 4, 7, 2, 5]
