"""Tells tools/test.sh which tests did not run, so that it can run them elsewhere, or fail when nothing can."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

_DESELECTED = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_DESELECTED] = []


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    for item in items:
        item.config.stash[_DESELECTED].append(item.nodeid)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--list-skipped", action="store_true", help="end with a line for each test that did not run, for tools/test.sh"
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not config.getoption("list_skipped"):
        return
    for report in terminalreporter.stats.get("skipped", ()):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        terminalreporter.write_line(f"skipped\t{report.nodeid}\t{' '.join(reason.split())}")
    for nodeid in config.stash[_DESELECTED]:
        terminalreporter.write_line(f"skipped\t{nodeid}\tdeselected")
