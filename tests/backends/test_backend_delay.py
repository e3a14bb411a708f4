"""`Delay`: late by as much as was asked for, in the mean, and otherwise its base."""

from __future__ import annotations

import errno
import random
import time
from typing import Any, get_args

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.backends.backend_model import Step, check_against_model, scripts
from tests.backends.bases import CHECK, HUNT, AsyncRecorded, OnStorage, Recorded, cancel_everywhere, run_on_mock_clock
from ublk_trio.backends import Delay, LatencyKind, Memory, Null
from ublk_trio.errors import UsageError
from ublk_trio.testing import BrokenPromiseError, run_against

SIZE = 5 * 4096 + 3 * 512
LATENCIES: dict[str, int] = {
    "avg_read_us": 1000,
    "p99_read_us": 20_000,
    "avg_write_us": 3000,
    "p99_write_us": 50_000,
}


def delayed(base: Any = None, kind: type[Delay] = Delay, **latencies: int) -> Delay:
    return kind(base or Recorded(), random=random.Random(7), **{**LATENCIES, **latencies})


async def seconds_of(request: Any) -> float:
    begin = trio.current_time()
    await request
    return trio.current_time() - begin


async def latencies_of(delay: Delay, kind: str, requests: int) -> list[float]:
    """How long each of them takes, one after the other."""
    buffer = memoryview(bytearray(512))
    return [
        await seconds_of(
            delay.read(0, buffer)
            if kind == "read"
            else delay.write(0, buffer, fua=False)
            if kind == "write"
            else delay.flush()
        )
        for _ in range(requests)
    ]


def check_latencies(kind: type[Delay], request: str) -> None:
    """10,000 requests: each takes one of its two latencies, and one in a hundred the second."""
    average, p99 = (1000, 20_000) if request == "read" else (3000, 50_000)

    async def main() -> list[float]:
        delay = delayed(kind=kind)
        await delay.open()
        return await latencies_of(delay, request, 10_000)

    took = [round(seconds * 1e6) for seconds in run_on_mock_clock(main)]
    assert set(took) == {average, p99}
    assert took.count(p99) == pytest.approx(100, abs=30)
    assert sum(took) / len(took) == pytest.approx(0.99 * average + 0.01 * p99, rel=0.1)


@pytest.mark.parametrize("request_kind", ["read", "write", "flush"])
def test_each_request_takes_one_of_two_latencies(request_kind: str) -> None:
    """Reads theirs, writes and flushes theirs, exactly; the mean is 0.99 average + 0.01 p99."""
    check_latencies(Delay, request_kind)


async def test_the_mean_holds_on_a_real_clock() -> None:
    """Far below what a timer can do, the mean is within a tenth of what was asked for: too long waits are made up for."""
    buffer = memoryview(bytearray(512))
    means = []
    # A machine that is busy with something else for longer than is made up for spoils a round, but not each of them.
    for _ in range(5):
        delay = delayed(Null(1 << 20), avg_read_us=200, p99_read_us=200)
        await delay.open()
        begin = time.perf_counter()
        for _ in range(500):
            await delay.read(0, buffer)
        means.append((time.perf_counter() - begin) / 500 * 1e6)
    assert min(means) == pytest.approx(200, rel=0.1)


async def test_an_overlong_wait_is_made_up_for_once(mock_clock: trio.testing.MockClock) -> None:
    """After a wait that was 4 ms too long, four others of 1 ms are left out, however many begin at once."""
    delay = delayed(avg_read_us=1000, p99_read_us=1000)
    await delay.open()
    done = []

    async def reader() -> None:
        done.extend(await latencies_of(delay, "read", 1))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(reader)
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(0.005)
        await trio.testing.wait_all_tasks_blocked()
        assert done == pytest.approx([0.005])
        for _ in range(6):
            nursery.start_soon(reader)
        await trio.testing.wait_all_tasks_blocked()
        assert done[1:] == [0, 0, 0, 0]
        mock_clock.jump(0.001)
    assert done[5:] == pytest.approx([0.001, 0.001])


async def test_a_long_pause_is_not_made_up_for(autojump_clock: trio.testing.MockClock) -> None:
    """When the process was stopped for a minute, at most 0.1 s of waiting are left out."""
    delay = delayed(avg_read_us=1000, p99_read_us=1000)
    await delay.open()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(latencies_of, delay, "read", 1)
        await trio.testing.wait_all_tasks_blocked()
        autojump_clock.jump(60)
    assert sum(await latencies_of(delay, "read", 200)) == pytest.approx(0.1)


def test_requests_wait_side_by_side() -> None:
    """A hundred at a time take as long as one."""

    async def main() -> None:
        delay = delayed(p99_read_us=1000)
        await delay.open()
        begin = trio.current_time()
        async with trio.open_nursery() as nursery:
            for _ in range(100):
                nursery.start_soon(latencies_of, delay, "read", 1)
        assert trio.current_time() - begin == pytest.approx(0.001)

    run_on_mock_clock(main)


