"""The driver's flags of a tag."""

from __future__ import annotations

from ublk_trio.kernel_sim.tag import TagFlag


def test_flags_are_bits_of_their_own() -> None:
    """No flag implies another: each is one bit, and no two are the same."""
    assert [flag.bit_count() for flag in TagFlag.__members__.values()] == [1] * len(TagFlag)
    assert sum(TagFlag) == 2 ** len(TagFlag) - 1
