"""Bases for stacks: memory whose calls are recorded, and a disk on storage that crashes; and how to cancel a stack anywhere."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import trio
import trio.testing
from hypothesis import Phase, settings

from tests.property.pumped import AtStep
from ublk_trio.backends import Backend, Memory
from ublk_trio.testing import Storage
from ublk_trio.testing.against import DEFAULT_SETTINGS

#: For `run_against`: the same examples every time.
CHECK = settings(DEFAULT_SETTINGS, max_examples=40, derandomize=True, database=None)
#: The same for a disk with a bug, whose shortest run nobody wants to see.
HUNT = settings(CHECK, max_examples=400, phases=[Phase.generate], report_multiple_bugs=False)
#: A scenario must end within so many steps, or the loop over all of them would not.
STEPS_MAX = 500


class Recorded(Memory):
    """Memory with a cache that holds nothing. `log` gets ``"open"`` and so on; several can share one."""

    def __init__(
        self, size: int = 1 << 16, *, block_size: int = 512, name: str = "", log: list[Any] | None = None
    ) -> None:
        super().__init__(size, block_size=block_size)
        self.name = name
        self.log: list[Any] = [] if log is None else log
        self.opened = 0

    async def open(self) -> None:
        await trio.lowlevel.checkpoint()
        self.opened += 1
        self.log.append(f"open {self.name}")

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()
        self.opened -= 1
        self.log.append(f"close {self.name}")

    def read(self, offset: int, buffer: memoryview) -> int | None:
        self.log.append(("read", offset, len(buffer)))
        return super().read(offset, buffer)

    def write(self, offset: int, data: memoryview, *, fua: bool) -> int | None:
        self.log.append(("write", offset, len(data), fua))
        return super().write(offset, data, fua=fua)

    def flush(self) -> None:
        self.log.append("flush")

    def discard(self, offset: int, length: int) -> None:
        self.log.append(("discard", offset, length))
        super().discard(offset, length)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        self.log.append(("write_zeroes", offset, length, unmap))
        super().write_zeroes(offset, length, unmap=unmap)


class AsyncRecorded(Recorded):
    """The same with ``async def`` methods, each with a checkpoint."""

    async def read(self, offset: int, buffer: memoryview) -> int | None:  # type: ignore[override]
        await trio.lowlevel.checkpoint()
        return super().read(offset, buffer)

    async def write(self, offset: int, data: memoryview, *, fua: bool) -> int | None:  # type: ignore[override]
        await trio.lowlevel.checkpoint()
        return super().write(offset, data, fua=fua)

    async def flush(self) -> None:  # type: ignore[override]
        await trio.lowlevel.checkpoint()
        super().flush()

    async def discard(self, offset: int, length: int) -> None:  # type: ignore[override]
        await trio.lowlevel.checkpoint()
        super().discard(offset, length)

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:  # type: ignore[override]
        await trio.lowlevel.checkpoint()
        super().write_zeroes(offset, length, unmap=unmap)


class OnStorage(Backend):
    """For `run_against`: keeps its bytes on the storage, and its word."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.size = storage.size

    def read(self, offset: int, buffer: memoryview) -> None:
        self.storage.read(offset, buffer)

    def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        self.storage.write(offset, data, fua=fua)

    def flush(self) -> None:
        self.storage.flush()


def run_on_mock_clock(main: Callable[[], Awaitable[Any]], *, instruments: tuple[trio.abc.Instrument, ...] = ()) -> Any:
    """`trio.run` on a clock that jumps to the next deadline when every task waits."""
    return trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0), instruments=instruments)


def cancel_everywhere(scenario: Callable[[trio.CancelScope], Awaitable[None]]) -> int:
    """Runs the scenario again and again, its scope cancelled just before the first, second, third … step of its tasks.

    The scenario checks what is left. Returns how many steps there are; the error says at which it broke.
    """
    for number in range(1, STEPS_MAX):
        scope = trio.CancelScope()
        at_step = AtStep(number, scope.cancel)
        try:
            run_on_mock_clock(lambda scope=scope: scenario(scope), instruments=(at_step,))  # type: ignore[misc]
        except BaseException as broken:
            broken.add_note(f"cancelled before step {number}")
            raise
        if at_step.steps < number:
            return number - 1
    raise AssertionError(f"the scenario does not end within {STEPS_MAX} steps")
