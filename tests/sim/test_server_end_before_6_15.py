"""Older releases learn of a server's end when one of its idle commands is cancelled, or from a request's timeout."""

from __future__ import annotations

import errno

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.sim.mini import RawQueue, basic_params, live, machine, opened
from tests.sim.raw import COMMIT, FETCH, raw_server
from ublk_trio.errors import KernelError
from ublk_trio.kernel_sim import DrawnChoices, SimKernel
from ublk_trio.kernel_sim.uring import SimUring
from ublk_trio.uapi import ControlCommand, DeviceState, Feature, IoOp

R, REISSUE = Feature.USER_RECOVERY, Feature.USER_RECOVERY_REISSUE


def old_kernel() -> SimKernel:
    return SimKernel(version=(6, 12), partition_scan=False)


async def test_a_ring_with_an_idle_command_tells() -> None:
    """The exit of a queue's ring fails what its server had, at once, and removes the disk; the char device may stay open."""
    kernel = old_kernel()
    async with machine(kernel) as m, live(m, depth=2) as device:
        owned = device.disk.submit(IoOp.READ, 0, 512)
        device.queue.events()
        device.queue.ring.close()
        assert owned.result == -errno.EIO
        assert not device.disk.exists
        assert (await m.info()).state is DeviceState.DEAD


async def test_nobody_misses_a_busy_server_of_a_live_process() -> None:
    """With every tag at the server there is no command to cancel: its requests hang, for ever if its process lives."""
    kernel = old_kernel()
    async with machine(kernel) as m, live(m, depth=1) as device, trio.open_nursery() as nursery:
        bio = device.disk.submit(IoOp.READ, 0, 512)
        device.queue.events()
        device.close()
        kernel.let_time_pass(3600)
        assert not bio.done
        assert (await m.info()).state is DeviceState.LIVE
        nursery.start_soon(m.stop)
        await wait_all_tasks_blocked()
        assert kernel.held_commands() == ["STOP_DEV of device 0, waiting for 1 operations on /dev/ublkb0"]
        kernel.crash_server(0)
        kernel.let_time_pass(30)
        await wait_all_tasks_blocked()
        assert bio.result == -errno.EIO
        assert kernel.held_commands() == []


@pytest.mark.parametrize(
    ("flags", "result", "state"),
    [
        (Feature(0), -errno.EIO, DeviceState.DEAD),
        (R, -errno.EIO, DeviceState.QUIESCED),
        (R | REISSUE, None, DeviceState.QUIESCED),
    ],
)
async def test_a_busy_servers_death_is_found_out_by_the_timeout(
    flags: Feature, result: int | None, state: DeviceState
) -> None:
    """30 s after a request began to wait its timer finds the server's process dead, and no command pending."""
    kernel = old_kernel()
    async with machine(kernel) as m, live(m, depth=1, flags=flags) as device:
        bio = device.disk.submit(IoOp.READ, 0, 512)
        device.queue.events()
        kernel.let_time_pass(20)
        kernel.crash_server(0)
        assert (await m.info()).state is DeviceState.LIVE
        kernel.let_time_pass(9.9)
        assert (await m.info()).state is DeviceState.LIVE
        kernel.let_time_pass(0.1)
        assert bio.result == result
        assert (await m.info()).state is state
    assert kernel.leftovers() == []


async def test_two_queues_one_busy() -> None:
    """One queue's idle command tells of the other's death, too, but the other's requests still wait for their timeout."""
    kernel = old_kernel()
    async with machine(kernel) as m, live(m, queues=2, depth=1, flags=R) as device:
        bio = device.disk.submit(IoOp.READ, 0, 512)
        assert len(device.queues[0].events()) == 1
        kernel.crash_server(0)
        assert kernel.held_commands() == [
            "end of the server of device 0, waiting for the requests that the server of device 0 has"
        ]
        assert (await m.info()).state is DeviceState.LIVE
        kernel.let_time_pass(30)
        assert bio.result == -errno.EIO
        assert (await m.info()).state is DeviceState.QUIESCED


async def test_fail_io_is_for_all_queues() -> None:
    """When one queue's ring tells that the server goes, every queue fails what comes, also one whose server still works."""
    kernel = SimKernel(version=(6, 14), partition_scan=False)
    async with machine(kernel) as m, live(m, queues=2, depth=1, flags=R | Feature.USER_RECOVERY_FAIL_IO) as device:
        device.queues[1].ring.close()
        assert (await m.info()).state is DeviceState.FAIL_IO
        bios = [device.disk.submit(IoOp.READ, 4096 * number, 512) for number in range(4)]
        assert [bio.result for bio in bios] == [-errno.EREMOTEIO] * 4


