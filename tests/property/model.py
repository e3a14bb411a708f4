"""What every byte of a disk may be, and what every operation may come to.

A block that several writes touch at once, or that a failed write touched, may be any of their contents until a later write
that was alone on it succeeds; so every block has a set of allowed contents. Blocks are written whole: half a block is wrong always.
"""

from __future__ import annotations

import errno
from typing import Literal

import attrs

from tests.property.disks import BLOCK, FIRST_WRITE, Disk, content_of
from ublk_trio.kernel_sim import Bio

Name = Literal["read", "write", "flush", "discard", "write_zeroes"]
ZEROES = bytes(BLOCK)
#: The calls of a backend that an operation may become.
CALLS: dict[Name, tuple[str, ...]] = {
    "read": ("read",),
    "write": ("write",),
    "flush": ("flush",),
    "discard": ("discard",),
    "write_zeroes": ("write_zeroes", "write"),
}
_CALL_SETS = {name: frozenset(calls) for name, calls in CALLS.items()}
_PARTITION_SCAN_BYTES = 4096


#: Calls that may fail with EOPNOTSUPP without failing their operation: zeroes are written instead, and the block layer takes
#: a discard or a flush that turns out not to be there for done.
_EXCUSED: dict[Name, tuple[str, ...]] = {
    "read": (),
    "write": ("write_zeroes",),
    "write_zeroes": ("write_zeroes",),
    "discard": ("discard",),
    "flush": ("flush",),
}


class BrokenError(AssertionError):
    """An invariant does not hold."""

    def __init__(self, invariant: str, text: object) -> None:
        super().__init__(f"{invariant}: {text}")
        self.invariant = invariant


def demand(condition: object, invariant: str, text: object) -> None:
    """Raise `BrokenError` unless the condition holds; ``text`` may be a function that makes it."""
    if not condition:
        raise BrokenError(invariant, text() if callable(text) else text)


@attrs.define(eq=False, kw_only=True)
class Operation:
    """What an application asked for, until it ended."""

    name: Name
    bio: Bio
    offset: int
    length: int
    fua: bool
    #: How many failures the backend had when it began.
    failures_before: int
    #: Per block, what a write puts there, or what a read may find there.
    contents: list[bytes] = attrs.Factory(list)
    allowed: list[set[bytes]] = attrs.Factory(list)
    #: Blocks of a write that another write touched meanwhile.
    contended: set[int] = attrs.Factory(set)
    #: Another operation's failure could be taken for one of this.
    ambiguous: bool = False
    #: For a flush: the versions that must be durable when it succeeds.
    versions: list[int] = attrs.Factory(list)

    #: Its blocks: the first, and the one behind the last.
    first: int = attrs.field(init=False)
    end: int = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.first = self.offset // BLOCK
        self.end = (self.offset + self.length) // BLOCK

    @property
    def blocks(self) -> range:
        return range(self.first, self.end)

    def __str__(self) -> str:
        return f"{self.name} of {self.length} bytes at {self.offset} ({self.bio})"


