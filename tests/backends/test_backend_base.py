"""`Backend`, `capabilities`, `check_geometry`, `as_async`: what the engine asks of every backend."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from ublk_trio.backends import (
    Backend,
    CanDiscard,
    CanFlush,
    CanWrite,
    CanWriteZeroes,
    File,
    Memory,
    Null,
    ThreadedFile,
    as_async,
    capabilities,
    check_geometry,
    fill_zeroes,
    is_async,
)
from ublk_trio.errors import UsageError


class Plain(Backend):
    size = 1 << 20

    def read(self, offset: int, buffer: memoryview) -> None:
        fill_zeroes(buffer)


class Full(Plain):
    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def read(self, offset: int, buffer: memoryview) -> Any:
        self.calls.append(("read", offset, len(buffer)))
        return 512

    def write(self, offset: int, data: memoryview, *, fua: bool) -> int:
        self.calls.append(("write", offset, len(data), fua))
        return 1024

    def flush(self) -> None:
        self.calls.append(("flush",))

    def discard(self, offset: int, length: int) -> None:
        self.calls.append(("discard", offset, length))

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        self.calls.append(("write_zeroes", offset, length, unmap))


def test_the_base_class_defines_no_optional_method() -> None:
    """Presence is capability, so `Backend` must not have a method that a subclass did not write."""
    assert not {"write", "flush", "discard", "write_zeroes"} & set(dir(Backend))


def test_a_backend_must_read() -> None:
    """A class without `read` can't be instantiated."""
    with pytest.raises(TypeError, match="read"):
        type("NoRead", (Backend,), {})()


def test_capabilities_are_what_the_class_defines() -> None:
    """`capabilities` names exactly the methods that are there."""
    assert capabilities(Plain()) == {"read"}
    assert capabilities(Full()) == {"read", "write", "flush", "discard", "write_zeroes"}
    assert capabilities(Null(512)) == capabilities(Memory(512)) == {"read", "write", "discard", "write_zeroes"}


def test_unsupported_takes_a_capability_away_from_one_instance() -> None:
    """`unsupported` counts per instance."""
    backend = Full()
    backend.unsupported = frozenset({"discard"})
    assert capabilities(backend) == capabilities(Full()) - {"discard"}


def test_a_read_only_backend_can_only_read() -> None:
    """`read_only`, and no way to write, both leave `read` alone."""
    backend = Full()
    backend.read_only = True
    assert capabilities(backend) == {"read"}
    backend = Full()
    backend.unsupported = frozenset({"write"})
    assert capabilities(backend) == {"read"}


def test_derived_sizes_follow_block_size_until_they_are_set() -> None:
    """physical_block_size and discard_granularity derive from block_size, and may be set plainly."""
    backend = Plain()
    assert (backend.physical_block_size, backend.discard_granularity) == (4096, 512)
    backend.block_size = 4096
    assert (backend.physical_block_size, backend.discard_granularity) == (4096, 4096)
    backend.physical_block_size = 8192
    backend.discard_granularity = 65536
    assert (backend.physical_block_size, backend.discard_granularity) == (8192, 65536)
    assert Plain().physical_block_size == 4096


def test_str_is_like_a_spec() -> None:
    """`str()` names kind and size, and works before the size is known."""
    assert str(Plain()) == "plain:1M"
    assert repr(Plain()) == "<Plain plain:1M>"
    assert (
        str(File("/x/y", direct=True, read_only=True, block_size=4096))
        == "file:/x/y,direct=on,read_only=on,block_size=4096"
    )

    class Sizeless(Backend):
        def read(self, offset: int, buffer: memoryview) -> None: ...

    assert str(Sizeless()) == "sizeless"


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"size": 0}, "backend plain:0: size 0 is not possible: a disk has at least one block of 512 bytes"),
        ({"size": -512}, "backend plain:-512: size -512 is not possible: a disk has at least one block of 512 bytes"),
        ({"size": 1000}, "backend plain:1000: size 1000 is not a multiple of block_size 512: use 512 or 1024"),
        ({"size": 100}, "backend plain:100: size 100 is not a multiple of block_size 512: use 512"),
        (
            {"size": 1 << 63},
            "backend plain:8388608T: size 9223372036854775808 is not possible: a disk is smaller than 2**63 bytes",
        ),
        (
            {"size": 1e9},
            "backend plain: size is 1000000000.0, not an int: set it in __init__ or open(), in bytes, "
            "e.g. self.size = 4096",
        ),
        (
            {"size": None},
            "backend plain: size is None, not an int: set it in __init__ or open(), in bytes, e.g. self.size = 4096",
        ),
        ({"block_size": 256}, "backend plain:1M: block_size 256 is not possible: use 512, 1024, 2048 or 4096"),
        ({"block_size": 8192}, "backend plain:1M: block_size 8192 is not possible: use 512, 1024, 2048 or 4096"),
        ({"block_size": 1000}, "backend plain:1M: block_size 1000 is not possible: use 512, 1024, 2048 or 4096"),
        (
            {"block_size": 4096, "physical_block_size": 512},
            "backend plain:1M: physical_block_size 512 is not possible: use a power of two from block_size 4096 up",
        ),
        (
            {"optimal_io_size": 3000},
            "backend plain:1M: optimal_io_size 3000 is not possible: use 0 or a power of two from block_size 512 up",
        ),
        (
            {"discard_granularity": 1000},
            "backend plain:1M: discard_granularity 1000 is not possible: use a multiple of block_size 512",
        ),
        (
            {"discard_granularity": 0},
            "backend plain:1M: discard_granularity 0 is not possible: use a multiple of block_size 512",
        ),
    ],
)
def test_impossible_geometry_is_one_line_with_the_mend(values: dict[str, Any], line: str) -> None:
    """`check_geometry` refuses what the kernel would, and says how to mend it."""
    backend = Plain()
    for name, value in values.items():
        setattr(backend, name, value)
    with pytest.raises(UsageError) as caught:
        check_geometry(backend)
    assert str(caught.value) == line


