"""User recovery: what becomes of requests when a server goes, and how the next one takes over."""

from __future__ import annotations

import errno

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.sim.mini import GET_DATA, Machine, RawQueue, Started, live, machine, opened
from ublk_trio.errors import KernelError
from ublk_trio.kernel_sim import Bio, DrawnChoices, SeededChoices, SimKernel, SimulatedOopsError
from ublk_trio.ring import pack_answer
from ublk_trio.uapi import ControlCommand, DeviceState, Feature, IoCommand, IoOp

R, REISSUE, FAIL_IO = Feature.USER_RECOVERY, Feature.USER_RECOVERY_REISSUE, Feature.USER_RECOVERY_FAIL_IO
BEGIN, END, QUIESCE = (
    ControlCommand.START_USER_RECOVERY,
    ControlCommand.END_USER_RECOVERY,
    ControlCommand.QUIESCE_DEV,
)
VERSIONS = pytest.mark.parametrize("version", [(6, 6), (6, 12), (6, 16), (7, 0), (7, 3)])


def make_kernel(version: tuple[int, int] = (7, 3), **options: object) -> SimKernel:
    return SimKernel(version=version, partition_scan=False, **options)  # type: ignore[arg-type]


class NextServer:
    """Takes over a device that lost its server."""

    def __init__(self, m: Machine, device: Started) -> None:
        self.m = m
        self.device = device

    async def open(self) -> None:
        assert await self.m.command(BEGIN) == 0
        info = self.device.info
        self.device.char = await self.m.kernel.open_char_device(info, ioctl_encoded=True)
        self.device.queues = [
            RawQueue(self.device.char.open_queue(queue_id, buffers=info.queue_depth))
            for queue_id in range(info.nr_hw_queues)
        ]

    async def take_over(self) -> None:
        await self.open()
        for queue in self.device.queues:
            queue.fetch_all()
        assert await self.m.command(END, data=self.m.kernel.server_pid) == 0


def owned_undelivered_and_waiting(device: Started) -> tuple[Bio, Bio, Bio]:
    """One request that the server has, one that it has not reaped, one that waits for a tag; with a depth of 2."""
    owned = device.disk.submit(IoOp.WRITE, 0, b"a" * 512)
    assert device.queue.event().result == 0
    undelivered = device.disk.submit(IoOp.WRITE, 512, b"b" * 512)
    waiting = device.disk.submit(IoOp.WRITE, 1024, b"c" * 512)
    return owned, undelivered, waiting


# ---------------------------------------------------------------------- requests


@VERSIONS
async def test_plain_recovery_fails_what_was_owned_and_holds_the_rest(version: tuple[int, int]) -> None:
    """USER_RECOVERY: an owned request fails EIO; undelivered, waiting and new ones are held, and served by the next server."""
    kernel = make_kernel(version)
    async with machine(kernel) as m, live(m, depth=2, flags=R) as device:
        owned, undelivered, waiting = owned_undelivered_and_waiting(device)
        kernel.crash_server(0)
        assert owned.result == -errno.EIO
        new = device.disk.submit(IoOp.READ, 1536, 512)
        assert (await m.info()).state is DeviceState.QUIESCED
        await NextServer(m, device).take_over()
        assert (await m.info()).state is DeviceState.LIVE
        served: list[int] = []
        while events := device.queue.events():
            for event in events:
                assert event.result == 0
                served.append(event.start_sector)
                device.queue.commit(event.tag, 512)
        assert served == [1, 2, 3]
        assert [bio.result for bio in (undelivered, waiting, new)] == [512] * 3
    kernel.check()