class ByteModel:
    """A disk's content, as far as an application can know it."""

    def __init__(self, disk: Disk, *, volatile_cache: bool, copies_fall_short: bool = False) -> None:
        self.disk = disk
        self.volatile_cache = volatile_cache
        #: The kernel may fail whatever has data, without the backend's doing.
        self.copies_fall_short = copies_fall_short
        self.allowed: list[set[bytes]] = [{content_of(FIRST_WRITE, block)} for block in range(disk.size // BLOCK)]
        self.in_flight: list[Operation] = []

    def begin(self, operation: Operation) -> None:
        """An operation was submitted."""
        for other in self.in_flight:
            if self._overlap(other, operation) and not _CALL_SETS[other.name].isdisjoint(CALLS[operation.name]):
                other.ambiguous = operation.ambiguous = True
        if operation.name == "read":
            operation.ambiguous |= operation.offset < _PARTITION_SCAN_BYTES
            operation.allowed = [allowed.copy() for allowed in self.allowed[operation.first : operation.end]]
        elif operation.name == "flush":
            operation.versions = list(self.disk.versions)
        else:
            self._begin_write(operation)
        self.in_flight.append(operation)

    @staticmethod
    def _overlap(a: Operation, b: Operation) -> bool:
        return a.name == "flush" or (a.first < b.end and b.first < a.end)

    def _begin_write(self, operation: Operation) -> None:
        for allowed, content in zip(self.allowed[operation.first : operation.end], operation.contents, strict=True):
            allowed.add(content)
        for other in self.in_flight:
            # A flush has no blocks.
            shared = range(max(other.first, operation.first), min(other.end, operation.end))
            if other.name == "read":
                for block in shared:
                    other.allowed[block - other.first].add(operation.contents[block - operation.first])
            else:
                other.contended.update(shared)
                operation.contended.update(shared)

    def end(self, operation: Operation, *, may_fail: bool) -> None:
        """An operation ended: is that right?"""
        self.in_flight.remove(operation)
        result = operation.bio.result
        assert result is not None
        if result < 0:
            self._check_failure(operation, -result, may_fail=may_fail)
            return
        demand(result == operation.length, "the result is right", f"{operation} should give {operation.length}")
        if not operation.ambiguous:
            failed = [
                failure
                for failure in self.disk.failures[operation.failures_before :]
                if failure.name in CALLS[operation.name]
                and failure.touches(operation.offset, operation.length)
                and not (failure.number == errno.EOPNOTSUPP and failure.name in _EXCUSED[operation.name])
            ]
            demand(not failed, "a failed call fails its request", f"{operation} succeeded in spite of {failed}")
        if operation.name in ("discard", "flush") and self._was_not_supported(operation):
            return  # nothing was done, and nobody was told
        if operation.name == "read":
            self._check_read(operation)
        elif operation.name == "flush":
            lost = [block for block, version in enumerate(operation.versions) if self.disk.durable[block] < version]
            demand(not lost or not self.volatile_cache, "a flush flushed what came before", f"{operation} left {lost}")
        else:
            self._end_write(operation)

    def _was_not_supported(self, operation: Operation) -> bool:
        return any(
            failure.number == errno.EOPNOTSUPP
            and failure.name == operation.name
            and (operation.name == "flush" or failure.touches(operation.offset, operation.length))
            for failure in self.disk.failures[operation.failures_before :]
        )

    def _check_failure(self, operation: Operation, number: int, *, may_fail: bool) -> None:
        if may_fail and number in (errno.EIO, errno.ENXIO):
            return
        if self.copies_fall_short and number == errno.EIO:
            return
        calls = CALLS[operation.name]
        for failure in self.disk.failures[operation.failures_before :]:
            alike = failure.name in calls and failure.number == number
            if alike and failure.touches(operation.offset, operation.length):
                return
        raise BrokenError("an error has its cause", f"{operation} failed, but no call of the backend did so")

    def _check_read(self, operation: Operation) -> None:
        data = operation.bio.data
        for number, (block, allowed) in enumerate(zip(operation.blocks, operation.allowed, strict=True)):
            content = bytes(data[number * BLOCK : (number + 1) * BLOCK])
            demand(
                content in allowed,
                "what was written is what is read",
                f"{operation}: block {block} is {_brief(content)}, not {' or '.join(map(_brief, allowed))}",
            )

    def _end_write(self, operation: Operation) -> None:
        for block, content in zip(operation.blocks, operation.contents, strict=True):
            if block in operation.contended:
                continue
            self.allowed[block] = {content}
            if operation.fua and self.volatile_cache:
                demand(
                    self.disk.durable[block] == self.disk.versions[block],
                    "a FUA write is durable",
                    f"{operation}: block {block} is only in the cache",
                )


def _brief(content: bytes) -> str:
    number = int.from_bytes(content[:8], "big")
    if content == content[:8] * (BLOCK // 8) and number:
        return f"block {number & (1 << 20) - 1} of write {number >> 20}"
    return "zeroes" if content == ZEROES else f"torn ({content[:8].hex()}…{content[-8:].hex()})"
