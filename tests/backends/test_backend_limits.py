"""`Limited`: never more than was allowed, never less than that when it is wanted, and first come, first served."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.backends.backend_model import Step, check_against_model, scripts
from tests.backends.bases import CHECK, AsyncRecorded, OnStorage, cancel_everywhere, run_on_mock_clock
from ublk_trio import DeviceOptions, SimKernel, open_target
from ublk_trio.backends import Limited, Limits, Memory, Null, limits
from ublk_trio.backends.limits import BURST_SECONDS
from ublk_trio.errors import UsageError
from ublk_trio.testing import run_against

SIZE = 5 * 4096 + 3 * 512
MBYTE = 1 << 20
SECONDS = 10.0


@attrs.frozen
class Done:
    """A request that got to the base."""

    kind: str
    time: float
    length: int
    offset: int


class Timed(Null):
    """Notes what gets to it, and when; takes `seconds` for each request."""

    def __init__(self, seconds: float = 0) -> None:
        super().__init__(1 << 40)
        self.seconds = seconds
        self.done: list[Done] = []

    async def read(self, offset: int, buffer: memoryview) -> None:  # type: ignore[override]
        self.done.append(Done("read", trio.current_time(), len(buffer), offset))
        if self.seconds:
            await trio.sleep(self.seconds)

    async def write(self, offset: int, data: memoryview, *, fua: bool) -> None:  # type: ignore[override]
        self.done.append(Done("write", trio.current_time(), len(data), offset))
        if self.seconds:
            await trio.sleep(self.seconds)


async def opened(base: Any, allowed: Limits, kind: type[Limited] = Limited) -> Limited:
    disk = kind(base, allowed)
    await disk.open()
    return disk


async def ask(disk: Limited, kind: str, length: int = 4096, offset: int = 0) -> None:
    """One request; the base sees `offset`, so a test can tell requests apart by it."""
    if kind == "read":
        await disk.read(offset, memoryview(bytearray(length)))
    else:
        await disk.write(offset, memoryview(bytes(length)), fua=False)


# How much


@attrs.frozen
class Stream:
    """A user of the disk: asks again as soon as it is answered."""

    kind: str
    length: int


def spent(done: list[Done], name: str) -> list[tuple[float, int]]:
    """When how many tokens of a limit were spent."""
    kinds = {"r_mbytes_per_sec": ("read",), "w_mbytes_per_sec": ("write",)}.get(name, ("read", "write"))
    return [(one.time, 1 if name == "rw_ios_per_sec" else one.length) for one in done if one.kind in kinds]


def check_never_more(done: list[Done], allowed: Limits) -> None:
    """In any stretch of time: no more than the limit, what a bucket holds, and the one request that overdraws it."""
    for name, limit in attrs.asdict(allowed).items():
        rate = limit * (1 if name == "rw_ios_per_sec" else MBYTE)
        # What is in the bucket, as it was drawn: more than it can hold, or a debt when somebody goes, breaks the rule.
        debt, last = 0.0, -1e9
        for time, cost in spent(done, name) if rate else ():
            debt = max(debt - (time - last) * rate, -BURST_SECONDS * rate)
            assert debt <= cost * 1e-6 + 1e-3, f"{name}={limit}: too early by {debt} at {time}"
            debt, last = debt + cost, time


def expected_rates(allowed: Limits, stream: Stream) -> float:
    """Requests a second that streams of one kind get when nobody else is there."""
    own = allowed.r_mbytes_per_sec if stream.kind == "read" else allowed.w_mbytes_per_sec
    rates = [allowed.rw_ios_per_sec, allowed.rw_mbytes_per_sec * MBYTE / stream.length, own * MBYTE / stream.length]
    return min(rate for rate in rates if rate)


async def run_streams(disk: Limited, streams: list[Stream], seconds: float = SECONDS) -> None:
    async def user(stream: Stream) -> None:
        while True:
            await ask(disk, stream.kind, stream.length)

    with trio.move_on_after(seconds):
        async with trio.open_nursery() as nursery:
            for stream in streams:
                nursery.start_soon(user, stream)


@st.composite
def some_limits(draw: st.DrawFn) -> Limits:
    """At least one that concerns reads, and one that concerns writes."""
    drawn = [draw(st.sampled_from([0, 0, 1, 2, 7])) for _ in range(3)]
    ios = draw(st.sampled_from([0, 10, 33, 150]))
    if not (ios or drawn[0] or (drawn[1] and drawn[2])):
        ios = 20
    return Limits(rw_ios_per_sec=ios, rw_mbytes_per_sec=drawn[0], r_mbytes_per_sec=drawn[1], w_mbytes_per_sec=drawn[2])


# From a third of what a second allows to several times of it.
lengths = st.sampled_from([1 << 16, 1 << 18, 1 << 20, 5 << 20])


async def check_one_kind(kind: type[Limited], allowed: Limits, stream: Stream, users: int, base_seconds: float) -> None:
    base = Timed(base_seconds)
    disk = await opened(base, allowed, kind)
    begin = trio.current_time()
    await run_streams(disk, [stream] * users)
    check_never_more(base.done, allowed)
    rate = min(expected_rates(allowed, stream), users / base_seconds if base_seconds else 1e9)
    at_begin = [one for one in base.done if one.time == begin]
    # One request is always let through, whatever it costs; with it, and with what was in the bucket, 10 s have begun.
    assert len(base.done) - len(at_begin) == pytest.approx(SECONDS * rate, rel=0.05, abs=2)


@settings(deadline=None, max_examples=40)
@given(some_limits(), st.sampled_from(["read", "write"]), lengths, st.sampled_from([1, 3, 16]))
def test_one_kind_gets_what_is_allowed(allowed: Limits, kind: str, length: int, users: int) -> None:
    """Over 10 s, of whatever limits: what the tightest one allows, within 5 %, by any number of users; never more."""
    run_on_mock_clock(lambda: check_one_kind(Limited, allowed, Stream(kind, length), users, 0))


@settings(deadline=None, max_examples=20)
@given(some_limits(), st.sampled_from(["read", "write"]), lengths)
def test_a_slow_base_is_not_slowed_down_further(allowed: Limits, kind: str, length: int) -> None:
    """What the base takes goes on beside the waiting, and is not added to it."""
    run_on_mock_clock(lambda: check_one_kind(Limited, allowed, Stream(kind, length), 2, 0.05))


async def check_mixed(kind: type[Limited], allowed: Limits, streams: list[Stream]) -> None:
    base = Timed()
    disk = await opened(base, allowed, kind)
    await run_streams(disk, streams, 3.0)
    check_never_more(base.done, allowed)
    for stream in streams:
        last = max((one.time for one in base.done if one.kind == stream.kind), default=-1.0)
        # The longest that anybody can have to wait, at the tightest limit: for the one that went last, for one of each
        # of the others, which came before, and for one of its own kind.
        each = [1 / expected_rates(allowed, other) for other in streams]
        longest = max(each) + sum(each) + 1 / expected_rates(allowed, stream)
        assert last > trio.current_time() - longest - 0.1 or longest > 3, "nobody starves"


@settings(deadline=None, max_examples=60)
@given(some_limits(), st.lists(st.builds(Stream, st.sampled_from(["read", "write"]), lengths), min_size=1, max_size=8))
def test_reads_and_writes_together_get_no_more_and_nobody_starves(allowed: Limits, streams: list[Stream]) -> None:
    """Any mixture of small and huge requests: each limit holds in any stretch of time, and each kind goes on to the end."""
    run_on_mock_clock(lambda: check_mixed(Limited, allowed, streams))


async def check_late_wakings(kind: type[Limited], users: int) -> None:
    """A clock that only moves in steps of 7 ms, so that everybody wakes up late, by another time each."""
    clock: Any = trio.lowlevel.current_clock()
    base = Timed()
    disk = await opened(base, Limits(rw_ios_per_sec=1000), kind)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run_streams, disk, [Stream("read", 4096), Stream("write", 4096)] * users, 1.0)
        for _ in range(144):
            await trio.testing.wait_all_tasks_blocked()
            clock.jump(0.007)
    check_never_more(base.done, Limits(rw_ios_per_sec=1000))
    assert len(base.done) == pytest.approx(1000, rel=0.05)


@pytest.mark.parametrize("users", [1, 4])
def test_late_wakings_cost_nothing(users: int) -> None:
    """The rate is the same when whoever waits wakes up milliseconds too late."""
    trio.run(check_late_wakings, Limited, users, clock=trio.testing.MockClock())


async def check_idle() -> None:
    base = Timed()
    disk = await opened(base, Limits(rw_ios_per_sec=1000))
    await ask(disk, "read")
    await trio.sleep(60)
    begin = trio.current_time()
    await run_streams(disk, [Stream("read", 512)] * 4, 0.1)
    assert 50 <= len([one for one in base.done if one.time == begin]) <= 51
    check_never_more(base.done, Limits(rw_ios_per_sec=1000))


def test_an_idle_disk_saves_up_little() -> None:
    """After a minute without requests no more than 50 ms of the limit, and one request, go at once."""
    run_on_mock_clock(check_idle)


# In which order


async def check_order(kind: type[Limited], allowed: Limits, script: list[tuple[str, int, float, float]]) -> None:
    """Requests that come one after the other, some of them cancelled after a while: those of a kind go in that order."""
    base = Timed()
    disk = await opened(base, allowed, kind)
    came: list[tuple[str, int]] = []

    async def request(number: int, kind: str, length: int, patience: float) -> None:
        with trio.move_on_after(patience):
            await ask(disk, kind, length, number * 512)

    async with trio.open_nursery() as nursery:
        for number, (what, length, pause, patience) in enumerate(script):
            await trio.sleep(pause)
            came.append((what, number * 512))
            nursery.start_soon(request, number, what, length, patience)
            # It must have come before the next one does.
            await trio.testing.wait_all_tasks_blocked()
    check_never_more(base.done, allowed)
    went = [(one.kind, one.offset) for one in base.done]
    for what in ("read", "write"):
        mine = [one for one in went if one[0] == what]
        assert mine == [one for one in came if one in mine], f"{what}s in order"
    if not allowed.r_mbytes_per_sec and not allowed.w_mbytes_per_sec:
        assert went == [one for one in came if one in went], "what both share, in the order of all"
    patient = [one for one, (*_, patience) in zip(came, script, strict=True) if patience == 1e6]
    assert set(patient) <= set(went), "everybody who waits gets there"
    assert not disk._reads.waiting
    assert not disk._writes.waiting


requests = st.lists(
    st.tuples(
        st.sampled_from(["read", "write"]),
        lengths,
        st.sampled_from([0, 0, 0.001, 0.3]),
        st.sampled_from([1e6, 1e6, 1e6, 0.0, 0.01, 0.5]),
    ),
    max_size=12,
)


@settings(deadline=None, max_examples=100)
@given(some_limits(), requests)
def test_first_come_first_served(allowed: Limits, script: list[tuple[str, int, float, float]]) -> None:
    """Reads go in their order, writes in theirs, all in one if no limit is one kind's own; whoever gives up in between."""
    run_on_mock_clock(lambda: check_order(Limited, allowed, script))


