"""Failures of control commands that no server causes, and commands with addresses of a process's own."""

from __future__ import annotations

import errno

import attrs
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.sim.mini import Machine, basic_params, live, machine, opened
from ublk_trio.kernel_sim import DrawnChoices, SimKernel
from ublk_trio.kernel_sim.call import Call, Identity
from ublk_trio.kernel_sim.control import execute
from ublk_trio.kernel_sim.control_faults import CONTROL_FAULTS
from ublk_trio.kernel_sim.linux_errno import ENOTSUPP
from ublk_trio.uapi import ControlCommand, DeviceState, DevInfo, Feature, Params

INFO = DevInfo(dev_id=0, nr_hw_queues=1, queue_depth=1, max_io_buf_bytes=65536)


def failing_kernel(point: str) -> SimKernel:
    kernel = SimKernel(DrawnChoices(lambda what, options: int(what in CONTROL_FAULTS)), partition_scan=False)
    kernel.control_faults = frozenset({point})
    return kernel


async def meet(m: Machine, point: str) -> int:
    """Send the command that the point belongs to; everything before it is in order."""
    match point.split()[0]:
        case "ADD_DEV":
            return await m.command(ControlCommand.ADD_DEV, buffer=bytearray(INFO.pack()))
        case "GET_FEATURES":
            return await m.command(ControlCommand.GET_FEATURES, buffer=bytearray(8))
        case "START_DEV":
            async with opened(m) as device:
                device.queue.fetch_all()
                return await m.start()
        case "END_USER_RECOVERY" | "QUIESCE_DEV" as name:
            async with live(m, flags=Feature.USER_RECOVERY | Feature.QUIESCE):
                return await m.command(ControlCommand[name])
        case "DEL_DEV":
            async with opened(m):
                result = await m.delete()
            m.kernel.control_faults = frozenset()
            return result
    await m.add()
    match point.split()[0]:
        case "SET_PARAMS":
            return await m.set_params(0, basic_params())
        case "GET_PARAMS":
            return await m.command(ControlCommand.GET_PARAMS, buffer=bytearray(Params.query()))
        case "GET_DEV_INFO":
            return await m.command(ControlCommand.GET_DEV_INFO, buffer=bytearray(64))
        case "GET_QUEUE_AFFINITY":
            return await m.command(ControlCommand.GET_QUEUE_AFFINITY, buffer=bytearray(8))
        case "path":
            buffer = bytearray(b"/dev/ublkc0\0" + bytes(64))
            return await m.control.submit(ControlCommand.GET_DEV_INFO2, dev_id=0, buffer=buffer, dev_path_length=12)
        case other:
            raise AssertionError(other)


@pytest.mark.parametrize("point", CONTROL_FAULTS)
async def test_every_point_fails_when_choices_may(point: str) -> None:
    """A command fails where it was chosen to, with that point's errno."""
    kernel = failing_kernel(point)
    async with machine(kernel) as m, trio.open_nursery() as nursery:
        results: list[int] = []

        async def run() -> None:
            results.append(await meet(m, point))

        nursery.start_soon(run)
        await wait_all_tasks_blocked()
        assert results == [-CONTROL_FAULTS[point]]


async def test_no_fault_without_permission() -> None:
    """Choices that would fail everything are not even asked."""
    choices = DrawnChoices(lambda what, options: int(what in CONTROL_FAULTS))
    async with machine(SimKernel(choices, partition_scan=False)) as m, live(m):
        pass
    assert not {choice.what for choice in choices.trace} & set(CONTROL_FAULTS)


async def test_failures_leave_nothing_behind() -> None:
    """A device that could not be added, or started, is as it was."""
    kernel = failing_kernel("ADD_DEV copy-out")
    async with machine(kernel) as m:
        assert await m.command(ControlCommand.ADD_DEV, buffer=bytearray(INFO.pack())) == -errno.EFAULT
        assert kernel.device_ids() == []
        kernel.control_faults = frozenset({"START_DEV allocate"})
        async with opened(m) as device:
            device.queue.fetch_all()
            assert await m.start() == -errno.ENOMEM
            assert (await m.info()).state is DeviceState.DEAD
            kernel.control_faults = frozenset({"SET_PARAMS copy-in"})
            assert await m.set_params(0, basic_params()) == -errno.EFAULT
            kernel.control_faults = frozenset()
            # 7.3 forgets what it had, 6.12 would not.
            assert await m.start() == -errno.EINVAL
            assert await m.set_params(0, basic_params()) == 0
            assert await m.start() == 0
    assert kernel.leftovers() == []


