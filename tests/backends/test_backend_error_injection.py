"""`ErrorInjection`: fails as it was told to, and is its base otherwise."""

from __future__ import annotations

import errno
from typing import Any

import attrs
import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.backends.backend_model import Step, check_against_model, scripts
from tests.backends.bases import CHECK, AsyncRecorded, OnStorage, Recorded, cancel_everywhere, run_on_mock_clock
from ublk_trio import DeviceOptions, SimKernel, open_target
from ublk_trio.backends import ErrorInjection, ErrorType, IoType, Memory
from ublk_trio.backends.error_injection import _Injection
from ublk_trio.errors import UsageError
from ublk_trio.testing import BrokenPromiseError, run_against
from ublk_trio.uapi import IoOp

SIZE = 5 * 4096 + 3 * 512
TYPES: tuple[IoType, ...] = ("read", "write", "flush", "discard", "write_zeroes")
ERRNO = {"failure": errno.EIO, "nomem": errno.ENOMEM, "pending": errno.EIO}


async def opened(base: Any = None, kind: type[ErrorInjection] = ErrorInjection) -> ErrorInjection:
    disk = kind(base if base is not None else Recorded())
    await disk.open()
    return disk


async def ask(disk: ErrorInjection, io_type: str, *, length: int = 1024) -> bytes:
    """One request at 512. What a read read, else nothing."""
    if io_type == "read":
        buffer = bytearray(length)
        await disk.read(512, memoryview(buffer))
        return bytes(buffer)
    if io_type == "write":
        await disk.write(512, memoryview(b"w" * length), fua=False)
    elif io_type == "flush":
        await disk.flush()
    elif io_type == "discard":
        await disk.discard(512, length)
    else:
        await disk.write_zeroes(512, length, unmap=False)
    return b""


async def result_of(disk: ErrorInjection, io_type: str) -> int:
    """0, or the errno."""
    try:
        await ask(disk, io_type)
    except OSError as error:
        return error.errno or -1
    return 0


# What fails, and how


@attrs.frozen
class Act:
    """One thing that is done: an injection, a `clear`, or a request."""

    what: str
    io_type: IoType
    error_type: ErrorType = "failure"
    num: int = 0


acts = st.lists(
    st.builds(
        Act,
        st.sampled_from(["inject", "inject", "clear", "request", "request", "request"]),
        st.sampled_from([*TYPES, "all"]),
        st.sampled_from(["failure", "nomem"]),
        st.integers(0, 3),
    ),
    max_size=20,
)


async def check_counts(kind: type[ErrorInjection], acts: list[Act]) -> None:
    base = Recorded()
    disk = await opened(base, kind)
    left: dict[str, list[int]] = {}
    for act in acts:
        types = TYPES if act.io_type == "all" else (act.io_type,)
        if act.what == "clear":
            disk.clear()
            left.clear()
        elif act.what == "inject":
            disk.inject(act.io_type, act.error_type, num=act.num)
            left.update({one: [ERRNO[act.error_type]] * act.num for one in types})
        else:
            for one in types:
                expected = left[one].pop() if left.get(one) else 0
                calls = len(base.log)
                assert await result_of(disk, one) == expected, (act, one)
                assert len(base.log) == calls + (expected == 0), "what fails does not get to the base"


@settings(deadline=None)
@given(acts)
def test_injections_count_down_each_for_its_type(acts: list[Act]) -> None:
    """The next so many of a type fail, none of another; a new injection takes the old one's place; clear ends all."""
    trio.run(check_counts, ErrorInjection, acts)


@settings(deadline=None, max_examples=60)
@given(scripts(SIZE, 512), st.booleans())
def test_without_injections_it_is_its_base(script: list[Step], asynchronous: bool) -> None:
    """Reads give what a bytearray would."""

    async def main() -> None:
        await check_against_model(await opened((AsyncRecorded if asynchronous else Memory)(SIZE)), script, size=SIZE)

    trio.run(main)