def test_a_server_ends_once() -> None:
    """A queue's second ring tells nothing new; while the end waits for another queue's requests, what comes there is held."""
    kernel = old_kernel()
    server = raw_server(kernel, queues=2, flags=R, live=False)
    rings = [SimUring(server.tasks[1]) for _ in range(2)]
    for tag, ring in enumerate(rings):
        server.ring.submit([server.io_sqe(FETCH, tag)])
        ring.submit([server.io_sqe(FETCH, tag, queue=1)])
    assert server.control.start() == 0
    owned = server.disk.submit(IoOp.READ, 0, 512)
    tag = server.delivered().user_data
    rings[0].close()
    held = ["end of the server of device 0, waiting for the requests that the server of device 0 has"]
    assert kernel.held_commands() == held
    rings[1].close()
    assert kernel.held_commands() == held
    # Two, because the block layer may give each queue one of them.
    late = [server.disk.submit(IoOp.READ, 4096 * number, 512) for number in (1, 2)]
    assert server.ring.reap() == []
    server.commit(tag, 512)
    assert owned.result == 512
    assert not any(bio.done for bio in late)
    assert kernel.held_commands() == []


def test_the_end_of_one_ring_leaves_what_is_on_its_way_to_another() -> None:
    """A queue's second ring still brings its request to the server, who may answer: only what was delivered has failed."""
    server = raw_server(old_kernel(), depth=3, live=False)
    rings = [server.ring, SimUring(server.tasks[0])]
    for tag in range(3):
        rings[tag % 2].submit([server.io_sqe(FETCH, tag)])
    assert server.control.start() == 0
    # On tags 0 and 1; 2 stays idle.
    bios = [server.disk.submit(IoOp.READ, 4096 * number, 512) for number in range(2)]
    assert server.delivered(rings[0]).user_data == 0
    rings[0].close()
    assert [bio.result for bio in bios] == [-errno.EIO, None]
    assert server.delivered(rings[1]).result == 0
    assert server.disk.exists
    # Nothing is left then: the disk goes, and the answer's own command ends with the server's idle ones.
    assert server.io(COMMIT, 1, result=512, ring=rings[1]) == -errno.ENODEV
    assert bios[1].result == 512
    assert not server.disk.exists


async def test_the_end_of_one_ring_ends_the_others_commands() -> None:
    """When one queue's ring tells that the server goes, the idle commands of the others end with ABORT."""
    kernel = old_kernel()
    async with machine(kernel) as m, live(m, queues=2, depth=2) as device:
        device.queues[0].ring.close()
        assert [event.result for event in device.queues[1].events()] == [-errno.ENODEV] * 2


async def test_without_a_disk_no_ring_tells() -> None:
    """Before START_DEV one ring's exit is nobody else's business."""
    kernel = old_kernel()
    async with machine(kernel) as m, opened(m, queues=2, depth=2) as device:
        for queue in device.queues:
            queue.fetch_all()
        device.queues[0].ring.close()
        assert device.queues[1].events() == []


async def test_the_last_close_resets_nothing() -> None:
    """A new server cannot fetch the tags of a device that was stopped, and START_DEV passes without them."""
    kernel = old_kernel()
    async with machine(kernel) as m, live(m) as device:
        await m.stop()
        device.close()
        assert await m.set_params(0, basic_params()) == 0
        device.char = await kernel.open_char_device(device.info, ioctl_encoded=True)
        device.queues = [RawQueue(device.char.open_queue(0, buffers=4))]
        device.queue.fetch_all()
        assert [event.result < 0 for event in device.queue.events()] == [True] * 4
        assert await m.start() == 0
        # It is a disk that serves nothing.
        assert device.disk.submit(IoOp.READ, 0, 512).result == -errno.EIO


async def test_start_passes_after_the_servers_death() -> None:
    """Once all tags were fetched START_DEV never waits again, server or none; a disk with nobody behind it fails everything."""
    kernel = old_kernel()
    async with machine(kernel) as m, live(m) as device:
        kernel.crash_server(0)
        assert await m.start() == 0
        assert device.disk.submit(IoOp.READ, 0, 512).result == -errno.EIO
        assert await m.stop() == 0


