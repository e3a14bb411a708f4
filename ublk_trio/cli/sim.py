"""``sim``: one seeded run of the engine on the simulated kernel, or the replay of a recorded one."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ublk_trio.cli.exit_codes import ExitCode
from ublk_trio.cli.output import print_json
from ublk_trio.errors import UsageError
from ublk_trio.kernel_sim import Choices, RecordedChoices, ReplayDivergedError, SeededChoices
from ublk_trio.simulation import (
    Recording,
    Report,
    RunOptions,
    compare,
    load_recording,
    parse_faults,
    save_recording,
    simulate,
    write_timeline,
)
from ublk_trio.simulation.faults import format_faults
from ublk_trio.simulation.recording import parse_version

#: Problems that are printed; a run that went wrong once often goes on doing so.
_PROBLEMS_MAX = 20


def sim(
    *,
    seed: int | None = None,
    faults: str | None = None,
    kernel_version: str | None = None,
    steps: int | None = None,
    record: Path | None = None,
    replay: Path | None = None,
    timeline: Path | None = None,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Run the engine on a simulated kernel, with faults, in virtual time; or replay such a run.

    Disks are started, stopped, cancelled and killed while applications read and write and check every byte.

    Parameters
    ----------
    seed
        Decides everything. Default: 0.
    faults
        Which faults a run may have: all, none, or names separated by commas. Default: all.
    kernel_version
        The Linux release that the simulated kernel plays. Default: 7.3.
    steps
        Steps until the faults stop and everything must end. Default: 300.
    record
        Write the run to this file.
    replay
        Repeat the run in this file, and compare.
    timeline
        Write a page that shows the run, for a browser.
    json
        Print a JSON object instead of text.
    """
    if replay is not None and (seed, faults, kernel_version, steps, record) != (None, None, None, None, None):
        raise UsageError("--replay takes the run's options from its file: leave out all but --timeline and --json")
    recording: Recording | None = None
    if replay is not None:
        recording = load_recording(replay)
        options = recording.options
    else:
        options = _options(seed, faults, kernel_version, steps)
    difference = None
    if recording is not None:
        try:
            report = _simulate(options, RecordedChoices(recording.choices))
        except ReplayDivergedError as error:
            print(f"ublk-trio: {replay} does not replay: {error}", file=sys.stderr)
            return ExitCode.FAILED
        difference = compare(recording, report)
        again = f"python -m ublk_trio sim --replay {replay}"
    else:
        report = _simulate(options, SeededChoices(options.seed))
        again = options.command_line()
    if record is not None:
        save_recording(record, report)
        again = f"python -m ublk_trio sim --replay {record}"
    if timeline is not None:
        write_timeline(timeline, report)
    return _conclude(report, again, difference, replay, json=json)


def _simulate(options: RunOptions, choices: Choices) -> Report:
    """Run it, without a word about each failure that it injects, unless ``--debug`` asks for them."""
    logger = logging.getLogger("ublk_trio")
    level = logger.level
    if not logger.isEnabledFor(logging.DEBUG):
        logger.setLevel(logging.CRITICAL + 1)
    try:
        return simulate(options, choices)
    finally:
        logger.setLevel(level)


def _options(seed: int | None, faults: str | None, kernel_version: str | None, steps: int | None) -> RunOptions:
    if seed is not None and seed < 0:
        raise UsageError(f"--seed is {seed}: give 0 or more")
    if steps is not None and steps < 1:
        raise UsageError(f"--steps is {steps}: give 1 or more")
    default = RunOptions()
    return RunOptions(
        seed=default.seed if seed is None else seed,
        faults=default.faults if faults is None else parse_faults(faults),
        kernel_version=default.kernel_version if kernel_version is None else parse_version(kernel_version),
        steps=default.steps if steps is None else steps,
    )


def _conclude(report: Report, again: str, difference: str | None, replay: Path | None, *, json: bool) -> int:
    digest = report.log.digest()
    if json:
        print_json(_as_json(report, digest, difference, again))
    else:
        for line in _as_text(report, digest):
            print(line)
        if replay is not None and difference is None:
            print("the replay is the recorded run, event for event")
    for problem in report.problems[:_PROBLEMS_MAX]:
        print(f"ublk-trio: {problem}", file=sys.stderr)
    if difference is not None:
        print(f"ublk-trio: {replay} does not replay: {difference}", file=sys.stderr)
    if report.problems:
        print(f"ublk-trio: {len(report.problems)} problems; repeat: {again}", file=sys.stderr)
    return ExitCode.FAILED if report.problems or difference is not None else ExitCode.OK


def _as_text(report: Report, digest: str) -> list[str]:
    counts = report.counts
    operations = ", ".join(
        f"{counts[name]} {name}" for name in sorted(counts) if name not in ("steps", "disks", "failed")
    )
    faults = ", ".join(f"{report.faults[name]} {name}" for name in sorted(report.faults))
    return [
        f"{report.options.command_line().removeprefix('python -m ublk_trio ')}",
        f"enabled: {format_faults(report.plan.faults)}",
        f"{counts['steps']} steps, {counts['disks']} disks, {report.virtual_seconds:.1f} virtual seconds",
        f"{report.requests} operations: {operations or 'none'}; {counts['failed']} failed with their cause",
        f"{report.bytes_verified} bytes verified",
        f"injected: {faults or 'nothing'}",
        f"{len(report.choices)} choices, {len(report.log)} events, sha256 {digest}",
    ]


def _as_json(report: Report, digest: str, difference: str | None, again: str) -> dict[str, object]:
    options = report.options
    return {
        "seed": options.seed,
        "faults": format_faults(options.faults),
        "kernel_version": str(options.kernel_version),
        "steps": options.steps,
        "enabled": sorted(report.plan.faults),
        "counts": dict(sorted(report.counts.items())),
        "injected": dict(sorted(report.faults.items())),
        "bytes_verified": report.bytes_verified,
        "choices": len(report.choices),
        "events": len(report.log),
        "digest": digest,
        "problems": list(report.problems),
        "difference": difference,
        "repeat": again,
    }