def test_possible_geometry_passes() -> None:
    """Every logical block that the kernel takes is accepted."""
    for block_size in (512, 1024, 2048, 4096):
        check_geometry(Null(1 << 40, block_size=block_size))


def test_fill_zeroes_fills_all_of_any_length() -> None:
    """No byte is left over, at and around the length of the block of zeroes."""
    for length in (0, 1, 512, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, (2 << 20) + 512):
        buffer = bytearray(b"x") * length
        fill_zeroes(memoryview(buffer))
        assert not any(buffer)


def test_null_reads_zeroes_whatever_was_written() -> None:
    """A read from null never leaves stale bytes in the buffer."""
    null = Null(1 << 40)
    null.write(4096, memoryview(b"x" * 512), fua=False)
    null.discard(0, 4096)
    null.write_zeroes(0, 4096, unmap=True)
    buffer = bytearray(b"y" * 1024)
    null.read(4096, memoryview(buffer))
    assert buffer == bytes(1024)


def test_null_takes_any_size_that_a_disk_can_have() -> None:
    """Grown and shrunk; what is not possible is refused, and changes nothing."""
    null = Null(1 << 20, block_size=4096)
    for size in (1 << 40, 4096):
        null.resize(size)
        assert null.size == size
        check_geometry(null)
    for size, why in ((0, "size 0 is not possible"), (512, "not a multiple of block_size 4096"), (1 << 63, "smaller")):
        with pytest.raises(UsageError, match=why):
            null.resize(size)
        assert null.size == 4096


async def test_as_async_passes_everything_on() -> None:
    """The wrapper calls the inner method with the same arguments, and again for the rest of a short read."""
    inner = Full()
    wrapper: Any = as_async(inner)
    await wrapper.open()
    assert await wrapper.read(0, memoryview(bytearray(1024))) is None
    assert await wrapper.write(512, memoryview(bytes(1024)), fua=True) is None
    assert await wrapper.flush() is None
    assert await wrapper.discard(0, 4096) is None
    assert await wrapper.write_zeroes(0, 8192, unmap=True) is None
    assert inner.calls == [
        ("read", 0, 1024), ("read", 512, 512), ("write", 512, 1024, True), ("flush",), ("discard", 0, 4096),
        ("write_zeroes", 0, 8192, True),
    ]  # fmt: skip


async def test_as_async_awaits_what_the_inner_method_returns() -> None:
    """A plain method that returns an awaitable is served too."""
    awaited = []

    class Lazy(Full):
        def read(self, offset: int, buffer: memoryview) -> Any:
            async def later() -> int:
                await trio.lowlevel.checkpoint()
                awaited.append(offset)
                return 512

            return later()

    wrapper: Any = as_async(Lazy())
    await wrapper.open()
    await wrapper.read(0, memoryview(bytearray(1024)))
    assert awaited == [0, 512]


async def test_as_async_has_the_same_capabilities_and_geometry() -> None:
    """Wrapping neither adds nor loses a capability, and copies every size."""
    for inner in (Plain(), Full(), Null(1 << 30, block_size=4096), Memory(1 << 20)):
        wrapper = as_async(inner)
        await wrapper.open()
        assert is_async(wrapper)
        assert not is_async(inner)
        assert capabilities(wrapper) == capabilities(inner)
        assert (wrapper.size, wrapper.block_size, str(wrapper)) == (inner.size, inner.block_size, str(inner))
        assert wrapper.discard_granularity == inner.discard_granularity


async def test_as_async_learns_what_open_found_out() -> None:
    """Size and unsupported methods that are known only after `open` reach the wrapper."""

    class Late(Full):
        closed = False

        async def open(self) -> None:
            self.size = 4096
            self.unsupported = frozenset({"discard"})

        async def aclose(self) -> None:
            self.closed = True

    inner = Late()
    wrapper = as_async(inner)
    await wrapper.open()
    assert wrapper.size == 4096
    assert capabilities(wrapper) == {"read", "write", "flush", "write_zeroes"}
    await wrapper.aclose()
    assert inner.closed


def test_as_async_keeps_what_is_async_and_threads_a_file() -> None:
    """An asynchronous backend is itself; a file becomes a threaded one with the same options."""
    threaded = as_async(File("/x", direct=True, read_only=True, block_size=4096))
    assert isinstance(threaded, ThreadedFile)
    assert (threaded.path, threaded.direct, threaded.read_only, threaded.block_size) == ("/x", True, True, 4096)
    assert as_async(threaded) is threaded


def test_the_protocols_are_met() -> None:
    """The built-in backends satisfy the typed protocols (a type checker proves it on this function)."""
    write: list[CanWrite] = [Null(512), Memory(512), File("/x"), ThreadedFile("/x")]
    flush: list[CanFlush] = [File("/x"), ThreadedFile("/x")]
    discard: list[CanDiscard] = [Null(512), Memory(512), File("/x"), ThreadedFile("/x")]
    zeroes: list[CanWriteZeroes] = [Null(512), Memory(512), File("/x"), ThreadedFile("/x")]
    assert all([write, flush, discard, zeroes])
