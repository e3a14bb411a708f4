"""`Raid0` and `Concat`: a bytearray spread over several, with all promises of a disk."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.backends.backend_model import Step, check_against_model, scripts
from tests.backends.raid_members import SECTOR, Member, Part
from ublk_trio import Backend, BackendError, File, Memory, UsageError
from ublk_trio.backends import Concat, Raid0, capabilities, check_geometry
from ublk_trio.backends.spanning import Spanning
from ublk_trio.testing import DurabilityModel, Storage, TapeChoices, kernel_choices, run_against
from ublk_trio.testing.against import DEFAULT_SETTINGS

CHECK = settings(DEFAULT_SETTINGS, max_examples=30)
STRIP = 1024


async def opened(disk: Spanning) -> Spanning:
    await disk.open()
    check_geometry(disk)
    return disk


def raid0_on(storage: Storage, *, members: int = 3, strip: int = STRIP) -> Raid0:
    """A raid0 that uses all of a storage, its members one after the other there."""
    each = storage.size // members
    return Raid0([Part(storage, number * each, each) for number in range(members)], strip)


def concat_on(storage: Storage, sizes: Sequence[int] = (1, 5, 2)) -> Concat:
    """A concat that uses all of a storage; `sizes` in shares of it."""
    share = storage.size // sum(sizes)
    starts = [sum(sizes[:number]) * share for number in range(len(sizes))]
    return Concat([Part(storage, start, size * share) for start, size in zip(starts, sizes, strict=True)])


SIZE = 24 * 1024


@settings(deadline=None, max_examples=100)
@given(st.data(), st.integers(1, 4), st.sampled_from([512, 1024, 4096]))
def test_raid0_is_a_bytearray(data: st.DataObject, members: int, strip: int) -> None:
    """Whatever is written, discarded and zeroed across strips and members, of unequal sizes: reads give it back."""
    size = members * 2 * strip
    script = data.draw(scripts(size, SECTOR))

    async def main() -> None:
        bases = [Memory(2 * strip + number * SECTOR) for number in range(members)]
        await check_against_model(await opened(Raid0(bases, strip)), script, size=size)

    trio.run(main)


@settings(deadline=None, max_examples=100)
@given(st.data(), st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_concat_is_a_bytearray(data: st.DataObject, sizes: list[int]) -> None:
    """The same across members of any sizes."""
    size = sum(sizes) * SECTOR
    script: list[Step] = data.draw(scripts(size, SECTOR))

    async def main() -> None:
        disk = await opened(Concat([Memory(blocks * SECTOR) for blocks in sizes]))
        await check_against_model(disk, script, size=size)

    trio.run(main)


async def check_durable(disk: Spanning, members: list[Member], script: list[Step]) -> None:
    """Runs the script, has the power of all members fail, and looks whether what was promised is there."""
    await disk.open()
    model = DurabilityModel(bytes(disk.size), volatile_cache=True)
    for number, step in enumerate(script, 1):
        if step.op == "write":
            data = number.to_bytes(8, "big") * (step.length // 8)
            pending = model.begin_write(step.offset, data, fua=step.flag)
            await disk.write(step.offset, memoryview(data), fua=step.flag)
            model.end(pending)
        elif step.op == "write_zeroes":
            pending = model.begin_write_zeroes(step.offset, step.length)
            await disk.write_zeroes(step.offset, step.length, unmap=step.flag)
            model.end(pending)
        elif step.op == "flush":
            pending = model.begin_flush()
            await disk.flush()
            model.end(pending)
    for member in members:
        member.storage = member.storage.crash()
    model.crash()
    content = memoryview(bytearray(disk.size))
    pending = model.begin_read(0, disk.size)
    await disk.read(0, content)
    model.end(pending, data=bytes(content))
    await disk.aclose()


def check_kind_durable(kind: str, script: list[Step], crash: TapeChoices) -> None:
    """`check_durable` for three members."""
    members = [Member(SIZE // 3) for _ in range(3)]
    disk = Raid0(members, STRIP) if kind == "raid0" else Concat(members)
    for member in members:
        member.storage.choices = crash
    trio.run(check_durable, disk, members, script)


@pytest.mark.parametrize("kind", ["raid0", "concat"])
@settings(deadline=None, max_examples=100)
@given(script=scripts(SIZE, SECTOR), crash=kernel_choices())
def test_durable(kind: str, script: list[Step], crash: TapeChoices) -> None:
    """What was flushed, or written with FUA, survives a power failure on every member."""
    check_kind_durable(kind, script, crash)


@pytest.mark.parametrize("make", [raid0_on, concat_on])
def test_served_by_the_engine(make: Callable[[Storage], Backend]) -> None:
    """Under any kernel, through kills and power failures of all members at once: nothing that was promised is lost."""
    run_against(make, size=SIZE, settings=CHECK)


async def test_where_raid0_puts_bytes() -> None:
    """Strip n is on member n % members, as its strip n // members; a merged range is one call for each member."""
    members = [Member(4096, name=str(number)) for number in range(3)]
    disk = await opened(Raid0(members, STRIP))
    data = b"".join(bytes([number]) * SECTOR for number in range(24))
    await disk.write(0, memoryview(data), fua=False)
    for number, member in enumerate(members):
        strips = [data[(row * 3 + number) * STRIP : (row * 3 + number + 1) * STRIP] for row in range(4)]
        assert member.content == b"".join(strips)
        member.calls.clear()
    await disk.discard(SECTOR, 7 * STRIP)
    assert [member.calls for member in members] == [
        [("discard", SECTOR, 5 * SECTOR)],
        [("discard", 0, 5 * SECTOR)],
        [("discard", 0, 2 * STRIP)],
    ]
    await disk.write_zeroes(STRIP, STRIP, unmap=True)
    assert members[1].calls[1:] == [("write_zeroes", 0, STRIP)]
    await disk.aclose()