@VERSIONS
async def test_reissue_gives_what_was_owned_to_the_next_server_first(version: tuple[int, int]) -> None:
    """USER_RECOVERY_REISSUE: what the dead server had comes again, before everything else, with its data."""
    kernel = make_kernel(version)
    async with machine(kernel) as m, live(m, depth=2, flags=R | REISSUE) as device:
        bios = owned_undelivered_and_waiting(device)
        kernel.crash_server(0)
        assert not any(bio.done for bio in bios)
        await NextServer(m, device).take_over()
        served: list[tuple[int, int]] = []
        while events := device.queue.events():
            for event in events:
                served.append((event.start_sector, device.queue.buffer(event.tag)[0]))
                device.queue.commit(event.tag, 512)
        assert served == [(0, ord("a")), (1, ord("b")), (2, ord("c"))]
        assert [bio.result for bio in bios] == [512] * 3


@pytest.mark.parametrize("version", [(6, 13), (6, 14), (6, 15)])
async def test_fail_io_ends_with_the_recovery(version: tuple[int, int]) -> None:
    """After END_USER_RECOVERY a device that failed requests serves them, in the older releases, too."""
    kernel = make_kernel(version)
    async with machine(kernel) as m, live(m, depth=2, flags=R | FAIL_IO) as device:
        kernel.crash_server(0)
        assert device.disk.submit(IoOp.READ, 0, 512).result == -errno.EREMOTEIO
        await NextServer(m, device).take_over()
        bio = device.disk.submit(IoOp.READ, 0, 512)
        device.queue.commit(device.queue.event().tag, 512)
        assert bio.result == 512
    kernel.check()


async def test_fail_io_fails_everything_until_the_next_server() -> None:
    """USER_RECOVERY_FAIL_IO: all that was there is EIO, what comes is EREMOTEIO; the next server gets what comes after its fetches."""
    kernel = make_kernel()
    async with machine(kernel) as m, live(m, depth=2, flags=R | FAIL_IO) as device:
        bios = owned_undelivered_and_waiting(device)
        kernel.crash_server(0)
        assert [bio.result for bio in bios] == [-errno.EIO] * 3
        assert (await m.info()).state is DeviceState.FAIL_IO
        assert device.disk.submit(IoOp.READ, 0, 512).result == -errno.EREMOTEIO
        server = NextServer(m, device)
        await server.open()
        assert device.disk.submit(IoOp.READ, 0, 512).result == -errno.EREMOTEIO
        device.queue.fetch_all()
        early = device.disk.submit(IoOp.READ, 0, 512)
        assert (await m.info()).state is DeviceState.FAIL_IO
        assert await m.command(END, data=kernel.server_pid) == 0
        device.queue.commit(device.queue.event().tag, 512)
        assert early.result == 512


@pytest.mark.parametrize(("version", "at_once"), [((6, 12), False), ((6, 16), True), ((7, 3), True)])
async def test_new_requests_before_the_end_of_recovery(version: tuple[int, int], at_once: bool) -> None:
    """Since 6.15 a queue that is fetched gets new requests at once; what was held waits for END_USER_RECOVERY in any release."""
    kernel = make_kernel(version)
    async with machine(kernel) as m, live(m, flags=R) as device:
        kernel.crash_server(0)
        held = device.disk.submit(IoOp.READ, 0, 512)
        await NextServer(m, device).open()
        device.queue.fetch_all()
        new = device.disk.submit(IoOp.READ, 512, 512)
        events = device.queue.events()
        assert [event.start_sector for event in events] == ([1] if at_once else [])
        assert await m.command(END, data=kernel.server_pid) == 0
        events += device.queue.events()
        assert sorted(event.start_sector for event in events) == [0, 1]
        for event in events:
            device.queue.commit(event.tag, 512)
        assert (held.result, new.result) == (512, 512)


