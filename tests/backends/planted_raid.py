"""Bugs to plant in raid0, concat and raid1: the mistakes that are made there in earnest. The suites must find each.

Every function is a context manager under which the backends have the bug that the first line of its docstring names.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, suppress
from typing import Any
from unittest import mock

from ublk_trio.backends import Concat, MemberState, Raid0, Raid1, raid1
from ublk_trio.backends.raid1 import _Member
from ublk_trio.backends.range_lock import RangeLock
from ublk_trio.backends.spanning import Piece, Spanning
from ublk_trio.backends.stacked import Base

Plant = Callable[[], AbstractContextManager[None]]
#: By what the bug is in.
PLANTED_SPANNING: dict[str, list[Plant]] = {"raid0": [], "concat": []}
PLANTED_RAID1: list[Plant] = []


def _planted(*lists: list[Plant]) -> Callable[[Callable[[], Iterator[None]]], Plant]:
    def register(function: Callable[[], Iterator[None]]) -> Plant:
        plant = contextmanager(function)
        for one in lists:
            one.append(plant)
        return plant

    return register


_raid0 = _planted(PLANTED_SPANNING["raid0"])
_concat = _planted(PLANTED_SPANNING["concat"])
_both = _planted(*PLANTED_SPANNING.values())
_raid1 = _planted(PLANTED_RAID1)

# raid0 and concat -----------------------------------------------------------------------------------------------------


@_raid0
def strips_wrap_late() -> Iterator[None]:
    """All members but the first use the row behind the right one, so that in the last row two strips meet."""
    pieces = Raid0.pieces

    def wrong(self: Raid0, offset: int, length: int) -> Iterator[Piece]:
        last = self.size // len(self.bases) // self.strip_size - 1
        for piece in pieces(self, offset, length):
            row, within = divmod(piece.offset, self.strip_size)
            at = min(last, row + (self.bases.index(piece.base) > 0)) * self.strip_size + within
            yield Piece(base=piece.base, offset=at, start=piece.start, end=piece.end)

    with mock.patch.object(Raid0, "pieces", wrong):
        yield


@_raid0
def strip_not_cut() -> Iterator[None]:
    """A request that begins within a strip goes on on the same member for a whole strip."""

    def wrong(self: Raid0, offset: int, length: int) -> Iterator[Piece]:
        start = 0
        while start < length:
            strip, within = divmod(offset + start, self.strip_size)
            row, member = divmod(strip, len(self.bases))
            end = min(length, start + self.strip_size)
            at = min(row * self.strip_size + within, self.size // len(self.bases) - (end - start))
            yield Piece(base=self.bases[member], offset=at, start=start, end=end)
            start = end

    with mock.patch.object(Raid0, "pieces", wrong):
        yield


@_concat
def borders_off_by_one() -> Iterator[None]:
    """The first block of a member is taken for the last of the one before."""
    settle = Concat.settle

    def wrong(self: Concat) -> None:
        settle(self)
        self._starts = [0, *(start + self.block_size for start in self._starts[1:])]

    with mock.patch.object(Concat, "settle", wrong):
        yield


@_both
def first_base_flushed_only() -> Iterator[None]:
    """A flush goes to the first member."""

    async def wrong(self: Spanning) -> None:
        for part in {id(base.backend): base for base in self.bases[:1]}.values():
            await part.flush()

    with mock.patch.object(Spanning, "flush", wrong):
        yield


@_both
def fua_forgotten_beyond_the_first() -> Iterator[None]:
    """Only the first piece of a FUA write is one."""

    async def wrong(self: Spanning, offset: int, data: memoryview, *, fua: bool) -> None:
        for piece in self.pieces(offset, len(data)):
            await piece.base.write(piece.offset, data[piece.start : piece.end], fua=fua and piece.start == 0)

    with mock.patch.object(Spanning, "write", wrong):
        yield


@_both
def zeroes_end_early() -> Iterator[None]:
    """The merged range of each member lacks its last block."""
    ranges = Spanning._ranges

    def wrong(self: Spanning, offset: int, length: int) -> Iterator[tuple[Base, tuple[int, int]]]:
        for base, (first, count) in ranges(self, offset, length):
            yield base, (first, max(512, count - 512))

    with mock.patch.object(Spanning, "_ranges", wrong):
        yield


# raid1 ----------------------------------------------------------------------------------------------------------------


@_raid1
def no_range_lock() -> Iterator[None]:
    """Overlapping writes reach the members in any order."""

    @asynccontextmanager
    async def wrong(self: RangeLock, start: int, end: int) -> AsyncIterator[None]:
        yield

    with mock.patch.object(RangeLock, "hold", wrong):
        yield


@_raid1
def rebuild_without_lock() -> Iterator[None]:
    """A rebuild copies what is being written at the same time."""

    async def wrong(self: Raid1, member: _Member) -> None:
        window = memoryview(bytearray(raid1.WINDOW_BYTES))
        for start in range(0, self.size, len(window)):
            await self._read(start, window)
            await member.base.write(start, window, fua=False)
        await member.base.flush()
        if member.state is MemberState.REBUILDING:
            member.state = MemberState.IN_SYNC

    with mock.patch.object(Raid1, "_fill", wrong):
        yield


@_raid1
def rebuild_ends_one_block_early() -> Iterator[None]:
    """The last block is never copied."""
    fill = Raid1._fill

    async def wrong(self: Raid1, member: _Member) -> None:
        size, self.size = self.size, self.size - self.block_size
        try:
            await fill(self, member)
        finally:
            self.size = size

    with mock.patch.object(Raid1, "_fill", wrong):
        yield


@_raid1
def rebuild_not_flushed() -> Iterator[None]:
    """A rebuilt member is in sync while what was copied is in its cache."""
    fill = Raid1._fill

    async def wrong(self: Raid1, member: _Member) -> None:
        async def no_flush() -> None:
            pass

        with mock.patch.object(member.base, "flush", no_flush):
            await fill(self, member)

    with mock.patch.object(Raid1, "_fill", wrong):
        yield


@_raid1
def rebuilding_member_misses_changes() -> Iterator[None]:
    """Changes go to the members in sync only, also where a rebuild has been already."""
    with mock.patch.object(Raid1, "_changing", Raid1._in_sync):
        yield


@_raid1
def rebuilding_member_is_read() -> Iterator[None]:
    """Reads go to a member that is not there yet."""
    read = Raid1._read

    async def wrong(self: Raid1, offset: int, buffer: memoryview, *, but: Iterable[_Member] = ()) -> list[_Member]:
        with mock.patch.object(self, "_in_sync", self._changing):
            return await read(self, offset, buffer, but=but)

    with mock.patch.object(Raid1, "_read", wrong):
        yield


@_raid1
def flush_of_one_member() -> Iterator[None]:
    """A flush goes to the first member only."""

    async def wrong(self: Raid1) -> None:
        members = self._changing()
        failures: dict[_Member, Exception] = {}
        await self._on_each(members[:1], lambda base: base.flush(), failures)
        self._judge(members, failures)

    with mock.patch.object(Raid1, "flush", wrong):
        yield


@_raid1
def failed_flush_forgiven() -> Iterator[None]:
    """A member that failed a flush stays, if another one did it."""

    async def wrong(self: Raid1) -> None:
        members = self._changing()
        failures: dict[_Member, Exception] = {}
        await self._on_each(members, lambda base: base.flush(), failures)
        if len(failures) == len(members):
            self._judge(members, failures)

    with mock.patch.object(Raid1, "flush", wrong):
        yield


@_raid1
def failed_write_acknowledged() -> Iterator[None]:
    """A member that failed a write stays in sync, if another one did it."""
    judge = Raid1._judge

    def wrong(self: Raid1, members: Sequence[_Member], failures: dict[_Member, Exception]) -> None:
        if len(failures) >= len(members):
            judge(self, members, failures)

    with mock.patch.object(Raid1, "_judge", wrong):
        yield


@_raid1
def all_stay_when_all_fail() -> Iterator[None]:
    """A write that failed on all members leaves them all in sync, with half of it here and half there."""
    judge = Raid1._judge

    def wrong(self: Raid1, members: Sequence[_Member], failures: dict[_Member, Exception]) -> None:
        if all(member in failures for member in members):
            raise failures[members[0]]
        judge(self, members, failures)

    with mock.patch.object(Raid1, "_judge", wrong):
        yield


@_raid1
def cancelled_write_forgiven() -> Iterator[None]:
    """A cancelled write takes nobody out."""
    judge = Raid1._judge

    def wrong(self: Raid1, members: Sequence[_Member], failures: dict[_Member, Exception]) -> None:
        cut_off = [one for one, failure in failures.items() if getattr(failure, "errno", 0) == errno.ECANCELED]
        if not cut_off:
            judge(self, members, failures)

    with mock.patch.object(Raid1, "_judge", wrong):
        yield


@_raid1
def target_outlives_a_failed_source() -> Iterator[None]:
    """A write that fails on the last member in sync leaves the one that is being rebuilt with it."""
    judge = Raid1._judge

    def wrong(self: Raid1, members: Sequence[_Member], failures: dict[_Member, Exception]) -> None:
        judge(self, [one for one in members if one in failures or one.state is MemberState.IN_SYNC], failures)

    with mock.patch.object(Raid1, "_judge", wrong):
        yield


@_raid1
def mends_with_what_was_read_before() -> Iterator[None]:
    """A member that failed a read gets what was read then, though it may have been overwritten since."""

    async def wrong(self: Raid1, offset: int, buffer: memoryview) -> None:
        for member in await self._read(offset, buffer):
            if not self.read_only and member.state is MemberState.IN_SYNC:
                with suppress(OSError):
                    await member.base.write(offset, buffer, fua=False)

    with mock.patch.object(Raid1, "read", wrong):
        yield


@_raid1
def no_other_member_asked() -> Iterator[None]:
    """A read that fails on one member fails."""
    read = Raid1._read

    async def wrong(self: Raid1, offset: int, buffer: memoryview, *, but: Iterable[_Member] = ()) -> list[_Member]:
        failed = await read(self, offset, buffer, but=but)
        if failed:
            raise OSError(errno.EIO, "planted")
        return failed

    with mock.patch.object(Raid1, "_read", wrong):
        yield


@_raid1
def mirror_forgets_fua() -> Iterator[None]:
    """A FUA write is one on the first member only."""

    async def wrong(self: Raid1, offset: int, data: memoryview, *, fua: bool) -> None:
        def call(base: Base) -> Any:
            return base.write(offset, data, fua=fua and base is self.bases[0])

        await self._change(offset, len(data), call)

    with mock.patch.object(Raid1, "write", wrong):
        yield


@_raid1
def zeroes_on_one_member() -> Iterator[None]:
    """Zeroes are written to one member."""

    async def wrong(self: Raid1, offset: int, length: int, *, unmap: bool) -> None:
        async def call(base: Base) -> None:
            if base is self._in_sync()[0].base:
                await base.write_zeroes(offset, length, unmap=unmap)

        await self._change(offset, length, call)

    with mock.patch.object(Raid1, "write_zeroes", wrong):
        yield


@_raid1
def no_memory_takes_out() -> Iterator[None]:
    """A member that is short of resources for a moment is taken out."""
    with mock.patch.object(raid1, "_is_not_now", return_value=False):
        yield


@_raid1
def removed_too_soon() -> Iterator[None]:
    """A removed member is closed while requests are on their way to it."""

    async def wrong(self: _Member) -> None:
        pass

    with mock.patch.object(_Member, "wait_unused", wrong):
        yield


def name_of(plant: Plant) -> str:
    return str(getattr(plant, "__name__", plant))