def test_writes_that_wait_for_their_own_limit_do_not_hold_up_reads() -> None:
    """A limit of writes is none of reads, even if both share another one."""

    async def main() -> None:
        base = Timed()
        disk = await opened(base, Limits(rw_ios_per_sec=100, w_mbytes_per_sec=1))
        begin = trio.current_time()
        await run_streams(disk, [Stream("write", MBYTE)] * 4 + [Stream("read", 4096)] * 4)
        reads = [one for one in base.done if one.kind == "read"]
        assert len(reads) == pytest.approx(SECONDS * 99, rel=0.05)
        assert len(base.done) - len(reads) == pytest.approx(SECONDS, abs=1)
        assert trio.current_time() - begin == pytest.approx(SECONDS)

    run_on_mock_clock(main)


# Changes


def test_new_limits_count_for_those_that_wait() -> None:
    """A request that had to wait for minutes goes when the limit is lifted; with another one it waits for that."""

    async def main() -> None:
        base = Timed()
        disk = await opened(base, Limits(r_mbytes_per_sec=1))
        await ask(disk, "read", 100 * MBYTE)
        begin = trio.current_time()
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(ask, disk, "read", MBYTE)
            await trio.sleep(5)
            assert len(base.done) == 1
            disk.set_limits(Limits(r_mbytes_per_sec=2))
            await trio.sleep(0.1)
            assert len(base.done) == 2, "the old debt is not the new limit's"
            await trio.sleep(0.5)
            assert len(base.done) == 3
            disk.set_limits(Limits(w_mbytes_per_sec=2))
        assert disk.limits == Limits(w_mbytes_per_sec=2)
        assert trio.current_time() - begin == pytest.approx(5.6)
        with trio.testing.assert_no_checkpoints():
            await disk.base.flush()

    run_on_mock_clock(main)


