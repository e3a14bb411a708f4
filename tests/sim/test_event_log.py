"""The log of a run: typed, the same everywhere, and free when it is off."""

from __future__ import annotations

import hashlib
import json

import pytest
import trio

from tests.sim.mini import FETCH, live, machine
from ublk_trio.kernel_sim import EventLog, FirstChoice, SeededChoices, SimKernel
from ublk_trio.kernel_sim.event_log import EVENTS, MARK_DIGITS, as_record
from ublk_trio.uapi import IoFlag, IoOp

#: The digest of `calm_log`, which is drawn from nothing but the simulator: another Python must give the same.
CALM_DIGEST = "284c9594f416c8f9a3a6d154d5556e0d4fb1a9090be66755a84bdfafa22c113a"


def calm_log() -> EventLog:
    """A write and a read on a device of one tag, without the engine, on a calm machine."""
    kernel = SimKernel(FirstChoice(record=True), partition_scan=False, log=True)
    kernel.choices.off = frozenset({"command-before-cancel"})

    async def main() -> None:
        async with machine(kernel) as m, live(m, depth=1) as device:
            for op, what in ((IoOp.WRITE, b"x" * 512), (IoOp.READ, 512)):
                device.disk.submit(op, 1024, what)
                device.queue.commit(device.queue.event().tag, 512)
            await m.stop()

    trio.run(main)
    assert kernel.log is not None
    return kernel.log


def test_lines() -> None:
    """Each event is one line of JSON with its kind and its fields by name, numbers of the ABI in words."""
    log = calm_log()
    records = [json.loads(line) for line in log.lines()]
    assert records == list(log.records())
    write = {"event": "event", "device": 0, "queue": 0, "tag": 0, "result": 0}
    assert [record for record in records if record["event"] == "event"][:2] == [
        {**write, "op": "WRITE", "sectors": 1, "start_sector": 2},
        {**write, "op": "READ", "sectors": 1, "start_sector": 2},
    ]
    fetch = {"event": "command", "device": 0, "queue": 0, "tag": 0, "command": "FETCH_REQ", "result": 0}
    assert next(record for record in records if record["event"] == "command") == fetch
    assert [record["state"] for record in records if record["event"] == "state"] == ["LIVE", "DEAD"]
    controls = [record for record in records if record["event"].startswith("control")]
    assert controls[0] == {"event": "control-sent", "command": "ADD_DEV", "device": 0xFFFFFFFF}
    assert controls[1] == {"event": "control", "command": "ADD_DEV", "device": 0xFFFFFFFF, "result": 0}
    assert {record["event"] for record in records} == {
        "control-sent", "control", "ring-opened", "command", "state", "bio", "request", "event", "bio-done",
        "ring-closed", "deleted", "choice",
    }  # fmt: skip


def test_digest_is_that_of_the_lines() -> None:
    """Whoever keeps the lines can check the digest with sha256sum, and the marks are its beginnings."""
    log = calm_log()
    text = "".join(line + "\n" for line in log.lines()).encode()
    assert log.digest() == hashlib.sha256(text).hexdigest()
    first = next(iter(log.lines())) + "\n"
    assert len(log.marks()) == MARK_DIGITS * len(log)
    assert hashlib.sha256(first.encode()).hexdigest().startswith(log.marks()[:MARK_DIGITS])


def test_pinned_digest() -> None:
    """The same run gives the same log in every process, on every machine and every Python.

    It changes with what the simulator logs or does: then look at the lines, and put the new one here.
    """
    log = calm_log()
    assert log.digest() == CALM_DIGEST, "\n".join(log.lines())


def test_marks_show_the_first_difference() -> None:
    """Two logs' marks are equal up to the first event that differs, and not there."""
    log = calm_log()
    other = EventLog(log)
    other[5] = ("phase", "another")
    assert log.marks()[: 5 * MARK_DIGITS] == other.marks()[: 5 * MARK_DIGITS]
    assert log.marks()[5 * MARK_DIGITS :][:MARK_DIGITS] != other.marks()[5 * MARK_DIGITS :][:MARK_DIGITS]


@pytest.mark.parametrize("event", [("unheard", 1), ("state", 0), ("state", 0, "LIVE", 1), ("event", 0, 0)])
def test_an_event_that_is_not_in_the_table(event: tuple[object, ...]) -> None:
    """A kind that nobody described, or fields too few or too many, are said by name."""
    with pytest.raises(ValueError, match=f"no such event: \\('{event[0]}'"):
        as_record(event)


@pytest.mark.parametrize("event", [("state", "0", "LIVE"), ("state", 0, 1), ("time", "now")])
def test_a_field_of_another_type(event: tuple[object, ...]) -> None:
    with pytest.raises(AssertionError):
        as_record(event)


def test_operations_in_words() -> None:
    """Flags are named in their bits' order, unknown operations by number."""
    both = IoOp.WRITE | IoFlag.FUA | IoFlag.NOUNMAP
    assert as_record(("bio", 1, both, 0, 512))["op"] == "WRITE|FUA|NOUNMAP"
    assert as_record(("bio", 1, 99, 0, 512))["op"] == "operation 99"
    assert as_record(("command", 0, 0, 0, FETCH, 0))["command"] == "FETCH_REQ"
    assert as_record(("command", 0, 0, 0, 0x77, 0))["command"] == "command 0x77"


def test_no_log_unless_asked_for() -> None:
    """Without a log nothing is kept, neither events nor decisions."""
    kernel = SimKernel(SeededChoices(0))
    assert kernel.log is None
    assert kernel.choices.log is None


def test_decisions_by_name() -> None:
    """Each recorded decision is in the log; one that is off or calm is neither recorded nor there."""
    choices = SeededChoices(1)
    kernel = SimKernel(choices, log=True)
    choices.choose("tag", 5)
    choices.off = frozenset({"tag"})
    assert choices.choose("tag", 5) == 0
    choices.calm_down()
    assert choices.choose("queue", 5) == 0
    assert kernel.log == [("choice", "tag", 5, choices.trace[0].chosen)]
    assert len(choices.trace) == 1
    assert "choice" in EVENTS
