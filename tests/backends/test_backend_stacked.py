"""`Base`, `Stacked` and `Passthru`: a disk made of disks is a disk, and leaves none of them open."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.backends.backend_model import Step, check_against_model, scripts
from tests.backends.bases import CHECK, HUNT, AsyncRecorded, OnStorage, Recorded, cancel_everywhere
from ublk_trio.backends import (
    Backend,
    Base,
    File,
    Memory,
    Null,
    Passthru,
    Stacked,
    ThreadedFile,
    as_async,
    capabilities,
    check_geometry,
    is_async,
)
from ublk_trio.errors import UsageError
from ublk_trio.testing import BrokenPromiseError, run_against

SIZE = 5 * 4096 + 3 * 512
OPTIONAL = frozenset({"write", "flush", "discard", "write_zeroes"})


class Joined(Stacked):
    """Any number of bases as one disk, as far as this module needs it: all calls go to the first one."""

    def settle(self) -> None:
        super().settle()
        self.size = self.bases[0].backend.size

    async def read(self, offset: int, buffer: memoryview) -> None:
        await self.bases[0].read(offset, buffer)

    async def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        await self.bases[0].write(offset, data, fua=fua)

    async def flush(self) -> None:
        for base in self.bases:
            await base.flush()

    async def discard(self, offset: int, length: int) -> None:
        await self.bases[0].discard(offset, length)

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        await self.bases[0].write_zeroes(offset, length, unmap=unmap)


async def opened(base: Backend) -> Base:
    made = Base(base)
    await made.open()
    return made


# As a disk


async def check_passthru(backend: Passthru, script: list[Step]) -> None:
    await backend.open()
    await check_against_model(backend, script, size=SIZE)
    await backend.aclose()


@pytest.mark.parametrize("kind", [Memory, Recorded, AsyncRecorded])
def test_a_stack_is_a_bytearray(kind: Callable[[int], Memory]) -> None:
    """Two floors high, on plain and on asynchronous methods: reads give what a bytearray would."""

    @settings(deadline=None, max_examples=60)
    @given(scripts(SIZE, 512))
    def checked(script: list[Step]) -> None:
        trio.run(check_passthru, Passthru(Passthru(kind(SIZE))), script)

    checked()


def test_a_stack_on_a_file_is_a_bytearray(tmp_path: Path) -> None:
    """The same on a file, which is served in threads."""
    disk = tmp_path / "disk"

    @settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.too_slow])
    @given(scripts(SIZE, 512))
    def checked(script: list[Step]) -> None:
        disk.write_bytes(b"")
        os.truncate(disk, SIZE)
        trio.run(check_passthru, Passthru(File(disk)), script)

    checked()


def test_a_stack_keeps_its_bases_promises() -> None:
    """Served by the engine, through kills and crashes: flush and FUA go down to the storage."""
    run_against(lambda storage: Passthru(OnStorage(storage)), settings=CHECK)


# How a base is called


async def test_short_reads_are_continued_and_a_read_that_stands_still_is_eio() -> None:
    """A read is whole or an error, whatever the base does at a time, at once or awaited."""

    class Short(Recorded):
        step: Any = 512
        later = False

        def read(self, offset: int, buffer: memoryview) -> Any:
            super().read(offset, buffer[:512])
            return self._await() if self.later else self.step

        async def _await(self) -> int:
            await trio.lowlevel.checkpoint()
            return int(self.step)

    for later in (False, True):
        short = Short()
        short.later = later
        base = await opened(short)
        short.write(0, memoryview(bytes(range(256)) * 8), fua=False)
        buffer = bytearray(2048)
        await base.read(0, memoryview(buffer))
        assert buffer == bytes(range(256)) * 8
        assert [call for call in short.log if call[0] == "read"] == [
            ("read", offset, 512) for offset in range(0, 2048, 512)
        ]
        for step, text in ((0, "read 0 of 2048 bytes"), (4096, "read 4096 of 2048"), (-1, "read -1 of 2048")):
            short.step = step
            with pytest.raises(OSError, match=text) as caught:
                await base.read(0, memoryview(buffer))
            assert caught.value.errno == errno.EIO


async def test_a_short_write_is_eio() -> None:
    """Nobody is told that a write was done when a part of it was not."""

    class Short(Recorded):
        def write(self, offset: int, data: memoryview, *, fua: bool) -> Any:
            return len(data) - 512

    class Later(Recorded):
        def write(self, offset: int, data: memoryview, *, fua: bool) -> Any:
            async def later() -> int:
                return len(data) - 512

            return later()

    for base in (await opened(Short()), await opened(Later())):
        with pytest.raises(OSError, match="wrote 512 of 1024 bytes") as caught:
            await base.write(0, memoryview(bytes(1024)), fua=False)
        assert caught.value.errno == errno.EIO


async def test_a_base_out_of_resources_is_enomem() -> None:
    """Whether it raises it or returns it, from whichever method, at once or awaited."""

    async def later(result: int) -> int:
        return result

    class Full(Recorded):
        waits = False

        def full(self, *arguments: Any, **keywords: Any) -> Any:
            return later(-errno.ENOMEM) if self.waits else -errno.ENOMEM

        read = write = flush = discard = write_zeroes = full

    for waits in (False, True):
        full = Full()
        full.waits = waits
        stack = Passthru(full)
        await stack.open()
        for request in (
            stack.read(0, memoryview(bytearray(512))), stack.write(0, memoryview(bytes(512)), fua=False),
            stack.flush(), stack.discard(0, 512), stack.write_zeroes(0, 512, unmap=False),
        ):  # fmt: skip
            with pytest.raises(OSError, match="out of resources") as caught:
                await request
            assert caught.value.errno == errno.ENOMEM


async def test_flush_and_fua_go_to_bases_with_a_cache_only() -> None:
    """A base without `flush` is neither flushed nor asked for FUA; one with it is, exactly when the caller asks."""
    cached, plain = Recorded(), Recorded()
    plain.unsupported = frozenset({"flush"})
    for backend, expected in ((cached, True), (plain, False)):
        base = await opened(backend)
        await base.write(0, memoryview(bytes(512)), fua=True)
        await base.write(0, memoryview(bytes(512)), fua=False)
        await base.flush()
        assert ("flush" in backend.log) == expected
        assert [call[3] for call in backend.log if call[0] == "write"] == [expected, False]


async def test_calling_a_plain_base_is_no_checkpoint() -> None:
    """Where the base does not wait nothing does: not even through two floors."""
    stack = Passthru(Passthru(Recorded()))
    await stack.open()
    with trio.testing.assert_no_checkpoints():
        await stack.read(0, memoryview(bytearray(512)))
        await stack.write(0, memoryview(bytes(512)), fua=True)
        await stack.flush()
        await stack.discard(0, 4096)
        await stack.write_zeroes(0, 4096, unmap=True)


def test_a_file_is_served_in_threads(tmp_path: Path) -> None:
    """A `File` becomes a `ThreadedFile` with the same options; one that is open is refused; another kind stays itself."""
    file = Base(File("/x", direct=True, read_only=True, block_size=4096)).backend
    assert type(file) is ThreadedFile
    assert (file.path, file.direct, file.read_only, file.block_size) == ("/x", True, True, 4096)
    memory = Memory(512)
    assert Base(memory).backend is memory
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(512))

    async def main() -> None:
        taken = File(disk)
        await taken.open()
        with pytest.raises(UsageError, match="open already: convert it before it is opened"):
            Base(taken)
        await taken.aclose()

    trio.run(main)


# What a stack can do, and its geometry

subsets = st.frozensets(st.sampled_from(sorted(OPTIONAL)))


@settings(deadline=None)
@given(st.lists(st.tuples(subsets, st.booleans()), min_size=1, max_size=3))
def test_a_stack_can_do_what_its_bases_can(bases: list[tuple[frozenset[str], bool]]) -> None:
    """Write, discard and zero when all can; flush when one that can be written can; read always."""
    backends = []
    for unsupported, read_only in bases:
        backends.append(Recorded())
        backends[-1].unsupported, backends[-1].read_only = unsupported, read_only
    able = [capabilities(backend) for backend in backends]
    stack = Joined(backends)
    trio.run(stack.open)
    expected = {"read"}
    if all("write" in one for one in able):
        expected |= {name for name in ("write", "discard", "write_zeroes") if all(name in one for one in able)}
        expected |= {"flush"} if any("flush" in one for one in able) else set()
    assert capabilities(stack) == expected
    assert is_async(stack)


class Shaped(Null):
    """A disk of any possible geometry."""

    def __init__(self, shape: tuple[int, int, int, int, bool]) -> None:
        block_size, physical, optimal, granularity, rotational = shape
        super().__init__(1 << 20, block_size=block_size)
        self.physical_block_size = block_size * physical
        self.optimal_io_size = block_size * optimal
        self.discard_granularity = block_size * granularity
        self.rotational = rotational


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([512, 1024, 2048, 4096]),
            st.sampled_from([1, 2, 8]),
            st.sampled_from([0, 1, 2, 128]),
            st.integers(1, 24),
            st.booleans(),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_geometry_is_what_suits_every_base(shapes: list[tuple[int, int, int, int, bool]]) -> None:
    """The kernel takes it, and each size is a multiple of the bases' own, or no hint at all."""
    backends = [Shaped(shape) for shape in shapes]
    for backend in backends:
        check_geometry(backend)
    stack = Joined(backends)
    trio.run(stack.open)
    check_geometry(stack)
    for name in ("block_size", "physical_block_size", "discard_granularity"):
        assert all(getattr(stack, name) % getattr(backend, name) == 0 for backend in backends)
    assert stack.optimal_io_size in {0, *(backend.optimal_io_size for backend in backends)}
    assert stack.rotational == any(backend.rotational for backend in backends)