def test_a_limit_that_stays_the_same_is_not_begun_anew() -> None:
    """Whoever sets the same limit every millisecond gets no more through it."""

    async def main() -> None:
        base = Timed()
        allowed = Limits(rw_ios_per_sec=100)
        disk = await opened(base, allowed)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run_streams, disk, [Stream("read", 4096)] * 3, 1.0)
            for milliseconds in range(1000):
                disk.set_limits(attrs.evolve(allowed, w_mbytes_per_sec=milliseconds % 3))
                await trio.sleep(0.001)
        check_never_more(base.done, allowed)
        assert len(base.done) == pytest.approx(100 * (1 + BURST_SECONDS), abs=2)

    run_on_mock_clock(main)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(some_limits(), st.sampled_from([0.0, 0.05, 1.0])), min_size=1, max_size=6), requests)
def test_limits_may_change_at_any_time(
    changes: list[tuple[Limits, float]], script: list[tuple[str, int, float, float]]
) -> None:
    """Whatever they change to and whoever waits: the order stays, and everybody gets there in the end."""

    class Changing(Limited):
        async def change(self) -> None:
            for allowed, pause in changes:
                await trio.sleep(pause)
                self.set_limits(allowed)
            self.set_limits(Limits())

    async def main() -> None:
        base = Timed()
        disk = await opened(base, changes[0][0], Changing)
        assert isinstance(disk, Changing)
        done = 0

        async def request(what: str, length: int) -> None:
            nonlocal done
            await ask(disk, what, length)
            done += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(disk.change)
            for what, length, pause, _ in script:
                nursery.start_soon(request, what, length)
                await trio.sleep(pause)
        assert done == len(script)

    run_on_mock_clock(main)