@pytest.mark.parametrize("kind", ["raid0", "concat"])
@pytest.mark.parametrize("call", ["read", "write", "flush", "discard", "write_zeroes"])
async def test_one_failure_fails_the_request(kind: str, call: str) -> None:
    """The request fails with the errno of the first member that failed, after the others have done their part."""
    members = [Member(STRIP, name=str(number)) for number in range(3)]
    disk = await opened(Raid0(members, STRIP) if kind == "raid0" else Concat(members))
    members[1].fail(call, number=errno.ENOSPC)
    members[2].fail(call, number=errno.EIO, when="after")
    buffer = memoryview(bytearray(b"x" * 3 * STRIP))
    calls: dict[str, Callable[[], Awaitable[None]]] = {
        "read": partial(disk.read, 0, buffer),
        "write": partial(disk.write, 0, buffer, fua=False),
        "flush": disk.flush,
        "discard": partial(disk.discard, 0, 3 * STRIP),
        "write_zeroes": partial(disk.write_zeroes, 0, 3 * STRIP, unmap=False),
    }
    with pytest.raises(OSError, match="planned") as caught:
        await calls[call]()
    assert caught.value.errno == errno.ENOSPC
    assert [[name for name, _, _ in member.calls] for member in members] == [[call]] * 3
    if call == "write":
        assert members[0].content == members[2].content == b"x" * STRIP
    await disk.write(0, buffer, fua=False)
    await disk.read(0, buffer)
    await disk.aclose()
    assert [member.misuse for member in members] == [[], [], []]


async def test_pieces_are_carried_out_together() -> None:
    """A slow member does not keep the next strip waiting; the request ends with the slowest."""
    members = [Member(4096) for _ in range(2)]
    disk = await opened(Raid0(members, STRIP))
    for member in members:
        member.gate = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(disk.read, 0, memoryview(bytearray(4 * STRIP)))
        await trio.testing.wait_all_tasks_blocked()
        assert [member.running for member in members] == [2, 2]
        for member in members:
            assert member.gate is not None
            member.gate.set()


