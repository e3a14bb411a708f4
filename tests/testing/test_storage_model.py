"""The storage model and its oracle: what a crash may leave, and that the oracle allows just that."""

from __future__ import annotations

import itertools

import pytest

from ublk_trio.kernel_sim import DrawnChoices
from ublk_trio.testing import SECTOR_BYTES, BrokenPromiseError, DurabilityModel, Storage

A, B, C, ZERO = (letter * SECTOR_BYTES for letter in (b"a", b"b", b"c", b"\0"))


def content(storage: Storage) -> bytes:
    buffer = bytearray(storage.size)
    storage.read(0, buffer)
    return bytes(buffer)


def survivals(faults: set[str], answers: int) -> set[bytes]:
    """All that may be left of: A settled, then B and C over two sectors, unsettled."""
    found = set()
    for answered in itertools.product(range(3), repeat=answers):
        left = iter(answered)
        choices = DrawnChoices(lambda what, options, left=left: min(next(left), options - 1))  # type: ignore[misc]
        storage = Storage(2 * SECTOR_BYTES, choices=choices, faults=faults)
        storage.write(0, A + A)
        storage.flush()
        storage.write(0, B + B)
        storage.write(0, C)
        found.add(content(storage.crash()))
    return found


def test_what_a_crash_leaves() -> None:
    """Any subset of the unsettled writes survives, whole; torn, any subset of their sectors; settled ones always."""
    assert survivals(set(), 0) == {C + B}
    assert survivals({"lost-cache"}, 3) == {C + B, A + A, B + B, C + A}
    assert survivals({"lost-cache", "torn-write"}, 4) == {first + second for first in (A, B, C) for second in (A, B)}


def test_flush_and_fua_settle() -> None:
    """What was flushed, or written with FUA, is there after every crash; an older write never comes back over it."""
    for answers in itertools.product(range(3), repeat=3):
        left = iter(answers)
        choices = DrawnChoices(lambda what, options, left=left: min(next(left), options - 1))  # type: ignore[misc]
        storage = Storage(2 * SECTOR_BYTES, choices=choices)
        storage.write(SECTOR_BYTES, A)
        storage.flush()
        storage.write(0, B)
        storage.write(0, C, fua=True)
        assert content(storage.crash()) == C + A


def test_a_process_that_dies_loses_nothing_of_the_storage() -> None:
    """After `restart` everything written is there, and still unsettled; the dead process writes nowhere."""
    storage = Storage(SECTOR_BYTES, choices=DrawnChoices(lambda what, options: options - 1))
    storage.write(0, A)
    after = storage.restart()
    storage.write(0, B)
    assert content(after) == A
    assert content(after.crash()) == ZERO


@pytest.mark.parametrize(
    ("fault", "left"), [("lost-write", ZERO + ZERO), ("misdirected-write", ZERO + A), ("lying-flush", ZERO + ZERO)]
)
def test_storage_that_breaks_its_word(fault: str, left: bytes) -> None:
    """Each of these faults does what it is called, and only if it is enabled."""
    for faults, expected in (({fault, "lost-cache"}, left), ({"lost-cache"}, A + ZERO)):
        choices = DrawnChoices(lambda what, options: options - 1)
        storage = Storage(2 * SECTOR_BYTES, choices=choices, faults=faults)
        storage.write(0, A)
        storage.flush()
        assert content(storage.crash()) == expected


# The oracle -----------------------------------------------------------------------------------------------------------


def model(*, volatile_cache: bool = True) -> DurabilityModel:
    return DurabilityModel(ZERO * 2, volatile_cache=volatile_cache)


def allowed(oracle: DurabilityModel) -> set[bytes]:
    """Which of these contents a read of the first sector may find."""
    found = set()
    for sector in (ZERO, A, B, C):
        pending = oracle.begin_read(0, SECTOR_BYTES)
        # Of a read that failed the oracle takes no note: it can be asked again and again.
        if sector in pending.seen[0]:
            found.add(sector)
        oracle.end(pending, failed=True)
    return found


