"""Runs the state machine from one random seed after another, until the time is up or something is found: ``make soak``.

Prints each seed before it is used. What is found comes with the line that repeats it; the exit code is then 1. With a bug planted
(``--plant NAME``, or ``random``) it must be found: that is a soak of the suite.
"""

from __future__ import annotations

import argparse
import logging
import random
import time

from hypothesis import Phase, settings

from tests.property.machine import EngineMachine
from tests.property.planted import PLANTED, name_of
from tests.property.reports import PROFILES
from tests.property.running import repeating_line, run_machine

#: Examples from one seed: a few seconds.
EXAMPLES = 200


def soak(*, seconds: float, plant: str | None, shrink: bool) -> int:
    """Returns the exit code."""
    logging.getLogger("ublk_trio").setLevel(logging.CRITICAL + 1)
    # No explanations: they take longer than the finding.
    phases = [Phase.generate, Phase.shrink] if shrink else [Phase.generate]
    profile = settings(PROFILES["soak"], max_examples=EXAMPLES, database=None, phases=phases)
    began = time.monotonic()
    runs = steps = seeds = 0
    while time.monotonic() - began < seconds:
        seed = random.SystemRandom().getrandbits(32)
        print(f"{time.monotonic() - began:6.0f} s  seed {seed}", flush=True)
        seeds += 1
        try:
            run_machine(profile, seed=seed, plant=plant)
        except Exception as error:
            print(f"found by seed {seed}, after {EngineMachine.runs} runs: {type(error).__name__}: {error}")
            print(repeating_line(error, profile, plant=plant) or "Hypothesis does not say how to repeat it", flush=True)
            return 1
        runs += EngineMachine.runs
        steps += EngineMachine.steps
    print(f"nothing found in {seconds:.0f} seconds: {seeds} seeds, {runs} runs, {steps} steps")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--plant", choices=["random", *map(name_of, PLANTED)], help="plant a bug, which must be found")
    parser.add_argument(
        "--no-shrink", action="store_true", help="keep the run as it was found: shrinking takes minutes"
    )
    arguments = parser.parse_args()
    plant = arguments.plant
    if plant == "random":
        plant = random.SystemRandom().choice([name_of(one) for one in PLANTED])
        print(f"planted: {plant}")
    return soak(seconds=arguments.seconds, plant=plant, shrink=not arguments.no_shrink)


if __name__ == "__main__":
    raise SystemExit(main())