async def test_announced_write_is_the_servers() -> None:
    """A WRITE that was announced for NEED_GET_DATA, and not fetched yet, is one that the server had."""
    for flags, result in ((R, -errno.EIO), (R | REISSUE, None)):
        kernel = make_kernel()
        async with machine(kernel) as m, live(m, flags=flags | Feature.NEED_GET_DATA) as device:
            bio = device.disk.submit(IoOp.WRITE, 0, b"x" * 512)
            assert device.queue.event().result == 1
            kernel.crash_server(0)
            assert bio.result == result
            await NextServer(m, device).take_over()
            if result is None:
                event = device.queue.event()
                assert event.result == 1
                device.queue.ring.commit([pack_answer(GET_DATA, event.tag)])
                assert device.queue.event().result == 0
                assert device.queue.buffer(event.tag)[0] == ord("x")
                device.queue.commit(event.tag, 512)
                assert bio.result == 512


async def test_one_ring_of_two_goes() -> None:
    """The exit of one queue's ring holds up both queues; the other's server still answers what it has."""
    kernel = make_kernel()
    async with machine(kernel) as m, live(m, queues=2, depth=2, flags=R | REISSUE) as device:
        bios = [device.disk.submit(IoOp.READ, 512 * i, 512) for i in range(2)]
        events = [queue.event() for queue in device.queues]
        device.queues[0].ring.close()
        new = [device.disk.submit(IoOp.READ, 512 * i, 512) for i in range(2, 4)]
        assert device.queues[1].events() == []
        device.queues[1].commit(events[1].tag, 512)
        assert [bio.result for bio in bios] == [None, 512]
        assert (await m.info()).state is DeviceState.LIVE
        device.close()
        assert (await m.info()).state is DeviceState.QUIESCED
        await NextServer(m, device).take_over()
        for queue in device.queues:
            for event in queue.events():
                queue.commit(event.tag, 512)
        assert [bio.result for bio in bios + new] == [512] * 4


async def test_held_requests_come_before_those_that_wait_for_a_tag() -> None:
    """What was held goes to the head of the line, before later requests that found every tag in use."""
    kernel = make_kernel()
    async with machine(kernel) as m, live(m, depth=1, flags=R) as device:
        kernel.crash_server(0)
        device.disk.submit(IoOp.READ, 0, 512)
        await NextServer(m, device).open()
        device.queue.fetch_all()
        for sector in (1, 2):
            device.disk.submit(IoOp.READ, 512 * sector, 512)
        assert await m.command(END, data=kernel.server_pid) == 0
        served = []
        for _ in range(3):
            event = device.queue.event()
            served.append(event.start_sector)
            device.queue.commit(event.tag, 512)
        assert served == [0, 1, 2]


async def test_stop_of_a_recovering_device() -> None:
    """STOP_DEV fails what is held at once, and waits for what the next server has already."""
    kernel = make_kernel()
    async with machine(kernel) as m, live(m, flags=R) as device, trio.open_nursery() as nursery:
        kernel.crash_server(0)
        held = device.disk.submit(IoOp.READ, 0, 512)
        await NextServer(m, device).open()
        device.queue.fetch_all()
        owned = device.disk.submit(IoOp.READ, 512, 512)
        event = device.queue.event()
        nursery.start_soon(m.stop)
        await wait_all_tasks_blocked()
        assert (held.result, owned.result) == (-errno.EIO, None)
        assert kernel.held_commands() == ["STOP_DEV of device 0, waiting for 1 operations on /dev/ublkb0"]
        device.queue.commit(event.tag, 512)
        await wait_all_tasks_blocked()
        assert owned.result == 512
        assert kernel.held_commands() == []


async def test_a_queue_fetched_after_a_cancel_delivers_nothing() -> None:
    """A ring that goes before START_DEV spoils the whole round: no queue delivers, though START_DEV finds all tags fetched."""
    kernel = make_kernel()
    async with machine(kernel) as m, opened(m, queues=2, depth=2) as device:
        device.queues[0].fetch_all()
        device.queues[0].ring.close()
        device.queues[1].fetch_all()
        assert await m.start() == 0
        assert [device.disk.submit(IoOp.READ, 0, 512).result for _ in range(2)] == [-errno.EIO] * 2


