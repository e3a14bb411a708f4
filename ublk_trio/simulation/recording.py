"""A run as a file: JSON lines, to be replayed.

| line | content |
|---|---|
| first | an object: ``format`` and ``version`` of the file, the run's ``options``, the ``seed`` that it came from |
| one per choice | ``[what, options, chosen]`` |
| last | an object: the number of ``events`` of the log, its ``digest``, and its ``marks``, see `EventLog.marks` |
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final

import attrs

from ublk_trio.errors import UsageError
from ublk_trio.kernel_sim import Choice, KernelVersion
from ublk_trio.kernel_sim.event_log import MARK_DIGITS
from ublk_trio.simulation.faults import format_faults, parse_faults
from ublk_trio.simulation.run import Report, RunOptions

FORMAT: Final = "ublk_trio run"
VERSION: Final = 1


class RecordingError(UsageError):
    """A file is not a whole recording of a version that is understood."""


@attrs.frozen(kw_only=True)
class Recording:
    """What a file holds."""

    options: RunOptions
    choices: tuple[Choice, ...]
    events: int
    digest: str
    marks: str


def parse_version(text: str) -> KernelVersion:
    """``6.12``. Raises `UsageError`."""
    if not re.fullmatch(r"\d{1,3}\.\d{1,3}", text, re.ASCII):
        raise UsageError(f"kernel version {text!r}: give it as 6.12")
    try:
        return KernelVersion(*map(int, text.split(".")))
    except ValueError as error:
        raise UsageError(str(error)) from None


def save_recording(path: Path, report: Report) -> None:
    """Write the run to a file. Raises `OSError`."""
    options = report.options
    header = {
        "format": FORMAT,
        "version": VERSION,
        "seed": options.seed,
        "faults": format_faults(options.faults),
        "kernel_version": str(options.kernel_version),
        "steps": options.steps,
    }
    end = {"events": len(report.log), "digest": report.log.digest(), "marks": report.log.marks()}
    with path.open("w", encoding="utf-8") as file:
        for line in (header, *map(attrs.astuple, report.choices), end):
            file.write(json.dumps(line) + "\n")


def load_recording(path: Path) -> Recording:
    """Read what `save_recording` wrote. Raises `OSError`, and `RecordingError` for anything else in the file."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise RecordingError(f"{path} is not a recording of a run, or damaged: {error}") from None
    header, end = (lines[0], lines[-1]) if len(lines) > 1 else (lines[0] if lines else None, None)
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise RecordingError(f"{path} is not a recording of a run: its first line does not say {FORMAT!r}")
    if header.get("version") != VERSION:
        raise RecordingError(f"{path} is of version {header.get('version')!r}: this program reads version {VERSION}")
    if not isinstance(end, dict):
        raise RecordingError(f"{path} is cut off: its last line does not hold the digest")
    try:
        return Recording(
            options=RunOptions(
                seed=_whole(header["seed"]),
                faults=parse_faults(header["faults"]),
                kernel_version=parse_version(header["kernel_version"]),
                steps=_whole(header["steps"]),
            ),
            choices=tuple(map(_choice, lines[1:-1])),
            events=_whole(end["events"]),
            digest=_text(end["digest"], 64),
            marks=_text(end["marks"], MARK_DIGITS * _whole(end["events"])),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RecordingError(f"{path} is damaged: {type(error).__name__}: {error}") from None


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no whole number from 0 up")
    return value


def _text(value: Any, length: int) -> str:
    if not isinstance(value, str) or len(value) != length:
        raise ValueError(f"{length} characters were expected, not {value!r:.40}")
    return value


def _choice(line: Any) -> Choice:
    what, options, chosen = line
    if not isinstance(what, str) or not 0 <= _whole(chosen) < _whole(options):
        raise ValueError(f"{line!r} is no choice")
    return Choice(what, options, chosen)


def compare(recording: Recording, report: Report) -> str | None:
    """None when the replay's log is that of the recording; else where it first differs, in one line."""
    log = report.log
    if log.digest() == recording.digest:
        return None
    marks = log.marks()
    for number, line in enumerate(log.lines()):
        place = slice(number * MARK_DIGITS, (number + 1) * MARK_DIGITS)
        if marks[place] != recording.marks[place]:
            return f"event {number} of {recording.events} differs; in the replay it is {line}"
    return f"the replay ends after event {len(log) - 1}, the recording has {recording.events} events"
