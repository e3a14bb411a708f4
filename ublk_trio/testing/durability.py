"""`DurabilityModel`: what a disk may contain, now and after a crash, as far as an application can know it.

Each sector has two sets of contents. **Now**: what a read may find. A write that begins adds its content; one that succeeds and was
alone on the sector leaves nothing else. Of writes that were in flight together any may be the last, and of a write that failed any
part may be done. **After a crash**: all that, and whatever was there before that was not settled. A flush that succeeds removes what
was overwritten before it began; a write with FUA, what was overwritten before the write began.

So: what was acknowledged before a completed flush, or with FUA, survives; everything else may or may not. On a disk without a
volatile cache every write counts as one with FUA.
"""

from __future__ import annotations

from collections.abc import Iterator

import attrs

from ublk_trio.testing.storage import SECTOR_BYTES

#: A discarded sector's content: any.
_ANY = None
_Contents = set[bytes | None]


class BrokenPromiseError(AssertionError):
    """The disk broke a promise to its application."""


@attrs.define(eq=False, kw_only=True)
class Pending:
    """An operation between its begin and its end. For `DurabilityModel.end`."""

    name: str
    first: int
    end: int
    settles: bool = False
    contents: list[bytes | None] = attrs.Factory(list)
    #: By sector: what a read may find, what may be there once a write has succeeded, what may be settled once a flush has.
    seen: dict[int, _Contents] = attrs.Factory(dict)
    #: Of a read, the sectors that were written meanwhile.
    moving: set[int] = attrs.Factory(set)

    def __str__(self) -> str:
        return f"{self.name} of sectors {self.first} to {self.end - 1}" if self.end > self.first else self.name


class DurabilityModel:
    """The oracle. Tell it when each operation begins and ends, and of each crash; it raises `BrokenPromiseError`."""

    def __init__(self, content: bytes, *, volatile_cache: bool) -> None:
        """``content``: what the disk contains now, settled. ``volatile_cache``: whether the disk admits to having one."""
        self.volatile_cache = volatile_cache
        self._now: list[_Contents] = [{sector} for sector in _sectors(content)]
        self._after_crash: list[_Contents] = [set(contents) for contents in self._now]
        self._in_flight: list[Pending] = []

    def begin_read(self, offset: int, length: int) -> Pending:
        """An application asked for these bytes."""
        pending = self._pending("read", offset, length)
        pending.seen = {sector: set(self._now[sector]) for sector in range(pending.first, pending.end)}
        pending.moving = {sector for other in self._in_flight if other.contents for sector in _shared(pending, other)}
        return self._begin(pending)

    def begin_write(self, offset: int, data: bytes, *, fua: bool = False) -> Pending:
        """An application wrote this."""
        return self._begin_write("FUA write" if fua else "write", offset, list(_sectors(data)), fua)

    def begin_write_zeroes(self, offset: int, length: int) -> Pending:
        """An application asked for zeroes there."""
        return self._begin_write("write_zeroes", offset, [bytes(SECTOR_BYTES)] * (length // SECTOR_BYTES), False)

    def begin_discard(self, offset: int, length: int) -> Pending:
        """An application does not need these bytes any more: they may be anything."""
        return self._begin_write("discard", offset, [_ANY] * (length // SECTOR_BYTES), False)

    def begin_flush(self) -> Pending:
        """An application asked for durability of what was acknowledged so far."""
        pending = self._pending("flush", 0, 0)
        pending.settles = True
        pending.seen = {
            sector: set(now)
            for sector, (now, after) in enumerate(zip(self._now, self._after_crash, strict=True))
            if after - now
        }
        return self._begin(pending)

    def end(self, pending: Pending, *, failed: bool = False, data: bytes = b"") -> None:
        """The operation ended; ``data`` is what a read found."""
        self._in_flight.remove(pending)
        if failed:
            return
        if pending.name == "read":
            self._end_read(pending, data)
        elif pending.contents:
            # What was there before it began is overwritten.
            for sector, contents in pending.seen.items():
                self._now[sector] &= contents
        if pending.settles:
            for sector, settled in pending.seen.items():
                self._after_crash[sector] = set(settled)

    def crash(self) -> None:
        """Whatever served the disk is gone, and what it had not settled perhaps with it."""
        self._in_flight.clear()
        self._now = [set(contents) for contents in self._after_crash]

    def _pending(self, name: str, offset: int, length: int) -> Pending:
        assert not (offset | length) % SECTOR_BYTES, "whole sectors"
        return Pending(name=name, first=offset // SECTOR_BYTES, end=(offset + length) // SECTOR_BYTES)

    def _begin(self, pending: Pending) -> Pending:
        self._in_flight.append(pending)
        return pending

    def _begin_write(self, name: str, offset: int, contents: list[bytes | None], fua: bool) -> Pending:
        pending = self._pending(name, offset, len(contents) * SECTOR_BYTES)
        pending.contents = contents
        pending.settles = fua or not self.volatile_cache
        for sector, content in zip(range(pending.first, pending.end), contents, strict=True):
            self._now[sector].add(content)
            self._after_crash[sector].add(content)
            pending.seen[sector] = {content}
        for other in self._in_flight:
            shared = _shared(pending, other)
            if other.contents:
                for sector in shared:
                    pending.seen[sector].add(other.contents[sector - other.first])
            else:
                other.moving.update(shared)
            for sector, content in zip(range(pending.first, pending.end), contents, strict=True):
                if sector in other.seen:
                    other.seen[sector].add(content)
        return self._begin(pending)

    def _end_read(self, pending: Pending, data: bytes) -> None:
        found = list(_sectors(data))
        if len(found) != pending.end - pending.first:
            raise BrokenPromiseError(f"{pending} found {len(data)} bytes")
        for (sector, allowed), content in zip(pending.seen.items(), found, strict=True):
            if content not in allowed and _ANY not in allowed:
                raise BrokenPromiseError(
                    f"{pending}: sector {sector} is {_brief(content)}, and may be {' or '.join(map(_brief, allowed))}"
                )
            if sector not in pending.moving and _ANY not in allowed:
                # Nobody was writing: what is read now will be read again.
                self._now[sector] = {content}


def _sectors(data: bytes) -> Iterator[bytes]:
    return (bytes(data[start : start + SECTOR_BYTES]) for start in range(0, len(data), SECTOR_BYTES))


def _shared(a: Pending, b: Pending) -> range:
    return range(max(a.first, b.first), min(a.end, b.end))


def _brief(content: bytes | None) -> str:
    if content is None:
        return "anything"
    if content == content[:1] * len(content):
        return f"all 0x{content[0]:02x}"
    whole = content == content[:8] * (len(content) // 8)
    return f"8 bytes {content[:8].hex()}, repeated" if whole else f"torn: {content[:8].hex()} to {content[-8:].hex()}"
