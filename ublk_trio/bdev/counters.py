"""What a bdev was asked for, how much of it, how long it took, and what failed."""

from __future__ import annotations

import errno
from collections import Counter
from types import MappingProxyType
from typing import Final

import attrs

#: The operations that are counted, by the name of the backend's method.
OPERATIONS: Final = ("read", "write", "flush", "discard", "write_zeroes")


@attrs.frozen(kw_only=True)
class OperationStatistics:
    """One kind of operation. Those that failed are counted too, with 0 bytes. Times are nanoseconds; 0 when there was none."""

    count: int
    bytes: int
    total_ns: int
    min_ns: int
    max_ns: int


@attrs.frozen(kw_only=True)
class IoStatistics:
    """What a bdev did since it was made, or since `Counters.reset`."""

    operations: MappingProxyType[str, OperationStatistics]
    #: How many failed, by errno.
    errors: MappingProxyType[int, int]


class _Operation:
    __slots__ = ("bytes", "count", "max_ns", "min_ns", "total_ns")

    def __init__(self) -> None:
        self.count = self.bytes = self.total_ns = self.min_ns = self.max_ns = 0

    def add(self, length: int, ns: int) -> None:
        if self.count == 0 or ns < self.min_ns:
            self.min_ns = ns
        if ns > self.max_ns:
            self.max_ns = ns
        self.count += 1
        self.bytes += length
        self.total_ns += ns


class Counters:
    """The counters of one bdev, over all who use it."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begins at 0 again."""
        self._operations = {name: _Operation() for name in OPERATIONS}
        self._errors: Counter[int] = Counter()

    def done(self, operation: str, length: int, ns: int) -> None:
        """An operation succeeded, with so many bytes, after so long."""
        self._operations[operation].add(length, ns)

    def failed(self, operation: str, failure: BaseException, ns: int) -> None:
        """An operation raised. What is no `OSError` counts as EIO, which is what the application gets."""
        self._operations[operation].add(0, ns)
        number = failure.errno if isinstance(failure, OSError) else None
        self._errors[number or errno.EIO] += 1

    def statistics(self) -> IoStatistics:
        """A snapshot."""
        return IoStatistics(
            operations=MappingProxyType(
                {
                    name: OperationStatistics(
                        count=each.count,
                        bytes=each.bytes,
                        total_ns=each.total_ns,
                        min_ns=each.min_ns,
                        max_ns=each.max_ns,
                    )
                    for name, each in self._operations.items()
                }
            ),
            errors=MappingProxyType(dict(self._errors)),
        )
