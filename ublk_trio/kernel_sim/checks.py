"""Catching servers that break the contract in ways that a real kernel lets pass, or that would break the kernel.

**Supported.** Two lists on the kernel: `violations` (the server is wrong) and `notes` (it waits for itself, or will).
With ``paranoid`` the content of every buffer that the kernel owns is poison: a server that writes to it is found when
the kernel gives it back, and one that reads it gets garbage. `SimulatedOopsError` where the real driver would follow a null
pointer.
**Rejected.** Nothing: checks never change what a command returns.
**Differs from Linux.** An oops kills whoever met it, perhaps with locks held, and leaves the machine in a state that nobody
can tell: here it is an exception, and the run should end. A real kernel leaves the buffers' content alone. Large buffers
are poisoned at their first and last 4 KiB and over the bytes that the last request moved; damage elsewhere is not seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import attrs

EDGE_BYTES: Final = 4096


class SimulatorViolationError(AssertionError):
    """The server broke the kernel's contract. Raised by `SimKernel.check` only, never by a ring's calls."""

    def __init__(self, violations: Sequence[Violation]) -> None:
        self.violations = tuple(violations)
        super().__init__("\n".join(str(violation) for violation in violations))


class SimulatedOopsError(Exception):
    """The real driver would crash here. Raised by whatever call made it happen: an application's, a command's or a ring's.

    Nothing that the simulated kernel does afterwards means anything.
    """


@attrs.frozen(kw_only=True)
class Violation:
    """One breach: ``kind`` is stable and meant for tests, ``text`` for people."""

    kind: str
    dev_id: int
    queue_id: int
    tag: int
    text: str

    def __str__(self) -> str:
        return f"device {self.dev_id} queue {self.queue_id} tag {self.tag}: {self.kind}: {self.text}"


# A period that divides no power of two: shifted copies of the pattern differ from it.
_PERIOD: Final = bytes(range(0x80, 0xFF))
_pattern = _PERIOD


def pattern(length: int) -> bytes:
    """The first ``length`` bytes of the poison."""
    global _pattern
    if length > len(_pattern):
        _pattern = _PERIOD * (length // len(_PERIOD) + 1)
    return _pattern[:length]


def poison(view: memoryview, moved_bytes: int = 0) -> int:
    """Overwrite the buffer's edges and the bytes just moved; returns what `damage` needs to know."""
    size = len(view)
    head = min(max(moved_bytes, EDGE_BYTES), size)
    view[:head] = pattern(head)
    tail = max(head, size - EDGE_BYTES)
    view[tail:] = pattern(size - tail)
    return head


def damage(view: memoryview, head: int) -> int | None:
    """The offset of the first byte that is not poison any more, or None when all is as `poison` left it."""
    size = len(view)
    tail = max(head, size - EDGE_BYTES)
    for start, end in ((0, head), (tail, size)):
        found, expected = bytes(view[start:end]), pattern(end - start)
        if found != expected:
            return start + _first_difference(found, expected)
    return None


def _first_difference(found: bytes, expected: bytes) -> int:
    return next(i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b)
