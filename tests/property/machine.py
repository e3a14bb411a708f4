"""The engine and the simulator, driven together by Hypothesis: the state machine.

Every rule is one thing that a program, an application, a backend or the machine may do next; nothing runs but in the rules
that pump. After each rule all invariants are checked (`EngineMachine.check`), and at the end nothing may be left. What is found is a
`BrokenError` that names the invariant, under the shortest program that breaks it.

| invariant | means |
|---|---|
| the result is right, an error has its cause, a failed call fails its request | each operation ended once, as its backend's calls say |
| what was written is what is read | against `model.ByteModel` |
| a flush flushed what came before, a FUA write is durable | against the backend's model of its cache |
| the kernel's contract: … | what the simulator forbids a server (`SimKernel.check`) |
| the target lists its devices | every live device is in `Target.devices` until it is gone |
| the tag tables agree | engine and simulator say the same of each tag; strictly when nothing is runnable |
| every buffer is in one place | free, or on one tag |
| the backend is used well | open exactly while it is called, closed once, no call running then, no call out of bounds |
| nothing hangs | nothing is runnable, the backends hold nothing, and yet something has not ended |
| a stop is bounded | … whatever the backends hold |
| nothing fails unasked | every task's exceptions are planned ones |
| nothing is left | in the kernel and of the operations, when the target has ended |
"""

from __future__ import annotations

import errno
import math
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, TypeVar

import attrs
import hypothesis.strategies as st
import trio
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.property.disks import BLOCK, FIRST_WRITE, AsyncDisk, Call, Disk, PlainDisk, content_of
from tests.property.model import ZEROES, BrokenError, ByteModel, Name, Operation, demand
from tests.property.pumped import PumpedRun
from ublk_trio import DataMode, Device, DeviceOptions, SimKernel, Target, open_target
from ublk_trio.handlers import Serve
from ublk_trio.kernel_sim import DrawnChoices, FirstChoice, SimBlockDevice
from ublk_trio.kernel_sim.device import SimDevice
from ublk_trio.kernel_sim.tag import ACTIVE, CANCELED, NEED_GET_DATA, OWNED_BY_SRV, SimTag, TagFlag
from ublk_trio.queue import Queue
from ublk_trio.ring import NO_SLOT
from ublk_trio.tag import TagState
from ublk_trio.uapi import IoOp

#: Disks at a time, and in the life of a target.
DISKS_MAX = 3
STARTS_MAX = 5
PASSES_MAX = 3_000
#: Seconds (virtual) that a stop may take after the last operation ended: its grace time, and what comes on top.
STOP_SECONDS_MAX = 30.0
#: Deadlines that may pass while a target ends.
DEADLINES_MAX = 50
OPS: dict[Name, IoOp] = {
    "read": IoOp.READ,
    "write": IoOp.WRITE,
    "flush": IoOp.FLUSH,
    "discard": IoOp.DISCARD,
    "write_zeroes": IoOp.WRITE_ZEROES,
}
_INTEGERS = {options: st.integers(0, options - 1) for options in range(2, 300)}
_DATA_OPS = (IoOp.READ, IoOp.WRITE)
T = TypeVar("T")


class UserError(Exception):
    """What the user's block raises."""


@attrs.frozen(kw_only=True)
class DiskPlan:
    """How a disk is made and served."""

    kind: str = "plain"
    serve: Serve | None = None
    mode: DataMode = DataMode.COPY
    queues: int = 1
    depth: int = 1
    pool_buffers: int = 1
    max_io_bytes: int = 4096
    blocks: int = 16
    troubles: bool = False
    suspensions_max: int = 0
    fails_to_open: bool = False
    unsupported: frozenset[str] = frozenset()
    read_only: bool = False


disk_plans = st.builds(
    DiskPlan,
    kind=st.sampled_from(["async", "plain", "async"]),
    serve=st.sampled_from([None, None, "async"]),
    mode=st.sampled_from(DataMode),
    queues=st.integers(1, 3),
    depth=st.integers(1, 8),
    pool_buffers=st.integers(1, 3),
    max_io_bytes=st.sampled_from([4096, 8192, 16384]),
    blocks=st.sampled_from([16, 64, 129]),
    troubles=st.booleans(),
    suspensions_max=st.integers(0, 3),
    fails_to_open=st.sampled_from([False] * 9 + [True]),
    unsupported=st.sampled_from(
        [frozenset[str]()] * 4 + [frozenset({"flush"}), frozenset({"discard"}), frozenset({"write_zeroes"})]
    ),
    read_only=st.sampled_from([False] * 9 + [True]),
)


