"""What must hold of a target after each of its steps.

| invariant | means |
|---|---|
| the result is right, an error has its cause, a failed call fails its request | each operation ended once, as its backend's calls say |
| what was written is what is read | against `model.ByteModel` |
| a flush flushed what came before, a FUA write is durable | against the backend's model of its cache |
| the kernel's contract: … | what the simulator forbids a server (`SimKernel.check`) |
| the target lists its devices | every live device is in `Target.devices` until it is gone |
| the tag tables agree | engine and simulator say the same of each tag; strictly when nothing is runnable |
| every buffer is in one place | free, or on one tag, or lent until a worker has sent its answer |
| the backend is used well | open exactly while it is called, closed once, no call running then, no call out of bounds |
| nothing hangs | nothing is runnable, the backends hold nothing, nothing is tried again soon, and yet something has not ended |
| a stop is bounded | … whatever the backends hold |
| nothing fails unasked | every task's exceptions are planned ones |
| nothing is left | in the kernel and of the operations, when the target has ended |
| a killed server's requests end, a dead server's disks go | by the kernel alone, and can be deleted by another process |
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.property.model import BrokenError, demand
from tests.property.pumped import PumpedRun

if TYPE_CHECKING:
    from tests.property.engine_run import EngineRun
    from tests.property.served import Served

#: Seconds (virtual) that a stop may take after the last operation ended: its grace time, and what comes on top.
STOP_SECONDS_MAX = 30.0


class UserError(Exception):
    """What the user's block raises."""


def check(run: EngineRun) -> None:
    """All of them that can be looked at now."""
    for violation in run.kernel.violations:
        raise BrokenError(f"the kernel's contract: {violation.kind}", violation)
    now = run.now
    for served in run.served:
        demand(not served.disk.misuse, "the backend is used well", served.disk.misuse)
        demand(not served.errors, "nothing fails unasked", served.errors)
        served.check_operations(now)
    if run.ended:
        _check_end(run)
        return
    idle = run.pumped.idle
    _check_devices(run, idle=idle)
    for served in run.served:
        served.check_device(idle=idle)
    if idle:
        _check_progress(run, now)


def _check_devices(run: EngineRun, *, idle: bool) -> None:
    listed = run.target._devices
    there = {served.device for served in run.served if served.device is not None and served.present}
    # A device whose start was cancelled at the last moment is nobody's, but listed while it stops.
    settled = idle and not any(served.disk.running for served in run.served)
    demand(
        there == listed if settled else there <= listed,
        "the target lists its devices",
        lambda: f"{run.target.devices} are listed, {there} are there",
    )


def _check_progress(run: EngineRun, now: float) -> None:
    held = [call for served in run.served for call in served.disk.running]
    if not held and run.tries_again_soon:
        return
    for served in run.served:
        if not held:
            _demand_settled(run, served)
        elif served.stopping and now > served.progress_time + STOP_SECONDS_MAX:
            closing = any(call.name in ("open", "close") for call in held)
            demand(
                closing or not served.model.in_flight,
                "a stop is bounded",
                f"{served} still has {served.model.in_flight}",
            )
    demand(held or run.leaving is None, "nothing hangs", lambda: f"the target has not ended; {run.kernel.leftovers()}")


def _demand_settled(run: EngineRun, served: Served) -> None:
    gone = served.device is None or not served.stopping or served.disk.closed == served.disk.opened
    if served.model.in_flight or not served.start_ended or served.stops_running or not gone:
        leftovers = run.kernel.leftovers()
        demand(not served.model.in_flight, "nothing hangs", f"{served}: {served.model.in_flight}; {leftovers}")
        demand(served.start_ended, "nothing hangs", f"{served} has not started; {leftovers}")
        raise BrokenError("nothing hangs", f"{served} has not stopped; {leftovers}")


def _check_end(run: EngineRun) -> None:
    error = run.pumped.error
    planned = isinstance(error, UserError) if run.leaving == "raise" else error is None
    demand(planned, "nothing fails unasked", f"the target's block ended with {error!r}")
    demand(not run.kernel.leftovers(), "nothing is left", run.kernel.leftovers())
    for served in run.served:
        disk = served.disk
        demand(not served.model.in_flight, "nothing is left", served.model.in_flight)
        demand(disk.opened == disk.closed <= 1, "the backend is used well", f"{disk.opened=} {disk.closed=}")
        demand(not disk.running, "nothing is left", disk.running)


def demand_ended(run: PumpedRun) -> None:
    """A run that nothing disturbed has ended without an error."""
    demand(run.ended and run.error is None, "nothing fails unasked", repr(run.error))
