"""What the suite's profile is, and what it found of the planted bugs."""

from __future__ import annotations

import os
from collections.abc import Sequence

import attrs
from hypothesis import HealthCheck, settings

PROFILES: dict[str, settings] = {
    name: settings(
        max_examples=examples,
        stateful_step_count=steps,
        # A loaded machine is no failure, and neither is a rule that runs a target from its start to its end.
        deadline=None,
        print_blob=True,
        derandomize=False,
        suppress_health_check=[
            # A run with three disks and dozens of steps is slow to make, and long: that is what it is for.
            HealthCheck.too_slow,
            HealthCheck.data_too_large,
            HealthCheck.large_base_example,
        ],
    )
    for name, examples, steps in (("dev", 100, 40), ("ci", 2_000, 60), ("soak", 50_000, 100))
}
for _name, _settings in PROFILES.items():
    settings.register_profile(f"property-{_name}", _settings)


def chosen_profile() -> str:
    """The profile's name, from the environment."""
    asked = os.environ.get("UBLK_TRIO_PROFILE") or os.environ.get("HYPOTHESIS_PROFILE")
    name = asked or ("ci" if os.environ.get("CI") else "dev")
    if name not in PROFILES:
        raise ValueError(f"there is no profile {name!r}: choose {', '.join(PROFILES)}")
    return name


PROFILE = chosen_profile()
SETTINGS = PROFILES[PROFILE]


@attrs.frozen(kw_only=True)
class Caught:
    """A planted bug that was found."""

    bug: str
    examples: int
    invariant: str


CAUGHT: list[Caught] = []


def table(rows: Sequence[Caught]) -> list[str]:
    """Lines for people."""
    width = max(len(row.bug) for row in rows)
    head = f"{'bug':{width}}  {'caught after':>14}  by"
    return [head] + [
        f"{row.bug:{width}}  {row.examples:>5} example{'s' if row.examples != 1 else ' '}  {row.invariant}"
        for row in rows
    ]