async def test_end_of_recovery_without_a_beginning() -> None:
    """END_USER_RECOVERY without START_USER_RECOVERY makes a device LIVE whose requests are held for a server that never comes."""
    kernel = old_kernel()
    async with machine(kernel) as m, live(m, flags=R) as device:
        kernel.crash_server(0)
        bio = device.disk.submit(IoOp.READ, 0, 512)
        assert await m.command(ControlCommand.END_USER_RECOVERY, data=-5 & (1 << 64) - 1) == 0
        info = await m.info()
        assert (info.state, info.ublksrv_pid) == (DeviceState.LIVE, -5)
        assert bio.result is None
        assert await m.stop() == 0
        assert bio.result == -errno.EIO


async def test_recovery_begins_once() -> None:
    """A second START_USER_RECOVERY has no server to forget: EINVAL; it is EBUSY while the char device is open."""
    kernel = old_kernel()
    async with machine(kernel) as m, live(m, depth=2, flags=R) as device:
        device.queue.ring.close()
        assert (await m.info()).state is DeviceState.QUIESCED
        assert await m.command(ControlCommand.START_USER_RECOVERY) == -errno.EBUSY
        device.char.close()
        assert await m.command(ControlCommand.START_USER_RECOVERY) == 0
        assert await m.command(ControlCommand.START_USER_RECOVERY) == -errno.EINVAL


async def test_a_stopped_recoverable_device_never_serves_again() -> None:
    """STOP_DEV leaves the queues of a device with recovery failing, whatever is done with them later."""
    kernel = old_kernel()
    async with machine(kernel) as m, live(m, flags=R) as device:
        assert await m.stop() == 0
        device.close()
        assert await m.start() == 0
        assert device.disk.submit(IoOp.READ, 0, 512).result == -errno.EIO
        assert await m.command(ControlCommand.START_USER_RECOVERY) == -errno.EBUSY


async def test_a_device_that_was_stopped_in_its_recovery_never_serves_again() -> None:
    """The same when its next server had not fetched yet: that one's tags are taken, its disk fails everything."""
    kernel = old_kernel()
    async with machine(kernel) as m, live(m, flags=R) as device:
        kernel.crash_server(0)
        assert await m.command(ControlCommand.START_USER_RECOVERY) == 0
        assert await m.stop() == 0
        device.char = await kernel.open_char_device(device.info, ioctl_encoded=True)
        device.queues = [RawQueue(device.char.open_queue(0, buffers=4))]
        device.queue.fetch_all()
        assert device.queue.events() == []
        assert await m.start() == 0
        assert device.disk.submit(IoOp.READ, 0, 512).result == -errno.EIO


async def test_reissue_alone_is_no_recovery() -> None:
    """ADD_DEV to 6.12 takes USER_RECOVERY_REISSUE without USER_RECOVERY, and it means nothing: what the server had fails."""
    kernel = old_kernel()
    async with machine(kernel) as m, live(m, depth=2, flags=REISSUE) as device:
        assert device.info.flags & REISSUE
        bio = device.disk.submit(IoOp.READ, 0, 512)
        device.queue.events()
        kernel.crash_server(0)
        assert bio.result == -errno.EIO
        assert (await m.info()).state is DeviceState.DEAD


async def test_in_between_a_stopped_device_keeps_its_tags() -> None:
    """On 6.16 the last close is the server's end, but where there is no disk any more it resets nothing."""
    kernel = SimKernel(version=(6, 16), partition_scan=False)
    async with machine(kernel) as m, live(m) as device:
        await m.stop()
        device.close()
        char = await kernel.open_char_device(device.info, ioctl_encoded=True)
        queue = RawQueue(char.open_queue(0, buffers=4))
        queue.fetch_all()
        assert [event.result < 0 for event in queue.events()] == [True] * 4
        queue.ring.close()
        char.close()


async def test_an_old_device_is_open_again_at_once() -> None:
    """There is no work after the last close of the char device that an opener could meet, however late it may be."""
    choices = DrawnChoices(lambda what, options: options - 1 if what == "release-late" else 0)
    kernel = SimKernel(choices, version=(6, 12), partition_scan=False)
    async with machine(kernel) as m:
        info = await m.add()
        for _ in range(2):
            char = await kernel.open_char_device(info, ioctl_encoded=True)
            with pytest.raises(KernelError):
                await kernel.open_char_device(info, ioctl_encoded=True)
            char.close()
