"""`Memory`: a bytearray in every respect but its price."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.backends.backend_model import Step, check_against_model, scripts
from ublk_trio.backends import Memory, as_async, memory
from ublk_trio.errors import BackendError, UsageError

PAGE = mmap.PAGESIZE
#: Not a multiple of the page, so that the last page is a partial one.
SIZE = 5 * PAGE + 3 * 512


@settings(deadline=None, max_examples=150)
@given(scripts(SIZE, 512))
def test_memory_is_a_bytearray(script: list[Step]) -> None:
    """Whatever is written, discarded and zeroed, in blocks across pages: reads give what a bytearray would."""
    trio.run(lambda: check_against_model(Memory(SIZE), script, size=SIZE))


@settings(deadline=None, max_examples=30)
@given(scripts(SIZE, 512))
def test_async_memory_is_a_bytearray(script: list[Step]) -> None:
    """The same behind `as_async`."""

    async def main() -> None:
        disk = as_async(Memory(SIZE))
        await disk.open()
        await check_against_model(disk, script, size=SIZE)

    trio.run(main)


class WritesOneBlockLate(Memory):
    def write(self, offset: int, data: memoryview, *, fua: bool) -> int | None:
        return super().write(min(offset + 512, self.size - len(data)), data, fua=fua)


class ZeroesAByteTooMany(Memory):
    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        super().write_zeroes(offset, min(length + 1, self.size - offset), unmap=unmap)


class RoundsDiscardUp(Memory):
    """What madvise does by itself to a length that is not a multiple of the page."""

    def discard(self, offset: int, length: int) -> None:
        super().discard(offset, min(-(-length // PAGE) * PAGE, self.size - offset))


class LeavesHolesStale(Memory):
    """What reading into a buffer of an earlier request shows when nothing is copied for a hole."""

    def read(self, offset: int, buffer: memoryview) -> int | None:
        wanted = bytearray(len(buffer))
        super().read(offset, memoryview(wanted))
        if any(wanted):
            buffer[:] = wanted
        return None


@pytest.mark.parametrize("planted", [WritesOneBlockLate, ZeroesAByteTooMany, RoundsDiscardUp, LeavesHolesStale])
def test_the_model_catches_planted_bugs(planted: type[Memory]) -> None:
    """A checker that can't fail is worth nothing: each of these bugs is found."""

    @settings(
        deadline=None,
        max_examples=1000,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(scripts(SIZE, 512))
    def checked(script: list[Step]) -> None:
        trio.run(lambda: check_against_model(planted(SIZE), script, size=SIZE))

    with pytest.raises(AssertionError):
        checked()


def resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * PAGE


def test_a_tebibyte_costs_nothing_until_written() -> None:
    """Sparse: 1 TiB is made at once, reads zeroes at its end, and only what is written takes memory."""
    before = resident()
    disk = Memory(1 << 40)
    buffer = bytearray(b"x" * 4096)
    disk.read((1 << 40) - 4096, memoryview(buffer))
    assert buffer == bytes(4096)
    disk.write((1 << 40) - 4096, memoryview(b"y" * 4096), fua=False)
    disk.read((1 << 40) - 4096, memoryview(buffer))
    assert buffer == b"y" * 4096
    assert resident() - before < 8 << 20


@pytest.mark.parametrize("way", ["discard", "write_zeroes"])
def test_discard_and_zeroes_free_memory(way: str) -> None:
    """What is discarded or zeroed is given back to the machine."""
    disk = Memory(1 << 30)
    megabyte = memoryview(os.urandom(1 << 20))
    for offset in range(0, 64 << 20, 1 << 20):
        disk.write(offset, megabyte, fua=False)
    full = resident()
    if way == "discard":
        disk.discard(0, 64 << 20)
    else:
        disk.write_zeroes(0, 64 << 20, unmap=False)
    assert full - resident() > 60 << 20


def test_a_request_beyond_the_end_is_eio() -> None:
    """Nothing outside the disk is read, written or zeroed, not even the rest of its last page; nor a part of it inside."""
    disk = Memory(512)
    disk.write(0, memoryview(b"x" * 512), fua=False)
    buffer = bytearray(b"?" * 1024)
    requests: list[Callable[[], object]] = [
        lambda: disk.read(0, memoryview(buffer)),
        lambda: disk.read(512, memoryview(buffer)),
        lambda: disk.write(0, memoryview(bytes(1024)), fua=False),
        lambda: disk.write(512, memoryview(bytes(512)), fua=False),
        lambda: disk.discard(0, 1024),
        lambda: disk.write_zeroes(512, 512, unmap=False),
    ]
    for request in requests:
        with pytest.raises(OSError, match="is beyond the end") as caught:
            request()
        assert caught.value.errno == errno.EIO
    assert buffer == b"?" * 1024
    disk.read(0, memoryview(buffer)[:512])
    assert buffer[:512] == b"x" * 512


# Resizing

#: Sizes at, before and behind the ends of pages.
sizes = st.sampled_from([512, PAGE - 512, PAGE, PAGE + 512, 2 * PAGE, 3 * PAGE - 512, 5 * PAGE, 5 * PAGE + 1024])


def check_resizes(kind: type[Memory], steps: list[tuple[int, int, int]]) -> None:
    """Resize, compare all, fill a part; again and again."""
    disk, model = kind(SIZE), bytearray(SIZE)
    for size, first, value in steps:
        disk.resize(size)
        model = model[:size].ljust(size, b"\0")
        content = bytearray(b"?" * size)
        disk.read(0, memoryview(content))
        assert content == model
        start = first * 512 % size
        data = bytes([value]) * (size - start)
        disk.write(start, memoryview(data), fua=False)
        model[start:] = data


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(sizes, st.integers(0, 100), st.integers(1, 255)), max_size=8))
def test_a_resized_memory_is_a_bytearray(steps: list[tuple[int, int, int]]) -> None:
    """What is kept is kept; what is new is zeroes, whatever was there before the disk was smaller."""
    check_resizes(Memory, steps)


