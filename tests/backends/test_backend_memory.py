"""`Memory`: a bytearray in every respect but its price."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, Phase, given, settings

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


def test_a_request_beyond_the_end_raises() -> None:
    """Nothing outside the disk is read, written or zeroed, not even the rest of its last page."""
    disk = Memory(512)
    with pytest.raises(ValueError, match="structure"):
        disk.read(0, memoryview(bytearray(1024)))
    with pytest.raises(ValueError, match="structure"):
        disk.write(512, memoryview(bytes(512)), fua=False)
    with pytest.raises(AssertionError, match="zeroing 0 to 1024"):
        disk.discard(0, 1024)


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
