"""The simulator's devices, covered: every control command in every state of a device.

An operator without any sense sends control commands at random, while a server comes and goes and an application has requests in
flight. One command at a time: one that waits gets first the answers, then the ends that it may wait for, and at last is interrupted. One
that waits even then is an error, which says for what: nothing here can hang.

A command joins with its release: once `version.COMMAND_RELEASE` has it, `CALLS` must say how to send it.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import attrs

from tests.proof.coverage_table import Table
from tests.sim.mini import RawQueue, basic_params
from ublk_trio.errors import KernelError
from ublk_trio.kernel_sim import SimKernel
from ublk_trio.kernel_sim.block.device import SimBlockFile
from ublk_trio.kernel_sim.call import Call
from ublk_trio.kernel_sim.control import execute
from ublk_trio.kernel_sim.ring import SimCharDevice
from ublk_trio.kernel_sim.version import COMMAND_RELEASE
from ublk_trio.uapi import ControlCommand, DeviceState, DevInfo, Feature, IoOp, Params, ShmemBufReg

SEEDS = range(500)
STEPS = 60
DEV_ID = 0
DEPTH = 2
BLOCK = 512
PAGE = 4096


class State(enum.Enum):
    """A device's states, and no device at all."""

    ABSENT = "absent"
    DEAD = "dead"
    LIVE = "live"
    QUIESCED = "quiesced"
    FAIL_IO = "fail_io"


assert {state.name for state in State} == {"ABSENT", *(state.name for state in DeviceState)}

#: What a device may have.
RECOVERY = (
    Feature(0),
    Feature.USER_RECOVERY,
    Feature.USER_RECOVERY | Feature.USER_RECOVERY_REISSUE,
    Feature.USER_RECOVERY | Feature.USER_RECOVERY_FAIL_IO,
)

_RECOVERING = {State.QUIESCED, State.FAIL_IO}
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


#: They wait until the disk is idle.
_FREEZE = {ControlCommand.REG_BUF, ControlCommand.UNREG_BUF}
SERVER_PID = 1000


def table() -> Table[ControlCommand, State]:
    """The table, empty, as far as the simulator has commands."""
    legal = {(command, state) for command in COMMAND_RELEASE for state in LEGAL[command]}
    return Table(rows=sorted(ControlCommand), columns=list(State), legal=legal)


@attrs.define(slots=False)
class _Machine:
    """A kernel with one device at most, and whoever uses it."""

    random: random.Random
    counted: Table[ControlCommand, State]
    kernel: SimKernel = attrs.Factory(lambda: SimKernel(partition_scan=False))
    char: SimCharDevice | None = None
    queue: RawQueue | None = None
    opened: SimBlockFile | None = None

    def __attrs_post_init__(self) -> None:
        self.kernel.server_pid = SERVER_PID
        self.memory = self.kernel.process().memory
        self.pages = [self.memory.map(PAGE) for _ in range(2)]

    def state(self) -> State:
        device = self.kernel.devices.get(DEV_ID)
        return State["ABSENT" if device is None else device.info.state.name]

    def run(self) -> None:
        for _ in range(STEPS):
            what = self.random.randrange(10)
            if what < 5:
                self.send(self.random.choice(self.counted.rows))
            elif what < 6:
                self.bring_up()
            elif what < 7:
                self.come()
            elif what < 8:
                self.kernel.block_device(DEV_ID).submit(IoOp.READ, 0, BLOCK)
            elif what < 9:
                self.open_or_close()
            else:
                self.go()
        self.end()

    # A server

    def come(self) -> None:
        """A server opens the char device, if it can, and fetches every tag."""
        if self.char is not None or DEV_ID not in self.kernel.devices:
            return
        try:
            device = self.kernel.char_to_open(DEV_ID, self.kernel.identity)
        except KernelError:  # deleted, and waiting for its openers
            return
        self.char = SimCharDevice(device, ioctl_encoded=True)
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
            self.close_disk()
        elif disk.exists:
            self.opened = disk.open()

    def close_disk(self) -> None:
        if self.opened is not None:
            self.opened.close()
            self.opened = None

    # An operator

    def send(self, command: ControlCommand) -> None:
        if (command in _FREEZE and not self.can_freeze()) or (
            command is ControlCommand.QUIESCE_DEV and self.would_deliver_to_nobody()
        ):
            return
        before = self.state()
        result = self.run_command(command, **CALLS[command](self))
        self.counted.count_result(command, before, result)

    def can_freeze(self) -> bool:
        """Whether the disk's operations will end. Those that wait for a next server do not, and hold up such a command for ever:
        and, because it has the device's mutex, also whatever could help it."""
        self.answer()
        device = self.kernel.devices.get(DEV_ID)
        return device is None or not device.holds or device.disk is None or not device.disk.bios

    def would_deliver_to_nobody(self) -> bool:
        """Whether QUIESCE_DEV is sent to a device whose next server fetches already: it ends the fetched commands, and leaves the
        device as it is, which goes on to deliver requests to them. Linux does that, too, and crashes."""
        return self.char is not None and self.state() in _RECOVERING

    def run_command(self, command: ControlCommand, **arguments: Any) -> int:
        """Its result. Whatever it waits for is brought about."""
        results: list[int] = []
        buffer = arguments.get("buffer")
        length = len(buffer) if buffer is not None else 0
        call = Call(command=command, dev_id=DEV_ID, length=length, memory=self.memory, **arguments)
        self.kernel.run(command.name, execute(self.kernel, call), ring=self, on_done=results.append)
        for unblock in (self.answer, self.go, self.close_disk):
            if not results:
                unblock()
        if not results:
            self.kernel.interrupt(self)
        assert results, f"nothing ends it: {self.kernel.held_commands()}"
        return results[0]

    def bring_up(self) -> None:
        """By chance alone a device would hardly ever be live."""
        if self.state() in _RECOVERING:
            commands = ControlCommand.START_USER_RECOVERY, ControlCommand.END_USER_RECOVERY
        else:
            self.send(ControlCommand.ADD_DEV)
            commands = ControlCommand.SET_PARAMS, ControlCommand.START_DEV
        self.send(commands[0])
        self.come()
        self.send(commands[1])

    def end(self) -> None:
        """Whatever state it all is in, it can be cleared away."""
        self.go()
        self.close_disk()
        self.run_command(ControlCommand.DEL_DEV)
        assert self.kernel.leftovers() == []