class LeavesTheLastPage(Memory):
    """What mremap does by itself: it keeps whole pages."""

    def resize(self, size: int) -> None:
        self._view.release()
        self._mapping.resize(size)
        self._view = memoryview(self._mapping)
        self.size = size


class ZeroesAll(Memory):
    def resize(self, size: int) -> None:
        super().resize(size)
        super().discard(0, size)


@pytest.mark.parametrize("planted", [LeavesTheLastPage, ZeroesAll])
def test_the_model_of_resizes_catches_planted_bugs(planted: type[Memory]) -> None:
    """Old bytes that come back, and bytes that are lost, are found."""

    @settings(deadline=None, max_examples=500, derandomize=True, database=None, phases=[Phase.generate])
    @given(st.lists(st.tuples(sizes, st.integers(0, 100), st.integers(1, 255)), max_size=8))
    def checked(steps: list[tuple[int, int, int]]) -> None:
        check_resizes(planted, steps)

    with pytest.raises(AssertionError):
        checked()


def test_shrinking_frees_memory_and_growing_takes_none() -> None:
    """A disk that is cut off gives its pages back; a tebibyte more costs nothing until it is written."""
    disk = Memory(64 << 20)
    megabyte = memoryview(os.urandom(1 << 20))
    for offset in range(0, 64 << 20, 1 << 20):
        disk.write(offset, megabyte, fua=False)
    full = resident()
    disk.resize(1 << 20)
    assert full - resident() > 60 << 20
    before = resident()
    disk.resize(1 << 40)
    buffer = bytearray(b"?" * 4096)
    disk.read((1 << 40) - 4096, memoryview(buffer))
    assert buffer == bytes(4096)
    assert resident() - before < 8 << 20


