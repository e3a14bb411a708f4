"""A target with its disks, in a Trio run that is pumped by hand, from its opening to its end or its death."""

from __future__ import annotations

import errno
import math
from collections.abc import Collection

import attrs
import trio

from tests.property.disks import FIRST_WRITE, AsyncDisk, Call, Disk, PlainDisk
from tests.property.invariants import UserError, check, demand_ended
from tests.property.model import BrokenError, ByteModel, demand
from tests.property.plans import Ask, DiskPlan
from tests.property.pumped import PumpedRun
from tests.property.served import Served
from tests.property.tape import Tape
from ublk_trio import DataMode, DeviceOptions, KernelError, SimKernel, Target, open_target
from ublk_trio.back_pressure import RETRY_SECONDS
from ublk_trio.control import open_control
from ublk_trio.uapi import FEATURE_RELEASE, Feature

PASSES_MAX = 3_000
#: The faults that a disk has only if its plan says so.
FAILURES = frozenset({"backend-raises", "backend-short"})
#: A little more than a request's time limit.
NOTICE_SECONDS = 31.0
#: Deadlines that may pass while a target ends.
DEADLINES_MAX = 50
#: What sums of virtual seconds may be off.
ROUNDING_SECONDS = 1e-6
#: Errnos of commands that fail by a fault, by its name.
COMMAND_ERRNOS = {"no-memory": errno.ENOMEM, "interrupted": errno.EINTR}


