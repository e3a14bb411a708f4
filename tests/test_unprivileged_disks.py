"""Disks of ordinary users, on the simulated kernel; the real one's turn is tests/kernel/test_ordinary_users.py."""

from __future__ import annotations

import errno
import math
from unittest import mock

import pytest
import trio
import trio.testing
from trio.testing import MockClock

import ublk_trio.cli.udev
from ublk_trio import (
    Backend,
    DataMode,
    DeviceOptions,
    KernelError,
    Memory,
    Recovery,
    SimKernel,
    UsageError,
    open_target,
)
from ublk_trio.cli.devices import stop_one
from ublk_trio.control import Control, open_control
from ublk_trio.device import ACCESS_SECONDS
from ublk_trio.handlers import Serve
from ublk_trio.kernel_sim.char_device import Node
from ublk_trio.kernel_sim.device import SimDevice
from ublk_trio.uapi import DeviceState, DevInfo, Feature, IoOp
from ublk_trio.workload import Workload, WorkloadReport

MIB = 1 << 20
BLOCK = 4096
UNPRIVILEGED = DeviceOptions(unprivileged=True, max_io_bytes=65536)


def user_kernel(version: tuple[int, int] = (7, 3), **options: object) -> SimKernel:
    return SimKernel(version=version, privileged=False, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", [DataMode.COPY, DataMode.GET_DATA])
@pytest.mark.parametrize("serve", ["inline", "async"])
@pytest.mark.parametrize("version", [(6, 6), (6, 12), (6, 16), (7, 3)])
async def test_serve_resize_list_and_stop(version: tuple[int, int], serve: Serve, mode: DataMode) -> None:
    """An ordinary user's disk lives as root's does: every byte, its size, its description, its end; nothing is left."""
    kernel, backend = user_kernel(version), Memory(MIB)
    options = DeviceOptions(unprivileged=True, serve=serve, mode=mode, queues=2, depth=4, max_io_bytes=65536)
    with trio.fail_after(30):
        async with open_target(kernel) as target:
            device = await target.start_device(backend, options)
            assert Feature.UNPRIVILEGED_DEV in device.info.flags
            report = WorkloadReport(disk=device.path)
            await Workload(seed=1, seconds=30.0, operations=10, region_bytes=65536).run(kernel.block_device(0), report)
            assert report.faults == []
            if version >= (6, 16):
                backend.size = MIB // 2
                await device.update_size()
                assert kernel.block_device(0).size == MIB // 2
            # Another program of the same user's, which has not made it.
            async with open_control(kernel) as control:
                info = await control.device_info(0)
                assert (info.owner_uid, info.state) == (1000, DeviceState.LIVE)
                assert (await control.params(0)).basic is not None
            await target.stop_device(device)
            assert kernel.device_ids() == []
    kernel.check()
    assert kernel.leftovers() == []


async def _stopped_by_others(kernel: SimKernel) -> None:
    async with open_target(kernel) as target:
        device = await target.start_device(Memory(MIB), UNPRIVILEGED)
        async with open_control(kernel) as control, trio.open_nursery() as nursery:
            await control.device_info(0)
            await control.stop_device(0)
            nursery.start_soon(control.delete_device, 0)
            await target.wait_device(device)
    assert kernel.leftovers() == []


@pytest.mark.parametrize("version", [(6, 12), (7, 3)])
async def test_stopped_by_another_program(version: tuple[int, int]) -> None:
    """Another program of the owner's stops and deletes it, as `stop` does."""
    with trio.fail_after(10):
        await _stopped_by_others(user_kernel(version))


async def test_root_stops_it() -> None:
    """Root reaches an unprivileged disk by its path, too."""
    kernel = user_kernel(partition_scan=False)
    with trio.fail_after(10):
        async with open_target(kernel) as target:
            device = await target.start_device(Memory(MIB), UNPRIVILEGED)
            kernel.privileged, kernel.uid, kernel.gid = True, 0, 0
            async with open_control(kernel) as control:
                await control.device_info(0)
                await control.stop_device(0)
            await target.wait_device(device)
    assert kernel.leftovers() == []


async def test_other_users_may_not() -> None:
    """Nobody else's disks can be reached, and the error says whose they are."""
    kernel = user_kernel(partition_scan=False)
    with trio.fail_after(10):
        async with open_target(kernel) as target:
            await target.start_device(Memory(MIB), UNPRIVILEGED)
            kernel.uid = kernel.gid = 1001
            async with open_control(kernel) as control:
                with pytest.raises(KernelError, match="/dev/ublkc0 belongs to another user") as caught:
                    await control.device_info(0)
                assert caught.value.errno == errno.EACCES
            async with open_control(kernel) as control:
                with pytest.raises(KernelError, match="/dev/ublkc0 belongs to another user"):
                    await stop_one(kernel, control, 0, 5, if_unused=False)
            kernel.uid = kernel.gid = 1000


async def test_refused_in_words() -> None:
    """What cannot be is said: not asked for, root's, with recovery, by user copy, too old a kernel."""
    for kernel, options, why in [
        (user_kernel(), DeviceOptions(), "an ordinary user can make an unprivileged one"),
        (SimKernel(), UNPRIVILEGED, "root's disks are never unprivileged"),
        (user_kernel(), DeviceOptions(unprivileged=True, recovery=Recovery.REISSUE), "has no recovery"),
        (user_kernel(), DeviceOptions(unprivileged=True, mode=DataMode.USER_COPY), "cannot have mode user-copy"),
        (user_kernel((6, 2)), UNPRIVILEGED, r"UNPRIVILEGED_DEV, which came with Linux 6\.3"),
    ]:
        async with open_target(kernel) as target:
            with pytest.raises((KernelError, UsageError), match=why):
                await target.start_device(Memory(MIB), options)
        assert kernel.leftovers() == []


@pytest.mark.parametrize("seconds", [5.0, ACCESS_SECONDS + 10])
def test_waits_for_udev(seconds: float) -> None:
    """The node is root's until udev has given it away: that is waited for, but not for ever, and then said."""
    add_device = Control.add_device
    in_time = seconds < ACCESS_SECONDS
    kernel = user_kernel(partition_scan=False)

    async def give(device: SimDevice, node: Node) -> None:
        await trio.sleep(seconds)
        device.node = node

    async def main() -> None:
        async with trio.open_nursery() as udev:

            async def add(control: Control, info: DevInfo) -> DevInfo:
                added = await add_device(control, info)
                device = kernel.devices[added.dev_id]
                mine, device.node = device.node, Node(uid=0, gid=0)
                udev.start_soon(give, device, mine)
                return added

            async with open_target(kernel) as target:
                begin = trio.current_time()
                with mock.patch.object(Control, "add_device", add):
                    if in_time:
                        await target.start_device(Memory(MIB), UNPRIVILEGED)
                    else:
                        with pytest.raises(KernelError, match=r"install the udev rule.*ublk-trio stop 0"):
                            await target.start_device(Memory(MIB), UNPRIVILEGED)
                assert trio.current_time() - begin == pytest.approx(min(seconds, ACCESS_SECONDS), abs=0.2)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert kernel.leftovers() == ([] if in_time else ["device 0: DEAD"])


@pytest.mark.parametrize("seconds", [5.0, ACCESS_SECONDS + 10])
@pytest.mark.parametrize("cancelled_after", [1.0, math.inf])
async def test_waits_for_the_disk_s_own_node(autojump_clock: MockClock, seconds: float, cancelled_after: float) -> None:
    """A start returns when its user may use the disk: udev gives that node away later than the char device's. Nothing is left."""
    begin, kernel = trio.current_time(), user_kernel(partition_scan=False)
    live = False

    def usable(_kernel: SimKernel, _dev_id: int) -> bool:
        return trio.current_time() - begin >= seconds

    with mock.patch.object(SimKernel, "disk_usable", usable):
        async with open_target(kernel) as target:
            with trio.move_on_after(cancelled_after):
                if seconds < ACCESS_SECONDS:
                    await target.start_device(Memory(MIB), UNPRIVILEGED)
                    live = True
                else:
                    with pytest.raises(
                        KernelError, match=r"/dev/ublkb0 was not given to this user .* is stopped again"
                    ):
                        await target.start_device(Memory(MIB), UNPRIVILEGED)
            took = trio.current_time() - begin
    assert took == pytest.approx(min(seconds, ACCESS_SECONDS, cancelled_after), abs=0.2)
    assert live is (seconds < min(ACCESS_SECONDS, cancelled_after))
    assert kernel.leftovers() == []


async def test_stopped_while_its_own_node_is_awaited(autojump_clock: MockClock) -> None:
    """Whoever stops a disk that its user may not open yet ends the start, at once."""
    kernel = user_kernel(partition_scan=False)

    async def stop_it() -> None:
        await trio.sleep(1)
        async with open_control(kernel) as control:
            await control.device_info(0)
            await control.stop_device(0)

    with mock.patch.object(SimKernel, "disk_usable", return_value=False):
        async with open_target(kernel) as target, trio.open_nursery() as nursery:
            nursery.start_soon(stop_it)
            begin = trio.current_time()
            with pytest.raises(KernelError, match="device 0 was stopped while it was starting"):
                await target.start_device(Memory(MIB), UNPRIVILEGED)
            assert trio.current_time() - begin < 2
    assert kernel.leftovers() == []


async def test_cancelled_while_udev_is_awaited(caplog: pytest.LogCaptureFixture) -> None:
    """What a user may not use they may not delete: a start that is given up then says so, and is cancelled as asked."""
    add_device = Control.add_device
    kernel = user_kernel(partition_scan=False)

    async def add(control: Control, info: DevInfo) -> DevInfo:
        added = await add_device(control, info)
        kernel.devices[added.dev_id].node = Node(uid=0, gid=0)
        return added

    with trio.fail_after(10), mock.patch.object(Control, "add_device", add):
        async with open_target(kernel) as target:
            with trio.move_on_after(0.2) as scope:
                await target.start_device(Memory(MIB), UNPRIVILEGED)
            assert scope.cancelled_caught
    assert "device 0 is left for root to remove" in caplog.text
    assert kernel.leftovers() == ["device 0: DEAD"]


class Hangs(Backend):
    """Answers nothing."""

    size = MIB

    async def read(self, offset: int, buffer: memoryview) -> None:
        await trio.sleep_forever()


async def test_kernel_kills_a_server_that_does_not_answer() -> None:
    """After 30 seconds without an answer the driver ends the server: requests fail, and the target gets over it."""
    kernel = user_kernel(partition_scan=False)
    with trio.fail_after(60):
        async with open_target(kernel) as target:
            device = await target.start_device(Hangs(), DeviceOptions(unprivileged=True, grace_seconds=0.1))
            bio = kernel.block_device(0).submit(IoOp.READ, 0, BLOCK)
            await trio.testing.wait_all_tasks_blocked()
            kernel.let_time_pass(31.0)
            assert await bio.wait() == -errno.EIO
            await target.stop_device(device)
    assert kernel.leftovers() == []


async def test_planted_bugs_are_caught() -> None:
    """A command that forgets the path is noticed: the kernel refuses it."""
    for method, command in (("stop_device", "STOP_DEV"), ("delete_device", "DEL_DEV")):
        plant = mock.patch.object(Control, method, _forgetting(getattr(Control, method)))
        with plant, pytest.raises(KernelError, match=f"refused {command} .* EINVAL"), trio.fail_after(20):
            await _stopped_by_others(user_kernel())


def _forgetting(command: object) -> object:
    async def forget(control: Control, dev_id: int) -> None:
        known, control._unprivileged = control._unprivileged, set()
        try:
            await command(control, dev_id)  # type: ignore[operator]
        finally:
            control._unprivileged = known

    return forget


def test_rule() -> None:
    """The rule gives nodes away by a program of this installation, and leaves those of root's disks alone."""
    lines = ublk_trio.cli.udev.rule().splitlines()
    assert lines[1].startswith('KERNEL=="ublk-control", MODE="0666"')
    program = lines[2].split('PROGRAM="')[1].split('"')[0].split()
    assert program[:1] == ["/usr/bin/env"]
    assert program[-4:] == ["-m", "ublk_trio", "node-owner", "%k"]
    # What stands behind the program counts only when it exits with 0.
    assert lines[2].index("PROGRAM") < lines[2].index("OWNER") < lines[2].index("MODE")