def test_a_resize_that_is_not_possible_changes_nothing() -> None:
    """A size that no disk has; more than the address space; a view that somebody holds: the disk is as it was."""
    disk = Memory(8192, block_size=4096)
    disk.write(0, memoryview(b"x" * 8192), fua=False)
    for size, why in ((0, "size 0 is not possible"), (512, "not a multiple of block_size 4096"), (1 << 63, "smaller")):
        with pytest.raises(UsageError, match=why):
            disk.resize(size)
    with pytest.raises(BackendError) as caught:
        disk.resize(1 << 62)
    assert str(caught.value).startswith("memory:4194304T: ENOMEM (Cannot allocate memory): ")
    with disk._view[4096:] as held:
        for size in (4096, 16384):
            with pytest.raises(BackendError, match=r"EBUSY .*: let go of the views of its memory first"):
                disk.resize(size)
        assert held == b"x" * 4096
    content = bytearray(8192)
    disk.read(0, memoryview(content))
    assert disk.size == 8192
    assert content == b"x" * 8192
    disk.resize(4096)
    assert disk.size == 4096


async def test_a_stack_sees_the_new_size() -> None:
    """Behind `as_async` and on any floor of a stack."""
    memory = Memory(4096)
    disk = as_async(memory)
    await disk.open()
    memory.resize(8192)
    assert disk.size == 8192


def test_sizes_are_checked_when_it_is_made() -> None:
    """An impossible size is the caller's error, at once."""
    with pytest.raises(UsageError, match="size 0 is not possible"):
        Memory(0)
    with pytest.raises(UsageError, match="not a multiple of block_size 4096"):
        Memory(512, block_size=4096)
    with pytest.raises(UsageError, match=r"backend memory:'1G': size is '1G', not an int"):
        Memory("1G")  # type: ignore[arg-type]


def test_more_than_the_address_space_is_a_backend_error() -> None:
    """ENOMEM, by name, with the mend."""
    with pytest.raises(BackendError) as caught:
        Memory(1 << 62)
    assert str(caught.value).startswith("memory:4194304T: ENOMEM (Cannot allocate memory): ")
    assert "use a smaller disk" in str(caught.value)


def test_a_limited_address_space_is_named() -> None:
    """Under RLIMIT_AS the error says that it is this limit, and how to lift it."""
    program = """
        import resource
        from ublk_trio.backends import Memory
        from ublk_trio.errors import BackendError
        resource.setrlimit(resource.RLIMIT_AS, (1 << 31, 1 << 31))
        try:
            Memory(1 << 40)
        except BackendError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True
    )
    assert done.stdout == (
        "memory:1T: ENOMEM (Cannot allocate memory): address space is limited to 2147483648 bytes: "
        "raise it with ulimit -v unlimited, or use a smaller disk\n"
    )


def test_strict_overcommit_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With vm.overcommit_memory 2 the error says so, and how to change it."""
    setting = tmp_path / "overcommit_memory"
    setting.write_text("2\n")
    monkeypatch.setattr(memory, "_OVERCOMMIT", str(setting))
    with pytest.raises(BackendError, match=r"vm\.overcommit_memory is 2 .*: sysctl vm\.overcommit_memory=0, or use a"):
        Memory(1 << 62)


def test_a_forked_child_writes_its_own_copy() -> None:
    """After fork neither process sees what the other one writes."""
    program = """
        import os
        from ublk_trio.backends import Memory
        disk = Memory(1 << 20)
        disk.write(0, memoryview(b"parent" + bytes(506)), fua=False)
        child = os.fork()
        if child == 0:
            disk.write(0, memoryview(b"child!" + bytes(506)), fua=False)
            disk.discard(4096, 4096)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        buffer = bytearray(512)
        disk.read(0, memoryview(buffer))
        print(bytes(buffer[:6]).decode())
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "parent\n"
