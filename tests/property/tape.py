"""Decisions out of a few drawn bytes.

A rule draws one short `bytes` and the engine, the kernel, the disks and the scheduler take their decisions from it while the
rule runs; when it is used up, everything is calm. One draw a rule instead of one a decision is what makes the machine
fast, nothing is drawn in the middle of somebody's task, and a shrunk tape is zeroes but for the decisions that matter.
"""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis.strategies as st

TAPE_BYTES = 10
#: What a rule draws. Of one length: Hypothesis then makes it in one go, and zeroes at the end cost nothing.
tapes = st.binary(min_size=TAPE_BYTES, max_size=TAPE_BYTES)


class Tape:
    """The decisions of the rule that runs now."""

    def __init__(self) -> None:
        self._left: Iterator[int] = iter(b"")
        #: Faults have stopped: every answer is 0.
        self.calm = False

    def load(self, drawn: bytes) -> None:
        """A rule begins."""
        self._left = iter(drawn)

    def choose(self, what: str, options: int) -> int:
        """A number from 0 to ``options`` - 1; 0 is the calm one."""
        if self.calm:
            return 0
        assert options <= 256, f"{what}: {options} options, of one byte"
        return next(self._left, 0) % options
