"""docs/coverage.md: the tables of what the suites reach, made by running them."""

from __future__ import annotations

import functools
from typing import Any

from tests.proof import device_states, engine_tags, simulator_tags
from tests.proof.coverage_table import Table


@functools.cache
def tables() -> tuple[Table[Any, Any], ...]:
    """The covered tables: the engine's tags, the simulator's tags, the simulator's devices."""
    return engine_tags.covered(), simulator_tags.covered(), device_states.covered()


def coverage_page() -> str:
    """The page, the same at every call and on every machine."""
    tags, commands, devices = tables()
    return "\n".join(
        [
            "# What the tests reach",
            "",
            "Made by running it: `make docs` drives the engine and the simulator through fixed runs with fixed seeds and counts",
            "what happened in which state. A test fails when this page is not what the runs give now, when a legal cell was never",
            "reached, and when an illegal one was accepted or never tried.",
            "",
            "A **bold** number says how often the cell was reached and accepted. What else stands in a cell was refused, with what,",
            "and how often; in a legal cell for another reason than the state (a missing buffer, a server that is not there).",
            "A cell without a bold number is illegal.",
            "",
            "## The engine's tags",
            "",
            "The states and events of [the tag state machine](tag.md), in",
            f"{len(engine_tags.SEEDS)} lives of a queue of the engine, on a kernel that sends whatever the table allows, and in some of",
            "them, once, what it forbids. Every illegal cell is tried once more on the table alone.",
            "",
            *tags.markdown(corner="state"),
            "",
            *(f"{row.name} and {column.name}: {why}" for (row, column), why in tags.elsewhere.items()),
            "",
            "## The simulator's tags",
            "",
            "The flags of a tag in the simulated driver, and the commands that a server sends for it:",
            f"{len(simulator_tags.SEEDS)} servers that send anything at any time.",
            "",
            *commands.markdown(corner="flags", row_names=simulator_tags.ROWS),
            "",
            "## The simulator's devices",
            "",
            "The control commands, by the state of the device that they are for (ABSENT: there is none):",
            f"{len(device_states.SEEDS)} operators who send anything at any time, while a server and an application come and go.",
            "",
            *devices.markdown(corner="command"),
            "",
        ]
    )
