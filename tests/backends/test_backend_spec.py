"""SPECs and sizes: what is understood, and what is said about the rest."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ublk_trio.backends import KINDS, File, Kind, Memory, Null, format_size, parse_backend, parse_size, register
from ublk_trio.errors import UsageError


@given(st.integers(0, 1 << 63))
def test_sizes_round_trip(size: int) -> None:
    """`format_size` is exact: `parse_size` gives the number back."""
    assert parse_size(format_size(size)) == size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0), ("512", 512), ("512B", 512), ("4K", 4096), ("4k", 4096), ("4KiB", 4096),
        ("3M", 3 << 20), ("3mib", 3 << 20),
        ("1G", 1 << 30), ("1 GiB", 1 << 30), ("2T", 2 << 40), (" 2TiB ", 2 << 40),
    ],
)  # fmt: skip
def test_sizes_that_are_understood(text: str, size: int) -> None:
    """Units are powers of 1024, in either spelling and case."""
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "G", "-1", "1.5G", "1X", "1P", "1GG", "0x10", "1_000", "\u0663K", "1\u212a", "9" * 21]
)
def test_what_is_not_a_size(text: str) -> None:
    """One line that shows the text and how a size is written."""
    with pytest.raises(UsageError) as caught:
        parse_size(text)
    assert str(caught.value) == (
        f"{text!r} is not a size: write a whole number of bytes, or one with K, M, G or T, such as 64K or 1G"
    )


def test_decimal_units_are_refused_with_the_mend() -> None:
    """1GB could mean two sizes, so it means none."""
    with pytest.raises(UsageError, match=r"^'1GB' is not a size: units are .*; did you mean 1G \(a power of 1024\)\?$"):
        parse_size("1GB")
    with pytest.raises(UsageError, match=r"^'1iB' is not a size"):
        parse_size("1iB")


def test_format_size_takes_the_largest_exact_unit() -> None:
    """Never rounds."""
    sizes = [0, 1, 1000, 1024, 1536, 1536 << 20, 1 << 30, 1 << 40, (1 << 40) + 512]
    assert [format_size(size) for size in sizes] == [
        "0", "1", "1000", "1K", "1536", "1536M", "1G", "1T", "1099511628288",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        ("memory:1G", Memory),
        ("memory:1G,block_size=4096", Memory),
        ("null:1T", Null),
        ("null:1T,block_size=1024", Null),
        ("file:/a/b", File),
        ("file:/a/b,direct=on", File),
        ("file:/a/b,direct=on,read_only=on,block_size=4096", File),
        ("file:/with:colon, and comma,direct=on", File),
    ],
)
def test_specs_round_trip(spec: str, kind: type) -> None:
    """`str()` of a backend is the SPEC that makes it."""
    backend = parse_backend(spec)
    assert type(backend) is kind
    assert str(backend) == spec
    assert str(parse_backend(str(backend))) == spec


def test_options_reach_the_backend() -> None:
    """Each option sets what it names; off is the default."""
    file = parse_backend("file:/a,read_only=on,direct=off,block_size=2K")
    assert isinstance(file, File)
    assert (file.path, file.read_only, file.direct, file.block_size) == ("/a", True, False, 2048)
    memory = parse_backend("memory:1M,block_size=4K")
    assert (memory.size, memory.block_size) == (1 << 20, 4096)


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        ("memry:1G", "unknown backend 'memry': known are file, memory, null, rbd; did you mean memory?"),
        ("Memory:1G", "unknown backend 'Memory': known are file, memory, null, rbd; did you mean memory?"),
        ("/dev/sda", "unknown backend '/dev/sda': known are file, memory, null, rbd"),
        ("", "unknown backend '': known are file, memory, null, rbd"),
        ("memory", "backend 'memory': SIZE is missing: write memory:SIZE[,block_size=…]"),
        ("null:", "backend 'null:': SIZE is missing: write null:SIZE[,block_size=…]"),
        (
            "file:,direct=on",
            "backend 'file:,direct=on': PATH is missing: write file:PATH[,block_size=…][,direct=…][,read_only=…]",
        ),
        (
            "memory:1X",
            "backend 'memory:1X': '1X' is not a size: write a whole number of bytes, or one with K, M, G or T, "
            "such as 64K or 1G",
        ),
        (
            "memory:block_size=4096",
            "backend 'memory:block_size=4096': SIZE is missing: write memory:SIZE[,block_size=…]",
        ),
        (
            "memory:1G,blocksize=4096",
            "backend 'memory:1G,blocksize=4096': unknown option 'blocksize': known are block_size; "
            "did you mean block_size?",
        ),
        (
            "file:/a,size=1G",
            "backend 'file:/a,size=1G': unknown option 'size': known are block_size, direct, read_only",
        ),
        ("file:/a,direct=yes", "backend 'file:/a,direct=yes': direct: 'yes' is not a switch: write on or off"),
        (
            "file:/a,direct=on,direct=off",
            "backend 'file:/a,direct=on,direct=off': option 'direct' is given twice: give it once",
        ),
        ("memory:0", "backend memory:0: size 0 is not possible: a disk has at least one block of 512 bytes"),
        (
            "file:/a,block_size=3K",
            "backend file:/a,block_size=3072: block_size 3072 is not possible: use 512, 1024, 2048 or 4096",
        ),
    ],
)
def test_what_is_wrong_with_a_spec_is_said_in_one_line(spec: str, line: str) -> None:
    """The line names the thing, and what would be right."""
    with pytest.raises(UsageError) as caught:
        parse_backend(spec)
    assert str(caught.value) == line


@pytest.fixture
def kinds() -> Iterator[None]:
    before = dict(KINDS)
    yield
    KINDS.clear()
    KINDS.update(before)


@pytest.mark.usefixtures("kinds")
def test_kinds_can_be_added_once() -> None:
    """A registered kind is parsed and listed; its name can't be taken twice, and must fit in front of a colon."""
    register(Kind(name="zero", argument="SIZE", help="a test", make=Null, parse_argument=parse_size))
    assert parse_backend("zero:1M").size == 1 << 20
    with pytest.raises(UsageError, match="known are file, memory, null, rbd, zero"):
        parse_backend("nope:1")
    with pytest.raises(UsageError, match="'zero' is registered already"):
        register(Kind(name="zero", argument="SIZE", help="a test", make=Null))
    with pytest.raises(UsageError, match="'A:b': use lower case"):
        register(Kind(name="A:b", argument="SIZE", help="a test", make=Null))


def test_every_kind_has_one_line_of_help() -> None:
    """What the command line prints per kind is there, and one line."""
    for name, kind in KINDS.items():
        assert kind.name == name
        for text in [kind.help, *(option.help for option in kind.options.values())]:
            assert text
            assert "\n" not in text