async def test_without_limits_it_is_its_base() -> None:
    """No checkpoint, and nothing to wait for; and what no limit counts goes by."""
    disk = Limited(Memory(1 << 20))
    await disk.open()
    with trio.testing.assert_no_checkpoints():
        await ask(disk, "read")
        await ask(disk, "write")
    disk.set_limits(Limits(rw_ios_per_sec=1, rw_mbytes_per_sec=1))
    await ask(disk, "write", MBYTE)
    with trio.testing.assert_no_checkpoints():
        await disk.flush()
        await disk.discard(0, 4096)
        await disk.write_zeroes(0, 4096, unmap=True)


@pytest.mark.parametrize("value", [-1, 0.5, "1", None, True])
def test_an_impossible_limit_is_refused(value: Any) -> None:
    """In one line that names it."""
    with pytest.raises(UsageError, match=r"limits: r_mbytes_per_sec .* is not possible: use a whole number from 0 up"):
        Limits(r_mbytes_per_sec=value)


# Cancelled


def test_cancelled_anywhere_it_has_taken_nothing() -> None:
    """Wherever those that wait are cancelled: what did not get to the base has used up nothing, and the next one goes."""

    async def scenario(scope: trio.CancelScope) -> None:
        base = Timed()
        disk = await opened(base, Limits(rw_ios_per_sec=1))
        begin = trio.current_time()
        with scope:
            async with trio.open_nursery() as nursery:
                for kind in ("read", "write", "read"):
                    nursery.start_soon(ask, disk, kind)
        before = len(base.done)
        await ask(disk, "write")
        await ask(disk, "read")
        assert len(base.done) == before + 2
        # The bucket holds 0.05 requests at first.
        assert trio.current_time() - begin == pytest.approx(before + 1 - BURST_SECONDS, abs=0.001)
        assert not disk._reads.waiting
        assert not disk._writes.waiting

    assert cancel_everywhere(scenario) > 6


# As a disk, and served


@settings(deadline=None, max_examples=40)
@given(scripts(SIZE, 512), st.booleans())
def test_a_limited_disk_is_a_bytearray(script: list[Step], asynchronous: bool) -> None:
    """Reads give what a bytearray would, some time."""

    async def main() -> None:
        base = (AsyncRecorded if asynchronous else Memory)(SIZE)
        disk = await opened(base, Limits(rw_ios_per_sec=50, w_mbytes_per_sec=1))
        await check_against_model(disk, script, size=SIZE)

    run_on_mock_clock(main)