@attrs.frozen(kw_only=True)
class Ask:
    """One operation of an application; range in blocks, cut to the disk."""

    name: Name
    block: int
    blocks: int
    fua: bool


asks = st.builds(
    Ask,
    name=st.sampled_from(["read", "write", "read", "write", "flush", "discard", "write_zeroes"]),
    block=st.integers(0, 40),
    blocks=st.sampled_from([1, 2, 8, 9, 40]),
    fua=st.booleans(),
)


#: Which of the things that a rule could take; more than there are begins anew.
indices = st.integers(0, 20)
#: Rules before a target's block may end: short lives and long ones.
lasts = st.sampled_from([30, 10, 0, 100])


def _pick(things: list[T], which: int) -> T:
    return things[which % len(things)]


@attrs.define(eq=False, kw_only=True)
class Served:
    """A disk under test, with what is known of it."""

    number: int
    plan: DiskPlan
    disk: Disk
    model: ByteModel
    start_scope: trio.CancelScope = attrs.Factory(trio.CancelScope)
    start_ended: bool = False
    stop_scopes: list[trio.CancelScope] = attrs.Factory(list)
    stops_running: int = 0
    device: Device | None = None
    sim: SimDevice | None = None
    block_device: SimBlockDevice | None = None
    stopping: bool = False
    #: When it was asked to stop, or the last operation ended since.
    progress_time: float = 0.0
    errors: list[BaseException] = attrs.Factory(list)

    def __str__(self) -> str:
        return f"disk {self.number}"


