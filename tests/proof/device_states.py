"""The simulator's devices, covered: every control command in every state of a device.

An operator without any sense sends control commands at random, while a server comes and goes and an application has requests in
flight. One command at a time: one that waits gets first the answers, then the ends that it may wait for, and at last is interrupted.

A state joins with recovery: once the simulator offers USER_RECOVERY, the table has QUIESCED and FAIL_IO, and they must be reached. A
command joins with its release: once `version.COMMAND_RELEASE` has it, `CALLS` must say how to send it.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import attrs
import trio
from trio.testing import wait_all_tasks_blocked

from tests.proof.coverage_table import Table
from tests.sim.mini import RawQueue, basic_params, machine
from ublk_trio.errors import KernelError
from ublk_trio.kernel_sim import FirstChoice, SimKernel, scheduled_by
from ublk_trio.kernel_sim.ring import SimCharDevice
from ublk_trio.kernel_sim.version import COMMAND_RELEASE, MODELLED
from ublk_trio.uapi import ControlCommand, DeviceState, DevInfo, Feature, IoOp, Params

SEEDS = range(120)
STEPS = 60
DEV_ID = 0
DEPTH = 2
BLOCK = 512


class State(enum.Enum):
    """A device's states, and no device at all."""

    ABSENT = "absent"
    DEAD = "dead"
    LIVE = "live"
    QUIESCED = "quiesced"
    FAIL_IO = "fail_io"


assert {state.name for state in State} == {"ABSENT", *(state.name for state in DeviceState)}

#: What a device may have; what the simulator does not offer, ADD_DEV drops.
RECOVERY = (
    Feature(0),
    Feature.USER_RECOVERY,
    Feature.USER_RECOVERY | Feature.USER_RECOVERY_REISSUE,
    Feature.USER_RECOVERY | Feature.USER_RECOVERY_FAIL_IO,
)

_AT_ONCE = {State.ABSENT, State.DEAD, State.LIVE}
_RECOVERING = set(State) - _AT_ONCE
_PRESENT = set(State) - {State.ABSENT}
_WITH_DISK = _PRESENT - {State.DEAD}

#: The states in which each command can succeed.
LEGAL = MappingProxyType(
    {
        ControlCommand.GET_QUEUE_AFFINITY: _PRESENT,
        ControlCommand.GET_DEV_INFO: _PRESENT,
        ControlCommand.ADD_DEV: {State.ABSENT},
        ControlCommand.DEL_DEV: _PRESENT,
        ControlCommand.START_DEV: {State.DEAD},
        ControlCommand.STOP_DEV: _PRESENT,
        ControlCommand.SET_PARAMS: {State.DEAD},
        ControlCommand.GET_PARAMS: _PRESENT,
        ControlCommand.START_USER_RECOVERY: _RECOVERING,
        ControlCommand.END_USER_RECOVERY: _RECOVERING,
        ControlCommand.GET_DEV_INFO2: _PRESENT,
        ControlCommand.GET_FEATURES: set(State),
        ControlCommand.DEL_DEV_ASYNC: _PRESENT,
        ControlCommand.UPDATE_SIZE: _WITH_DISK,
        ControlCommand.QUIESCE_DEV: _WITH_DISK,
        ControlCommand.TRY_STOP_DEV: _WITH_DISK,
        ControlCommand.REG_BUF: _PRESENT,
        ControlCommand.UNREG_BUF: _PRESENT,
    }
)


def _add(generator: random.Random) -> dict[str, Any]:
    flags = generator.choice(RECOVERY)
    if flags and generator.randrange(2):
        flags |= Feature.QUIESCE
    info = DevInfo(dev_id=DEV_ID, nr_hw_queues=1, queue_depth=DEPTH, max_io_buf_bytes=64 << 10, flags=flags)
    return {"buffer": bytearray(info.pack())}


def _info2(generator: random.Random) -> dict[str, Any]:
    path = f"/dev/ublkc{DEV_ID}".encode().ljust(16, b"\0")
    return {"buffer": bytearray(path + bytes(64)), "dev_path_length": len(path)}


#: How to send each command that the simulator knows so that nothing but the state can be wrong with it.
CALLS: MappingProxyType[ControlCommand, Callable[[random.Random], dict[str, Any]]] = MappingProxyType(
    {
        ControlCommand.GET_QUEUE_AFFINITY: lambda generator: {"buffer": bytearray(8)},
        ControlCommand.GET_DEV_INFO: lambda generator: {"buffer": bytearray(64)},
        ControlCommand.ADD_DEV: _add,
        ControlCommand.DEL_DEV: lambda generator: {},
        ControlCommand.START_DEV: lambda generator: {"data": SERVER_PID},
        ControlCommand.STOP_DEV: lambda generator: {},
        ControlCommand.SET_PARAMS: lambda generator: {"buffer": bytearray(basic_params().pack())},
        ControlCommand.GET_PARAMS: lambda generator: {"buffer": bytearray(Params.query())},
        ControlCommand.START_USER_RECOVERY: lambda generator: {},
        ControlCommand.END_USER_RECOVERY: lambda generator: {"data": SERVER_PID},
        ControlCommand.GET_DEV_INFO2: _info2,
        ControlCommand.GET_FEATURES: lambda generator: {"buffer": bytearray(8)},
        ControlCommand.DEL_DEV_ASYNC: lambda generator: {},
        ControlCommand.UPDATE_SIZE: lambda generator: {"data": 1 << 11},
        ControlCommand.QUIESCE_DEV: lambda generator: {"data": 100},
        ControlCommand.TRY_STOP_DEV: lambda generator: {},
    }
)
SERVER_PID = 1000


