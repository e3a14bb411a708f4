"""The tables of docs/coverage.md are covered to 100 %, and would show it if they were not. (`test_docs.py` keeps the page fresh.)"""

from __future__ import annotations

import enum
import logging

import pytest

from tests.proof import device_states, engine_tags, planted_simulator, simulator_tags
from tests.proof.coverage_page import tables
from tests.proof.coverage_table import Table
from ublk_trio.kernel_sim import SimKernel, control
from ublk_trio.kernel_sim.control import Call, Steps
from ublk_trio.kernel_sim.device import SimDevice
from ublk_trio.queue import Queue
from ublk_trio.tag import TRANSITIONS
from ublk_trio.uapi import ControlCommand


class Letter(enum.Enum):
    A = 1
    B = 2


@pytest.mark.parametrize("index", range(3), ids=["engine-tags", "simulator-tags", "device-states"])
def test_all_legal_cells_are_reached_and_all_illegal_ones_rejected(index: int) -> None:
    """100 % of both, in each table."""
    table = tables()[index]
    assert table.problems() == []
    assert table.accepted


def test_a_step_that_the_engine_never_takes_is_tested_elsewhere() -> None:
    """What the runs cannot reach is legal all the same, and there is no more of it than is said."""
    legal = {(state, event) for state, row in TRANSITIONS.items() for event in row}
    assert set(engine_tags.ELSEWHERE) < legal
    assert len(engine_tags.ELSEWHERE) == 1


def test_what_is_wrong_with_a_table_is_named() -> None:
    """A legal cell that was not reached, an illegal one that was accepted or not tried, and cells that there are not."""
    A, B = Letter
    table = Table(rows=[A, B], columns=[A, B], legal={(A, A), (A, B)}, elsewhere={(A, B): "because"})
    assert table.problems() == [
        "A x A: legal, and never reached",
        "A x B: legal, and never reached",
        "B x A: illegal, and never tried",
        "B x B: illegal, and never tried",
    ]
    table.count(A, A)
    table.count(A, B)
    table.count_result(B, A, -1)
    table.count_result(B, B, 0)
    table.count_result(B, B, -1)
    assert table.problems() == ["B x B: illegal, and accepted"]
    small = Table(rows=[A], columns=[A], legal=set[tuple[Letter, Letter]]())
    small.count(B, A)
    assert small.problems()[0] == "there is no cell for <Letter.B: 2> x <Letter.A: 1>"


def test_a_tables_page() -> None:
    """Counts, refusals by kind, and how much was reached."""
    A, B = Letter
    table = Table(rows=[A, B], columns=[A, B], legal={(A, A), (A, B)}, elsewhere={(A, B): "because"})
    for result in (0, 0, -1, -22, -95):
        table.count_result(A, A, result)
    table.count(A, B)
    table.count_result(B, B, -95)
    assert table.markdown(corner="letter") == [
        "Legal cells: 2 of 2 reached. Illegal cells: 1 of 2 rejected.",
        "",
        "| letter | A | B |",
        "|---|---|---|",
        "| A | **2**, EINVAL 1, EOPNOTSUPP 1, EPERM 1 | **1** (see below) |",
        "| B |  | EOPNOTSUPP 1 |",
    ]


def test_an_engine_that_steps_wrongly_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A queue that forgets to end its tags when the ring is closed leaves cells empty, and fails."""
    monkeypatch.setattr(Queue, "_close_tags", lambda queue: None)
    with pytest.raises(AssertionError, match="a queue ends when its tags have"):
        engine_tags.covered()
    assert logging.root.manager.disable == logging.NOTSET


def test_a_driver_that_refuses_carelessly_is_seen() -> None:
    """A refusal that changes the tag all the same is found while the commands are counted."""
    (plant,) = (plant for plant in planted_simulator.PLANTED if plant.name == "refusal_changes_the_tag")
    with plant.plant(), pytest.raises(AssertionError, match="a refused command changes nothing"):
        simulator_tags.covered()


def test_a_driver_that_allows_too_much_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """An UPDATE_SIZE that needs no disk shows as accepted where it is illegal."""

    def update_size(kernel: SimKernel, device: SimDevice, call: Call) -> Steps:
        yield from ()
        return 0

    monkeypatch.setattr(control, "_COMMANDS", {**control._COMMANDS, ControlCommand.UPDATE_SIZE: update_size})
    assert device_states.covered().problems() == ["UPDATE_SIZE x DEAD: illegal, and accepted"]


def test_a_command_that_waits_for_ever_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing hangs: registering memory while requests wait for a next server, which never ends, is an error that says so."""
    monkeypatch.setattr(device_states._Machine, "can_freeze", lambda machine: True)
    with pytest.raises(AssertionError, match=r"nothing ends it: .*REG_BUF"):
        device_states.covered()