def test_a_new_latency_counts_from_the_next_wait_on() -> None:
    """Each kind is changed by itself, and a request that waits already is not touched."""

    async def main() -> None:
        delay = delayed(p99_read_us=1000, p99_write_us=3000)
        await delay.open()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(latencies_of, delay, "read", 1)
            await trio.testing.wait_all_tasks_blocked()
            for kind in get_args(LatencyKind):
                delay.update_latency(kind, {"avg_read": 5000, "p99_read": 5000}.get(kind, 7000))
            begin = trio.current_time()
        assert trio.current_time() - begin == pytest.approx(0.001)
        assert await latencies_of(delay, "read", 1) == pytest.approx([0.005])
        assert await latencies_of(delay, "write", 1) == pytest.approx([0.007])
        assert dict(delay.latency_us) == {"avg_read": 5000, "p99_read": 5000, "avg_write": 7000, "p99_write": 7000}

    run_on_mock_clock(main)


async def test_a_latency_of_0_is_the_base_itself() -> None:
    """It adds no checkpoint; nor do a discard and zeroing, which are never late."""
    delay = delayed(avg_read_us=0, p99_read_us=0, avg_write_us=0, p99_write_us=0)
    await delay.open()
    with trio.testing.assert_no_checkpoints():
        await delay.read(0, memoryview(bytearray(512)))
        await delay.write(0, memoryview(bytes(512)), fua=False)
        await delay.flush()
    delay = delayed()
    await delay.open()
    with trio.testing.assert_no_checkpoints():
        await delay.discard(0, 4096)
        await delay.write_zeroes(0, 4096, unmap=False)


@pytest.mark.parametrize("value", [-1, 1.5, "3", None])
def test_an_impossible_latency_is_refused(value: Any) -> None:
    """In one line, and nothing is changed."""
    with pytest.raises(UsageError, match=r"avg_read .* is not possible: use a whole number of µs"):
        delayed(avg_read_us=value)
    delay = delayed()
    with pytest.raises(UsageError, match=r"p99_write .* is not possible"):
        delay.update_latency("p99_write", value)
    unknown: Any = "avg_flush"
    with pytest.raises(
        UsageError, match="latency 'avg_flush' is unknown: use avg_read, p99_read, avg_write, p99_write"
    ):
        delay.update_latency(unknown, 1)
    assert delay.latency_us["p99_write"] == 50_000


def test_a_percentile_below_its_average_is_refused_at_first() -> None:
    """No disk is made with it; changing one after the other must be possible."""
    with pytest.raises(UsageError, match="p99_write_us 2 is less than avg_write_us 3: give at least that"):
        delayed(avg_write_us=3, p99_write_us=2)
    delay = delayed()
    delay.update_latency("avg_write", 100_000)


async def test_what_fails_in_the_base_fails_at_once() -> None:
    """An error is not late, and has the base's errno."""

    class Fails(Recorded):
        def read(self, offset: int, buffer: memoryview) -> int | None:
            raise OSError(errno.ENODATA, "no data")

    delay = delayed(Fails())
    await delay.open()
    with pytest.raises(OSError, match="no data"), trio.testing.assert_no_checkpoints():
        await delay.read(0, memoryview(bytearray(512)))


def test_cancelled_anywhere_nothing_is_left_over() -> None:
    """Wherever a request is cancelled, later ones take what they take, and the disk closes."""

    async def scenario(scope: trio.CancelScope) -> None:
        base = AsyncRecorded()
        delay = delayed(base, p99_read_us=1000, p99_write_us=3000)
        await delay.open()
        with scope:
            await latencies_of(delay, "write", 2)
            await latencies_of(delay, "read", 2)
            await latencies_of(delay, "flush", 1)
        assert await latencies_of(delay, "read", 3) == pytest.approx([0.001] * 3)
        await delay.aclose()
        assert base.opened == 0

    assert cancel_everywhere(scenario) > 8


@settings(deadline=None, max_examples=40)
@given(scripts(SIZE, 512), st.booleans())
def test_a_delayed_disk_is_a_bytearray(script: list[Step], asynchronous: bool) -> None:
    """Reads give what a bytearray would, only later."""

    async def main() -> None:
        delay = delayed((AsyncRecorded if asynchronous else Memory)(SIZE))
        await delay.open()
        await check_against_model(delay, script, size=SIZE)

    run_on_mock_clock(main)


class FlushesLater(Delay):
    """Answers a flush, and means to flush some time."""

    async def flush(self) -> None:
        await self._wait("avg_write", "p99_write")


def test_a_delayed_disk_keeps_its_bases_promises() -> None:
    """Served by the engine, out of order, through kills and crashes."""
    run_against(lambda storage: delayed(OnStorage(storage)), settings=CHECK)
    with pytest.raises(BrokenPromiseError):
        run_against(lambda storage: delayed(OnStorage(storage), FlushesLater), settings=HUNT)


class AlwaysAverage(Delay):
    async def _wait(self, average: LatencyKind, p99: LatencyKind) -> None:
        await super()._wait(average, average)


class OneInTen(Delay):
    async def _wait(self, average: LatencyKind, p99: LatencyKind) -> None:
        await super()._wait(p99 if self._random.randrange(10) == 0 else average, p99)


class FlushesAtOnce(Delay):
    async def flush(self) -> None:
        await self.base.flush()


@pytest.mark.parametrize(
    ("planted", "request_kind"), [(AlwaysAverage, "read"), (OneInTen, "write"), (FlushesAtOnce, "flush")]
)
def test_the_latencies_catch_planted_bugs(planted: type[Delay], request_kind: str) -> None:
    """A disk that is late by something else is found."""
    with pytest.raises(AssertionError):
        check_latencies(planted, request_kind)