def test_a_limited_disk_keeps_its_bases_promises() -> None:
    """Served by the engine, through kills and crashes."""
    run_against(lambda storage: Limited(OnStorage(storage), Limits(rw_ios_per_sec=3000)), settings=CHECK)


def test_applications_get_what_is_allowed() -> None:
    """Behind a device, over 10 s of the simulator's clock: within 5 %; and a stop does not wait for the debts."""

    async def main() -> None:
        base = Timed()
        kernel = SimKernel()
        async with open_target(kernel) as target:
            disk = Limited(base, Limits(rw_ios_per_sec=200))
            device = await target.start_device(disk, DeviceOptions(queues=2, depth=8))
            block = kernel.block_device(device.dev_id)

            async def user(number: int) -> None:
                while True:
                    await block.read(number * 4096, 4096)

            before = len(base.done)
            with trio.move_on_after(SECONDS):
                async with trio.open_nursery() as nursery:
                    for number in range(6):
                        nursery.start_soon(user, number)
            assert len(base.done) - before == pytest.approx(SECONDS * 200, rel=0.05)
        kernel.check()
        assert kernel.leftovers() == []

    run_on_mock_clock(main)


# Planted bugs


class SavesUpForEver(limits._Bucket):
    def take(self, moment: float, length: int) -> None:
        self.free_at = max(self.free_at, 0) + (length if self.of_bytes else 1) / self.rate


class CountsLargeOnesAsSmall(limits._Bucket):
    def take(self, moment: float, length: int) -> None:
        super().take(moment, min(length, 1 << 18))


class LosesWhatIsLate(limits._Bucket):
    def take(self, moment: float, length: int) -> None:
        self.free_at = trio.current_time()
        super().take(trio.current_time(), length)


class NobodysTurn(Limited):
    """Whoever wakes up first goes first."""

    async def _pass(self, lane: limits._Lane, length: int) -> None:
        while lane.due > trio.current_time():  # noqa: ASYNC110 - that is the bug
            await trio.sleep_until(lane.due)
        lane.pay(trio.current_time(), length)


class PaysBeforeItWaits(Limited):
    async def _pass(self, lane: limits._Lane, length: int) -> None:
        due = lane.due
        lane.pay(trio.current_time(), length)
        await trio.sleep_until(max(due, trio.current_time()))


def hunt(check: Callable[..., Any], *strategies: st.SearchStrategy[Any]) -> None:
    """Drives a check until it fails; the same examples every time."""

    @settings(
        deadline=None, max_examples=300, derandomize=True, database=None, phases=[Phase.generate],
        report_multiple_bugs=False, suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.tuples(*strategies))
    def checked(drawn: tuple[Any, ...]) -> None:
        run_on_mock_clock(lambda: check(*drawn))

    checked()


def test_the_rates_catch_planted_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket that is paid too little, or holds too much, is found."""
    monkeypatch.setattr(limits, "_Bucket", CountsLargeOnesAsSmall)
    with pytest.raises(AssertionError):
        run_on_mock_clock(lambda: check_one_kind(Limited, Limits(r_mbytes_per_sec=1), Stream("read", MBYTE), 3, 0))
    monkeypatch.setattr(limits, "_Bucket", SavesUpForEver)
    with pytest.raises(AssertionError):
        run_on_mock_clock(check_idle)


def test_late_wakings_catch_a_planted_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rate that counts from when somebody woke up is found."""
    monkeypatch.setattr(limits, "_Bucket", LosesWhatIsLate)
    with pytest.raises(AssertionError):
        trio.run(check_late_wakings, Limited, 4, clock=trio.testing.MockClock())


@pytest.mark.parametrize("planted", [NobodysTurn, PaysBeforeItWaits])
def test_the_order_catches_planted_bugs(planted: type[Limited]) -> None:
    """Overtaking, and a place that is not given up, are found."""

    async def check(allowed: Limits, script: list[tuple[str, int, float, float]]) -> None:
        await check_order(planted, allowed, script)
        # Those that gave up have used up nothing: a new one waits for those only that were carried out.
        base = Timed()
        disk = await opened(base, Limits(rw_ios_per_sec=1), planted)
        await ask(disk, "read")
        with trio.move_on_after(0.5):
            await ask(disk, "read")
        begin = trio.current_time()
        await ask(disk, "read")
        assert trio.current_time() - begin < 0.6

    with pytest.raises(AssertionError):
        hunt(check, some_limits(), requests)