async def test_a_stopped_device_starts_again() -> None:
    """On 7.3 a device with recovery that was stopped serves again, once a new server has fetched its tags."""
    kernel = make_kernel()
    async with machine(kernel) as m, live(m, flags=R) as device:
        assert await m.stop() == 0
        device.close()
        device.char = await kernel.open_char_device(device.info, ioctl_encoded=True)
        device.queues = [RawQueue(device.char.open_queue(0, buffers=4))]
        device.queue.fetch_all()
        assert await m.start() == 0
        bio = device.disk.submit(IoOp.READ, 0, 512)
        device.queue.commit(device.queue.event().tag, 512)
        assert bio.result == 512


# ---------------------------------------------------------------------- commands


@pytest.mark.parametrize("version", [(6, 12), (6, 16), (7, 3)])
async def test_end_of_recovery_is_about_the_next_server(version: tuple[int, int]) -> None:
    """After START_USER_RECOVERY the old server's fetches count no more, in any release."""
    kernel = make_kernel(version)
    async with machine(kernel) as m, live(m, flags=R) as device, trio.open_nursery() as nursery:
        kernel.crash_server(0)
        server = NextServer(m, device)
        await server.open()
        nursery.start_soon(lambda: m.command(END, data=kernel.server_pid))
        await wait_all_tasks_blocked()
        assert (await m.info()).state is DeviceState.QUIESCED
        device.queue.fetch_all()
        await wait_all_tasks_blocked()
        assert (await m.info()).state is DeviceState.LIVE


@VERSIONS
async def test_recover_twice(version: tuple[int, int]) -> None:
    """A device may lose one server after the other."""
    kernel = make_kernel(version)
    async with machine(kernel) as m, live(m, flags=R | REISSUE) as device:
        bio = device.disk.submit(IoOp.READ, 0, 512)
        for _ in range(3):
            assert device.queue.event().start_sector == 0
            kernel.crash_server(0)
            await NextServer(m, device).take_over()
        device.queue.commit(device.queue.event().tag, 512)
        assert bio.result == 512
    assert kernel.leftovers() == []


async def test_end_of_recovery_waits_for_every_tag() -> None:
    """END_USER_RECOVERY ends with the last tag of the last queue."""
    kernel = make_kernel()
    async with machine(kernel) as m, live(m, queues=2, flags=R) as device, trio.open_nursery() as nursery:
        kernel.crash_server(0)
        await NextServer(m, device).open()
        results: list[int] = []

        async def end() -> None:
            results.append(await m.command(END, data=kernel.server_pid))

        nursery.start_soon(end)
        device.queues[0].fetch_all()
        await wait_all_tasks_blocked()
        assert results == []
        assert kernel.held_commands() == [
            "END_USER_RECOVERY of device 0, waiting for every tag of device 0 to be fetched"
        ]
        device.queues[1].fetch_all()
        await wait_all_tasks_blocked()
        assert results == [0]


async def test_stop_wakes_end_of_recovery() -> None:
    """A STOP_DEV while END_USER_RECOVERY waits leaves no state to recover from: EBUSY. Held requests fail."""
    kernel = make_kernel()
    async with machine(kernel) as m, live(m, flags=R) as device, trio.open_nursery() as nursery:
        kernel.crash_server(0)
        held = device.disk.submit(IoOp.READ, 0, 512)
        await NextServer(m, device).open()
        results: list[int] = []

        async def end() -> None:
            results.append(await m.command(END, data=kernel.server_pid))

        nursery.start_soon(end)
        await wait_all_tasks_blocked()
        assert await m.stop() == 0
        await wait_all_tasks_blocked()
        assert results == [-errno.EBUSY]
        assert held.result == -errno.EIO