@pytest.mark.parametrize("io_type", TYPES)
async def test_queue_depth_counts_the_others_with_the_base(io_type: IoType) -> None:
    """With a depth of 2 the first two at a time go through, and the third fails; pending ones do not count."""
    disk = await opened(AsyncRecorded())
    disk.inject("flush", "pending", num=5)
    results: list[int] = []

    async def one() -> None:
        results.append(await result_of(disk, io_type))

    async with trio.open_nursery() as nursery:
        for _ in range(5 if io_type != "flush" else 0):
            nursery.start_soon(result_of, disk, "flush")
        await trio.testing.wait_all_tasks_blocked()
        disk.inject(io_type, "failure", num=100, queue_depth=2)
        for _ in range(2):
            assert await result_of(disk, io_type) == 0
        for _ in range(4):
            nursery.start_soon(one)
        await trio.testing.wait_all_tasks_blocked()
        disk.clear()
    assert sorted(results) == [0, 0, errno.EIO, errno.EIO]


@pytest.mark.parametrize("offset", [0, 511, 1023, 1024])
async def test_a_read_is_corrupted_in_its_reader_s_buffer_only(offset: int) -> None:
    """One bit pattern of one byte, and the disk keeps what it has; behind the data's end nothing."""
    base = Recorded()
    disk = await opened(base)
    await ask(disk, "write")
    disk.inject("read", "corrupt_data", corrupt_offset=offset, corrupt_value=0x21)
    expected = bytearray(b"w" * 1024)
    if offset < 1024:
        expected[offset] ^= 0x21
    assert await ask(disk, "read") == expected
    assert await ask(disk, "read") == b"w" * 1024, "it was counted"


@pytest.mark.parametrize("offset", [0, 511, 1023, 1024])
async def test_a_write_is_corrupted_in_the_base_only(offset: int) -> None:
    """The writer's data are not touched, not even for the time of the call."""
    seen = []

    class Looks(Recorded):
        async def write(self, offset: int, data: memoryview, *, fua: bool) -> None:  # type: ignore[override]
            await trio.lowlevel.checkpoint()
            seen.append(bytes(theirs))
            super().write(offset, data, fua=fua)

    disk = await opened(Looks())
    theirs = bytearray(b"w" * 1024)
    disk.inject("write", "corrupt_data", corrupt_offset=offset)
    await disk.write(512, memoryview(theirs).toreadonly(), fua=True)
    expected = bytearray(b"w" * 1024)
    if offset < 1024:
        expected[offset] ^= 0xFF
    assert await ask(disk, "read") == expected
    assert seen == [b"w" * 1024]


async def test_corrupting_what_has_no_data_counts_and_does_nothing() -> None:
    """A flush, a discard, zeroing are carried out."""
    base = Recorded()
    disk = await opened(base)
    disk.inject("all", "corrupt_data")
    for io_type in ("flush", "discard", "write_zeroes"):
        assert await ask(disk, io_type) == b""
    assert base.log[1:] == ["flush", ("discard", 512, 1024), ("write_zeroes", 512, 1024, False)]


@pytest.mark.parametrize("way", ["clear", "close"])
@pytest.mark.parametrize("io_type", TYPES)
async def test_pending_requests_end_with_eio(io_type: IoType, way: str) -> None:
    """They wait until all is cleared, or the disk is closed, and have never been carried out."""
    base = Recorded()
    disk = await opened(base)
    disk.inject(io_type, "pending", num=3)
    results: list[int] = []

    async def one() -> None:
        results.append(await result_of(disk, io_type))

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(one)
        await trio.testing.wait_all_tasks_blocked()
        assert (disk.pending, results) == (3, [])
        assert await result_of(disk, io_type) == 0, "the fourth goes through"
        disk.inject(io_type, "failure", num=0)
        await trio.testing.wait_all_tasks_blocked()
        assert disk.pending == 3, "another injection ends nothing"
        if way == "clear":
            disk.clear()
        else:
            await disk.aclose()
    assert results == [errno.EIO] * 3
    assert disk.pending == 0
    assert len([call for call in base.log if "open" not in call and "close" not in call]) == 1


