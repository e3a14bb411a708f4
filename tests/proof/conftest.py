"""At the end of a run, a table of the simulator's planted bugs says which test caught each."""

from __future__ import annotations

import pytest

from tests.proof.reports import CAUGHT, table


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if CAUGHT:
        terminalreporter.section("bugs planted in the simulator")
        for line in table(CAUGHT):
            terminalreporter.write_line(line)