async def test_settle_reaches_the_ground() -> None:
    """A size or a capability that changed below is known above after one call, however high the stack is."""
    memory = Memory(4096)
    stack = Passthru(as_async(Passthru(memory)))
    await stack.open()
    assert stack.size == 4096
    assert capabilities(stack) == {"read", "write", "discard", "write_zeroes"}
    memory.size = 8192
    assert stack.size == 8192, "the size of a stack on a single base is always that of the base"
    joined = Joined([stack])
    await joined.open()
    memory.size = 4096
    memory.unsupported = frozenset({"discard"})
    joined.settle()
    assert joined.size == 4096
    memory.size = 8192
    joined.settle()
    assert stack.size == 8192
    assert capabilities(stack) == {"read", "write", "write_zeroes"}
    memory.read_only = True
    stack.settle()
    assert capabilities(stack) == {"read"}


def test_str_names_what_it_stands_on() -> None:
    """A stack says what it is made of, from the top down."""
    assert str(Passthru(Passthru(Memory(1 << 20)))) == "passthru(passthru(memory:1M))"


# Opening and closing


class FailsToOpen(Recorded):
    async def open(self) -> None:
        await trio.lowlevel.checkpoint()
        raise OSError(errno.ENODEV, "gone")


class FailsToClose(Recorded):
    async def aclose(self) -> None:
        await super().aclose()
        raise OSError(errno.EIO, f"{self.name} stuck")


