"""The same seed gives the same run: in another process, under another hash seed, on another Python."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import trio

ROOT = Path(__file__).resolve().parent.parent.parent
SEED = 54
#: What that seed gives. Trio's scheduling is a part of the run; it has been the same since 0.27, the oldest allowed. It changes with the engine, the
#: simulator or the scenario: `test_pinned_digest` prints the new one.
TRIO = "0.35.0"
DIGEST = "9eee0b58e508b6acde4cce7586e7c64cd15e65bcd50bf0ddc02d90be93491062"
_ARGUMENTS = ["-m", "ublk_trio", "sim", "--seed", str(SEED), "--json"]


def digest(python: str, hash_seed: str) -> str:
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([python, *_ARGUMENTS], env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    # Enough happened in it for an accident to show.
    assert result["events"] > 1000
    assert len(result["injected"]) > 2
    return str(result["digest"])


def other_pythons() -> list[str]:
    """Every Python on the PATH, from 3.11 on, that has what the command line needs, with the same Trio."""
    found = []
    wanted = f"import trio, ublk_trio.cli; assert trio.__version__ == {trio.__version__!r}"
    names = [f"python3.{minor}" for minor in range(11, 20)]
    for python in filter(None, map(shutil.which, names)):
        done = subprocess.run([python, "-c", wanted], cwd=ROOT, capture_output=True, check=False)
        if done.returncode == 0:
            found.append(python)
    return found


def test_processes() -> None:
    """Two processes with hashes of their own, this Python and every other that is here, give one digest."""
    digests = {("this", seed): digest(sys.executable, seed) for seed in ("1", "2")}
    for python in other_pythons():
        digests[python, "3"] = digest(python, "3")
    assert len(set(digests.values())) == 1, digests


def test_pinned_digest() -> None:
    """Another machine and another Python give what this one gave."""
    found = digest(sys.executable, "0")
    assert found == DIGEST, f"seed {SEED} gives {found}, with Trio {trio.__version__} instead of {TRIO}"