@pytest.mark.parametrize(("version", "result"), [((6, 16), 0), ((6, 17), -errno.EINVAL), ((7, 3), -errno.EINVAL)])
async def test_the_next_servers_pid(version: tuple[int, int], result: int) -> None:
    """Since 6.17 END_USER_RECOVERY refuses a pid that is not the opener's; before, any."""
    kernel = make_kernel(version)
    async with machine(kernel) as m, live(m, flags=R) as device:
        kernel.crash_server(0)
        await NextServer(m, device).open()
        device.queue.fetch_all()
        assert await m.command(END, data=kernel.server_pid + 1) == result
        if not result:
            assert (await m.info()).ublksrv_pid == kernel.server_pid + 1


async def test_old_commands_never_meet_new_requests() -> None:
    """A ring of the old server is closed, and its tags' answers are nobody's; the new server's tags start anew."""
    kernel = make_kernel()
    async with machine(kernel) as m, live(m, depth=2, flags=R | REISSUE) as device:
        bio = device.disk.submit(IoOp.READ, 0, 512)
        event = device.queue.event()
        old = device.queue
        kernel.crash_server(0)
        await NextServer(m, device).open()
        with pytest.raises(trio.ClosedResourceError):
            old.commit(event.tag, 512)
        # The new server does not own what the old one had, not before it gets it.
        device.queue.commit(event.tag, 512)
        assert device.queue.event().result < 0
        assert bio.result is None
        device.queue.fetch_all()
        assert await m.command(END, data=kernel.server_pid) == 0
        device.queue.commit(device.queue.event().tag, 512)
        assert bio.result == 512


@VERSIONS
async def test_stop_without_a_server_fails_what_is_held(version: tuple[int, int]) -> None:
    """STOP_DEV of a quiesced device needs no server: held requests are EIO, the state is DEAD, DEL_DEV goes through."""
    kernel = make_kernel(version)
    async with machine(kernel) as m, live(m, flags=R | REISSUE) as device:
        owned = device.disk.submit(IoOp.READ, 0, 512)
        device.queue.events()
        kernel.crash_server(0)
        held = device.disk.submit(IoOp.READ, 512, 512)
        assert await m.stop() == 0
        assert (owned.result, held.result) == (-errno.EIO, -errno.EIO)
        assert (await m.info()).state is DeviceState.DEAD
        assert await m.delete() == 0
    assert kernel.leftovers() == []


@VERSIONS
async def test_stop_waits_for_what_the_server_has_and_fails_the_rest(version: tuple[int, int]) -> None:
    """STOP_DEV of a live device with recovery: what the server has is answered; what waits for a tag, or comes, is EIO."""
    kernel = make_kernel(version)
    async with machine(kernel) as m, live(m, depth=1, flags=R) as device, trio.open_nursery() as nursery:
        owned = device.disk.submit(IoOp.READ, 0, 512)
        event = device.queue.event()
        waiting = device.disk.submit(IoOp.READ, 512, 512)
        nursery.start_soon(m.stop)
        await wait_all_tasks_blocked()
        new = device.disk.submit(IoOp.READ, 1024, 512)
        assert not waiting.done
        assert not new.done
        device.queue.commit(event.tag, 512)
        await wait_all_tasks_blocked()
        assert [bio.result for bio in (owned, waiting, new)] == [512, -errno.EIO, -errno.EIO]
        assert kernel.held_commands() == []
        assert (await m.info()).state is DeviceState.DEAD


@VERSIONS
async def test_a_stop_gives_the_server_nothing_new(version: tuple[int, int]) -> None:
    """What comes after STOP_DEV of a live device with recovery is not delivered, though the server works and has a free tag: EIO."""
    kernel = make_kernel(version)
    async with machine(kernel) as m, live(m, depth=2, flags=R) as device, trio.open_nursery() as nursery:
        device.disk.submit(IoOp.READ, 0, 512)
        event = device.queue.event()
        nursery.start_soon(m.stop)
        await wait_all_tasks_blocked()
        new = device.disk.submit(IoOp.READ, 512, 512)
        assert device.queue.events() == []
        device.queue.commit(event.tag, 512)
        assert new.result == -errno.EIO