def three(log: list[Any], *kinds: type[Recorded]) -> list[Recorded]:
    return [kind(name=name, log=log) for kind, name in zip(kinds, "abc", strict=True)]


async def test_bases_open_in_order_and_close_the_other_way_round() -> None:
    """The last one opened is the first one closed."""
    log: list[Any] = []
    stack = Joined(three(log, Recorded, Recorded, Recorded))
    await stack.open()
    await stack.aclose()
    assert log == ["open a", "open b", "open c", "close c", "close b", "close a"]


async def test_an_open_that_fails_closes_what_it_opened() -> None:
    """Those before the one that failed are closed, it and those behind it are not touched; the error is its own."""
    log: list[Any] = []
    with pytest.raises(OSError, match="gone"):
        await Joined(three(log, Recorded, Recorded, FailsToOpen)).open()
    assert log == ["open a", "open b", "close b", "close a"]


async def test_an_open_that_fails_tells_what_failed_to_close() -> None:
    """The first error stays the error, what failed behind it is a note, and the others are closed all the same."""
    log: list[Any] = []
    with pytest.raises(OSError, match="gone") as caught:
        await Joined(three(log, Recorded, FailsToClose, FailsToOpen)).open()
    assert caught.value.__notes__ == ["and in closing: OSError(5, 'b stuck')"]
    assert log[-1] == "close a"