# ---------------------------------------------------------------------- addresses

BASE = 0x10000


class OneMapping:
    """An address space with one mapping."""

    def __init__(self, content: bytes) -> None:
        self.content = bytearray(content)

    def view(self, address: int, length: int) -> memoryview | None:
        start = address - BASE
        if start < 0 or start + length > len(self.content):
            return None
        return memoryview(self.content)[start : start + length]


def run(kernel: SimKernel, call: Call) -> int:
    results: list[int] = []
    kernel.run("test", execute(kernel, call), on_done=results.append)
    (result,) = results
    return result


ROOT = Identity(pid=77)


def call(command: int, memory: OneMapping, address: int, length: int, **more: object) -> Call:
    given = {"caller": ROOT} | more
    return Call(
        command=command, dev_id=0, memory=memory, address=address, length=length, **given  # type: ignore[arg-type]
    )  # fmt: skip


def test_addresses() -> None:
    """A command with an address works on the caller's memory: 0 is none (EINVAL), and what is not mapped is EFAULT."""
    kernel = SimKernel()
    memory = OneMapping(INFO.pack() + bytes(64))
    add = ControlCommand.ADD_DEV
    assert run(kernel, call(add, memory, 0, 64)) == -errno.EINVAL
    assert run(kernel, call(add, memory, 1, 64)) == -errno.EFAULT
    assert run(kernel, call(add, memory, BASE + 65, 64)) == -errno.EFAULT
    assert run(kernel, call(add, memory, BASE, 64)) == 0
    assert DevInfo.unpack(memory.content[:64]).ublksrv_pid == -1
    info = ControlCommand.GET_DEV_INFO
    assert run(kernel, call(info, memory, BASE + 64, 64)) == 0
    assert DevInfo.unpack(memory.content[64:]) == kernel.devices[0].info
    assert run(kernel, call(info, memory, BASE + 65, 64)) == -errno.EFAULT
    params = OneMapping(basic_params().pack())
    assert run(kernel, call(ControlCommand.SET_PARAMS, params, BASE, 152)) == 0
    assert run(kernel, call(ControlCommand.SET_PARAMS, params, 8, 152)) == -errno.EFAULT
    # The header can be read, the rest cannot.
    params.content = params.content[:100]
    assert run(kernel, call(ControlCommand.SET_PARAMS, params, BASE, 152)) == -errno.EFAULT
    assert run(kernel, call(ControlCommand.GET_PARAMS, params, BASE, 152)) == -errno.EFAULT
    assert run(kernel, call(ControlCommand.GET_QUEUE_AFFINITY, params, 8, 8)) == -errno.EFAULT
    assert run(kernel, call(ControlCommand.GET_FEATURES, params, 8, 8)) == -errno.EFAULT


def test_opcodes() -> None:
    """A type that is neither 'u' nor 0 is EOPNOTSUPP before anything else; GET_FEATURES must be whole."""
    kernel = SimKernel()
    memory = OneMapping(bytes(8))
    stop, features = ControlCommand.STOP_DEV, ControlCommand.GET_FEATURES
    assert run(kernel, call(stop, memory, 0, 0, opcode_type=1)) == -errno.EOPNOTSUPP
    assert run(kernel, call(stop, memory, 0, 0, opcode_type=0)) == -errno.ENODEV
    assert run(kernel, call(features, memory, BASE, 8)) == 0
    for broken in ({"opcode_type": 0}, {"exact_opcode": False}):
        assert run(kernel, call(features, memory, BASE, 8, **broken)) == -errno.ENODEV
    assert run(kernel, call(ControlCommand.ADD_DEV, OneMapping(INFO.pack()), BASE, 64)) == 0
    for broken in ({"opcode_type": 0}, {"exact_opcode": False}):
        assert run(kernel, call(features, memory, BASE, 8, **broken)) == -errno.EOPNOTSUPP


def test_without_legacy_opcodes_no_plain_number_is_understood() -> None:
    """EOPNOTSUPP, before the device is looked for, whatever the command's age."""
    kernel = SimKernel(legacy_opcodes=False)
    for command in (ControlCommand.GET_DEV_INFO2, ControlCommand.DEL_DEV_ASYNC):
        assert run(kernel, call(command, OneMapping(bytes(8)), BASE, 8, opcode_type=0)) == -errno.EOPNOTSUPP
        assert run(kernel, call(command, OneMapping(bytes(8)), BASE, 8)) == -errno.ENODEV


