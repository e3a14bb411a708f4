"""What a soak finds can be repeated by the line that it prints."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

from tests.property.reports import PROFILE

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=600
    )


def test_a_planted_bug_is_found_and_replayed() -> None:
    """The printed line fails by the same invariant with the bug, and finds nothing of the kind without it."""
    soaked = run(
        "tests.property.soak",
        "--seconds",
        "120",
        "--no-shrink",
        "--plant",
        "random" if PROFILE == "soak" else "double_commit",
    )
    assert soaked.returncode == 1, soaked.stdout + soaked.stderr
    found = re.search(r"^found by seed \d+, after \d+ runs: BrokenError: ([^:]*):", soaked.stdout, re.MULTILINE)
    assert found is not None, soaked.stdout
    python, _, *line = shlex.split(soaked.stdout.splitlines()[-1])
    assert python == "python"
    # The checkout may not be this user's to write to, and pytest's cache would.
    line += ["-p", "no:cacheprovider"]
    replayed = run(*line)
    assert replayed.returncode == 1
    assert f"BrokenError: {found[1]}" in replayed.stdout
    plant = line.index("--plant")
    healthy = run(*line[:plant], *line[plant + 2 :])
    assert "DidNotReproduce" in healthy.stdout


def test_a_healthy_engine_soaks() -> None:
    """Each seed is printed, and the end says how much was done."""
    soaked = run("tests.property.soak", "--seconds", "1")
    assert soaked.returncode == 0, soaked.stdout
    assert re.search(r"^ +0 s  seed \d+$", soaked.stdout, re.MULTILINE)
    assert re.search(r"nothing found in 1 seconds: 1 seeds, 2\d\d runs, \d+ steps", soaked.stdout)