async def test_a_stack_that_cannot_settle_is_closed() -> None:
    """What is wrong only once all bases are open, closes all of them."""

    class Unsettled(Joined):
        def settle(self) -> None:
            raise UsageError("these do not go together")

    log: list[Any] = []
    with pytest.raises(UsageError, match="do not go together"):
        await Unsettled(three(log, Recorded, Recorded, Recorded)).open()
    assert log[-3:] == ["close c", "close b", "close a"]


def test_an_open_cancelled_anywhere_leaves_nothing_open() -> None:
    """Wherever open is cancelled: either it returned and all bases are open, or none is."""
    outcomes = set()

    async def scenario(scope: trio.CancelScope) -> None:
        bases = three([], Recorded, AsyncRecorded, Recorded)
        stack = Passthru(Joined(bases))
        done = False
        with scope:
            await stack.open()
            done = True
        outcomes.add(done)
        assert [base.opened for base in bases] == [int(done)] * 3

    assert cancel_everywhere(scenario) > 3
    assert outcomes == {False, True}


async def test_every_base_is_closed_whichever_fails() -> None:
    """One error comes out as it is, several in a group, and each base was closed."""
    log: list[Any] = []
    stack = Joined(three(log, Recorded, FailsToClose, Recorded))
    await stack.open()
    with pytest.raises(OSError, match="b stuck"):
        await stack.aclose()
    assert log[-3:] == ["close c", "close b", "close a"]
    stack = Joined(three(log, FailsToClose, FailsToClose, Recorded))
    await stack.open()
    with pytest.raises(ExceptionGroup, match="bases failed to close") as caught:
        await stack.aclose()
    assert [str(error) for error in caught.value.exceptions] == ["[Errno 5] b stuck", "[Errno 5] a stuck"]


def test_a_cancelled_aclose_closes_all_the_same() -> None:
    """Wherever aclose is cancelled, no base stays open."""

    async def scenario(scope: trio.CancelScope) -> None:
        bases = three([], Recorded, Recorded, Recorded)
        stack = Joined(bases)
        await stack.open()
        with scope:
            await stack.aclose()
        assert [base.opened for base in bases] == [0, 0, 0]

    assert cancel_everywhere(scenario) > 3


# Planted bugs


class ForgetsTheOffset(Passthru):
    async def read(self, offset: int, buffer: memoryview) -> None:
        await self.base.read(0, buffer[:512])
        await self.base.read(offset + 512, buffer[512:]) if len(buffer) > 512 else None


class DropsZeroes(Passthru):
    async def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        if unmap:
            await super().write_zeroes(offset, length, unmap=unmap)


@pytest.mark.parametrize("planted", [ForgetsTheOffset, DropsZeroes])
def test_the_model_catches_planted_bugs(planted: type[Passthru]) -> None:
    """A stack that hands on something else than it was asked for is found."""

    @settings(
        deadline=None, max_examples=500, derandomize=True, database=None, phases=[Phase.generate],
        report_multiple_bugs=False, suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(scripts(SIZE, 512))
    def checked(script: list[Step]) -> None:
        trio.run(check_passthru, planted(Memory(SIZE)), script)

    with pytest.raises(AssertionError):
        checked()


class KeepsFlush(Passthru):
    async def flush(self) -> None:
        pass


class KeepsFua(Passthru):
    async def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        await super().write(offset, data, fua=False)


@pytest.mark.parametrize("planted", [KeepsFlush, KeepsFua])
def test_a_crash_catches_planted_bugs(planted: type[Passthru]) -> None:
    """A stack that keeps a flush, or FUA, to itself is found."""
    with pytest.raises(BrokenPromiseError):
        run_against(lambda storage: planted(OnStorage(storage)), settings=HUNT)