def table() -> Table[ControlCommand, State]:
    """The table, empty, as far as the simulator has states and commands."""
    states = [state for state in State if state in _AT_ONCE or Feature.USER_RECOVERY & MODELLED]
    legal = {(command, state) for command in COMMAND_RELEASE for state in LEGAL[command]}
    return Table(rows=sorted(ControlCommand), columns=states, legal=legal)


@attrs.define
class _Machine:
    """A kernel with one device at most, and whoever uses it."""

    kernel: SimKernel
    random: random.Random
    counted: Table[ControlCommand, State]
    char: SimCharDevice | None = None
    queue: RawQueue | None = None
    opened: Any = None

    def state(self) -> State:
        device = self.kernel.devices.get(DEV_ID)
        return State["ABSENT" if device is None else device.info.state.name]

    async def run(self) -> None:
        for _ in range(STEPS):
            what = self.random.randrange(10)
            if what < 5:
                await self.send(self.random.choice(self.counted.rows))
            elif what < 6:
                await self.bring_up()
            elif what < 7:
                await self.come()
            elif what < 8:
                self.kernel.block_device(DEV_ID).submit(IoOp.READ, 0, BLOCK)
            elif what < 9:
                self.open_or_close()
            elif not self.random.randrange(3):
                self.go()
        await self.end()

    # A server

    async def come(self) -> None:
        """A server opens the char device, if it can, and fetches every tag."""
        if self.char is not None or DEV_ID not in self.kernel.devices:
            return
        info = self.kernel.devices[DEV_ID].info
        try:
            self.char = await self.kernel.open_char_device(info, ioctl_encoded=True)
        except KernelError:  # deleted, and waiting for its openers
            return
        self.queue = RawQueue(self.char.open_queue(0, buffers=DEPTH))
        self.queue.fetch_all()

    def answer(self) -> None:
        if self.queue is not None:
            while delivered := [event for event in self.queue.events() if event.result >= 0]:
                for event in delivered:
                    self.queue.commit(event.tag, event.length)

    def go(self) -> None:
        if self.queue is not None:
            self.queue.ring.close()
        if self.char is not None:
            self.char.close()
        self.queue = self.char = None

    # An application

    def open_or_close(self) -> None:
        disk = self.kernel.block_device(DEV_ID)
        if self.opened is not None:
            self.opened.__exit__(None, None, None)
            self.opened = None
        elif disk.exists:
            self.opened = disk.opened()
            self.opened.__enter__()

    # An operator

    async def send(self, command: ControlCommand) -> None:
        before = self.state()
        results: list[int] = []
        arguments = CALLS[command](self.random) if command in COMMAND_RELEASE else {}
        async with trio.open_nursery() as nursery, machine(self.kernel) as m:

            async def submit() -> None:
                results.append(await m.control.submit(command, dev_id=DEV_ID, **arguments))

            nursery.start_soon(submit)
            for unblock in (self.answer, self.go, self.open_or_close):
                await wait_all_tasks_blocked()
                if results:
                    break
                if unblock != self.open_or_close or self.opened is not None:
                    unblock()
            await wait_all_tasks_blocked()
        self.counted.count_result(command, before, results[0])

    async def bring_up(self) -> None:
        """By chance alone a device would hardly ever be live."""
        if self.state() in _RECOVERING:
            commands = ControlCommand.START_USER_RECOVERY, ControlCommand.END_USER_RECOVERY
        else:
            await self.send(ControlCommand.ADD_DEV)
            commands = ControlCommand.SET_PARAMS, ControlCommand.START_DEV
        await self.send(commands[0])
        await self.come()
        await self.send(commands[1])

    async def end(self) -> None:
        """Whatever state it all is in, it can be cleared away."""
        self.go()
        if self.opened is not None:
            self.open_or_close()
        async with machine(self.kernel) as m:
            await m.delete(DEV_ID)
        assert self.kernel.leftovers() == []


def covered() -> Table[ControlCommand, State]:
    """The table after all runs."""
    counted = table()

    async def run(seed: int) -> None:
        kernel = SimKernel(partition_scan=False)
        kernel.server_pid = SERVER_PID
        await _Machine(kernel, random.Random(seed), counted).run()

    with scheduled_by(FirstChoice()):
        for seed in SEEDS:
            trio.run(run, seed)
    return counted
