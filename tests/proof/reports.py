"""What the tests found of the simulator's planted bugs."""

from __future__ import annotations

from collections.abc import Sequence

import attrs


@attrs.frozen(kw_only=True)
class Caught:
    """A planted bug of the simulator's that was found, and by which test."""

    bug: str
    test: str
    how: str


CAUGHT: list[Caught] = []


def table(rows: Sequence[Caught]) -> list[str]:
    """Lines for people."""
    width = max(len(row.bug) for row in rows)
    return [f"{'bug':{width}}  {'ends':5}  test"] + [f"{row.bug:{width}}  {row.how:5}  {row.test}" for row in rows]
