#!/usr/bin/env python3
"""Run a command as root under a real kernel that has ``ublk_drv``, in a throw-away virtual machine.

    python3 tests/kernel/vm.py run --kernel 6.12 -- COMMAND ARG...
    python3 tests/kernel/vm.py fetch --kernel 6.12 --kernel 7.3
    python3 tests/kernel/vm.py check

The guest's root is this machine's own root, read-only, under an overlay in memory: the command
sees the checkout and its virtual environment at the paths that they have here, and nothing that it
does lasts. The exit code is the command's own, or one of ``Exit`` (`guest/ending.py`), with one line on stderr
that says what, why and how to mend it.

All of it is in `guest/`, and needs nothing but Python's own library: it runs before there is a virtual environment.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Run as a script, this finds its own directory first, where modules have names that others have too.
sys.path[0] = str(Path(__file__).resolve().parents[2])

from tests.kernel.guest.command_line import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
