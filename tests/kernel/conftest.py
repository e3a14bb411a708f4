"""Tests that need a kernel with `ublk_drv`, root, and real programs on top: fio, mkfs, mount, dd.

They run in the guest of `vm.py`, or on any machine where this process may open the control device; elsewhere the
directory collects to nothing, and one line says so.
"""

from __future__ import annotations

import faulthandler
import io
import os
import sys
from collections.abc import Iterator

import pytest

from tests.kernel.leftovers import Leftovers
from ublk_trio.uapi import CONTROL_PATH

_USABLE = os.geteuid() == 0 and os.access(CONTROL_PATH, os.R_OK | os.W_OK)
#: Seconds for one test with its clean-up, in an emulated guest. Beyond it something hangs in the kernel, where no signal
#: reaches it: the run ends there, with every thread's traceback.
_TEST_SECONDS_MAX = 900.0

collect_ignore_glob = [] if _USABLE else ["test_*.py"]
_real_stderr: io.TextIOWrapper | None = None


def pytest_configure() -> None:
    # Capturing is suspended just now: this is where the user looks.
    global _real_stderr
    _real_stderr = os.fdopen(os.dup(sys.stderr.fileno()), "w")


def pytest_unconfigure() -> None:
    if _real_stderr is not None:
        _real_stderr.close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _USABLE:
        terminalreporter.write_line(
            f"tests/kernel: nothing collected: root with a usable {CONTROL_PATH} is needed; "
            "python3 tests/kernel/vm.py run --kernel 7.3 -- .venv/bin/pytest tests/kernel"
        )


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """No test may hang for ever."""
    assert _real_stderr is not None
    faulthandler.dump_traceback_later(_TEST_SECONDS_MAX, exit=True, file=_real_stderr)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(autouse=True)
def nothing_left(bounded: None) -> Iterator[None]:
    """No test leaves a device node, a device in the driver, a process, a descriptor, a mapping or a mount behind."""
    before = Leftovers.look()
    yield
    left = before.wait_for_new()
    before.clean()
    assert left == [], "the test left something behind"
