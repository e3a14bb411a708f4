"""`Descriptor`: a bdev as one of its users sees it.

It is a `Backend`, so that a device, or a backend that stands on others, uses it like any other. What the bdev's own backend
answers at once is answered at once here too: only what has to be awaited costs a coroutine.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from time import perf_counter_ns
from typing import Any, Final

from ublk_trio.backends import Backend, Done, Result
from ublk_trio.bdev.bdev import Bdev

#: Read off once, when it is opened; the size may change at any time.
_GEOMETRY: Final = (
    "block_size",
    "physical_block_size",
    "optimal_io_size",
    "discard_granularity",
    "rotational",
)


def _nothing() -> None:
    """Nobody needs to know."""


async def _nothing_to_wait_for() -> None:
    """Nobody needs to know."""


class Descriptor(Backend):
    """One user's view of a bdev; open between `open` and `aclose`. Made by `Registry.descriptor`.

    Args:
        bdev: what to use.
        claim: the user's name, to be the only one who writes; None to read only, beside others.
    """

    awaits = True

    def __init__(self, bdev: Bdev, *, claim: str | None) -> None:
        self.bdev = bdev
        self.claim = claim
        #: Called once when the bdev is about to go: close the descriptor soon. Until then it works as before.
        self.on_removed: Callable[[], None] = _nothing
        #: Awaited when the bdev's size has become another one; `size` is the new one already.
        self.on_resized: Callable[[], Awaitable[None]] = _nothing_to_wait_for

    @property
    def size(self) -> int:  # type: ignore[override]
        """The bdev's, as it is now."""
        return self.bdev.size

    async def open(self) -> None:
        """Enters the user. Raises `BackendError`: ENODEV when the bdev is being removed, EPERM when it is claimed."""
        self.bdev.attach(self)
        for name in _GEOMETRY:
            setattr(self, name, getattr(self.bdev.backend, name))
        missing = {"write", "flush", "discard", "write_zeroes"} - self.bdev.offered
        self.unsupported = frozenset(missing)
        self.read_only = self.claim is None or "write" in missing

    async def aclose(self) -> None:
        """Takes the user out. The bdev stays open."""
        self.bdev.detach(self)

    def read(self, offset: int, buffer: memoryview) -> Result:
        outcome: Result = self._counted("read", len(buffer), self.bdev.serving.read, offset, buffer)
        return outcome

    def write(self, offset: int, data: memoryview, *, fua: bool) -> Result:
        outcome: Result = self._counted("write", len(data), self.bdev.serving.write, offset, data, fua=fua)
        return outcome

    def flush(self) -> Done:
        outcome: Done = self._counted("flush", 0, self.bdev.serving.flush)
        return outcome

    def discard(self, offset: int, length: int) -> Done:
        outcome: Done = self._counted("discard", length, self.bdev.serving.discard, offset, length)
        return outcome

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> Done:
        outcome: Done = self._counted(
            "write_zeroes", length, self.bdev.serving.write_zeroes, offset, length, unmap=unmap
        )
        return outcome

    def _counted(self, operation: str, length: int, method: Callable[..., Any], *args: Any, **options: Any) -> Any:
        begin = perf_counter_ns()
        try:
            outcome = method(*args, **options)
        except Exception as failure:
            self.bdev.counters.failed(operation, failure, perf_counter_ns() - begin)
            raise
        if outcome is None:
            self.bdev.counters.done(operation, length, perf_counter_ns() - begin)
            return None
        if isinstance(outcome, int):
            self.bdev.counters.done(operation, outcome, perf_counter_ns() - begin)
            return outcome
        return self._awaited(operation, length, outcome, begin)

    async def _awaited(self, operation: str, length: int, awaitable: Awaitable[Any], begin: int) -> Any:
        try:
            outcome = await awaitable
        except Exception as failure:
            self.bdev.counters.failed(operation, failure, perf_counter_ns() - begin)
            raise
        done = outcome if isinstance(outcome, int) else length
        self.bdev.counters.done(operation, done, perf_counter_ns() - begin)
        return outcome

    def __str__(self) -> str:
        return self.bdev.name
