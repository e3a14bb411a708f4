"""The state machine again, on targets whose queues are owned by workers that are late whenever they like."""

from __future__ import annotations

import pytest
from hypothesis import settings

from tests.property.reports import SETTINGS
from tests.property.running import run_machine

#: It looks for what workers change; test_state_machine.py looks at the rest.
EXAMPLES = SETTINGS.max_examples // 4


def test_engine_and_kernel_agree_with_workers(pytestconfig: pytest.Config) -> None:
    """Every request ends exactly once with the right bytes, in any interleaving, and neither device nor worker is left."""
    run_machine(
        settings(SETTINGS, max_examples=EXAMPLES),
        replay=pytestconfig.getoption("--replay", default=None),
        cpus=(0, 1),
        test="tests/property/test_with_workers.py",
    )
