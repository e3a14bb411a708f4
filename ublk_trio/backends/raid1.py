"""`Raid1`: mirroring, so that a disk outlives all its members but one.

What holds, and why:

- **Members in sync are equal**, but for ranges that a request is changing just now and for discarded ones. A disk may
  do overlapping requests in any order, so two members would do them in two orders: whoever changes a range holds its
  lock until every member has done it.
- **An answered write is on every member in sync.** A member that fails a write or a flush is taken out before the
  answer: its state becomes failed, and nothing is read from it any more. Linux' md and SPDK's raid1 do the same.
- **The last member in sync is never taken out.** What it fails, the application sees. When a request fails on all, the
  first member stays, and the others go: what each made of the request is not known.
- **A failed read is served by another member**, and then written back to the one that failed and read again, which
  makes a medium replace its bad block. Only a member that fails that is taken out. (md does both, SPDK writes back.)
  If no member can read it, the application sees the error, and all stay.
- A failed **discard** takes nobody out: the content of the range does not matter any more. It fails when all fail it.
- **ENOMEM** from a member means "not now", here as for a device: a change is tried again on that member; a read, which
  changes nothing, is left to the caller to try again.
- **A cancelled change** leaves members where it was done, and others where nobody knows. Those are taken out, but the
  first if it was done on none.
- **Reads** go to the member with the fewest reads in flight, so that a slow one gets fewer; of these to the one that
  read just before this place, so that a sequence stays on one member and its read-ahead; of these to the one that
  served the fewest.
- **A rebuild** copies range by range, each under its lock, while requests go on. All changes go to the member that is
  being rebuilt too, so a range stays equal once it is copied. Before it counts as in sync it is flushed: what was on
  stable storage elsewhere must be on its own. A change that fails on all members in sync ends the rebuild, because
  the new member may differ from the one that stays.

**There is no superblock**: nothing on the members says that they belong together, or which are out. Whoever makes the
disk gives it members that are equal. After an unclean end (a power failure, a killed server, a cancelled device) the
ranges that were being written may differ, so make the disk of one member that was in sync, and `rebuild` the others.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import Enum
from functools import partial
from typing import Final

import attrs
import trio

from ublk_trio.backends.base import Backend, capabilities
from ublk_trio.backends.range_lock import RangeLock
from ublk_trio.backends.stacked import Base, Stacked
from ublk_trio.backends.together import run_together
from ublk_trio.errors import StuckError, UsageError, errno_name, errno_text

logger = logging.getLogger("ublk_trio.backend")

#: Bytes that a rebuild copies at a time, and all the memory that it takes. A write to them waits so long.
WINDOW_BYTES: Final = 1 << 20
#: Seconds until a member that had no resources is asked again.
NO_MEMORY_SECONDS: Final = 0.001
#: Seconds that a member which is removed has for the requests that it still has; then they are cut off, and have as long again to end.
REMOVE_SECONDS: Final = 10.0


class MemberState(Enum):
    """What a member of a mirror is good for."""

    IN_SYNC = "in sync"
    #: Gets all changes, and is not read.
    REBUILDING = "rebuilding"
    #: Out: gets nothing, and is stale.
    FAILED = "failed"


@attrs.frozen(kw_only=True)
class MemberStatus:
    """A member at one moment."""

    #: As text.
    backend: str
    state: MemberState
    #: Why it is out, by name; None for a member that is not.
    error: str | None
    #: Of a member that is being rebuilt, how much of it is there; else None.
    done_bytes: int | None
    #: How many reads it has served.
    reads: int


@attrs.frozen(kw_only=True)
class Raid1Status:
    """A mirror at one moment."""

    size: int
    members: tuple[MemberStatus, ...]


@attrs.define(eq=False)
class _Member:
    #: What the caller gave: `base` may stand on another one.
    given: Backend
    base: Base
    state: MemberState = MemberState.IN_SYNC
    error: int = 0
    done_bytes: int = 0
    #: Ends the rebuild that is running.
    rebuild: trio.CancelScope | None = None
    is_leaving: bool = False
    reads: int = 0
    reads_in_flight: int = 0
    #: Where its last read ended.
    next_offset: int = 0
    users: int = 0
    idle: trio.lowlevel.ParkingLot = attrs.Factory(trio.lowlevel.ParkingLot)
    #: Around each call of its backend.
    calls: set[trio.CancelScope] = attrs.Factory(set)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """It must not be closed meanwhile."""
        self.begin_use()
        try:
            yield
        finally:
            self.end_use()

    def begin_use(self) -> None:
        self.users += 1

    def end_use(self) -> None:
        self.users -= 1
        if not self.users:
            self.idle.unpark_all()

    @contextmanager
    def call(self) -> Iterator[None]:
        """Around a call of its backend. Raises `OSError` (ENODEV) when the call was cut off."""
        with trio.CancelScope() as scope:
            self.calls.add(scope)
            try:
                yield
            finally:
                self.calls.discard(scope)
        if scope.cancelled_caught:
            raise OSError(errno.ENODEV, f"{self} was removed while it had not answered")

    def cut_off(self) -> None:
        """End the calls that it has not answered."""
        for scope in list(self.calls):
            scope.cancel()

    async def wait_unused(self) -> None:
        while self.users:
            await self.idle.park()

    def __str__(self) -> str:
        return str(self.base.backend)


class Raid1(Stacked):
    """A disk of which every member has all; as large as the smallest, in whole blocks.

    It always has `flush`, because a member with a volatile cache may join later.

    Args:
        bases: its members; their content must be equal, see above.
    """

    def __init__(self, bases: Sequence[Backend]) -> None:
        super().__init__(bases)
        self._members = [_Member(given, base) for given, base in zip(bases, self.bases, strict=True)]
        self._ranges = RangeLock()
        self._is_open = False

    # Opening and closing

    async def open(self) -> None:
        """Opens the members. One that was out when the disk was closed is forgotten."""
        self._members = [member for member in self._members if member.state is MemberState.IN_SYNC]
        self.bases = tuple(member.base for member in self._members)
        await super().open()
        self._is_open = True

    async def aclose(self) -> None:
        """Ends rebuilds, and closes the members."""
        self._is_open = False
        for member in self._members:
            if member.state is MemberState.REBUILDING:
                self._take_out(member, OSError(errno.ESHUTDOWN, "the disk is closed"), asked_for=True)
        for member in list(self._members):
            await member.wait_unused()
        await super().aclose()

    def settle(self) -> None:
        """The size follows the smallest member that is not out."""
        super().settle()
        smallest = min(member.base.backend.size for member in self._members if member.state is not MemberState.FAILED)
        self.size = smallest // self.block_size * self.block_size
        self.unsupported -= {"flush"}

    def status(self) -> Raid1Status:
        """Where each member stands."""
        return Raid1Status(size=self.size, members=tuple(_status(member) for member in self._members))

    # Requests

    async def read(self, offset: int, buffer: memoryview) -> None:
        """Fills the buffer from one member. Raises what the first member raised when none can."""
        failed = await self._read(offset, buffer)
        for member in failed:
            await self._write_back(member, offset, len(buffer))

    async def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        """Stores the data on every member. Raises what the last member in sync raised."""
        await self._change(offset, len(data), lambda base: base.write(offset, data, fua=fua))

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """As `write`."""
        await self._change(offset, length, lambda base: base.write_zeroes(offset, length, unmap=unmap))

    async def discard(self, offset: int, length: int) -> None:
        """Frees what each member can free. Raises only when no member could; nobody is taken out."""
        async with self._ranges.hold(offset, offset + length):
            members = self._changing()
            failures: dict[_Member, Exception] = {}
            await self._on_each(members, lambda base: base.discard(offset, length), failures)
            if len(failures) == len(members):
                raise failures[members[0]]

    async def flush(self) -> None:
        """Flushes every member. Raises what the last member in sync raised."""
        members = self._changing()
        failures: dict[_Member, Exception] = {}
        await self._on_each(members, lambda base: base.flush(), failures)
        self._judge(members, failures)

    # Members

    async def rebuild(self, backend: Backend) -> None:
        """Makes a backend a member in sync, by copying all of the disk to it while requests go on; returns when it is.

        Either a new backend, which is opened, and closed with the disk; or a member that is out. `status` shows how
        far it is. Run it in a nursery of your own; cancelled, the member is out, and stays one until it is removed.
        A member that comes back is copied all over: nothing remembers what it has missed.

        Raises `UsageError` when the disk is not open, the backend is in sync or being rebuilt already, too small, or
        can do less than the disk promised; `OSError` when the backend failed, with its errno: the disk goes on without
        it; or when no member could be read.
        """
        if not self._is_open:
            raise UsageError(f"{self}: is not open: rebuild {backend} while the disk is served")
        member = self._find(backend)
        if member is None:
            member = await self._join(backend)
        elif member.state is not MemberState.FAILED:
            raise UsageError(f"{self}: {backend} is {member.state.value} already")
        elif member.is_leaving:
            raise UsageError(f"{self}: {backend} is being removed: wait for that")
        member.state, member.error, member.done_bytes = MemberState.REBUILDING, 0, 0
        with member.in_use():
            try:
                with trio.CancelScope() as member.rebuild:
                    await self._fill(member)
            except OSError as failure:
                self._take_out(member, failure)
            finally:
                member.rebuild = None
                if member.state is MemberState.REBUILDING:
                    self._take_out(member, OSError(errno.ECANCELED, "the rebuild was cancelled"), asked_for=True)
        if member.state is MemberState.FAILED:
            raise OSError(member.error, f"{self}: {backend} could not be rebuilt: {errno_text(member.error)}")

    async def join(self, backend: Backend) -> None:
        """Makes a new backend a member that is out, for `rebuild` to bring in sync.

        For those who want to know at once whether it fits. Raises as `rebuild` before it copies.
        """
        if not self._is_open:
            raise UsageError(f"{self}: is not open: join {backend} while the disk is served")
        if self._find(backend) is not None:
            raise UsageError(f"{self}: {backend} is a member already")
        await self._join(backend)

    async def remove(self, backend: Backend) -> None:
        """Takes a member out, in whatever state it is; returns when it is closed and forgotten.

        Ends its rebuild, and waits for the requests that it still has. Those that it has not answered after
        `REMOVE_SECONDS` are cut off: other members serve them, so a backend that hangs does not hold up the disk.
        Cancelled meanwhile, it is out but still a member. Raises `UsageError` for what is no member, and for the last one
        in sync; and `StuckError` when its backend does not end what was cut off: then too it is out but still a member.
        """
        member = self._find(backend)
        if member is None:
            raise UsageError(f"{self}: {backend} is no member")
        if member.is_leaving:
            raise UsageError(f"{self}: {backend} is being removed already")
        if self._in_sync() == [member]:
            raise UsageError(f"{self}: {backend} is the last member in sync: it cannot be removed")
        self._take_out(member, OSError(errno.ENODEV, "removed"), asked_for=True)
        member.is_leaving = True
        try:
            await self._wait_unused(member)
        finally:
            member.is_leaving = False
        if self._is_open:  # else it is closed with the disk, and forgotten when that is opened again
            self._members.remove(member)
            self.bases = tuple(base for base in self.bases if base is not member.base)
            with trio.CancelScope(shield=True):
                await member.base.aclose()

    async def _wait_unused(self, member: _Member) -> None:
        with trio.move_on_after(REMOVE_SECONDS):
            await member.wait_unused()
            return
        member.cut_off()
        with trio.move_on_after(REMOVE_SECONDS):
            await member.wait_unused()
            return
        raise StuckError(f"{self}: {member} is out, but does not end its {member.users} requests: remove it later")

    def _find(self, backend: Backend) -> _Member | None:
        return next((member for member in self._members if member.given is backend), None)

    def _in_sync(self) -> list[_Member]:
        return [member for member in self._members if member.state is MemberState.IN_SYNC]

    def _changing(self) -> list[_Member]:
        """Whom a change must reach."""
        return [member for member in self._members if member.state is not MemberState.FAILED]

    def _take_out(self, member: _Member, failure: Exception, *, asked_for: bool = False) -> None:
        if member.state is MemberState.FAILED:
            return
        assert self._in_sync() != [member], f"{member} is the last member in sync"
        member.state, member.error = MemberState.FAILED, _errno_of(failure)
        level = logging.INFO if asked_for else logging.WARNING
        logger.log(level, "%s: %s is out: %s", self, member, errno_text(member.error))
        if member.rebuild is not None:
            member.rebuild.cancel()

    # Reading

    async def _read(self, offset: int, buffer: memoryview, *, but: Iterable[_Member] = ()) -> list[_Member]:
        """Fills the buffer from a member in sync; returns those that failed to. Raises what the first one raised."""
        excluded = list(but)
        failed: list[_Member] = []
        first_failure: Exception = OSError(errno.EIO, "no other member is in sync")
        while True:
            members = [member for member in self._in_sync() if member not in excluded]
            if not members:
                raise first_failure
            member = min(members, key=lambda one: (one.reads_in_flight, one.next_offset != offset, one.reads))
            try:
                await self._read_from(member, offset, buffer)
                return failed
            except Exception as failure:
                if _is_not_now(failure):
                    raise
                first_failure = first_failure if failed else failure
                failed.append(member)
                excluded.append(member)

    async def _read_from(self, member: _Member, offset: int, buffer: memoryview) -> None:
        with member.in_use():
            member.reads += 1
            member.reads_in_flight += 1
            member.next_offset = offset + len(buffer)
            try:
                with member.call():
                    await member.base.read(offset, buffer)
            finally:
                member.reads_in_flight -= 1

    async def _write_back(self, member: _Member, offset: int, length: int) -> None:
        """Writes what the others have to a member that could not read it, and looks whether it can now."""
        if self.read_only:
            return
        async with self._ranges.hold(offset, offset + length):
            if member.state is not MemberState.IN_SYNC:
                return
            content = memoryview(bytearray(length))

            async def mend(base: Base) -> None:
                await base.write(offset, content, fua=False)
                await base.read(offset, content)

            failures: dict[_Member, Exception] = {}
            with member.in_use():
                try:
                    # Anew: it may have been written since.
                    await self._read(offset, content, but=[member])
                except Exception:
                    return  # what was asked for has been read; there is nothing to mend with now
                await self._on_each([member], mend, failures)
            if failures and self._in_sync() != [member]:
                self._take_out(member, failures[member])

    # Changing

    async def _change(self, offset: int, length: int, call: Callable[[Base], Awaitable[None]]) -> None:
        async with self._ranges.hold(offset, offset + length):
            members = self._changing()
            # What holds for whoever has not ended when this is cancelled.
            cut_off = OSError(errno.ECANCELED, "the request was cancelled")
            failures: dict[_Member, Exception] = dict.fromkeys(members, cut_off)
            try:
                await self._on_each(members, call, failures)
            except BaseException:
                with suppress(Exception):  # nobody waits for an answer any more
                    self._judge(members, failures)
                raise
            self._judge(members, failures)

    async def _on_each(
        self, members: Sequence[_Member], call: Callable[[Base], Awaitable[None]], failures: dict[_Member, Exception]
    ) -> None:
        """Calls the members at once; puts down who failed, and strikes out who did not."""

        async def attempt(member: _Member) -> None:
            try:
                while True:
                    try:
                        with member.call():
                            await call(member.base)
                        failures.pop(member, None)
                        return
                    except Exception as failure:
                        if not _is_not_now(failure) or member.state is MemberState.FAILED:
                            failures[member] = failure
                            return
                    await trio.sleep(NO_MEMORY_SECONDS)
            finally:
                member.end_use()

        # From now on: the calls begin later, and meanwhile a member may be removed.
        for member in members:
            member.begin_use()
        await run_together([partial(attempt, member) for member in members])

    def _judge(self, members: Sequence[_Member], failures: dict[_Member, Exception]) -> None:
        """Takes out whoever is not equal any more. Raises if the change is on no member in sync."""
        in_sync = [member for member in members if member.state is MemberState.IN_SYNC]
        if not in_sync:
            # Of a flush only, which holds no range: since it began, others were rebuilt from these, and flushed.
            return
        done = [member for member in in_sync if member not in failures]
        stay = done or in_sync[:1]
        for member in members:
            if member not in stay and (member in failures or not done):
                self._take_out(member, failures.get(member) or failures[stay[0]])
        if not done:
            raise failures[stay[0]]

    # Rebuilding

    async def _join(self, backend: Backend) -> _Member:
        """A new member, opened and out."""
        member = _Member(backend, Base(backend), MemberState.FAILED, errno.ECANCELED)
        await member.base.open()
        try:
            if not self._is_open:
                raise UsageError(f"{self}: was closed while {backend} was opened")
            self._check_fits(member.base)
        except BaseException:
            with trio.CancelScope(shield=True):
                await member.base.aclose()
            raise
        self._members.append(member)
        self.bases = (*self.bases, member.base)
        return member

    def _check_fits(self, base: Base) -> None:
        backend = base.backend
        if backend.size < self.size:
            raise UsageError(
                f"{self}: {backend} has {backend.size} bytes, the disk {self.size}: use a backend that is as large"
            )
        if backend.block_size > self.block_size:
            raise UsageError(
                f"{self}: {backend} has blocks of {backend.block_size} bytes, the disk of {self.block_size}: "
                "use a backend with blocks as small"
            )
        missing = sorted((capabilities(self) | {"write"}) - {"flush"} - base.offered)
        if missing:
            raise UsageError(f"{self}: {backend} has no {' and no '.join(missing)}: use a backend that can do all that")

    async def _fill(self, member: _Member) -> None:
        """Copies the disk; at the end the member is in sync, unless it was taken out."""
        window = memoryview(bytearray(min(WINDOW_BYTES, self.size)))
        while member.done_bytes < self.size:
            await trio.lowlevel.checkpoint()  # members in memory have none
            start = member.done_bytes
            part = window[: self.size - start]
            async with self._ranges.hold(start, start + len(part)):
                await _patiently(partial(self._read, start, part))
                await _patiently(partial(member.base.write, start, part, fua=False))
            member.done_bytes += len(part)
        await _patiently(member.base.flush)
        if member.state is MemberState.REBUILDING:
            member.state = MemberState.IN_SYNC


def _status(member: _Member) -> MemberStatus:
    return MemberStatus(
        backend=str(member),
        state=member.state,
        error=errno_name(member.error) if member.state is MemberState.FAILED else None,
        done_bytes=member.done_bytes if member.state is MemberState.REBUILDING else None,
        reads=member.reads,
    )


async def _patiently(call: Callable[[], Awaitable[object]]) -> None:
    """Until there are resources for it."""
    while True:
        try:
            await call()
            return
        except OSError as failure:
            if not _is_not_now(failure):
                raise
        await trio.sleep(NO_MEMORY_SECONDS)


def _is_not_now(failure: Exception) -> bool:
    return isinstance(failure, OSError) and failure.errno == errno.ENOMEM


def _errno_of(failure: Exception) -> int:
    """As a device would answer it."""
    if isinstance(failure, trio.TooSlowError):
        return errno.ETIMEDOUT
    return failure.errno or errno.EIO if isinstance(failure, OSError) else errno.EIO