@VERSIONS
async def test_stop_is_freed_by_the_end_of_a_ring(version: tuple[int, int]) -> None:
    """A STOP_DEV that waits for a request on its way to the server goes on when that one's ring closes, its char device open or not."""
    kernel = make_kernel(version)
    async with machine(kernel) as m, live(m, flags=R) as device, trio.open_nursery() as nursery:
        bio = device.disk.submit(IoOp.READ, 0, 512)
        nursery.start_soon(m.stop)
        await wait_all_tasks_blocked()
        assert not bio.done
        device.queue.ring.close()
        assert bio.result == -errno.EIO
        assert kernel.held_commands() == []


async def test_stop_is_freed_by_the_servers_death() -> None:
    """A STOP_DEV that waits for the server of a recoverable device goes on when the server dies; nothing is kept for a next one."""
    kernel = make_kernel()
    async with machine(kernel) as m, live(m, flags=R | REISSUE) as device, trio.open_nursery() as nursery:
        bio = device.disk.submit(IoOp.READ, 0, 512)
        assert device.queue.events()
        nursery.start_soon(m.stop)
        await wait_all_tasks_blocked()
        kernel.crash_server(0)
        await wait_all_tasks_blocked()
        assert bio.result == -errno.EIO
        assert kernel.held_commands() == []
        assert (await m.info()).state is DeviceState.DEAD


async def test_stop_is_freed_by_the_death_of_a_server_in_recovery() -> None:
    """The same when the server had not ended the recovery yet: what it got meanwhile fails, and is kept for nobody."""
    kernel = make_kernel()
    async with machine(kernel) as m, live(m, flags=R | REISSUE) as device, trio.open_nursery() as nursery:
        kernel.crash_server(0)
        await NextServer(m, device).open()
        device.queue.fetch_all()
        bio = device.disk.submit(IoOp.READ, 0, 512)
        assert device.queue.events()
        nursery.start_soon(m.stop)
        await wait_all_tasks_blocked()
        assert not bio.done
        kernel.crash_server(0)
        await wait_all_tasks_blocked()
        assert bio.result == -errno.EIO
        assert kernel.held_commands() == []
        assert (await m.info()).state is DeviceState.DEAD


async def test_size_of_a_quiesced_disk_may_change() -> None:
    """UPDATE_SIZE wants a disk, not a server; GET_PARAMS tells the new size."""
    kernel = make_kernel()
    async with machine(kernel) as m, live(m, flags=R) as device:
        kernel.crash_server(0)
        assert await m.command(ControlCommand.UPDATE_SIZE, data=16) == 0
        assert device.disk.size == 8192
        buffer = bytearray(152)
        buffer[0] = 152
        assert await m.command(ControlCommand.GET_PARAMS, buffer=buffer) == 0
        assert int.from_bytes(buffer[24:32], "little") == 16


async def test_a_new_size_outlives_the_disk() -> None:
    """UPDATE_SIZE changes the device's parameters, too: after STOP_DEV the next START_DEV makes a disk of that size."""
    kernel = make_kernel()
    async with machine(kernel) as m, live(m) as device:
        assert await m.command(ControlCommand.UPDATE_SIZE, data=16) == 0
        assert await m.stop() == 0
        device.close()
        device.char = await kernel.open_char_device(device.info, ioctl_encoded=True)
        device.queues = [RawQueue(device.char.open_queue(0, buffers=4))]
        device.queue.fetch_all()
        assert await m.start() == 0
        assert device.disk.size == 8192


# ---------------------------------------------------------------------- the moment after the last close


