"""One run: disks come and go, applications use them, faults happen; then everything must end well.

**Safety phase.** Step by step, as the choices have it: an operation of an application, a few passes of the scheduler,
some time, a disk more or less, a fault. Each operation is checked when it ends: its bytes, and that an error has its
cause. **Liveness phase.** No more faults, and every decision is the calm one. What is under way must end; every disk
that is still there, and a new one, must do as it is told; the target must take everything down.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable

import attrs
import trio

from ublk_trio.control import open_control
from ublk_trio.device import Device, already_gone_is_fine
from ublk_trio.errors import KernelError, UblkError
from ublk_trio.kernel_sim import Bio, Choices, SimBlockDevice, SimKernel
from ublk_trio.simulation.disk import AsyncDisk, Medium, PlainDisk
from ublk_trio.simulation.plan import Plan, draw_disk
from ublk_trio.simulation.region import Region, causes
from ublk_trio.target import Target, open_target
from ublk_trio.uapi import IoOp

#: Virtual seconds in which everything must have ended once the faults have stopped. A stop may take its grace time.
LIVENESS_SECONDS_MAX = 120.0
#: What starting a disk may fail with, by the fault that does it.
_START_ERRNOS = {"no-memory": errno.ENOMEM, "interrupted": errno.EINTR}
#: What an operation may fail with when its disk goes away.
_GONE = frozenset({errno.EIO, errno.ENXIO})
#: Each disk begins with what the kernel reads when it looks for partitions: no region lies there.
_FIRST_REGION = 4096
_PASSES_MAX = 8
_PAUSE_SECONDS = 0.1
_OPS = {
    "read": IoOp.READ,
    "write": IoOp.WRITE,
    "fua-write": IoOp.WRITE,
    "flush": IoOp.FLUSH,
    "discard": IoOp.DISCARD,
    "write-zeroes": IoOp.WRITE_ZEROES,
}


@attrs.define(eq=False, kw_only=True)
class Served:
    """A disk of the run, from before its start until it is gone."""

    dev_id: int
    medium: Medium
    regions: list[Region]
    block: SimBlockDevice
    starting: trio.CancelScope = attrs.Factory(trio.CancelScope)
    device: Device | None = None
    #: It was asked to stop, or something was done to it that ends it: operations may fail from now on.
    ending: bool = False
    #: Its server was killed: starting or stopping it may fail, too.
    killed: bool = False
    gone: bool = False

    @property
    def usable(self) -> bool:
        return self.device is not None and not self.ending and not self.gone


class Scenario:
    """The run. `run` does all of it; what was found is in `problems`, what was done in `counts`."""

    def __init__(self, kernel: SimKernel, plan: Plan, *, steps: int) -> None:
        self.kernel = kernel
        self.plan = plan
        self.steps = steps
        self.problems: list[str] = []
        self.counts: Counter[str] = Counter()
        self.bytes_verified = 0
        self._choices: Choices = kernel.choices
        self._served: list[Served] = []
        self._writes = 0
        self._in_flight = 0
        self._scope = trio.CancelScope()

    # ------------------------------------------------------------------ the two phases

    async def run(self) -> None:
        with self._scope:
            async with trio.open_nursery() as nursery, open_target(self.kernel) as target:
                self._phase("safety")
                for number in range(self.steps):
                    await self._step(number, target, nursery)
                self.kernel.faults.clear()
                self._choices.calm_down()
                self._phase("liveness")
                await self._live_on(target, nursery)
                for served in self._served:
                    served.ending = True
        for served in self._served:
            medium = served.medium
            if medium.opened != medium.closed or medium.opened > 1:
                self._problem(
                    "backend misused", f"disk {served.dev_id}: opened {medium.opened} times, closed {medium.closed}"
                )

    def hang(self) -> None:
        """Nothing can run any more: say what waits, and give up."""
        self._problem("nothing hangs", "; ".join(self.kernel.leftovers()) or "the kernel holds nothing")
        self._scope.cancel()

    async def _live_on(self, target: Target, nursery: trio.Nursery) -> None:
        with trio.move_on_after(LIVENESS_SECONDS_MAX) as scope:
            self._start_one(target, nursery)
            await self._until(lambda: not self._in_flight and not self._coming())
            await self._use_every_disk(nursery)
        if scope.cancelled_caught:
            self._problem("everything ends", f"{self._in_flight} operations: {'; '.join(self.kernel.leftovers())}")

    def _coming(self) -> bool:
        return any(served.device is None and not served.gone for served in self._served)

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():  # noqa: ASYNC110 - virtual time costs nothing, and any of many things may make it true
            await trio.sleep(_PAUSE_SECONDS)

    async def _use_every_disk(self, nursery: trio.Nursery) -> None:
        for served in self._served:
            for region in served.regions:
                for name in ("write", "read", "flush"):
                    if served.usable:
                        self._submit(served, region, name, 0, region.blocks, nursery)
                        await self._until(lambda: not self._in_flight)

    def _phase(self, name: str) -> None:
        self._log("phase", name)

    def _log(self, *event: object) -> None:
        if self.kernel.log is not None:
            self.kernel.log.append(event)

    def _problem(self, invariant: str, text: str) -> None:
        self.problems.append(f"{invariant}: {text}")

    def _inject(self, fault: str, dev_id: int, text: str) -> None:
        self._log("fault", fault, dev_id, text)

    # ------------------------------------------------------------------ one step

    def _actions(self) -> list[str]:
        """What may be done next; the first is the calm one. What is listed more often happens more often."""
        usable = any(served.usable for served in self._served)
        here = [served for served in self._served if not served.gone]
        actions = ["operate"] * 40 * usable + ["pass"] * 10 + ["pause"]
        if len(here) < self.plan.disks_max:
            actions += ["start"] * (2 if usable else 8)
            if not usable and not self._coming():
                return ["start"]
        if usable:
            actions += ["stop"]
            actions += [name for name in ("server-killed", "stopped-by-others") if name in self.plan.faults]
        if "start-cancelled" in self.plan.faults and any(served.device is None for served in here):
            actions += ["start-cancelled"]
        return actions

    async def _step(self, number: int, target: Target, nursery: trio.Nursery) -> None:
        actions = self._actions()
        action = actions[self._choices.choose("action", len(actions))]
        self._log("step", number, action)
        self.counts["steps"] += 1
        if action == "operate":
            if not self._operate(nursery):  # all are busy: let them go on
                await trio.lowlevel.checkpoint()
        elif action == "pass":
            for _ in range(1 + self._choices.choose("passes", _PASSES_MAX)):
                await trio.lowlevel.checkpoint()
        elif action == "pause":
            await trio.sleep(_PAUSE_SECONDS)
        elif action == "start":
            self._start_one(target, nursery)
        elif action == "start-cancelled":
            self._cancel_start(self._pick([served for served in self._served if self._is_starting(served)]))
        else:
            served = self._pick([served for served in self._served if served.usable])
            served.ending = True
            if action == "stop":
                assert served.device is not None
                served.device.ask_to_stop()
            elif action == "server-killed":
                self._inject(action, served.dev_id, "")
                served.killed = True
                self.kernel.crash_server(served.dev_id)
            else:
                self._inject(action, served.dev_id, "")
                nursery.start_soon(self._stop_from_outside, served)

    @staticmethod
    def _is_starting(served: Served) -> bool:
        return served.device is None and not served.gone

    def _pick(self, candidates: list[Served]) -> Served:
        return candidates[self._choices.choose("disk", len(candidates))]

    # ------------------------------------------------------------------ disks

    def _start_one(self, target: Target, nursery: trio.Nursery) -> None:
        dev_id = len(self._served)
        disk_plan = draw_disk(self._choices, self.plan, dev_id, self.kernel.version)
        block_bytes = disk_plan.block_bytes
        region_bytes = self.plan.blocks * block_bytes
        medium = Medium(
            size=_FIRST_REGION + self.plan.regions * region_bytes,
            block_bytes=block_bytes,
            choices=self._choices,
            faults=self.plan.faults,
            injected=lambda fault, text: self._inject(fault, dev_id, text),
        )
        regions = [
            Region(start=_FIRST_REGION + index * region_bytes, blocks=self.plan.blocks, block_bytes=block_bytes)
            for index in range(self.plan.regions)
        ]
        served = Served(dev_id=dev_id, medium=medium, regions=regions, block=self.kernel.block_device(dev_id))
        self._served.append(served)
        self.counts["disks"] += 1
        backend = AsyncDisk(medium) if disk_plan.serve_async else PlainDisk(medium)

        async def hold() -> None:
            try:
                with served.starting:
                    served.device = await target.start_device(backend, disk_plan.options)
                if served.device is not None:
                    await target.wait_device(served.device)
                    if not served.ending:
                        self._problem("nothing ends unasked", f"disk {dev_id} is gone")
            except UblkError as error:
                if not served.killed and not self._was_refused(served, error):
                    self._problem("nothing fails unasked", f"disk {dev_id}: {type(error).__name__}: {error}")
            finally:
                served.gone = True

        nursery.start_soon(hold, name=f"disk {dev_id}")

    def _was_refused(self, served: Served, error: UblkError) -> bool:
        """Whether a fault kept the disk from starting."""
        allowed = {number for fault, number in _START_ERRNOS.items() if fault in self.plan.faults}
        return served.device is None and isinstance(error, KernelError) and error.errno in allowed

    def _cancel_start(self, served: Served) -> None:
        self._inject("start-cancelled", served.dev_id, "")
        served.ending = True
        served.starting.cancel()

    async def _stop_from_outside(self, served: Served) -> None:
        """As ``ublk-trio stop`` does it."""
        with already_gone_is_fine():
            async with open_control(self.kernel) as control:
                await control.stop_device(served.dev_id)
                await control.delete_device(served.dev_id)

    # ------------------------------------------------------------------ operations

    def _operate(self, nursery: trio.Nursery) -> bool:
        """One operation of an application that is not busy, on a disk that is there; False if there is none."""
        places = [
            (served, region) for served in self._served if served.usable for region in served.regions if not region.busy
        ]
        if not places:
            return False
        choose = self._choices.choose
        served, region = places[choose("region", len(places))]
        name = self.plan.operations[choose("operation", len(self.plan.operations))]
        first = choose("first block", region.blocks)
        count = 1 + choose("blocks", region.blocks - first)
        self._submit(served, region, name, first, count, nursery)
        return True

    def _submit(self, served: Served, region: Region, name: str, first: int, count: int, nursery: trio.Nursery) -> None:
        offset, length = region.start + first * region.block_bytes, count * region.block_bytes
        op = _OPS[name]
        contents: list[bytes] = []
        if op is IoOp.WRITE:
            self._writes += 1
            contents = region.contents(self._writes, first, count)
        elif op in (IoOp.DISCARD, IoOp.WRITE_ZEROES):
            contents = region.zeroes(count)
        elif op is IoOp.FLUSH:
            offset = length = 0
        region.busy = True
        self._in_flight += 1
        self.counts[name] += 1
        failures_before = len(served.medium.failures)
        bio = served.block.submit(
            op, offset, b"".join(contents) if op is IoOp.WRITE else length, fua=name == "fua-write"
        )

        async def finish() -> None:
            await bio.wait()
            region.busy = False
            self._in_flight -= 1
            self._check(served, region, name, first, contents, bio, failures_before)

        nursery.start_soon(finish, name=f"{name} {bio.number}")

    def _check(
        self,
        served: Served,
        region: Region,
        name: str,
        first: int,
        contents: list[bytes],
        bio: Bio,
        failures_before: int,
    ) -> None:
        result = bio.result
        assert result is not None
        where = f"disk {served.dev_id}: {name} of {bio.length} bytes at {bio.offset} (bio {bio.number})"
        expected = causes(served.medium.failures[failures_before:], name, bio.offset, bio.length)
        if contents:
            region.written(first, contents, surely=result >= 0)
        if result < 0:
            self.counts["failed"] += 1
            if -result not in expected and not (served.ending and -result in _GONE):
                self._problem("an error has its cause", f"{where} ended with {errno.errorcode[-result]}")
            return
        if result != bio.length:
            self._problem("the result is right", f"{where} ended with {result}")
        if expected and name != "flush":  # another flush may have met that failure
            self._problem("a failed call fails its request", f"{where} succeeded, the backend's call did not")
        if name == "read":
            self.bytes_verified += result
            wrong = region.wrong_block(first, bytes(bio.data))
            if wrong is not None:
                self._problem("what was written is what is read", f"{where}: block {wrong} of its region is wrong")
