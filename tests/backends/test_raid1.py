"""`Raid1`: what is read where, who is taken out and why, and how a member comes back."""

from __future__ import annotations

import errno
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from unittest import mock

import attrs
import pytest
import trio
import trio.testing
from hypothesis import settings

from tests.backends.raid_members import SECTOR, Member, Part
from ublk_trio import DeviceOptions, File, Memory, SimKernel, StuckError, UsageError, open_target
from ublk_trio.backends import MemberState, Raid1, capabilities, check_geometry, raid1
from ublk_trio.kernel_sim import SeededChoices
from ublk_trio.testing import Storage, run_against
from ublk_trio.testing.against import DEFAULT_SETTINGS

SIZE = 8192
WINDOW = 2048
IN_SYNC, REBUILDING, FAILED = MemberState.IN_SYNC, MemberState.REBUILDING, MemberState.FAILED


@pytest.fixture(autouse=True)
def small_windows() -> object:
    """Four to a rebuild."""
    with mock.patch.object(raid1, "WINDOW_BYTES", WINDOW):
        yield


@asynccontextmanager
async def mirror(*members: Member) -> AsyncIterator[Raid1]:
    """An open mirror; afterwards everything is closed, once."""
    disk = Raid1(members)
    await disk.open()
    check_geometry(disk)
    yield disk
    await disk.aclose()
    assert all(member.opened == member.closed and not member.misuse for member in members)


def members_of(count: int = 2) -> list[Member]:
    return [Member(SIZE, name=f"m{number}") for number in range(count)]


def states(disk: Raid1) -> list[MemberState]:
    return [member.state for member in disk.status().members]


async def write(disk: Raid1, offset: int = 0, text: bytes = b"x", sectors: int = 1) -> None:
    await disk.write(offset, memoryview(text * (SECTOR * sectors)), fua=False)


async def read(disk: Raid1, offset: int = 0, sectors: int = 1) -> bytes:
    buffer = memoryview(bytearray(SECTOR * sectors))
    await disk.read(offset, buffer)
    return bytes(buffer)


# Reading --------------------------------------------------------------------------------------------------------------


async def test_reads_are_balanced() -> None:
    """One after the other, at random places: every member serves as many."""
    members = members_of(3)
    async with mirror(*members) as disk:
        for number in range(30):
            await read(disk, number * 5 % 16 * SECTOR)
        assert [member.reads for member in disk.status().members] == [10, 10, 10]