async def test_the_last_close_may_take_a_moment() -> None:
    """For as long as the driver works off the last close, START_USER_RECOVERY and open are EBUSY; whoever repeats gets through."""
    kernel = make_kernel(choices=DrawnChoices(lambda what, options: options - 1 if what == "release-late" else 0))
    async with machine(kernel) as m, live(m, flags=R) as device:
        kernel.crash_server(0)
        assert [await m.command(BEGIN) for _ in range(3)] == [-errno.EBUSY, -errno.EBUSY, 0]
        await NextServer(m, device).take_over()
        kernel.crash_server(0)
        for _ in range(2):
            with pytest.raises(KernelError) as caught:
                await kernel.open_char_device(device.info, ioctl_encoded=True)
            assert caught.value.errno == errno.EBUSY
            assert "it has an opener" in str(caught.value)
        device.char = await kernel.open_char_device(device.info, ioctl_encoded=True)
        device.queues = []


# ---------------------------------------------------------------------- QUIESCE_DEV


@pytest.mark.parametrize("version", [(6, 16), (7, 0), (7, 3)])
async def test_quiesce_for_an_update(version: tuple[int, int]) -> None:
    """QUIESCE_DEV ends idle commands and holds what comes; what the server has it can answer; the next server goes on."""
    kernel = make_kernel(version)
    async with machine(kernel) as m, live(m, depth=2, flags=R | Feature.QUIESCE) as device:
        owned = device.disk.submit(IoOp.READ, 0, 512)
        event = device.queue.event()
        assert await m.command(QUIESCE, data=1000) == 0
        assert [event.result for event in device.queue.events()] == [-errno.ENODEV]
        assert (await m.info()).state is DeviceState.LIVE
        held = device.disk.submit(IoOp.READ, 512, 512)
        # The answer is taken, and its tag waits without a completion.
        device.queue.commit(event.tag, 512)
        assert owned.result == 512
        assert device.queue.events() == []
        device.close()
        assert (await m.info()).state is DeviceState.QUIESCED
        await NextServer(m, device).take_over()
        event = device.queue.event()
        assert event.start_sector == 1
        device.queue.commit(event.tag, 512)
        assert held.result == 512
    kernel.check()
    assert kernel.leftovers() == []


@pytest.mark.parametrize("version", [(6, 16), (7, 3)])
@pytest.mark.parametrize("flags", [R, R | FAIL_IO])
@pytest.mark.parametrize("ended", [False, True])
async def test_quiesce_of_a_server_that_has_only_fetched(version: tuple[int, int], flags: Feature, ended: bool) -> None:
    """It ends the next server's commands, whose tags still count as fetched: the first request is the kernel's oops."""
    kernel = make_kernel(version)
    async with machine(kernel) as m, live(m, depth=2, flags=flags | Feature.QUIESCE) as device:
        kernel.crash_server(0)
        await NextServer(m, device).open()
        device.queue.fetch_all()
        assert await m.command(QUIESCE) == 0
        assert [event.result for event in device.queue.events()] == [-errno.ENODEV] * 2
        if ended:
            assert await m.command(END, data=kernel.server_pid) == 0
        with pytest.raises(SimulatedOopsError, match="a request for a command that has ended"):
            device.disk.submit(IoOp.READ, 0, 512)
        kernel.devices.clear()  # there is no such machine any more


@pytest.mark.parametrize("version", [(6, 16), (7, 3)])
async def test_quiesce_leaves_what_is_on_its_way(version: tuple[int, int]) -> None:
    """QUIESCE_DEV ends idle commands only: one with a request on its way brings it to the server, who may answer."""
    kernel = make_kernel(version)
    async with machine(kernel) as m, live(m, depth=2, flags=R | Feature.QUIESCE) as device:
        bio = device.disk.submit(IoOp.READ, 0, 512)
        assert await m.command(QUIESCE) == 0
        delivered, ended = device.queue.events()
        assert (delivered.result, ended.result) == (0, -errno.ENODEV)
        assert delivered.tag != ended.tag
        device.queue.commit(delivered.tag, 512)
        assert bio.result == 512