def _add(machine: _Machine) -> dict[str, Any]:
    flags = machine.random.choice(RECOVERY)
    if flags and machine.random.randrange(2):
        flags |= Feature.QUIESCE
    if machine.random.randrange(4):
        flags |= Feature.SHMEM_ZC
    info = DevInfo(dev_id=DEV_ID, nr_hw_queues=1, queue_depth=DEPTH, max_io_buf_bytes=64 << 10, flags=flags)
    return {"buffer": bytearray(info.pack())}


def _info2(machine: _Machine) -> dict[str, Any]:
    path = f"/dev/ublkc{DEV_ID}".encode().ljust(16, b"\0")
    return {"buffer": bytearray(path + bytes(64)), "dev_path_length": len(path)}


#: How to send each command that the simulator knows so that nothing but the state can be wrong with it.
CALLS: MappingProxyType[ControlCommand, Callable[[_Machine], dict[str, Any]]] = MappingProxyType(
    {
        ControlCommand.GET_QUEUE_AFFINITY: lambda machine: {"buffer": bytearray(8)},
        ControlCommand.GET_DEV_INFO: lambda machine: {"buffer": bytearray(64)},
        ControlCommand.ADD_DEV: _add,
        ControlCommand.DEL_DEV: lambda machine: {},
        ControlCommand.START_DEV: lambda machine: {"data": SERVER_PID},
        ControlCommand.STOP_DEV: lambda machine: {},
        ControlCommand.SET_PARAMS: lambda machine: {"buffer": bytearray(basic_params().pack())},
        ControlCommand.GET_PARAMS: lambda machine: {"buffer": bytearray(Params.query())},
        ControlCommand.START_USER_RECOVERY: lambda machine: {},
        ControlCommand.END_USER_RECOVERY: lambda machine: {"data": SERVER_PID},
        ControlCommand.GET_DEV_INFO2: _info2,
        ControlCommand.GET_FEATURES: lambda machine: {"buffer": bytearray(8)},
        ControlCommand.DEL_DEV_ASYNC: lambda machine: {},
        ControlCommand.UPDATE_SIZE: lambda machine: {"data": 1 << 11},
        ControlCommand.QUIESCE_DEV: lambda machine: {"data": 100},
        ControlCommand.TRY_STOP_DEV: lambda machine: {},
        ControlCommand.REG_BUF: lambda machine: {
            "buffer": bytearray(ShmemBufReg.LAYOUT.pack(machine.random.choice(machine.pages), PAGE, 0, 0))
        },
        ControlCommand.UNREG_BUF: lambda machine: {"data": 0},
    }
)


def covered() -> Table[ControlCommand, State]:
    """The table after all runs."""
    counted = table()
    for seed in SEEDS:
        _Machine(random.Random(seed), counted).run()
    return counted
