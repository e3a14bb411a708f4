"""A random run of a mirror: what applications ask, members that fail, are removed and rebuilt, cancellations, a crash.

A run is a list of `Step`s and two tapes of decisions: in which order tasks run and for how long calls suspend, and what
a crash leaves. In the end the members' power fails, with operations in flight or not: **each** member in sync by itself
must then hold what was promised. What must hold besides is `Mirror.check` and what stands at each `demand`.
"""

from __future__ import annotations

import contextlib
import copy
import errno
from collections.abc import Callable
from functools import partial
from typing import Literal
from unittest import mock

import attrs
import hypothesis.strategies as st
import trio
import trio.testing

from tests.backends.raid_members import SECTOR, Member, When
from ublk_trio import UsageError
from ublk_trio.backends import MemberState, Raid1, raid1
from ublk_trio.kernel_sim import Choices, FirstChoice, scheduled_by
from ublk_trio.nursery import single_error
from ublk_trio.testing import BrokenPromiseError, DurabilityModel, Operation, TapeChoices

SECTORS = 16
SIZE = SECTORS * SECTOR
#: Four windows a rebuild.
WINDOW = 4 * SECTOR
#: Members and backends that may join later.
BACKENDS = 4
#: What the members contain at first: no two sectors are alike, and none is empty as those of the others.
CONTENT = b"".join(bytes([0xA0 + sector]) * SECTOR for sector in range(SECTORS))
#: Virtual seconds in which every operation must end: a call suspends for one at most.
SECONDS_MAX = 1000.0
#: A member that is broken fails so many calls.
BROKEN_TIMES = 1000
Name = Literal["read", "write", "flush", "discard", "write_zeroes"]
_NAMES: tuple[Name, ...] = ("write", "read", "flush", "write_zeroes", "discard")


@attrs.frozen(kw_only=True)
class Ask:
    """An application asks for something, and some backends fail the next call that may be for it."""

    operation: Operation
    failing: frozenset[int] = frozenset()
    when: When = "before"


@attrs.frozen(kw_only=True)
class Fail:
    """The next calls of a backend fail."""

    backend: int
    call: str
    number: int
    when: When
    times: int


@attrs.frozen(kw_only=True)
class Change:
    """A member is removed, or a backend rebuilt."""

    what: Literal["remove", "rebuild", "mend"]
    backend: int


@attrs.frozen(kw_only=True)
class Cancel:
    """The oldest thing of a kind that is going on is cancelled."""

    what: Literal["operation", "change"]


@attrs.frozen(kw_only=True)
class Pass:
    """Tasks get on: by some passes, or until all operations, or all there is, have ended."""

    until: Literal["passes", "operations", "all"]
    passes: int = 0


Step = Ask | Fail | Change | Cancel | Pass