async def test_quiesce_does_not_wait_for_an_idle_command() -> None:
    """With every tag at the server there is nobody to tell, and QUIESCE_DEV says 0 all the same, whatever its limit."""
    kernel = make_kernel()
    async with machine(kernel) as m, live(m, depth=1, flags=R | Feature.QUIESCE) as device:
        device.disk.submit(IoOp.READ, 0, 512)
        event = device.queue.event()
        for limit in (0, 1, 1 << 31):
            assert await m.command(QUIESCE, data=limit) == 0
        assert device.queue.events() == []
        device.queue.commit(event.tag, 512)


async def test_quiesce_takes_the_lower_half_of_its_limit() -> None:
    """A limit of 2³² ms is one of 0 ms, and is over: EBUSY. The device is quiesced all the same, with its commands pending."""
    kernel = make_kernel()
    async with machine(kernel) as m, live(m, flags=R | Feature.QUIESCE) as device:
        assert await m.command(QUIESCE, data=1 << 32) == -errno.EBUSY
        assert device.queue.events() == []
        bio = device.disk.submit(IoOp.READ, 0, 512)
        assert device.queue.events() == []
        assert bio.result is None


async def test_stop_after_quiesce() -> None:
    """STOP_DEV of a device that is being quiesced fails what is held, and ends the commands that were parked."""
    kernel = make_kernel()
    async with machine(kernel) as m, live(m, depth=1, flags=R | Feature.QUIESCE) as device:
        device.disk.submit(IoOp.READ, 0, 512)
        event = device.queue.event()
        assert await m.command(QUIESCE) == 0
        device.queue.commit(event.tag, 512)
        held = device.disk.submit(IoOp.READ, 0, 512)
        assert device.queue.events() == []
        assert await m.stop() == 0
        assert held.result == -errno.EIO
        assert device.queue.event().result == -errno.ENODEV


# ---------------------------------------------------------------------- at any moment


@pytest.mark.parametrize("version", [(6, 12), (7, 3)])
@pytest.mark.parametrize("seed", range(12))
async def test_reissue_loses_nothing(version: tuple[int, int], seed: int) -> None:
    """Whenever servers die, every request of a device with REISSUE is answered once, by one that lives."""
    choices = SeededChoices(seed)
    kernel = make_kernel(version, choices=choices)
    async with machine(kernel) as m, live(m, queues=2, depth=2, flags=R | REISSUE) as device:
        bios = [device.disk.submit(IoOp.READ, 512 * i, 512) for i in range(10)]
        for _ in range(choices.choose("lives", 4)):
            for queue in device.queues:
                for event in queue.events()[: choices.choose("answers", 3)]:
                    queue.commit(event.tag, 512)
            kernel.crash_server(0)
            kernel.let_time_pass(30)
            while await m.command(BEGIN):
                pass
            info = device.info
            device.char = await kernel.open_char_device(info, ioctl_encoded=True)
            device.queues = [RawQueue(device.char.open_queue(i, buffers=2)) for i in range(2)]
            for queue in device.queues:
                queue.ring.commit([pack_answer(IoCommand.FETCH_REQ, tag) for tag in range(2)])
            assert await m.command(END, data=kernel.server_pid) == 0
        for _ in range(100):
            for queue in device.queues:
                for event in queue.events():
                    queue.commit(event.tag, 512)
        assert [bio.result for bio in bios] == [512] * 10
    kernel.check()


@VERSIONS
async def test_stop_goes_on_when_the_server_has_answered(version: tuple[int, int]) -> None:
    """STOP_DEV fails what is held as soon as the server has nothing left, also when its last request was a part of an operation."""
    with trio.fail_after(5):
        async with machine(make_kernel(version)) as m, live(m, depth=1, flags=R) as device:
            bio = device.disk.submit(IoOp.READ, 0, 2 * device.info.max_io_buf_bytes)
            event = device.queue.event()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(m.stop)
                await wait_all_tasks_blocked()
                device.queue.commit(event.tag, event.length)
                assert await bio.wait() == -errno.EIO
