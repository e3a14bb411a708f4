"""The comparison in virtual machines: ``python -m tests.conformance.guests [--kernel SERIES]... [-- ARGUMENT...]``.

The arguments are those of ``python -m tests.conformance``. Where a driver got stuck it stays so for good: a fresh machine
goes on with the scripts after that one. What ``--digests`` prints goes into ``corpus/seen.json``.

Environment: VM_OPTIONS, more options for tests/kernel/vm.py.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.conformance.__main__ import DIFFERENT, SEEN, STUCK

_VM = Path(__file__).parents[1] / "kernel" / "vm.py"
_KERNELS = ("6.12", "7.3")
_SECONDS_MAX = 3600
#: For one kernel: a release on which more scripts than this get stuck is not worth the wait.
_MACHINES_MAX = 8
_STUCK_AT = re.compile(r"conformance: stuck at (\S+):")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance.guests", description="Conformance in guests.")
    parser.add_argument("--kernel", action="append", metavar="SERIES", help="(default: 6.12 and 7.3)")
    parser.add_argument("arguments", nargs="*", metavar="ARGUMENT", help="for python -m tests.conformance")
    asked = parser.parse_args(arguments)
    # Every kernel is played, whatever another one has shown.
    return max([run(kernel, asked.arguments) for kernel in asked.kernel or _KERNELS])


def run(kernel: str, arguments: Sequence[str]) -> int:
    """Everything on one kernel: 0, or what went wrong, as an exit status."""
    worst = 0
    after: list[str] = []
    for _machine in range(_MACHINES_MAX):
        status, stuck_at = _run_machine(kernel, [*arguments, *after])
        worst = max(worst, status)
        if status != STUCK:
            break
        after = ["--after", stuck_at]
    return worst


def _run_machine(kernel: str, arguments: Sequence[str]) -> tuple[int, str]:
    """One machine: its exit status, and the script at which the driver got stuck."""
    command = [sys.executable, str(_VM), "run", "--kernel", kernel, "--cpus", "4", "--timeout", str(_SECONDS_MAX)]
    command += ["--fail-on-kernel-warning", *shlex.split(os.environ.get("VM_OPTIONS", "")), "--"]
    command += [sys.executable, "-m", "tests.conformance", *arguments]
    stuck_at = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as machine:
        assert machine.stdout is not None
        for line in machine.stdout:
            if line.startswith('{"' + kernel):
                _keep(json.loads(line))
                continue
            print(line, end="", flush=True)
            if found := _STUCK_AT.match(line):
                stuck_at = found[1]
    return (machine.returncode if machine.returncode != STUCK or stuck_at else DIFFERENT), stuck_at


def _keep(digests: dict[str, dict[str, str]]) -> None:
    """Add what was seen to what is kept."""
    seen = json.loads(SEEN.read_text())
    for kernel, shown in digests.items():
        seen[kernel] = dict(sorted({**seen.get(kernel, {}), **shown}.items()))
    SEEN.write_text(json.dumps(seen, indent=0) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
