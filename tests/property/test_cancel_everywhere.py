"""Cancelled, or failed, at every single step of a fixed scenario: nothing may be left, wherever it happened.

A step is one turn of one task, counted by an instrument. The interruption comes just before the k-th, for k = 1, 2, 3, … until the
scenario ends on its own. The run is pumped by hand and calm, so the same k is always the same place.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable
from typing import Literal

import attrs
import pytest
import trio

from tests.property.disks import BLOCK, AsyncDisk, Disk, PlainDisk
from tests.property.engine_run import DEADLINES_MAX, PASSES_MAX
from tests.property.invariants import UserError
from tests.property.model import BrokenError, demand
from tests.property.pumped import AtStep, PumpedRun
from tests.property.reports import PROFILE
from ublk_trio import DataMode, Device, DeviceOptions, SimKernel, Target, open_target
from ublk_trio.kernel_sim import Bio, Choices, DrawnChoices, FirstChoice, SeededChoices
from ublk_trio.uapi import IoOp

How = Literal["cancel", "raise", "cancel start"]
#: The scenario must end within so many steps, or the loop over all of them would not.
STEPS_MAX = 2_000


@attrs.define
class Scenario:
    """Two devices, one inline and one async with too few buffers; requests in flight; one stopped, one left running."""

    how: How
    choices: Choices
    #: What each suspension of the async disk is: 2 is a single pass, 0 waits until it is cancelled.
    suspend_for: int
    #: How the data of the second disk moves, which has one buffer for all its tags.
    mode: DataMode = DataMode.GET_DATA
    #: Where the target has workers; None: it has none.
    cpus: tuple[int, ...] | None = None
    kernel: SimKernel = attrs.field(init=False)
    disks: list[Disk] = attrs.field(init=False)
    bios: list[Bio] = attrs.Factory(list)
    scope: trio.CancelScope = attrs.Factory(trio.CancelScope)
    completed: bool = False

    def __attrs_post_init__(self) -> None:
        self.kernel = SimKernel(self.choices)
        self.disks = [
            Disk(
                blocks=64,
                choose=self._choose,
                faults=frozenset({"backend-hangs"}),
                suspensions_max=most,
                fails_to_open=False,
            )
            for most in (0, 2)
        ]

    def _choose(self, what: str, options: int) -> int:
        if what.startswith("suspend "):
            # Opening and closing end by themselves: a backend that never closes is nobody's to cancel.
            ends = what in ("suspend open for", "suspend close for") or (not self.bios and self.how != "cancel start")
            return 2 if ends else self.suspend_for
        return {"suspensions": options - 1, "clean up": 1}.get(what, 0)

    async def main(self) -> None:
        if self.how == "cancel":
            with self.scope:
                async with open_target(self.kernel, cpus=self.cpus) as target:
                    await self._body(target)
            return
        async with open_target(self.kernel, cpus=self.cpus) as target:
            if self.how == "cancel start":
                await self._body(target)
                return
            with self.scope:
                await self._body(target)
            if self.scope.cancelled_caught:
                raise UserError

    async def _body(self, target: Target) -> None:
        plain, suspending = self.disks
        none = frozenset[str]()
        options = DeviceOptions(queues=2, depth=3, max_io_bytes=4096)
        # In the scenario "cancel start" it is this call that is cancelled, again and again.
        with self.scope if self.how == "cancel start" else trio.CancelScope():
            first = await target.start_device(PlainDisk(plain, none), options)
            pooled = attrs.evolve(options, mode=self.mode, pool_buffers=1)
            second = await target.start_device(AsyncDisk(suspending, none), pooled)
            if self.how != "cancel start":
                self._submit(first)
                self._submit(second)
                await self.bios[0].wait()
                self._submit(first)
                await target.stop_device(first)
                self._submit(second)
                await trio.lowlevel.checkpoint()
            self.completed = True

    def _submit(self, device: Device) -> None:
        disk = self.kernel.block_device(device.dev_id)
        data = bytes(range(256)) * (12 * BLOCK // 256)
        self.bios += [
            disk.submit(IoOp.WRITE, BLOCK, data),
            disk.submit(IoOp.READ, 0, 24 * BLOCK),
            disk.submit(IoOp.FLUSH),
            disk.submit(IoOp.WRITE, 40 * BLOCK, data, fua=True),
            disk.submit(IoOp.WRITE_ZEROES, 0, BLOCK),
        ]

    def check(self, error: BaseException | None) -> None:
        planned = isinstance(error, UserError) if self.how == "raise" else error is None
        # The step may be the very last of the block, where there is nothing to interrupt any more.
        demand(planned or (error is None and self.completed), "nothing fails unasked", repr(error))
        self.kernel.check()
        demand(not self.kernel.leftovers(), "nothing is left", self.kernel.leftovers())
        for disk in self.disks:
            demand(disk.opened == disk.closed <= 1, "the backend is used well", f"{disk.opened=} {disk.closed=}")
            demand(not disk.misuse and not disk.running, "the backend is used well", (disk.misuse, disk.running))
        for bio in self.bios:
            fine = bio.done and bio.result in (bio.length, -errno.EIO, -errno.ENXIO)
            demand(fine, "every operation ends", bio)


def interrupted_at(number: int, scenario: Scenario) -> bool:
    """Run the scenario, interrupt it before step ``number``, and check what is left. False if it ended before."""
    at_step = AtStep(number, scenario.scope.cancel)
    run = PumpedRun(scenario.main, lambda what, options: 0, instruments=[at_step])
    try:
        for _ in range(DEADLINES_MAX):
            demand(run.run_until_idle(passes_max=PASSES_MAX), "nothing hangs", "busy for ever")
            if run.ended:
                break
            if run.seconds_to_next_deadline < math.inf:
                run.let_time_pass(run.seconds_to_next_deadline)
            else:
                # The partition scan hangs in the backend, and the start with it: a user would cancel it.
                hanging_start = scenario.how == "cancel start" and not scenario.completed
                demand(hanging_start and not scenario.scope.cancel_called, "nothing hangs", scenario.kernel.leftovers())
                scenario.scope.cancel()
        demand(run.ended, "a stop is bounded", scenario.kernel.leftovers())
        scenario.check(run.error)
    finally:
        run.abandon()
    return at_step.steps >= number


def interrupt_everywhere(make: Callable[[], Scenario]) -> int:
    """Interrupt the scenario at every step; returns how many there are. The error says at which it broke."""
    open_files = os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []
    for number in range(1, STEPS_MAX):
        scenario = make()
        try:
            interrupted = interrupted_at(number, scenario)
        except AssertionError as broken:
            broken.add_note(f"interrupted before step {number}")
            raise
        if not interrupted:
            assert scenario.completed or scenario.scope.cancel_called, (
                "a run that nothing interrupted completes the scenario"
            )
            if open_files:
                assert len(os.listdir("/proc/self/fd")) == len(open_files), "no file is left open"
            return number - 1
    raise BrokenError("the scenario ends", f"not within {STEPS_MAX} steps")


@pytest.mark.parametrize("seed", [None] if PROFILE == "dev" else [None, 1, 2])
@pytest.mark.parametrize("suspend_for", [2, 0], ids=["handlers-finish", "handlers-hang"])
@pytest.mark.parametrize("how", ["cancel", "raise", "cancel start"])
def test_interrupted_at_every_step(how: How, suspend_for: int, seed: int | None) -> None:
    """Wherever a target's block is cancelled or fails, and wherever a start is cancelled, nothing is left of it."""
    steps = interrupt_everywhere(
        lambda: Scenario(how, FirstChoice() if seed is None else SeededChoices(seed), suspend_for)
    )
    assert steps > 25, "the scenario has steps to interrupt"


@pytest.mark.parametrize("mode", [DataMode.GET_DATA, DataMode.USER_COPY])
@pytest.mark.parametrize("how", ["cancel", "raise", "cancel start"])
def test_interrupted_at_every_step_with_late_workers(how: How, mode: DataMode) -> None:
    """The same of a target with workers that send as late as they can."""
    late = DrawnChoices(lambda what, options: options - 1 if what == "worker-late" else 0)
    assert interrupt_everywhere(lambda: Scenario(how, late, suspend_for=2, mode=mode, cpus=(0, 1))) > 25


@pytest.mark.parametrize("how", ["cancel", "raise", "cancel start"])
def test_interrupted_at_every_step_with_user_copy(how: How) -> None:
    """The same where the server moves the data."""
    assert interrupt_everywhere(lambda: Scenario(how, FirstChoice(), suspend_for=2, mode=DataMode.USER_COPY)) > 25
