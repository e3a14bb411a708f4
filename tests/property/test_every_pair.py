"""Two things that may happen to a target or to a disk of it, the second at every step of the first: neither wedges, each answers.

The run is pumped by hand and calm, as in test_cancel_everywhere.py, so that the same step is always the same place.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Awaitable, Callable
from unittest import mock

import attrs
import pytest
import trio

from tests.property.engine_run import DEADLINES_MAX, PASSES_MAX
from tests.property.model import BrokenError, demand
from tests.property.pumped import AtStep, PumpedRun
from tests.property.reports import PROFILE
from tests.property.test_cancel_everywhere import STEPS_MAX
from ublk_trio import Backend, Device, DeviceOptions, KernelError, Recovery, SimKernel, Target, UsageError, open_target
from ublk_trio.kernel_sim import Bio
from ublk_trio.uapi import ControlCommand, IoOp

BLOCK = 512
SIZE = 64 * BLOCK
VERSIONS = ((7, 3), (6, 12))
#: Every step of all pairs takes minutes; shorter runs take every so manyth, each pair from another one on.
STRIDE = {"dev": 25, "ci": 5}.get(PROFILE, 1)


class BugError(Exception):
    """What breaks a queue."""


class Slow(Backend):
    """Takes its time for everything; broken, it takes its queue along."""

    size = SIZE

    def __init__(self, *, hangs: bool) -> None:
        self.hangs = hangs
        self.opened = self.closed = 0

    async def open(self) -> None:
        if self.hangs:
            await trio.sleep_forever()
        await trio.lowlevel.checkpoint()
        self.opened += 1

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()
        self.closed += 1

    async def read(self, offset: int, buffer: memoryview) -> None:
        await trio.sleep(0.01)
        buffer[:] = bytes(len(buffer))

    async def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        await trio.sleep(0.01)


@attrs.define
class Life:
    """A target with a busy disk, to which two things happen."""

    first: str
    second: str
    version: tuple[int, int]
    kernel: SimKernel = attrs.field(init=False)
    begin_second: trio.Event = attrs.Factory(trio.Event)
    leave: trio.Event = attrs.Factory(trio.Event)
    left: trio.Event = attrs.Factory(trio.Event)
    starting: list[trio.CancelScope] = attrs.Factory(list)
    backends: list[Slow] = attrs.Factory(list)
    bios: list[Bio] = attrs.Factory(list)
    #: What each came to: None, or the exception.
    outcomes: dict[str, BaseException | None] = attrs.Factory(dict)
    target: Target = attrs.field(init=False)
    live: Device = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.kernel = SimKernel(version=self.version)

    async def main(self) -> None:
        async with trio.open_nursery() as programs:
            try:
                async with open_target(self.kernel) as target:
                    self.target = target
                    self.live = await self._start()
                    disk = self.kernel.block_device(self.live.dev_id)
                    self.bios += [
                        disk.submit(IoOp.WRITE, BLOCK, bytes(8 * BLOCK)),
                        disk.submit(IoOp.READ, 0, 24 * BLOCK),
                        disk.submit(IoOp.READ, 40 * BLOCK, BLOCK),
                    ]
                    programs.start_soon(self._play, "second", self.second, self.begin_second)
                    programs.start_soon(self._play, "first", self.first, None)
                    await self.leave.wait()
                if self.live.released:
                    # Nobody takes it over here.
                    await self._foreign(ControlCommand.DEL_DEV)
            finally:
                self.left.set()

    async def _start(self, *, hangs: bool = False) -> Device:
        backend = Slow(hangs=hangs)
        self.backends.append(backend)
        recovery = Recovery.REISSUE if "release" in (self.first, self.second) else Recovery.OFF
        options = DeviceOptions(queues=2, depth=4, max_io_bytes=4096, recovery=recovery)
        return await self.target.start_device(backend, options)

    async def _play(self, which: str, name: str, begin: trio.Event | None) -> None:
        if begin is not None:
            await begin.wait()
        try:
            await DEEDS[name](self)
        except Exception as error:
            self.outcomes[which] = error
        else:
            self.outcomes[which] = None
        if len(self.outcomes) == 2:
            self.leave.set()

    # The deeds -------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        with trio.CancelScope() as scope:
            self.starting.append(scope)
            await self._start()

    async def start_that_hangs(self) -> None:
        with trio.CancelScope() as scope:
            self.starting.append(scope)
            await self._start(hangs=True)

    async def cancel_start(self) -> None:
        await trio.lowlevel.checkpoint()
        for scope in self.starting:
            scope.cancel()

    async def stop(self) -> None:
        await self.target.stop_device(self.live)

    async def stop_if_unused(self) -> None:
        await self.target.stop_device(self.live, only_if_unused=True)

    async def hot_remove(self) -> None:
        self.live.ask_to_stop()
        await self.live.wait_closed()

    async def release(self) -> None:
        await self.target.release_device(self.live)

    async def resize(self) -> None:
        await self.live.update_size()

    async def break_queue(self) -> None:
        await trio.lowlevel.checkpoint()
        if self.live._queues:
            self.live._queues[0].handlers = mock.Mock(start=mock.Mock(side_effect=BugError))
        self.bios.append(self.kernel.block_device(self.live.dev_id).submit(IoOp.READ, 0, BLOCK, cpu=0))
        await self.target.wait_device(self.live)

    async def close(self) -> None:
        self.leave.set()
        await self.left.wait()

    async def stop_by_others(self) -> None:
        await self._foreign(ControlCommand.STOP_DEV)

    async def delete_by_others(self) -> None:
        await self._foreign(ControlCommand.DEL_DEV)

    async def _foreign(self, command: ControlCommand) -> None:
        """What another program does, to whatever has the highest id: the disk that is starting, if one is."""
        async with self.kernel.open_control() as control:
            ids = self.kernel.device_ids()
            if ids:
                result = await control.submit(command, dev_id=ids[-1])
                demand(result in (0, -errno.ENODEV), "other programs get their answer", result)

    # What must come of it --------------------------------------------------------------------------------------------

    def check(self, error: BaseException | None) -> None:
        for which, name in (("first", self.first), ("second", self.second)):
            if which == "first" or self.begin_second.is_set():
                demand(which in self.outcomes, "everybody gets an answer", f"{name} has none")
                outcome = self.outcomes[which]
                demand(self._allowed(name, outcome), "the answer is right", f"{name}: {outcome!r}")
        broken = "break_queue" in (self.first, self.second)
        surprise = error.split(BugError)[1] if isinstance(error, BaseExceptionGroup) and broken else error
        demand(surprise is None, "nothing fails unasked", repr(error))
        self.kernel.check()
        demand(not self.kernel.leftovers(), "nothing is left", self.kernel.leftovers())
        for backend in self.backends:
            demand(backend.opened == backend.closed <= 1, "the backend is used well", (backend.opened, backend.closed))
        for bio in self.bios:
            ended = bio.done and bio.result in (bio.length, -errno.EIO, -errno.ENXIO)
            demand(ended, "every operation ends", bio)

    def _allowed(self, name: str, outcome: BaseException | None) -> bool:
        if outcome is None:
            return True
        deeds = {self.first, self.second}
        number = outcome.errno if isinstance(outcome, KernelError) else None
        match name:
            case "start":
                closed = isinstance(outcome, UsageError) and "closed" in str(outcome) and "close" in deeds
                return closed or (number in STOPPED_ERRNOS and bool(deeds & FOREIGN))
            case "start_that_hangs":
                # Even when nothing closes the target: in the end the test does.
                return isinstance(outcome, UsageError) and "closed" in str(outcome)
            case "stop" | "stop_if_unused" | "break_queue":
                too_old = name == "stop_if_unused" and self.version < (7, 0) and isinstance(outcome, UsageError)
                released = "release" in deeds and isinstance(outcome, UsageError) and "was released" in str(outcome)
                return too_old or released or (isinstance(outcome, BugError) and "break_queue" in deeds)
            case "release":
                stopped = isinstance(outcome, UsageError) and "stopped" in str(outcome)
                return stopped or (isinstance(outcome, BugError) and "break_queue" in deeds)
            case "resize":
                return isinstance(outcome, UsageError) or number == errno.ENODEV
        return False


#: What a start may fail with when another program stops or deletes its device.
STOPPED_ERRNOS = (errno.EINTR, errno.ENODEV, errno.EBUSY, errno.ENOENT)
FOREIGN = {"stop_by_others", "delete_by_others"}
DEEDS: dict[str, Callable[[Life], Awaitable[None]]] = {
    "start": Life.start,
    "start_that_hangs": Life.start_that_hangs,
    "cancel_start": Life.cancel_start,
    "stop": Life.stop,
    "stop_if_unused": Life.stop_if_unused,
    "hot_remove": Life.hot_remove,
    "release": Life.release,
    "resize": Life.resize,
    "break_queue": Life.break_queue,
    "close": Life.close,
    "stop_by_others": Life.stop_by_others,
    "delete_by_others": Life.delete_by_others,
}


def played_at(number: int, life: Life) -> bool:
    """Play it with the second deed at step ``number`` of the run. False if the first one had its answer before."""
    at_step = AtStep(number, life.begin_second.set)
    run = PumpedRun(life.main, lambda what, options: 0, instruments=[at_step])
    early = False
    try:
        for _ in range(DEADLINES_MAX):
            demand(run.run_until_idle(passes_max=PASSES_MAX), "nothing hangs", "busy for ever")
            if run.ended:
                break
            if run.seconds_to_next_deadline == math.inf:
                # Nothing more comes of the first: now or never. And then the target is closed, which ends everything.
                if life.begin_second.is_set():
                    demand(not life.leave.is_set(), "nothing hangs", (life.outcomes, life.kernel.leftovers()))
                    deeds = {life.first, life.second}
                    # Before 7.0 a device that is deleted while it starts comes to life all the same, and DEL_DEV waits for its server.
                    old = life.version < (7, 0) and deeds == {"start", "delete_by_others"}
                    demand(
                        old or "start_that_hangs" in deeds, "nothing hangs", (life.outcomes, life.kernel.leftovers())
                    )
                    life.leave.set()
                early = early or not life.begin_second.is_set()
                life.begin_second.set()
            else:
                run.let_time_pass(run.seconds_to_next_deadline)
        demand(run.ended, "nothing hangs", (life.outcomes, life.kernel.leftovers()))
        life.check(run.error)
    finally:
        run.abandon()
    return not early


def at_every_step(first: str, second: str, version: tuple[int, int]) -> int:
    """How many steps there are. The error says at which it broke."""
    for number in range(1 + list(DEEDS).index(second) % STRIDE, STEPS_MAX, STRIDE):
        life = Life(first, second, version)
        try:
            more = played_at(number, life)
        except AssertionError as broken:
            broken.add_note(f"{second} at step {number} of {first} on {version}")
            raise
        if not more:
            return number
    raise BrokenError("the run ends", f"not within {STEPS_MAX} steps")


@pytest.mark.parametrize("version", VERSIONS, ids=["7.3", "6.12"])
@pytest.mark.parametrize("first", [name for name in DEEDS if name not in ("cancel_start", "close")])
def test_every_pair_at_every_step(first: str, version: tuple[int, int]) -> None:
    """Whatever happens while something else is happening: both get their answer, nothing wedges, and nothing is left."""
    for second in DEEDS:
        assert at_every_step(first, second, version) > 10, "there were steps to do it at"


def test_planted_bug_is_caught() -> None:
    """A target that waits, at its end, for starts that it did not end is noticed."""

    def patient(target: Target) -> None:
        target._closed = True
        target._nursery.cancel_scope.cancel()

    with mock.patch.object(Target, "_close", patient), pytest.raises(BrokenError, match="nothing hangs"):
        at_every_step("start_that_hangs", "close", VERSIONS[0])
