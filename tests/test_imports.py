"""A command starts without what it does not need: neither the simulator nor the remote calls, which take as long to import as the rest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: What is imported only when it is asked for.
SIMULATOR, CALLS, TABLES = "ublk_trio.kernel_sim", "ublk_trio.rpc", "rich.console"
SERVICE, WORKLOADS = "ublk_trio.service.service", "ublk_trio.simulation"
ALL = {SIMULATOR, CALLS, TABLES, SERVICE, WORKLOADS}

AFTERWARDS = """
import sys
from ublk_trio.cli import main
try:
    main(sys.argv[1:])
finally:
    print("imported", *sys.modules, file=sys.stderr)
"""


def imported(*arguments: str) -> set[str]:
    """Of the modules above, those that a run has imported."""
    command = [sys.executable, "-c", AFTERWARDS, *arguments]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    return ALL & set(ran.stderr.splitlines()[-1].split()[1:])


@pytest.mark.parametrize(
    ("arguments", "needed"),
    [
        (["--version"], {TABLES}),
        (["udev-rule"], set()),
        (["doctor", "--json"], set()),
        (["start", "--backend", "memory:1M", "--max-io", "513"], {CALLS}),  # it fails, and what fails may be a call
        (["rpc", "spdk_get_version", "--socket", "/nonexistent"], {CALLS}),
        (["start", "--kernel", "sim", "--backend", "null:1M", "--seconds", "0.05"], {SIMULATOR, TABLES}),
        (["start", "--config", "/nonexistent"], {CALLS, SERVICE}),
        (["sim", "--steps", "1", "--faults", "none"], {SIMULATOR, WORKLOADS}),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_what_a_command_imports(arguments: list[str], needed: set[str]) -> None:
    """Just what it needs, of what takes long."""
    assert imported(*arguments) == needed


def test_the_package_has_the_simulator_when_it_is_asked_for() -> None:
    """`SimKernel` is a name of the package like any other, and a wrong name is an error as ever."""
    program = "import sys, ublk_trio; a = 'ublk_trio.kernel_sim' in sys.modules; ublk_trio.SimKernel(); print(a)"
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout == "False\n"
    import ublk_trio

    with pytest.raises(AttributeError, match="SimKernl"):
        _ = ublk_trio.SimKernl  # type: ignore[attr-defined]


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]], ids=["nothing", "--help", "-h"])
def test_the_overview_describes_each_command(arguments: list[str]) -> None:
    """Though none of them is imported before it is called."""
    command = [sys.executable, "-m", "ublk_trio", *arguments]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    text = " ".join(ran.stdout.replace("│", " ").split())
    for says in ("Check everything that `start` needs", "Serve disks until", "Call a method", "Print the udev rule"):
        assert says in text