class EngineMachine(RuleBasedStateMachine):
    """See the module."""

    #: For reports: how many runs and rules there were, and what the first broken invariant was.
    runs: ClassVar[int] = 0
    steps: ClassVar[int] = 0
    broken: ClassVar[list[tuple[int, BrokenError]]] = []

    @classmethod
    def begin_count(cls) -> None:
        """Start counting anew."""
        cls.runs = cls.steps = 0
        cls.broken = []

    def __init__(self) -> None:
        super().__init__()
        EngineMachine.runs += 1
        self.served: list[Served] = []
        self.writes = FIRST_WRITE
        self.calm = False
        self.leaving: str | None = None
        self.undrawn: BaseException | None = None
        self.healthy = True
        self.run: PumpedRun | None = None

    # The run under test

    def choose(self, what: str, options: int) -> int:
        """A decision; drawn inside whatever the engine is just doing, so what the draw raises is kept for later."""
        if options == 1 or self.calm or self.undrawn is not None:
            return 0
        try:
            return self.data.draw(_INTEGERS[options], label=what)
        except BaseException as undrawn:
            self.undrawn = undrawn
            return 0

    @initialize(
        data=st.data(),
        calm_kernel=st.booleans(),
        patient=st.booleans(),
        live=st.booleans(),
        lasts=lasts,
        version=st.sampled_from([(7, 3), (7, 0), (6, 8), (6, 0)]),
        plan=disk_plans,
    )
    def begin(
        self,
        data: st.DataObject,
        calm_kernel: bool,
        patient: bool,
        live: bool,
        lasts: int,
        version: tuple[int, int],
        plan: DiskPlan,
    ) -> None:
        self.patient = patient
        self.data = data
        self.kernel = SimKernel(FirstChoice() if calm_kernel else DrawnChoices(self.choose), version=version)
        self._open(lasts)
        self._start_disk(plan)
        if live:
            with self._step():
                self._run_until_idle()

    def _open(self, lasts: int) -> None:
        self.may_leave_after = EngineMachine.steps + lasts
        self.scope = trio.CancelScope()
        self.leave_event = trio.Event()
        self.leaving = None
        self.served = []
        with self._step():
            self.run = PumpedRun(self._main, self.choose)
            self._run_until_idle()

    @precondition(lambda self: self.run is not None and self.run.ended)
    @rule(plan=disk_plans, lasts=lasts)
    def open_again(self, plan: DiskPlan, lasts: int) -> None:
        self._open(lasts)
        self._start_disk(plan)

    async def _main(self) -> None:
        with self.scope:
            async with open_target(self.kernel) as target:
                self.target: Target = target
                async with trio.open_nursery() as self.helpers:
                    await self.leave_event.wait()
                    self.helpers.cancel_scope.cancel()
                if self.leaving == "raise":
                    raise UserError

    async def _start(self, served: Served) -> None:
        plan = served.plan
        backend = (PlainDisk if plan.kind == "plain" else AsyncDisk)(served.disk, plan.unsupported)
        options = DeviceOptions(
            queues=plan.queues,
            depth=plan.depth,
            max_io_bytes=plan.max_io_bytes,
            mode=plan.mode,
            pool_buffers=plan.pool_buffers,
            serve=plan.serve,
            read_only=plan.read_only,
        )
        try:
            with served.start_scope:
                served.device = await self.target.start_device(backend, options)
        except OSError as error:
            if not plan.fails_to_open or error.args != (errno.ENXIO, "planned"):
                served.errors.append(error)
        except Exception as error:
            served.errors.append(error)
        finally:
            served.start_ended = True
        if served.device is not None:
            dev_id = served.device.dev_id
            served.sim = self.kernel.devices.get(dev_id)
            served.block_device = self.kernel.block_device(dev_id)

    async def _stop(self, served: Served, scope: trio.CancelScope) -> None:
        assert served.device is not None
        served.stops_running += 1
        try:
            with scope:
                await self.target.stop_device(served.device)
        except Exception as error:
            served.errors.append(error)
        finally:
            served.stops_running -= 1

    # Running it

    @contextmanager
    def _step(self) -> Iterator[None]:
        """A rule's frame: what it finds broken keeps `teardown` from looking on."""
        EngineMachine.steps += 1
        healthy, self.healthy = self.healthy, False
        try:
            yield
        except BrokenError as broken:
            EngineMachine.broken.append((EngineMachine.runs, broken))
            raise
        self.healthy = healthy

    def _pump(self, came_to_rest: bool) -> None:
        if self.undrawn is not None:
            raise self.undrawn
        demand(came_to_rest, "nothing hangs", f"still busy after {PASSES_MAX} passes")

    @property
    def pumped(self) -> PumpedRun:
        assert self.run is not None
        return self.run

    @property
    def inside(self) -> bool:
        """The target's block is still being executed."""
        return self.run is not None and not self.run.ended and self.leaving is None

    def waiting(self) -> list[tuple[Disk, Call]]:
        return [(served.disk, call) for served in self.served for call in served.disk.waiting()]

    # What a program does

    @precondition(
        lambda self: (
            self.inside
            and len(self.present()) < DISKS_MAX
            # With a limit, or most of a run would be starts; but something must always be possible.
            and (len(self.served) < STARTS_MAX or not self.live())
        )
    )
    @rule(plan=disk_plans)
    def start_another_disk(self, plan: DiskPlan) -> None:
        self._start_disk(plan)

    def _start_disk(self, plan: DiskPlan) -> None:
        disk = Disk(
            blocks=plan.blocks,
            choose=self.choose,
            troubles=plan.troubles,
            suspensions_max=plan.suspensions_max,
            fails_to_open=plan.fails_to_open,
        )
        model = ByteModel(disk, volatile_cache="flush" not in plan.unsupported)
        served = Served(number=len(self.served), plan=plan, disk=disk, model=model)
        with self._step():
            self.served.append(served)
            self.helpers.start_soon(self._start, served)

    def present(self) -> list[Served]:
        return [
            served
            for served in self.served
            if not served.start_ended or (served.device is not None and not served.device._closed.is_set())
        ]

    def starting(self) -> list[Served]:
        return [served for served in self.served if not served.start_ended and not served.start_scope.cancel_called]

    @precondition(lambda self: self.inside and bool(self.starting()))
    @rule(which=indices)
    def cancel_start(self, which: int) -> None:
        with self._step():
            _pick(self.starting(), which).start_scope.cancel()

    def live(self) -> list[Served]:
        return [served for served in self.served if served.device is not None and not served.stopping]

    @precondition(lambda self: self.inside and bool(self.live()))
    @rule(which=indices, wait=st.booleans())
    def stop(self, which: int, wait: bool) -> None:
        with self._step():
            served = _pick(self.live(), which)
            assert served.device is not None
            self._stop_begins(served)
            if wait:
                scope = trio.CancelScope()
                served.stop_scopes.append(scope)
                self.helpers.start_soon(self._stop, served, scope)
            else:
                served.device.ask_to_stop()

    def _stop_begins(self, served: Served) -> None:
        if not served.stopping:
            served.stopping = True
            served.progress_time = self.pumped.clock.current_time()

    def stop_scopes(self) -> list[trio.CancelScope]:
        return [scope for served in self.served if served.stops_running for scope in served.stop_scopes]

    @precondition(lambda self: self.inside and bool(self.stop_scopes()))
    @rule(which=indices)
    def cancel_wait_for_stop(self, which: int) -> None:
        with self._step():
            _pick(self.stop_scopes(), which).cancel()

    @precondition(lambda self: self.inside and EngineMachine.steps >= self.may_leave_after)
    @rule(how=st.sampled_from(["return", "raise", "cancel"]))
    def leave(self, how: str) -> None:
        with self._step():
            self._leave(how)

    def _leave(self, how: str) -> None:
        self.leaving = how
        for served in self.served:
            self._stop_begins(served)
        if how == "cancel":
            self.scope.cancel()
        else:
            self.leave_event.set()

    # What an application does

    def there(self) -> list[Served]:
        """The disks that an application could open; they may be going."""
        return [
            served
            for served in self.served
            if served.sim is not None and self.kernel.devices.get(served.sim.dev_id) is served.sim
        ]

    @precondition(lambda self: self.run is not None and not self.run.ended and bool(self.there()))
    @rule(which=indices, batch=st.lists(asks, min_size=1, max_size=6))
    def submit(self, which: int, batch: list[Ask]) -> None:
        with self._step():
            for ask in batch:
                self._submit(_pick(self.there(), which), ask)

    def _submit(self, served: Served, ask: Ask) -> None:
        assert served.block_device is not None
        blocks = served.plan.blocks
        first = min(ask.block, blocks - 1)
        count = min(ask.blocks, blocks - first) if ask.name != "flush" else 0
        offset, length = (first * BLOCK, count * BLOCK) if count else (0, 0)
        contents: list[bytes] = []
        if ask.name == "write":
            self.writes += 1
            contents = [content_of(self.writes, block) for block in range(first, first + count)]
        elif ask.name in ("discard", "write_zeroes"):
            contents = [ZEROES] * count
        data: bytes | int = b"".join(contents) if ask.name == "write" else length
        failures_before = len(served.disk.failures)
        bio = served.block_device.submit(OPS[ask.name], offset, data, fua=ask.fua)
        if bio.done:
            self._check_refusal(served, ask, bio.result, length)
            return
        served.model.begin(
            Operation(
                name=ask.name,
                bio=bio,
                offset=offset,
                length=length,
                fua=ask.fua and ask.name == "write",
                failures_before=failures_before,
                contents=contents,
            )
        )

    @staticmethod
    def _check_refusal(served: Served, ask: Ask, result: int | None, length: int) -> None:
        plan = served.plan
        if served.stopping and result in (-errno.EIO, -errno.ENXIO):
            return
        if ask.name == "flush":
            expected = 0 if "flush" in plan.unsupported or plan.read_only else None
        elif plan.read_only and ask.name != "read":
            expected = -errno.EPERM
        elif ask.name == "discard" and "discard" in plan.unsupported:
            expected = -errno.EOPNOTSUPP
        else:
            expected = None
        demand(result == expected, "the result is right", f"{ask} of {length} bytes ended at once with {result}")

    # What a backend and the machine do

    @precondition(lambda self: bool(self.waiting()))
    @rule(which=indices)
    def release(self, which: int) -> None:
        with self._step():
            disk, call = _pick(self.waiting(), which)
            disk.release(call)

    # Without preconditions: Hypothesis leaves rules out at random, and a run in which none is left is wasted.
    @rule(passes=st.integers(1, 4))
    def run_passes(self, passes: int) -> None:
        with self._step():
            for _ in range(passes):
                if not self.pumped.ended and self.undrawn is None:
                    self.pumped.run_pass()
            self._pump(True)

    @rule()
    def run_until_idle(self) -> None:
        with self._step():
            self._run_until_idle()

    def _run_until_idle(self) -> None:
        passes_max = self.pumped.passes + PASSES_MAX
        while not self.pumped.idle and self.undrawn is None and self.pumped.passes < passes_max:
            self.pumped.run_pass()
        self._pump(self.pumped.idle)

    @precondition(lambda self: self.run is not None and self.run.idle and self.run.seconds_to_next_deadline < math.inf)
    @rule(share=st.sampled_from([1.0, 0.5]))
    def let_time_pass(self, share: float) -> None:
        with self._step():
            # Only while nothing else can happen: a program that is not run for seconds is not what this is about.
            self.pumped.let_time_pass(share * self.pumped.seconds_to_next_deadline)
            self._pump(True)

    # What must hold

    @invariant()
    def all_is_well(self) -> None:
        if self.run is not None:
            with self._step():
                EngineMachine.steps -= 1
                self.check()

    def check(self) -> None:
        for violation in self.kernel.violations:
            raise BrokenError(f"the kernel's contract: {violation.kind}", violation)
        for served in self.served:
            demand(not served.disk.misuse, "the backend is used well", served.disk.misuse)
            demand(not served.errors, "nothing fails unasked", served.errors)
            self._check_operations(served)
        if self.pumped.ended:
            self._check_end()
            return
        idle = self.pumped.idle
        self._check_devices(idle=idle)
        for served in self.served:
            if served.device is not None and served.sim is not None:
                self._check_device(served, served.device, served.sim, idle=idle)
        if idle:
            self._check_progress()

    def _check_devices(self, *, idle: bool) -> None:
        listed = self.target.devices
        devices = [served.device for served in self.served if served.device is not None]
        there = {device for device in devices if not device._closed.is_set()}
        # A device whose start was cancelled at the last moment is nobody's, but listed while it stops.
        settled = idle and not any(served.disk.running for served in self.served)
        demand(
            there == set(listed) if settled else there <= set(listed),
            "the target lists its devices",
            f"{listed} are listed, {there} are there",
        )

    def _check_operations(self, served: Served) -> None:
        ended = [operation for operation in served.model.in_flight if operation.bio.done]
        for operation in ended:
            served.model.end(operation, may_fail=served.stopping)
        if ended:
            served.progress_time = self.pumped.clock.current_time()

    def _check_device(self, served: Served, device: Device, sim: SimDevice, *, idle: bool) -> None:
        if len(sim.rings) != len(device._queues):
            return  # being taken down
        serving = 0
        for queue, sim_queue in zip(device._queues, sim.queues, strict=True):
            for tag in range(queue.tags.depth):
                self._check_tag(served, queue, sim_queue.tags[tag], idle=idle)
            if queue._pool is not None:
                self._check_pool(served, queue)
            if idle:
                demand(not queue._answers, "the tag tables agree", f"{served}: answers were not sent")
            serving += sum(self._is_served(queue, tag) for tag in queue.tags.in_states(frozenset({TagState.SERVING})))
        if idle:
            running = [call for call in served.disk.running if call.name not in ("open", "close")]
            demand(
                serving == len(running),
                "the tag tables agree",
                f"{served}: {serving} requests are being served, by {len(running)} calls",
            )

    @staticmethod
    def _is_served(queue: Queue, tag: int) -> bool:
        return queue._pool is None or queue._requests[tag].op not in _DATA_OPS or queue.ring.slots[tag] != NO_SLOT

    @staticmethod
    def _check_tag(served: Served, queue: Queue, sim: SimTag, *, idle: bool) -> None:
        state, flags = queue.tags[sim.tag], sim.flags
        unsent = bool(queue._answers)
        unseen = operator.length_hint(queue.events) > 0
        if state is TagState.FETCHING:
            with_kernel = flags == ACTIVE and (not idle or sim.request is None)
            on_its_way = bool(flags & OWNED_BY_SRV) and (unsent or unseen)
            agrees = with_kernel or on_its_way or bool(flags & CANCELED and not idle)
        elif state is TagState.SERVING:
            agrees = flags == OWNED_BY_SRV and sim.request is not None
        elif state is TagState.ANNOUNCED:
            agrees = flags == OWNED_BY_SRV | NEED_GET_DATA
        elif state is TagState.GETTING_DATA:
            agrees = not idle and bool(flags & NEED_GET_DATA or (flags & OWNED_BY_SRV and unseen))
        elif state is TagState.CLOSED:
            agrees = bool(flags & CANCELED)
        else:
            agrees = False
        demand(
            agrees,
            "the tag tables agree",
            f"{served} queue {queue.queue_id} tag {sim.tag}: engine {state.name}, kernel {TagFlag(flags)!r} with "
            f"{sim.request}; idle={idle}, unsent={unsent}, unseen={unseen}",
        )

    @staticmethod
    def _check_pool(served: Served, queue: Queue) -> None:
        assert queue._pool is not None
        places = sorted([*queue._pool._free, *(slot for slot in queue.ring.slots if slot != NO_SLOT)])
        demand(
            places == list(range(len(queue.ring.buffers))),
            "every buffer is in one place",
            f"{served} queue {queue.queue_id}: {places}",
        )

    def _check_progress(self) -> None:
        now = self.pumped.clock.current_time()
        held = [call for served in self.served for call in served.disk.running]
        for served in self.served:
            if not held:
                self._demand_settled(served)
            elif served.stopping and now > served.progress_time + STOP_SECONDS_MAX:
                closing = any(call.name in ("open", "close") for call in held)
                demand(
                    closing or not served.model.in_flight,
                    "a stop is bounded",
                    f"{served} still has {served.model.in_flight}",
                )
        demand(held or self.leaving is None, "nothing hangs", f"the target has not ended; {self.kernel.leftovers()}")

    def _demand_settled(self, served: Served) -> None:
        leftovers = self.kernel.leftovers()
        demand(not served.model.in_flight, "nothing hangs", f"{served}: {served.model.in_flight}; {leftovers}")
        demand(served.start_ended, "nothing hangs", f"{served} has not started; {leftovers}")
        demand(not served.stops_running, "nothing hangs", f"{served} has not stopped; {leftovers}")
        if served.device is not None and served.stopping:
            demand(served.disk.closed == served.disk.opened, "nothing hangs", f"{served} has not stopped; {leftovers}")

    def _check_end(self) -> None:
        error = self.pumped.error
        planned = isinstance(error, UserError) if self.leaving == "raise" else error is None
        demand(planned, "nothing fails unasked", f"the target's block ended with {error!r}")
        demand(not self.kernel.leftovers(), "nothing is left", self.kernel.leftovers())
        for served in self.served:
            disk = served.disk
            demand(not served.model.in_flight, "nothing is left", served.model.in_flight)
            demand(disk.opened == disk.closed <= 1, "the backend is used well", f"{disk.opened=} {disk.closed=}")
            demand(not disk.running, "nothing is left", disk.running)

    # The end

    def teardown(self) -> None:
        if self.run is None:
            return
        try:
            if self.healthy:
                with self._step():
                    self._live_on()
        finally:
            self.calm = True
            self.run.abandon()

    def _live_on(self) -> None:
        """No more troubles: either whatever is under way must now end well, or the target ends while backends hold it."""
        self.calm = True
        if not self.patient:
            self._end_impatiently()
        for served in self.served:
            served.disk.calm_down()
        self._rest()
        if self.inside:
            for served in self.there():
                if not served.stopping:
                    self._submit(served, Ask(name="read", block=0, blocks=served.plan.blocks, fua=False))
                    self._submit(served, Ask(name="flush", block=0, blocks=0, fua=False))
            self._rest()
            self._leave("return")
            self._rest()
        demand(self.pumped.ended, "nothing hangs", "the target has not ended")

    def _end_impatiently(self) -> None:
        """Leave, and let time pass: no handler goes on by itself, but opening and closing do."""
        if self.inside:
            self._leave("return")
        self._rest()
        for _ in range(DEADLINES_MAX):
            opening = [(disk, call) for disk, call in self.waiting() if call.name in ("open", "close")]
            for disk, call in opening:
                disk.release(call)
            if not opening:
                if self.pumped.seconds_to_next_deadline == math.inf:
                    break
                self.pumped.let_time_pass(self.pumped.seconds_to_next_deadline)
            self._rest()
        waiting = [call for _, call in self.waiting()]
        demand(self.pumped.ended, "a stop is bounded", f"the target has not ended; {waiting} are running")

    def _rest(self) -> None:
        self._run_until_idle()
        self.check()