async def test_a_sequence_stays_on_its_member() -> None:
    """Reads that follow each other are served by one, beside another sequence by another."""
    members = members_of()
    async with mirror(*members) as disk:
        for number in range(6):
            await read(disk, number * SECTOR)
            await read(disk, (number + 8) * SECTOR)
    assert [{offset // (8 * SECTOR) for _, offset, _ in member.calls} for member in members] == [{0}, {1}]


async def test_a_slow_member_gets_fewer_reads() -> None:
    """While one hangs in a read, the others go elsewhere."""
    slow, fast = members_of()
    slow.gate = trio.Event()
    async with mirror(slow, fast) as disk, trio.open_nursery() as nursery:
        nursery.start_soon(read, disk)
        await trio.testing.wait_all_tasks_blocked()
        for number in range(5):
            await read(disk, number * 3 * SECTOR)
        assert [member.reads for member in disk.status().members] == [1, 5]
        slow.gate.set()


async def test_a_failed_read_is_served_and_mended() -> None:
    """The application sees the other member's bytes; the failed one gets them written, is read again, and stays."""
    first, second = members_of()
    async with mirror(first, second) as disk:
        await write(disk)
        first.calls.clear()
        first.fail("read")
        assert await read(disk) == b"x" * SECTOR
        assert [name for name, _, _ in first.calls] == ["read", "write", "read"]
        assert states(disk) == [IN_SYNC, IN_SYNC]


@pytest.mark.parametrize("failing", [{"write": 1}, {"read": 2}], ids=["write back", "second read"])
async def test_a_read_that_cannot_be_mended(failing: dict[str, int]) -> None:
    """The member is out."""
    first, second = members_of()
    async with mirror(first, second) as disk:
        first.fail("read")
        for call, times in failing.items():
            first.fail(call, times=times)
        await read(disk)
        assert states(disk) == [FAILED, IN_SYNC]


async def test_a_read_that_nobody_can_serve() -> None:
    """The error of the first member, and nobody is out."""
    first, second = members_of()
    async with mirror(first, second) as disk:
        first.fail("read", number=errno.ENODATA)
        second.fail("read")
        with pytest.raises(OSError, match="planned") as caught:
            await read(disk)
        assert caught.value.errno == errno.ENODATA
        assert states(disk) == [IN_SYNC, IN_SYNC]


async def test_a_read_without_resources_is_the_callers_to_try_again() -> None:
    """ENOMEM comes out; nobody is out, and nothing is mended."""
    members = members_of()
    async with mirror(*members) as disk:
        members[0].fail("read", number=errno.ENOMEM)
        with pytest.raises(OSError, match="planned") as caught:
            await read(disk)
        assert caught.value.errno == errno.ENOMEM
        assert [len(member.calls) for member in members] == [1, 0]
        assert await read(disk) == bytes(SECTOR)


# Changing -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [0, 1])
async def test_overlapping_writes(late: int, autojump_clock: trio.testing.MockClock) -> None:
    """Two at once, and a member where the first is late: the members are equal afterwards."""

    class Late(Member):
        async def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
            await trio.sleep(1 if data[0] == ord("a") else 0)
            await super().write(offset, data, fua=fua)

    members = [Late(SIZE) if number == late else Member(SIZE) for number in range(2)]
    async with mirror(*members) as disk:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write, disk, 0, b"a", 4)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(write, disk, SECTOR, b"b", 4)
        assert members[0].content == members[1].content
        assert members[0].content[: 5 * SECTOR] == b"a" * SECTOR + b"b" * 4 * SECTOR


@pytest.mark.parametrize("call", ["write", "flush", "write_zeroes"])
async def test_a_member_that_fails_a_change_is_out(call: str, caplog: pytest.LogCaptureFixture) -> None:
    """The application sees no error; the member gets nothing any more; a warning names it, and so does the status."""
    caplog.set_level(logging.WARNING, logger="ublk_trio")
    first, second = members_of()
    async with mirror(first, second) as disk:
        first.fail(call, number=errno.ENOSPC)
        await write(disk)
        await disk.flush()
        await disk.write_zeroes(0, SECTOR, unmap=False)
        calls = len(first.calls)
        await write(disk)
        assert len(first.calls) == calls
        status = disk.status().members[0]
        assert (status.state, status.error, status.done_bytes) == (FAILED, "ENOSPC", None)
        assert await read(disk) == b"x" * SECTOR
    assert "raid1:8K: m0 is out: ENOSPC (No space left on device)" in caplog.text


async def test_the_last_member_stays() -> None:
    """Its errors are the application's, with their errno, and it goes on being used."""
    first, second = members_of()
    async with mirror(first, second) as disk:
        first.fail()
        await write(disk)
        second.fail(number=errno.ENOSPC)
        with pytest.raises(OSError, match="planned") as caught:
            await write(disk)
        assert caught.value.errno == errno.ENOSPC
        await write(disk)
        assert states(disk) == [FAILED, IN_SYNC]


async def test_when_all_fail_the_first_stays() -> None:
    """A change that is on no member fails; since nobody knows what each made of it, one stays."""
    members = members_of(3)
    async with mirror(*members) as disk:
        for member in members:
            member.fail("write", when="middle")
        with pytest.raises(OSError, match="planned"):
            await write(disk, sectors=4)
        assert states(disk) == [IN_SYNC, FAILED, FAILED]


async def test_a_failed_discard_takes_nobody_out() -> None:
    """It is advice; only when nobody can follow it, the application hears of it."""
    first, second = members_of()
    async with mirror(first, second) as disk:
        first.fail("discard")
        await disk.discard(0, SECTOR)
        first.fail("discard", number=errno.EOPNOTSUPP)
        second.fail("discard")
        with pytest.raises(OSError, match="planned") as caught:
            await disk.discard(0, SECTOR)
        assert caught.value.errno == errno.EOPNOTSUPP
        assert states(disk) == [IN_SYNC, IN_SYNC]


async def test_a_member_short_of_resources_is_asked_again(autojump_clock: trio.testing.MockClock) -> None:
    """ENOMEM is not an error: the same change is tried until it is done, on that member only."""
    first, second = members_of()
    async with mirror(first, second) as disk:
        first.fail("write", number=errno.ENOMEM, times=5)
        await write(disk)
        assert [len(member.calls) for member in (first, second)] == [6, 1]
        assert first.content == second.content
        assert states(disk) == [IN_SYNC, IN_SYNC]


async def test_a_bug_of_a_member_is_a_failure() -> None:
    """An exception that is no OSError takes the member out with EIO; a time limit with ETIMEDOUT."""

    class Buggy(Member):
        error: Exception = ZeroDivisionError()

        async def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
            raise self.error

    for error, name in ((ZeroDivisionError(), "EIO"), (trio.TooSlowError(), "ETIMEDOUT")):
        buggy = Buggy(SIZE)
        buggy.error = error
        async with mirror(buggy, Member(SIZE)) as disk:
            await write(disk)
            assert disk.status().members[0].error == name


# Members --------------------------------------------------------------------------------------------------------------


async def test_a_member_comes_back(autojump_clock: trio.testing.MockClock) -> None:
    """Out, rebuilt while it is written all the time, then equal; the status shows how far it is."""
    first, second = (Member(SIZE, choices=SeededChoices(number), name=f"m{number}") for number in range(2))
    done: list[int | None] = []
    async with mirror(first, second) as disk:
        second.fail("write")
        await write(disk, text=b"0", sectors=16)
        assert states(disk) == [IN_SYNC, FAILED]

        async def load(seed: int) -> None:
            for number in range(50):
                await write(disk, (number * 7 + seed) % 13 * SECTOR, bytes([number + 50 * seed]), 3)

        async def watch() -> None:
            while states(disk) != [IN_SYNC, IN_SYNC]:
                done.append(disk.status().members[1].done_bytes)
                await trio.sleep(0.1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(load, 0)
            nursery.start_soon(load, 1)
            nursery.start_soon(watch)
            await disk.rebuild(second)
            assert states(disk) == [IN_SYNC, IN_SYNC]
        assert first.content == second.content
    progress = [count for count in done if count is not None]
    assert progress == sorted(progress)
    assert progress[0] == 0
    assert set(progress) <= set(range(0, SIZE + 1, WINDOW))
    assert len(set(progress)) > 1


async def test_a_new_backend_joins_and_leaves() -> None:
    """It is opened, copied to, flushed, and is then read; removed, it is closed and gets nothing any more."""
    first, new = members_of()
    async with mirror(first) as disk:
        await write(disk, text=b"y", sectors=16)
        await disk.rebuild(new)
        assert new.content == first.content
        assert new.calls[-1][0] == "flush"
        await disk.remove(first)
        assert (first.opened, first.closed) == (1, 1)
        assert await read(disk) == b"y" * SECTOR
        assert [member.backend for member in disk.status().members] == ["m1"]
    assert (new.opened, new.closed) == (1, 1)


async def test_a_backend_that_joined_is_out_until_it_is_rebuilt() -> None:
    """Joined, it is open and gets nothing; what does not fit, or is a member, is refused and closed."""
    first, new = members_of()
    async with mirror(first) as disk:
        await disk.join(new)
        await write(disk, text=b"y")
        assert [member.state for member in disk.status().members] == [MemberState.IN_SYNC, MemberState.FAILED]
        assert (new.opened, new.calls) == (1, [])
        with pytest.raises(UsageError, match="member already"):
            await disk.join(new)
        await disk.rebuild(new)
        assert new.content == first.content
    with pytest.raises(UsageError, match="not open"):
        await disk.join(new)
    assert (new.opened, new.closed) == (1, 1)


async def test_what_cannot_be_removed() -> None:
    """The last member in sync, and what is no member: one line each."""
    first, second = members_of()
    async with mirror(first, second) as disk:
        first.fail()
        await write(disk)
        with pytest.raises(UsageError, match="raid1:8K: m1 is the last member in sync: it cannot be removed"):
            await disk.remove(second)
        with pytest.raises(UsageError, match="is no member"):
            await disk.remove(Memory(SIZE))


async def test_removing_waits_for_requests() -> None:
    """A member that a request is on is closed only after it; meanwhile it is neither rebuilt nor removed again."""
    first, second = members_of()
    first.gate = trio.Event()
    async with mirror(first, second) as disk, trio.open_nursery() as nursery:
        nursery.start_soon(write, disk)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(disk.remove, first)
        await trio.testing.wait_all_tasks_blocked()
        assert first.closed == 0
        with pytest.raises(UsageError, match="m0 is being removed already"):
            await disk.remove(first)
        with pytest.raises(UsageError, match="m0 is being removed: wait for that"):
            await disk.rebuild(first)
        first.gate.set()
    assert first.closed == 1


async def check_hung(request: str) -> None:
    first, second = members_of()
    first.gate = trio.Event()
    async with mirror(first, second) as disk, trio.open_nursery() as nursery:
        answered = trio.Event()

        async def ask() -> None:
            match request:
                case "write":
                    await write(disk)
                case "read":
                    await read(disk)
                case _:
                    await disk.flush()
            answered.set()

        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        begin = trio.current_time()
        await disk.remove(first)
        assert trio.current_time() - begin == pytest.approx(raid1.REMOVE_SECONDS)
        assert (first.closed, states(disk)) == (1, [IN_SYNC])
        await trio.testing.wait_all_tasks_blocked()
        assert answered.is_set()
        await write(disk, SECTOR, b"y")
        assert second.content[: 2 * SECTOR] == (b"x" if request == "write" else b"\0") * SECTOR + b"y" * SECTOR


@pytest.mark.parametrize("request_", ["write", "read", "flush"])
async def test_a_member_that_hangs_can_be_removed(request_: str, autojump_clock: trio.testing.MockClock) -> None:
    """After its time it is cut off and closed; what waited for it is answered by the other, and the disk goes on."""
    await check_hung(request_)


async def test_a_removal_that_does_not_cut_off_is_noticed(autojump_clock: trio.testing.MockClock) -> None:
    """A planted bug."""
    stuck = pytest.RaisesGroup(StuckError, flatten_subgroups=True)
    with mock.patch.object(raid1._Member, "cut_off"), stuck, trio.fail_after(100):
        await check_hung("write")


async def test_a_member_that_does_not_end(autojump_clock: trio.testing.MockClock) -> None:
    """A backend that cannot be cut off is out, and said to be stuck after twice the time; when it has ended it can be removed."""

    class Stubborn(Member):
        async def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
            with trio.CancelScope(shield=True):
                await super().write(offset, data, fua=fua)

    first, second = Stubborn(SIZE, name="m0"), Member(SIZE, name="m1")
    first.gate = trio.Event()
    async with mirror(first, second) as disk, trio.open_nursery() as nursery:
        nursery.start_soon(write, disk)
        await trio.testing.wait_all_tasks_blocked()
        begin = trio.current_time()
        with pytest.raises(StuckError, match="m0 is out, but does not end its 1 requests"):
            await disk.remove(first)
        assert trio.current_time() - begin == pytest.approx(2 * raid1.REMOVE_SECONDS)
        assert (first.closed, states(disk)) == (0, [FAILED, IN_SYNC])
        first.gate.set()
        await disk.remove(first)
        assert (first.closed, states(disk)) == (1, [IN_SYNC])


async def test_what_does_not_fit() -> None:
    """Too small, blocks too large, able to do less, there already, closed: one line each, and it is closed again."""

    class NoZeroes(Member):
        write_zeroes = None  # type: ignore[assignment]

    small, coarse, poor = Member(SIZE - SECTOR, name="small"), Member(SIZE, name="coarse"), NoZeroes(SIZE, name="poor")
    coarse.block_size = 4096
    first = Member(SIZE, name="first")
    async with mirror(first) as disk:
        for backend, why in (
            (small, "small has 7680 bytes, the disk 8192: use a backend that is as large"),
            (coarse, "coarse has blocks of 4096 bytes, the disk of 512: use a backend with blocks as small"),
            (poor, "poor has no write_zeroes: use a backend that can do all that"),
        ):
            with pytest.raises(UsageError, match=f"^raid1:8K: {why}$"):
                await disk.rebuild(backend)
            assert backend.opened == backend.closed == 1
        with pytest.raises(UsageError, match="first is in sync already"):
            await disk.rebuild(first)
    with pytest.raises(UsageError, match="is not open"):
        await disk.rebuild(small)


@pytest.mark.parametrize("call", ["write", "flush"])
async def test_a_failing_target_ends_the_rebuild(call: str) -> None:
    """The error comes out where it was asked for, with its errno; the disk goes on without it."""
    first, target = members_of()
    target.fail(call, number=errno.ENOSPC)
    async with mirror(first) as disk:
        with pytest.raises(OSError, match="m1 could not be rebuilt: ENOSPC") as caught:
            await disk.rebuild(target)
        assert caught.value.errno == errno.ENOSPC
        assert states(disk) == [IN_SYNC, FAILED]
        await write(disk)
        await disk.rebuild(target)
        assert states(disk) == [IN_SYNC, IN_SYNC]


async def test_a_source_that_cannot_be_read_ends_the_rebuild() -> None:
    """Unless another member can be."""
    first, second, target = members_of(3)
    async with mirror(first, second) as disk:
        first.fail("read", times=2)
        second.fail("read")
        with pytest.raises(OSError, match="m2 could not be rebuilt: EIO"):
            await disk.rebuild(target)
        await disk.rebuild(target)
        assert states(disk) == [IN_SYNC] * 3


async def rebuild_that_fails(disk: Raid1, target: Member, number: int) -> None:
    with pytest.raises(OSError, match="could not be rebuilt") as caught:
        await disk.rebuild(target)
    assert caught.value.errno == number


@pytest.mark.parametrize("how", ["remove", "close"])
async def test_what_ends_a_rebuild(how: str) -> None:
    """Removing its target, and closing the disk: both wait for it."""
    first, target = members_of()
    target.gate = trio.Event()
    disk = Raid1([first])
    await disk.open()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rebuild_that_fails, disk, target, errno.ENODEV if how == "remove" else errno.ESHUTDOWN)
        await trio.testing.wait_all_tasks_blocked()
        assert states(disk) == [IN_SYNC, REBUILDING]
        with pytest.raises(UsageError, match="m1 is rebuilding already"):
            await disk.rebuild(target)
        if how == "remove":
            await disk.remove(target)
            assert states(disk) == [IN_SYNC]
        await disk.aclose()
    assert (target.opened, target.closed, target.misuse, first.misuse) == (1, 1, [], [])


async def test_what_was_out_is_forgotten_when_it_is_opened_again() -> None:
    """A disk that is closed and opened goes on with the members in sync; a stale one is not trusted."""
    first, second = members_of()
    disk = Raid1([first, second])
    await disk.open()
    first.fail("write")
    await write(disk)
    await disk.aclose()
    await disk.open()
    assert [member.backend for member in disk.status().members] == ["m1"]
    assert await read(disk) == b"x" * SECTOR
    await disk.aclose()
    assert [(member.opened, member.closed, member.misuse) for member in (first, second)] == [(1, 1, []), (2, 2, [])]


async def test_closed_while_a_member_is_removed() -> None:
    """The disk waits for the request that the removal waits for, and closes the member itself, once."""
    first, second = members_of()
    first.gate = trio.Event()
    disk = Raid1([first, second])
    await disk.open()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(write, disk)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(disk.remove, first)
        nursery.start_soon(disk.aclose)
        await trio.testing.wait_all_tasks_blocked()
        first.gate.set()
    assert [(member.opened, member.closed, member.misuse) for member in (first, second)] == [(1, 1, [])] * 2


async def test_closed_while_a_backend_joins() -> None:
    """What was opened for it is closed again."""

    class Slow(Member):
        async def open(self) -> None:
            await super().open()
            await ready.wait()

    ready = trio.Event()
    first, slow = Member(SIZE), Slow(SIZE, name="slow")
    disk = Raid1([first])
    await disk.open()

    async def rebuild() -> None:
        with pytest.raises(UsageError, match="raid1:8K: was closed while slow was opened"):
            await disk.rebuild(slow)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(rebuild)
        await trio.testing.wait_all_tasks_blocked()
        await disk.aclose()
        ready.set()
    assert (slow.opened, slow.closed, slow.misuse) == (1, 1, [])


async def test_files_are_known_by_what_was_given(tmp_path: Path) -> None:
    """A `File` is served in threads by another object; members are named by the one that the caller has."""
    paths = [tmp_path / "first", tmp_path / "second"]
    for path in paths:
        path.write_bytes(bytes(SIZE))
    first, second = (File(str(path)) for path in paths)
    disk = Raid1([first])
    await disk.open()
    await write(disk, text=b"f", sectors=16)
    await disk.rebuild(second)
    await disk.remove(first)
    await disk.rebuild(first)
    await disk.aclose()
    assert paths[0].read_bytes() == paths[1].read_bytes() == b"f" * SIZE


async def test_a_read_only_mirror_is_not_written() -> None:
    """A failed read is served by another member, and nothing is mended."""
    members = members_of()
    for member in members:
        member.read_only = True
    async with mirror(*members) as disk:
        assert capabilities(disk) == {"read"}
        members[0].fail("read")
        await read(disk)
        assert [name for name, _, _ in members[0].calls] == ["read"]
        assert states(disk) == [IN_SYNC, IN_SYNC]


async def test_geometry() -> None:
    """The smallest member's whole blocks; it can flush whatever the members are, so that one with a cache may join."""
    disk = Raid1([Memory(10 * 512), Memory(8192, block_size=4096)])
    await disk.open()
    assert (disk.size, disk.block_size) == (4096, 4096)
    assert capabilities(disk) == {"read", "write", "flush", "discard", "write_zeroes"}
    cached = Member(4096)
    await disk.rebuild(cached)
    await disk.write(0, memoryview(b"x" * 4096), fua=True)
    assert bytes(cached.storage.crash()._current) == b"x" * 4096
    await disk.aclose()


# Cancelled at every step ----------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class _AtStep(trio.abc.Instrument):
    """Calls back before the step with a given number."""

    number: int
    interrupt: Callable[[], None]
    steps: int = 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.steps += 1
        if self.steps == self.number:
            self.interrupt()


@pytest.mark.parametrize("victim", ["write", "zeroes", "mended read", "flush", "rebuild", "remove", "all"])
def test_cancelled_at_every_step(victim: str) -> None:
    """Wherever one of many requests, a rebuild or a removal is cut off: members in sync are equal, all is closed."""

    async def main(scope: trio.CancelScope) -> None:
        members = [Member(SIZE, choices=SeededChoices(number), name=f"m{number}") for number in range(4)]
        for member in members[:3]:
            member.storage.write(0, b"z" * SIZE, fua=True)
        async with mirror(*members[:3]) as disk:
            victims: dict[str, Callable[[], object]] = {
                "write": lambda: write(disk, SECTOR, b"v", 4),
                "zeroes": lambda: disk.write_zeroes(0, 4 * SECTOR, unmap=True),
                "mended read": lambda: read(disk, 0, 4),
                "flush": disk.flush,
                "rebuild": lambda: disk.rebuild(members[3]),
                "remove": lambda: disk.remove(members[2]),
            }
            members[0].fail("read")

            async def run_one(name: str) -> None:
                # A change that is cut off may end the rebuild.
                with scope if name == victim else trio.CancelScope():
                    try:
                        await victims[name]()  # type: ignore[misc]
                    except OSError:
                        assert name == "rebuild"

            with scope if victim == "all" else trio.CancelScope():
                async with trio.open_nursery() as nursery:
                    for name in victims:
                        nursery.start_soon(run_one, name)
            await write(disk, 3 * SECTOR, b"w", 2)
            names = {one.backend for one in disk.status().members if one.state is IN_SYNC}
            contents = {member.content for member in members if member.name in names}
            assert len(contents) == 1, disk.status()
            assert await read(disk, 3 * SECTOR, 2) == b"w" * 2 * SECTOR
        assert [member.misuse for member in members] == [[]] * 4
        assert all(member.opened == member.closed for member in members)

    for number in range(1, 2000):
        scope = trio.CancelScope()
        at_step = _AtStep(number, scope.cancel)
        clock = trio.testing.MockClock(autojump_threshold=0)
        trio.run(main, scope, clock=clock, instruments=[at_step])
        if at_step.steps < number:
            assert number > 40, "there are steps to cut it off at"
            return
    raise AssertionError("the scenario ends")


# Served ---------------------------------------------------------------------------------------------------------------


class Recovered(Raid1):
    """What whoever serves a mirror after an unclean end does: trusts one member, and makes the others equal to it."""

    def __init__(self, trusted: Part, others: list[Part]) -> None:
        super().__init__([trusted])
        self.others = others

    async def open(self) -> None:
        await super().open()
        for other in self.others:
            await self.rebuild(other)


def test_served_by_the_engine(caplog: pytest.LogCaptureFixture) -> None:
    """Through kills and power failures, each life beginning with another member and a rebuild: nothing is lost."""
    caplog.set_level(logging.CRITICAL)
    lives = 0

    def make(storage: Storage) -> Raid1:
        nonlocal lives
        lives += 1
        parts = [Part(storage, number * SIZE, SIZE) for number in range(2)]
        trusted = parts.pop(lives % 2)
        return Recovered(trusted, parts)

    run_against(make, size=SIZE, storage_bytes=2 * SIZE, settings=settings(DEFAULT_SETTINGS, max_examples=30))
    assert lives > 30


@pytest.mark.parametrize("seed", range(3))
async def test_rebuilt_under_a_live_disk(seed: int) -> None:
    """On a simulated kernel: a member fails under load, is rebuilt under load, and is equal at the end."""
    first, second = members_of()
    kernel = SimKernel(SeededChoices(seed))
    disk = Raid1([first, second])
    async with open_target(kernel) as target:
        device = await target.start_device(disk, DeviceOptions(queues=2, depth=4))
        application = kernel.block_device(device.dev_id)

        async def load(stop: trio.Event) -> None:
            number = 0
            while not stop.is_set():
                number += 1
                offset = number * 5 % 12 * SECTOR
                data = bytes([number % 256]) * (3 * SECTOR)
                await application.write(offset, data)
                assert await application.read(offset, len(data)) == data

        stop = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(load, stop)
            second.fail("write")
            while states(disk) != [IN_SYNC, FAILED]:
                await trio.lowlevel.checkpoint()
            await disk.rebuild(second)
            stop.set()
        assert states(disk) == [IN_SYNC, IN_SYNC]
    assert first.content == second.content
    kernel.check()
    assert kernel.leftovers() == []
