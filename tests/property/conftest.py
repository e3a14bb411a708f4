"""Profiles of the property suite, chosen by UBLK_TRIO_PROFILE or HYPOTHESIS_PROFILE: dev (the default), ci (where CI is set), soak.

They are applied to this suite's tests only and are not loaded for the whole session: the other suites have settings of
their own. At the end of a run the table of planted bugs says which invariant caught each, and how soon.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator

import pytest

from tests.property.reports import CAUGHT, table


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("the property suite's state machine")
    group.addoption(
        "--replay", metavar="PROFILE:BLOB", help="repeat one failing run, as a failure's note or a soak says"
    )
    group.addoption("--plant", metavar="BUG", help="with this bug of tests/property/planted.py")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """The engine logs every planned failure with its traceback, thousands of them; the tests look at states instead."""
    logger = logging.getLogger("ublk_trio")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    yield
    logger.setLevel(level)


@pytest.fixture(autouse=True, scope="session")
def _rare_collections() -> Iterator[None]:
    """Hypothesis makes many small objects that live long: looking through them every 700 costs a tenth of the time."""
    before = gc.get_threshold()
    gc.set_threshold(20_000, 20, 50)
    yield
    gc.set_threshold(*before)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if CAUGHT:
        terminalreporter.section("planted bugs")
        for line in table(CAUGHT):
            terminalreporter.write_line(line)
