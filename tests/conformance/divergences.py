"""Where the simulator is allowed to differ from a real driver, and why. Everything else is a bug of the simulator.

Each is matched narrowly: by release, by the step, and by every line that only one side shows. What follows such a step
in its script is not compared. An explanation that explains nothing in a whole run of the corpus is a failure, too.
"""

from __future__ import annotations

import re
from typing import Final

import attrs

from tests.conformance.lockstep import Difference

Release = tuple[int, int]


@attrs.frozen(kw_only=True)
class Divergence:
    """One explained difference; the patterns are regular expressions over whole steps and lines."""

    name: str
    reason: str
    #: A script that shows it.
    example: str
    since: Release = (6, 0)
    before: Release = (99, 0)
    step: str
    simulated: str = "(?!)"
    real: str = "(?!)"

    def explains(self, difference: Difference, release: Release) -> bool:
        return (
            self.since <= release < self.before
            and re.fullmatch(self.step, difference.step) is not None
            and all(re.fullmatch(self.simulated, text) for text in difference.expected)
            and all(re.fullmatch(self.real, text) for text in difference.shown)
        )


DIVERGENCES: Final[tuple[Divergence, ...]] = (
    Divergence(
        name="user-copy-counts-too-much",
        reason="6.12 counts the bytes of the server's buffer that it looked at, not those that it copied: a copy across the "
        "end of a request seems to have moved all that was asked for. The simulator counts what was copied.",
        example="user-copy-parts",
        before=(7, 0),
        step=r"(pread|pwrite) \S+ @\S+ .*",
        simulated=r"(pread = \w\w\*\d+|pwrite = \d+)",
        real=r"(pread = \w\w\*\d+( 00\*\d+)?|pwrite = \d+)",
    ),
)