class EngineRun:
    """One life of a server."""

    def __init__(
        self, kernel: SimKernel, tape: Tape, faults: frozenset[str], cpus: Collection[int] | None = None
    ) -> None:
        self.kernel = kernel
        self.cpus = cpus
        self.tape = tape
        self.faults = faults
        self.scope = trio.CancelScope()
        self.leave_event = trio.Event()
        #: How the target's block is being left.
        self.leaving: str | None = None
        self.killed = False
        self.served: list[Served] = []
        self.writes = FIRST_WRITE
        self._kills = kernel.kills
        self.pumped = PumpedRun(self._main, tape.choose)
        self.run_until_idle()

    # Its tasks

    async def _main(self) -> None:
        with self.scope:
            async with open_target(self.kernel, cpus=self.cpus) as target:
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
        except KernelError as error:
            if error.errno not in {COMMAND_ERRNOS.get(fault) for fault in self.faults}:
                served.errors.append(error)
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

    @property
    def ended(self) -> bool:
        return self.pumped.ended

    @property
    def inside(self) -> bool:
        """The target's block is still being executed."""
        return not self.ended and self.leaving is None

    @property
    def now(self) -> float:
        return self.pumped.clock.current_time()

    def run_passes(self, passes: int) -> None:
        """So many passes of the scheduler, or until the server is dead."""
        for _ in range(passes):
            if self.ended or self.kernel.kills != self._kills:
                break
            self.pumped.run_pass()
        self._bury_the_dead()

    def run_until_idle(self) -> None:
        """Until no task can run, or the server is dead."""
        pumped, kernel = self.pumped, self.kernel
        passes_max = pumped.passes + PASSES_MAX
        while not pumped.idle and kernel.kills == self._kills and pumped.passes < passes_max:
            pumped.run_pass()
        self._bury_the_dead()
        demand(pumped.idle, "nothing hangs", f"still busy after {PASSES_MAX} passes")

    def let_time_pass(self, seconds: float) -> None:
        self.pumped.let_time_pass(seconds)
        self._bury_the_dead()

    def check(self) -> None:
        """Raise `BrokenError` if an invariant does not hold now."""
        if not self.killed:
            check(self)

    # What a program does

    def start_disk(self, plan: DiskPlan) -> None:
        if plan.mode is DataMode.USER_COPY and self.kernel.version < FEATURE_RELEASE[Feature.USER_COPY]:
            plan = attrs.evolve(plan, mode=DataMode.GET_DATA)
        disk = Disk(
            blocks=plan.blocks,
            choose=self.tape.choose,
            faults=self.faults if plan.troubles else self.faults - FAILURES,
            suspensions_max=plan.suspensions_max,
            fails_to_open=plan.fails_to_open,
        )
        model = ByteModel(
            disk,
            volatile_cache="flush" not in plan.unsupported,
            copies_fall_short=plan.mode is DataMode.USER_COPY and "copy-short" in self.faults,
        )
        served = Served(number=len(self.served), plan=plan, disk=disk, model=model)
        self.served.append(served)
        self.helpers.start_soon(self._start, served)

    def stop(self, served: Served, *, wait: bool) -> None:
        assert served.device is not None
        served.begin_stop(self.now)
        if wait:
            scope = trio.CancelScope()
            served.stop_scopes.append(scope)
            self.helpers.start_soon(self._stop, served, scope)
        else:
            served.device.ask_to_stop()

    def leave(self, how: str) -> None:
        self.leaving = how
        for served in self.served:
            served.begin_stop(self.now)
        if how == "cancel":
            self.scope.cancel()
        else:
            self.leave_event.set()

    def submit(self, served: Served, ask: Ask) -> None:
        served.submit(ask, self._next_write)

    def _next_write(self) -> int:
        self.writes += 1
        return self.writes

    # What there is

    def starting(self) -> list[Served]:
        return [served for served in self.served if not served.start_ended and not served.start_scope.cancel_called]

    def present(self) -> list[Served]:
        return [served for served in self.served if served.present]

    def live(self) -> list[Served]:
        return [served for served in self.served if served.live]

    def there(self) -> list[Served]:
        """The disks that an application could open; they may be going."""
        if self.ended:
            return []
        devices = self.kernel.devices
        return [
            served for served in self.served if served.sim is not None and devices.get(served.sim.dev_id) is served.sim
        ]

    @property
    def tries_again_soon(self) -> bool:
        """A deadline is so near that it can only be that of requests that the backend had no resources for."""
        return self.pumped.seconds_to_next_deadline <= RETRY_SECONDS + ROUNDING_SECONDS

    def stop_scopes(self) -> list[trio.CancelScope]:
        return [scope for served in self.served if served.stops_running for scope in served.stop_scopes]

    def waiting(self) -> list[tuple[Disk, Call]]:
        """The calls of backends that wait to be released."""
        return [(served.disk, call) for served in self.served for call in served.disk.waiting()]

    # Its death

    def kill(self) -> None:
        """The process dies between two of its steps."""
        self.kernel.kill_server()
        self._bury_the_dead()

    def _bury_the_dead(self) -> None:
        """After a kill: nothing of the process runs any more, and the kernel must have ended all that it held of it."""
        if self.killed or self.kernel.kills == self._kills:
            return
        self.killed = True
        self.pumped.abandon()
        # A task that was just starting a disk may have opened one more char device on its way out.
        self.kernel.kill_server()
        # Before 6.15 it may be only a request's time limit that tells the kernel of a dead server.
        self.kernel.let_time_pass(NOTICE_SECONDS)
        for violation in self.kernel.violations:
            raise BrokenError(f"the kernel's contract: {violation.kind}", violation)
        for served in self.served:
            served.stopping = True
            served.check_operations(self.now)
            demand(not served.model.in_flight, "a killed server's requests end", f"{served}: {served.model.in_flight}")
        self.tape.load(b"")
        _delete_devices(self.kernel)
        demand(not self.kernel.leftovers(), "nothing is left", self.kernel.leftovers())

    # Its end: the liveness phase

    def live_on(self, *, patient: bool) -> None:
        """Faults have stopped: whatever is under way must now end well, or the target ends while backends hold it."""
        if self.killed:
            return
        if not patient:
            self._end_impatiently()
        for served in self.served:
            served.disk.calm_down()
        self._rest()
        if self.inside:
            for served in self.there():
                if not served.stopping:
                    self.submit(served, Ask(name="read", block=0, blocks=served.plan.blocks, fua=False))
                    self.submit(served, Ask(name="flush", block=0, blocks=0, fua=False))
            self._rest()
            self.leave("return")
            self._rest()
        demand(self.ended, "nothing hangs", "the target has not ended")

    def _end_impatiently(self) -> None:
        """Leave, and let time pass: no handler goes on by itself, but opening and closing do."""
        if self.inside:
            self.leave("return")
        self._rest()
        for _ in range(DEADLINES_MAX):
            opening = [(disk, call) for disk, call in self.waiting() if call.name in ("open", "close")]
            for disk, call in opening:
                disk.release(call)
            if not opening:
                if self.pumped.seconds_to_next_deadline == math.inf:
                    break
                self.let_time_pass(self.pumped.seconds_to_next_deadline)
            self._rest()
        waiting = [call for _, call in self.waiting()]
        demand(self.ended, "a stop is bounded", f"the target has not ended; {waiting} are running")

    def _rest(self) -> None:
        """Until nothing more happens by itself, but for what the backends hold and deadlines that are none of theirs."""
        self.run_until_idle()
        self.check()
        for _ in range(DEADLINES_MAX):
            if not self.tries_again_soon:
                return
            self.let_time_pass(self.pumped.seconds_to_next_deadline)
            self.run_until_idle()
            self.check()


def _delete_devices(kernel: SimKernel) -> None:
    """What an administrator does after a server died: delete its devices."""

    async def delete() -> None:
        async with open_control(kernel) as control:
            for dev_id in kernel.device_ids():
                await control.delete_device(dev_id)

    run = PumpedRun(delete, lambda what, options: 0)
    try:
        demand(
            run.run_until_idle(passes_max=PASSES_MAX) and run.ended, "a dead server's disks go", kernel.held_commands()
        )
        demand_ended(run)
    finally:
        run.abandon()