def test_cancelled_anywhere_nothing_is_counted_twice() -> None:
    """Wherever requests are cancelled, pending or with the base, later ones find the base as if they had not been."""

    async def scenario(scope: trio.CancelScope) -> None:
        disk = await opened(AsyncRecorded())
        disk.inject("read", "pending", num=1)
        disk.inject("write", "corrupt_data", num=2)
        with scope:
            await ask(disk, "write")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(result_of, disk, "read")
                nursery.start_soon(ask, disk, "write")
                await trio.testing.wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
        assert disk.pending == 0
        disk.inject("all", "failure", num=100, queue_depth=1)
        for io_type in TYPES:
            assert await result_of(disk, io_type) == 0, "nobody else is with the base"
        await disk.aclose()

    assert cancel_everywhere(scenario) > 5


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"io_type": "unmap"}, "io_type 'unmap' is unknown: use read, write, flush, discard, write_zeroes, all"),
        ({"error_type": "late"}, "error_type 'late' is unknown: use failure, pending, corrupt_data, nomem"),
        ({"num": -1}, "num -1 is not possible: use a whole number from 0 up"),
        ({"queue_depth": "2"}, "queue_depth '2' is not possible"),
        ({"corrupt_offset": 0.5}, "corrupt_offset 0.5 is not possible"),
        ({"corrupt_value": 0}, "corrupt_value 0 is not possible: use 1 to 255"),
        ({"corrupt_value": 256}, "corrupt_value 256 is not possible"),
    ],
)
async def test_what_cannot_be_injected_is_refused(arguments: dict[str, Any], text: str) -> None:
    """In one line, and what was injected before stays."""
    disk = await opened()
    disk.inject("read", "failure")
    with pytest.raises(UsageError) as caught:
        disk.inject(**{"io_type": "all", "error_type": "failure", **arguments})
    assert text in str(caught.value)
    assert [await result_of(disk, "read") for _ in range(2)] == [errno.EIO, 0]


# Served by the engine


def test_applications_see_what_is_injected() -> None:
    """Behind a device: EIO, a changed byte, and a device that stops though a request is pending."""

    async def main() -> None:
        disk = ErrorInjection(Memory(1 << 20))
        kernel = SimKernel()
        async with open_target(kernel) as target:
            device = await target.start_device(disk, DeviceOptions(grace_seconds=3))
            block = kernel.block_device(device.dev_id)
            disk.inject("write", "failure")
            with pytest.raises(OSError, match="Input/output error"):
                await block.write(0, b"x" * 4096)
            await block.write(0, b"x" * 4096)
            disk.inject("read", "corrupt_data", corrupt_offset=7, corrupt_value=1)
            assert await block.read(0, 4096) == b"x" * 7 + b"y" + b"x" * 4088
            disk.inject("read", "pending")
            stuck = block.submit(IoOp.READ, 0, 4096)
            await trio.testing.wait_all_tasks_blocked()
            assert disk.pending == 1
            begin = trio.current_time()
            await target.stop_device(device)
            assert trio.current_time() - begin == pytest.approx(3)
            assert stuck.result == -errno.EIO
        kernel.check()
        assert kernel.leftovers() == []

    run_on_mock_clock(main)


def test_served_without_injections_it_keeps_its_bases_promises() -> None:
    """Through kills and crashes; with a corrupted write, the test of any backend finds it."""
    run_against(lambda storage: ErrorInjection(OnStorage(storage)), settings=CHECK)

    def corrupting(storage: Any) -> ErrorInjection:
        disk = ErrorInjection(OnStorage(storage))
        disk.inject("write", "corrupt_data", corrupt_offset=300)
        return disk

    with pytest.raises(BrokenPromiseError):
        run_against(corrupting, settings=settings(CHECK, phases=[Phase.generate]))


# Planted bugs


class CountsTheOthers(ErrorInjection):
    """Requests of another type use an injection up."""

    def _take(self, io_type: str) -> _Injection | None:
        for injection in self._injections.values():
            injection.num = max(0, injection.num - 1)
        return super()._take(io_type)


class NeverOver(ErrorInjection):
    def _take(self, io_type: str) -> _Injection | None:
        return self._injections.get(io_type)


class FailsBehindTheBase(ErrorInjection):
    async def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        await self.base.write(offset, data, fua=fua)
        async with self._injected("write"):
            pass


@pytest.mark.parametrize("planted", [CountsTheOthers, NeverOver, FailsBehindTheBase])
def test_the_counts_catch_planted_bugs(planted: type[ErrorInjection]) -> None:
    """A disk that fails too often, too rarely, or after all was done, is found."""

    @settings(
        deadline=None, max_examples=500, derandomize=True, database=None, phases=[Phase.generate],
        report_multiple_bugs=False, suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(acts)
    def checked(acts: list[Act]) -> None:
        trio.run(check_counts, planted, acts)

    with pytest.raises(AssertionError):
        checked()