def write(oracle: DurabilityModel, data: bytes, *, fua: bool = False) -> None:
    oracle.end(oracle.begin_write(0, data, fua=fua))


def test_acknowledged_but_not_flushed() -> None:
    """It is there; after a crash it may be, or what was there before."""
    oracle = model()
    write(oracle, A)
    assert allowed(oracle) == {A}
    write(oracle, B)
    oracle.crash()
    assert allowed(oracle) == {ZERO, A, B}


@pytest.mark.parametrize("settle", ["flush", "fua", "no cache"])
def test_acknowledged_and_settled(settle: str) -> None:
    """After a completed flush, or with FUA, or on a disk without a cache, only the last survives."""
    oracle = model(volatile_cache=settle != "no cache")
    write(oracle, A)
    write(oracle, B, fua=settle == "fua")
    if settle == "flush":
        oracle.end(oracle.begin_flush())
    oracle.crash()
    assert allowed(oracle) == {B}


def test_a_flush_covers_only_what_was_acknowledged_before_it_began() -> None:
    """A write that is acknowledged while the flush runs may be lost."""
    oracle = model()
    write(oracle, A)
    flush = oracle.begin_flush()
    write(oracle, B)
    oracle.end(flush)
    oracle.crash()
    assert allowed(oracle) == {A, B}


def test_a_flush_that_failed_promises_nothing() -> None:
    oracle = model()
    write(oracle, A)
    oracle.end(oracle.begin_flush(), failed=True)
    oracle.crash()
    assert allowed(oracle) == {ZERO, A}


def test_writes_in_flight_together() -> None:
    """Either may be the last, now and after a crash; of a write that failed both may be found."""
    oracle = model()
    first, second = oracle.begin_write(0, A), oracle.begin_write(0, B)
    oracle.end(second)
    oracle.end(first)
    assert allowed(oracle) == {A, B}
    write(oracle, C)
    oracle.end(oracle.begin_write(0, A), failed=True)
    assert allowed(oracle) == {A, C}


def test_overlapping_fua_writes() -> None:
    """Each settles itself, so of two in flight together one survives, and nothing from before."""
    oracle = model()
    write(oracle, C)
    first, second = oracle.begin_write(0, A, fua=True), oracle.begin_write(0, B, fua=True)
    oracle.end(first)
    oracle.end(second)
    oracle.crash()
    assert allowed(oracle) == {A, B}


def test_what_was_read_is_read_again() -> None:
    """A crash leaves one of several contents; once somebody has seen which, it is that."""
    oracle = model()
    write(oracle, A)
    oracle.crash()
    oracle.end(oracle.begin_read(0, SECTOR_BYTES), data=ZERO)
    with pytest.raises(BrokenPromiseError, match="read of sectors 0 to 0: sector 0 is all 0x61, and may be all 0x00"):
        oracle.end(oracle.begin_read(0, SECTOR_BYTES), data=A)


def test_a_read_during_a_write() -> None:
    """It may find the old content or the new one, whichever of the two ends first."""
    for data in (ZERO, A):
        oracle = model()
        read, pending = oracle.begin_read(0, SECTOR_BYTES), oracle.begin_write(0, A)
        oracle.end(pending)
        oracle.end(read, data=data)
        assert allowed(oracle) == {A}


def test_discarded_is_anything() -> None:
    """Until it is written again."""
    oracle = model()
    oracle.end(oracle.begin_discard(0, SECTOR_BYTES))
    oracle.end(oracle.begin_read(0, SECTOR_BYTES), data=C)
    oracle.end(oracle.begin_write_zeroes(0, SECTOR_BYTES))
    assert allowed(oracle) == {ZERO}


def test_torn_is_wrong() -> None:
    """Half a sector of one write and half of another is nothing that any order allows."""
    oracle = model()
    pending = oracle.begin_write(0, A)
    with pytest.raises(BrokenPromiseError, match="torn: 6161"):
        oracle.end(oracle.begin_read(0, SECTOR_BYTES), data=A[:256] + ZERO[:256])
    oracle.end(pending)
