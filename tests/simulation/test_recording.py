"""Runs as files: what is written comes back, and anything else is said in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest

from ublk_trio.kernel_sim import EventLog, KernelVersion, SeededChoices
from ublk_trio.simulation import (
    Recording,
    RecordingError,
    Report,
    RunOptions,
    compare,
    load_recording,
    save_recording,
    simulate,
)

OPTIONS = RunOptions(seed=4, faults=frozenset({"backend-slow"}), kernel_version=KernelVersion(6, 12), steps=40)


@pytest.fixture(scope="module")
def report() -> Report:
    return simulate(OPTIONS, SeededChoices(OPTIONS.seed))


@pytest.fixture
def recorded(report: Report, tmp_path: Path) -> Path:
    save_recording(tmp_path / "run.jsonl", report)
    return tmp_path / "run.jsonl"


def test_there_and_back(report: Report, recorded: Path) -> None:
    """A file holds the options, every choice, and the log's length, digest and marks."""
    log = report.log
    assert load_recording(recorded) == Recording(
        options=OPTIONS, choices=report.choices, events=len(log), digest=log.digest(), marks=log.marks()
    )
    lines = [json.loads(line) for line in recorded.read_text().splitlines()]
    assert len(lines) == len(report.choices) + 2
    assert lines[0] == {
        "format": "ublk_trio run", "version": 1, "seed": 4, "faults": "backend-slow", "kernel_version": "6.12", "steps": 40,
    }  # fmt: skip


def changed(line: int, key: str, value: object) -> Callable[[list[str]], None]:
    def change(lines: list[str]) -> None:
        lines[line] = json.dumps({**json.loads(lines[line]), key: value})

    return change


def replaced(line: int, text: str) -> Callable[[list[str]], None]:
    def change(lines: list[str]) -> None:
        lines[line] = text

    return change


def shortened(lines: list[str]) -> None:
    del lines[-1:]


def emptied(lines: list[str]) -> None:
    lines.clear()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (emptied, "is not a recording of a run: its first line"),
        (replaced(0, "[]"), "is not a recording of a run: its first line"),
        (replaced(0, "text"), "is not a recording of a run, or damaged: Expecting value"),
        (changed(0, "format", "another"), "is not a recording of a run: its first line"),
        (changed(0, "version", 2), "is of version 2: this program reads version 1"),
        (changed(0, "version", None), "is of version None"),
        (shortened, "is cut off"),
        (replaced(-1, '{"events": 3'), "is not a recording of a run, or damaged"),
        (changed(0, "steps", "40"), "is damaged: ValueError"),
        (changed(0, "steps", -1), "is damaged: ValueError"),
        (changed(0, "steps", True), "is damaged: ValueError"),
        (changed(0, "faults", "rain"), "is damaged: UsageError: there is no fault 'rain'"),
        (changed(0, "faults", 3), "is damaged: AttributeError"),
        (changed(0, "kernel_version", "5.19"), "is damaged: UsageError: Linux 5.19 had no ublk driver"),
        (changed(0, "kernel_version", "six"), "is damaged: UsageError: kernel version 'six'"),
        (changed(-1, "digest", "0"), "is damaged: ValueError: 64 characters"),
        (changed(-1, "marks", "0"), "is damaged: ValueError"),
        (replaced(-1, "{}"), "is damaged: KeyError"),
        (replaced(3, '["tag", 2]'), "is damaged: ValueError"),
        (replaced(3, '["tag", 2, 2]'), "is damaged: ValueError"),
        (replaced(3, "[3, 2, 1]"), "is damaged: ValueError"),
        (replaced(3, "5"), "is damaged: TypeError"),
        (replaced(3, ""), "is not a recording of a run, or damaged"),
    ],
)
def test_another_file(recorded: Path, change: Callable[[list[str]], None], message: str) -> None:
    """What is not a whole recording is refused in one line that names the file."""
    lines = recorded.read_text().splitlines()
    change(lines)
    recorded.write_text("".join(line + "\n" for line in lines))
    with pytest.raises(RecordingError) as caught:
        load_recording(recorded)
    assert str(caught.value).startswith(f"{recorded} {message}")
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text(recorded: Path) -> None:
    recorded.write_bytes(b"\xff\xfe" + recorded.read_bytes())
    with pytest.raises(RecordingError, match="damaged"):
        load_recording(recorded)


def test_first_difference(report: Report, recorded: Path) -> None:
    """A replay with another log is told by its first event that differs, or by where one of the two ends."""
    recording = load_recording(recorded)
    assert compare(recording, report) is None
    other = EventLog(report.log)
    other[17] = ("phase", "another")
    assert compare(recording, attrs.evolve(report, log=other)) == (
        f"event 17 of {len(other)} differs; in the replay it is " + '{"event":"phase","name":"another"}'
    )
    shorter = compare(recording, attrs.evolve(report, log=EventLog(report.log[:-3])))
    assert shorter == f"the replay ends after event {len(other) - 4}, the recording has {len(other)} events"
    longer = compare(recording, attrs.evolve(report, log=EventLog([*report.log, ("phase", "more")])))
    assert longer is not None
    assert longer.startswith(f"event {len(other)} of {len(other)} differs")