@pytest.mark.parametrize("kind", ["raid0", "concat"])
async def test_cancelled_everywhere(kind: str) -> None:
    """A request that is cancelled leaves nothing running on any member."""
    members = [Member(2 * STRIP) for _ in range(3)]
    disk = await opened(Raid0(members, STRIP) if kind == "raid0" else Concat(members))
    members[2].gate = trio.Event()
    with trio.move_on_after(0.01) as scope:
        await disk.write(0, memoryview(bytes(6 * STRIP)), fua=True)
    assert scope.cancelled_caught
    assert [member.running for member in members] == [0, 0, 0]
    await disk.aclose()
    assert [member.misuse for member in members] == [[], [], []]


async def test_geometry_of_raid0() -> None:
    """As many strips of each as the smallest has; the largest block; what all can do."""
    disk = await opened(Raid0([Memory(10 * 1024), Memory(4096)], 4096))
    assert (disk.size, disk.block_size, disk.optimal_io_size) == (8192, 512, 4096)
    disk = await opened(Raid0([Memory(1 << 20), Memory(1 << 20, block_size=4096)], 65536))
    assert (disk.size, disk.block_size) == (2 << 20, 4096)
    assert capabilities(disk) == {"read", "write", "discard", "write_zeroes"}
    assert "flush" in capabilities(await opened(Raid0([Memory(1 << 20), Member(1 << 20)], 65536)))


async def test_impossible_raid0() -> None:
    """A strip that cannot be, is smaller than a block, or larger than a member: one line, with the mend."""
    for strip in (0, -512, 1000):
        with pytest.raises(UsageError, match=rf"raid0: strip_size {strip} is not possible: use a power of two"):
            Raid0([Memory(4096)], strip)
    with pytest.raises(UsageError, match="strip_size 512 is below the block size: use 4096"):
        await Raid0([Memory(8192, block_size=4096)], 512).open()
    members = [Member(65536), Member(4096, name="small")]
    with pytest.raises(UsageError, match="raid0: small holds no strip of 64K: use a smaller strip"):
        await Raid0(members, 65536).open()
    assert [(member.opened, member.closed) for member in members] == [(1, 1), (1, 1)]


async def test_impossible_concat() -> None:
    """A member without a whole block of the disk's is refused."""
    with pytest.raises(UsageError, match=r"concat: memory:3584 is smaller than a block of 4096 bytes: leave it out"):
        await Concat([Memory(8192, block_size=4096), Memory(3584)]).open()


async def test_concat_rounds_each_member_down() -> None:
    """With blocks of 4096 bytes a member of 5 KiB gives one block; the next one begins right behind."""
    small, large = Memory(5 * 1024), Memory(8192, block_size=4096)
    disk = await opened(Concat([small, large]))
    assert (disk.size, disk.block_size) == (12288, 4096)
    await disk.write(4096, memoryview(b"x" * 4096), fua=False)
    buffer = bytearray(4096)
    large.read(0, memoryview(buffer))
    assert buffer == b"x" * 4096


async def test_resized_members() -> None:
    """A concat grows and shrinks with its last member only, a raid0 with its smallest; nothing moves."""
    first, last = Member(4096), Member(8192)
    concat = await opened(Concat([first, last]))
    await concat.write(4096, memoryview(b"x" * 512), fua=False)
    first.size, last.size = 8192, 4096
    concat.settle()
    assert concat.size == 8192
    buffer = memoryview(bytearray(512))
    await concat.read(4096, buffer)
    assert buffer == b"x" * 512
    await concat.aclose()
    await concat.open()
    assert concat.size == 12288, "closed and opened again it takes them as they are"
    members = [Member(4096), Member(8192)]
    raid0 = await opened(Raid0(members, STRIP))
    members[0].size = 6144
    raid0.settle()
    assert raid0.size == 2 * 6144


async def test_a_member_that_does_not_open(tmp_path: object) -> None:
    """Those before it are closed again."""
    member = Member(4096)
    with pytest.raises(BackendError):
        await Concat([member, File(f"{tmp_path}/missing")]).open()
    assert (member.opened, member.closed) == (1, 1)