@attrs.frozen(kw_only=True)
class Program:
    """What happens in a run."""

    #: How many members the disk has at first.
    members: int
    steps: list[Step]


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Programs of a run. A swarm: each has only some kinds of steps, or few would have the same kind twice."""
    names = draw(st.sampled_from([("write", "flush"), ("write", "read"), ("write", "write_zeroes", "read"), _NAMES]))
    faulty, changing, cancelling = draw(st.tuples(st.booleans(), st.booleans(), st.booleans()))
    backend = st.integers(0, BACKENDS - 1)
    when = st.sampled_from(["before", "middle", "after"])
    sector, length = st.integers(0, SECTORS - 1), st.sampled_from([1, 2, 4, 8])

    def operation(name: Name, first: int, count: int, fua: bool) -> Operation:
        if name == "flush":
            return Operation(name=name)
        return Operation(name=name, offset=first * SECTOR, length=min(count, SECTORS - first) * SECTOR, fua=fua)

    asked = st.builds(operation, st.sampled_from(names), sector, length, st.booleans())
    failing = st.just(frozenset[int]()) | st.frozensets(backend, max_size=2) if faulty else st.just(frozenset[int]())
    kinds: list[st.SearchStrategy[Step]] = [
        st.builds(Ask, operation=asked, failing=failing, when=when),
        st.builds(Pass, until=st.sampled_from(["passes", "passes", "operations", "all"]), passes=st.integers(1, 8)),
    ]
    if faulty:
        kinds.append(
            st.builds(
                Fail,
                backend=backend,
                call=st.sampled_from(["", *_NAMES]),
                number=st.sampled_from([errno.EIO, errno.ENOSPC, errno.ENOMEM]),
                when=when,
                times=st.sampled_from([1, 1, 2, BROKEN_TIMES]),
            )
        )
    if changing:
        what = st.sampled_from(["rebuild", "rebuild", "remove", "mend"] if faulty else ["rebuild", "remove"])
        kinds.append(st.builds(Change, what=what, backend=backend))
    if cancelling:
        kinds.append(st.builds(Cancel, what=st.sampled_from(["operation", "change"])))
    # Asking twice as often as the rest.
    step = st.one_of(kinds[0], *kinds)
    return Program(
        members=draw(st.integers(1, 3)),
        steps=draw(st.lists(step, min_size=1, max_size=10) | st.lists(step, min_size=10, max_size=25)),
    )


def demand(condition: object, invariant: str, text: object) -> None:
    """Raises `BrokenPromiseError` unless the condition holds."""
    if not condition:
        raise BrokenPromiseError(f"{invariant}: {text}")


@attrs.define(eq=False)
class _Going:
    """Something that is going on."""

    name: str
    scope: trio.CancelScope = attrs.Factory(trio.CancelScope)


class Mirror:
    """One run."""

    def __init__(self, members: int, choices: Choices, crash_choices: Choices) -> None:
        self.choices = choices
        self.backends = [Member(SIZE, choices=choices, name=f"b{number}") for number in range(BACKENDS)]
        for number, backend in enumerate(self.backends):
            backend.storage.choices = crash_choices
            if number < members:
                backend.storage.write(0, CONTENT, fua=True)
                backend.storage.flush()
        self.disk = Raid1(self.backends[:members])
        self.model = DurabilityModel(CONTENT, volatile_cache=True)
        self.operations: list[_Going] = []
        self.changes: list[_Going] = []
        self.writes = 0
        #: Sectors in which members may differ: a discard of them failed somewhere.
        self.loose: set[int] = set()
        #: How often each backend has been rebuilt.
        self.rebuilt = [0] * len(self.backends)
        self.cancelled = False

    async def main(self, steps: list[Step]) -> None:
        await self.disk.open()
        try:
            async with trio.open_nursery() as nursery:
                with trio.fail_after(SECONDS_MAX * (len(steps) + 1)):
                    for step in steps:
                        await self._take(step, nursery)
                        self.check()
                self.crash()
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await self.disk.aclose()
        for backend in self.backends:
            demand(not backend.misuse, "backends are used well", backend.misuse)
            demand(backend.opened == backend.closed, "what was opened is closed", backend)

    async def _take(self, step: Step, nursery: trio.Nursery) -> None:
        match step:
            case Ask():
                going = _Going(step.operation.name)
                self.operations.append(going)
                for number in step.failing:
                    self.backends[number].fail(step.operation.name, when=step.when)
                nursery.start_soon(self._operate, going, step.operation)
                await trio.lowlevel.checkpoint()
            case Fail():
                backend = self.backends[step.backend]
                backend.fail(step.call, number=step.number, when=step.when, times=step.times)
                if step.number == errno.ENOMEM:
                    # For ever is no lack of resources.
                    backend.faults[-1].times = min(step.times, 3)
            case Change(what="mend"):
                self.backends[step.backend].faults.clear()
            case Change():
                going = _Going(step.what)
                self.changes.append(going)
                nursery.start_soon(self._change, going, step.backend)
            case Cancel(what="operation"):
                for going in self.operations[:1]:
                    self.cancelled = True
                    going.scope.cancel()
            case Cancel():
                for going in self.changes[:1]:
                    going.scope.cancel()
            case Pass(until="passes"):
                for _ in range(step.passes):
                    await trio.lowlevel.checkpoint()
            case Pass():
                busy: Callable[[], object] = (
                    (lambda: self.operations) if step.until == "operations" else lambda: self.operations or self.changes
                )
                with trio.move_on_after(SECONDS_MAX) as bound:
                    while busy():  # noqa: ASYNC110 - virtual time, and nobody announces it
                        await trio.sleep(0.1)
                demand(not bound.cancelled_caught, "everything ends", [going.name for going in self.operations])
                self.check_equal()

    # What goes on

    async def _operate(self, going: _Going, operation: Operation) -> None:
        name, offset, length = operation.name, operation.offset, operation.length
        buffer = memoryview(bytearray(length))
        model = self.model
        call: Callable[[], object]
        if name == "write":
            self.writes += 1
            # No two writes and no two sectors are alike.
            data = b"".join((self.writes << 32 | sector).to_bytes(8, "big") * 64 for sector in range(length // SECTOR))
            pending = model.begin_write(offset, data, fua=operation.fua)
            call = partial(self.disk.write, offset, memoryview(data), fua=operation.fua)
        elif name == "read":
            pending, call = model.begin_read(offset, length), partial(self.disk.read, offset, buffer)
        elif name == "flush":
            pending, call = model.begin_flush(), self.disk.flush
        elif name == "discard":
            pending, call = model.begin_discard(offset, length), partial(self.disk.discard, offset, length)
        else:
            pending = model.begin_write_zeroes(offset, length)
            call = partial(self.disk.write_zeroes, offset, length, unmap=operation.fua)
        before = self._standing()
        failed = True
        try:
            with going.scope:
                await call()
                failed = False
        except OSError as failure:
            if failure.errno == errno.ENOMEM:
                demand(name == "read", "only a read hands ENOMEM on", name)
            else:
                innocent = before & self._standing()
                demand(not innocent, "no request fails while a member is well", f"{pending}, {innocent}")
        finally:
            if name == "discard" and (failed or any(backend.failures for backend in self.backends)):
                self.loose |= set(range(pending.first, pending.end))
            model.end(pending, failed=failed, data=bytes(buffer) if name == "read" else b"")
            self.operations.remove(going)

    def _standing(self) -> set[tuple[str, int, int]]:
        """The members in sync, with what would tell that one of them failed meanwhile."""
        in_sync = {member.backend for member in self.disk.status().members if member.state is MemberState.IN_SYNC}
        return {
            (backend.name, backend.failures, rebuilt)
            for backend, rebuilt in zip(self.backends, self.rebuilt, strict=True)
            if backend.name in in_sync
        }

    async def _change(self, going: _Going, number: int) -> None:
        backend = self.backends[number]
        try:
            with going.scope, contextlib.suppress(UsageError):
                if going.name == "remove":
                    await self.disk.remove(backend)
                else:
                    with contextlib.suppress(OSError):
                        self.rebuilt[number] += 1
                        await self.disk.rebuild(backend)
        finally:
            self.changes.remove(going)

    # What must hold

    def check(self) -> None:
        """At any moment."""
        members = self.disk.status().members
        demand(any(one.state is MemberState.IN_SYNC for one in members), "a member is in sync always", members)
        for one in members:
            demand(one.error != "ENOMEM", "a member short of resources stays", one)
            demand((one.error is None) == (one.state is not MemberState.FAILED), "an error says why it is out", one)

    def check_equal(self) -> None:
        """When no operation is in flight: the members in sync are equal."""
        first, *others = self._in_sync()
        for other in others:
            different = {
                sector
                for sector in range(SECTORS)
                if first.content[sector * SECTOR :][:SECTOR] != other.content[sector * SECTOR :][:SECTOR]
            }
            demand(different <= self.loose, "members in sync are equal", f"{first} and {other} in {different}")

    def _in_sync(self) -> list[Member]:
        names = {one.backend for one in self.disk.status().members if one.state is MemberState.IN_SYNC}
        return [backend for backend in self.backends if backend.name in names]

    def crash(self) -> None:
        """The power of all members fails, and all but one are lost: whichever it is, it holds what was promised."""
        self.check()
        if not self.operations:
            self.check_equal()
        for survivor in self._in_sync():
            storage = survivor.storage.crash()
            model = copy.deepcopy(self.model)
            model.crash()
            content = bytearray(SIZE)
            storage.read(0, content)
            pending = model.begin_read(0, SIZE)
            try:
                model.end(pending, data=bytes(content))
            except BrokenPromiseError as broken:
                raise BrokenPromiseError(f"what was promised survives on each member: {survivor}: {broken}") from None


def run(program: Program, choices: Choices | None = None, crash_choices: Choices | None = None) -> None:
    """One run. Raises `BrokenPromiseError`."""
    choices = choices or FirstChoice()
    mirror = Mirror(program.members, choices, crash_choices or FirstChoice())
    with mock.patch.object(raid1, "WINDOW_BYTES", WINDOW), scheduled_by(choices):
        try:
            trio.run(mirror.main, program.steps, clock=trio.testing.MockClock(autojump_threshold=0))
        except BaseExceptionGroup as group:
            error = single_error(group)
            raise group if error is None else error from None


def tapes() -> st.SearchStrategy[TapeChoices]:
    """Decisions; the second kind is long enough for a whole run."""
    return (st.binary(max_size=200) | st.binary(min_size=60, max_size=200)).map(TapeChoices)