def test_a_plain_get_features_is_a_command_for_a_device() -> None:
    """A user's device wants its path, then, as for every command, and does not know it."""
    kernel = SimKernel(privileged=False)
    added = OneMapping(attrs.evolve(INFO, flags=Feature.UNPRIVILEGED_DEV).pack())
    user = {"caller": kernel.identity, "opcode_type": 0}
    assert run(kernel, call(ControlCommand.ADD_DEV, added, BASE, 64, **user)) == 0
    memory = OneMapping(b"/dev/ublkc0\0" + bytes(8))
    features = ControlCommand.GET_FEATURES
    assert run(kernel, call(features, memory, BASE, 20, dev_path_length=12, **user)) == -errno.EOPNOTSUPP
    assert run(kernel, call(features, memory, BASE, 20, **user)) == -errno.EINVAL


def test_before_6_4_no_type_is_looked_at() -> None:
    """An opcode of whatever type is one more number that nobody knows: ENODEV, as for any without a device."""
    kernel = SimKernel(version=(6, 1))
    assert run(kernel, call(ControlCommand.STOP_DEV, OneMapping(b""), 0, 0, opcode_type=1)) == -errno.ENODEV


def test_before_6_3_get_dev_info2_is_unknown() -> None:
    """To a device that there is it is like any other number; nothing asks for a path."""
    kernel = SimKernel(version=(6, 1))
    assert run(kernel, call(ControlCommand.ADD_DEV, OneMapping(INFO.pack()), BASE, 64, opcode_type=0)) == 0
    info2 = call(ControlCommand.GET_DEV_INFO2, OneMapping(bytes(64)), BASE, 64, opcode_type=0)
    assert run(kernel, info2) == -errno.EOPNOTSUPP


@pytest.mark.parametrize(
    ("version", "result"),
    [
        ((6, 5), -ENOTSUPP),
        ((6, 6), -errno.EOPNOTSUPP),
        ((6, 11), -ENOTSUPP),
        ((6, 12), -errno.EOPNOTSUPP),
        ((6, 13), -ENOTSUPP),
        ((6, 14), -errno.EOPNOTSUPP),
    ],
)
def test_what_an_unknown_command_gets(version: tuple[int, int], result: int) -> None:
    """524 before 6.14, but in long-term series EOPNOTSUPP."""
    kernel = SimKernel(version=version)
    assert run(kernel, call(ControlCommand.ADD_DEV, OneMapping(INFO.pack()), BASE, 64)) == 0
    assert run(kernel, call(0x7F, OneMapping(b""), 0, 0)) == result


def test_missing_devices_before_6_3() -> None:
    """To 6.2 each command looked for its device itself, and said EINVAL; DEL_DEV said ENODEV."""
    kernel = SimKernel(version=(6, 1))
    for command, result in (
        (ControlCommand.STOP_DEV, -errno.EINVAL),
        (ControlCommand.START_USER_RECOVERY, -errno.EINVAL),
        (ControlCommand.GET_DEV_INFO, -errno.EINVAL),
        (ControlCommand.DEL_DEV, -errno.ENODEV),
        (0x7F, -errno.ENODEV),
    ):
        assert run(kernel, call(command, OneMapping(bytes(64)), BASE, 64, opcode_type=0)) == result


@pytest.mark.parametrize(
    ("data", "result"), [(77, 0), (77 | 1 << 32, 0), (1 << 31, -errno.EINVAL), (78, -errno.EINVAL)]
)
async def test_pid_is_the_lower_half_of_the_data(data: int, result: int) -> None:
    """The driver takes an int of the data word: what stands above it is not seen."""
    kernel = SimKernel(partition_scan=False)
    kernel.server_pid = 77
    async with machine(kernel) as m, opened(m) as device:
        device.queue.fetch_all()
        assert await m.command(ControlCommand.START_DEV, data=data) == result


async def test_a_wait_that_is_none_cannot_be_interrupted() -> None:
    """DEL_DEV of a device that nobody uses has nothing to wait for, and so passes."""
    kernel = failing_kernel("DEL_DEV wait")
    async with machine(kernel) as m:
        await m.add()
        assert await m.delete() == 0
