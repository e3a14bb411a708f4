"""Tells tools/test.sh which tests did not run, so that it can run them elsewhere, or fail when nothing can."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--list-skipped", action="store_true", help="end with a line for each skipped test, for tools/test.sh"
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not config.getoption("list_skipped"):
        return
    for report in terminalreporter.stats.get("skipped", ()):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        terminalreporter.write_line(f"skipped\t{report.nodeid}\t{' '.join(reason.split())}")
