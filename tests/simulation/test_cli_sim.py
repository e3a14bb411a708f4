"""``ublk-trio sim`` as a user meets it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from tests.simulation.test_simulate import swallow_errors
from ublk_trio.cli import main
from ublk_trio.simulation import RunOptions
from ublk_trio.simulation.faults import format_faults


def sim(*arguments: str | Path) -> int:
    """The exit code."""
    with pytest.raises(SystemExit) as caught:
        main(["sim", *map(str, arguments)])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_a_good_run(capsys: pytest.CaptureFixture[str]) -> None:
    """Prints what was done, and the same digest each time; exits with 0."""
    assert sim("--seed", "3", "--steps", "60", "--kernel-version", "6.12") == 0
    first = capsys.readouterr()
    assert first.err == ""
    assert first.out.startswith("sim --seed 3 --faults all --kernel-version 6.12 --steps 60\n")
    assert sim("--seed", "3", "--steps", "60", "--kernel-version", "6.12") == 0
    assert capsys.readouterr().out == first.out


def test_help_says_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    """What the help and the manual say is what a run without options has."""
    options = RunOptions()
    faults = format_faults(options.faults)
    assert sim("--help") == 0
    help_text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    manual = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    for name, placeholder, value in (
        ("seed", "N", options.seed),
        ("faults", "NAMES", faults),
        ("kernel-version", "RELEASE", options.kernel_version),
        ("steps", "N", options.steps),
    ):
        assert f"Default: {value}." in help_text.partition(f"--{name} ")[2].partition("--")[0]
        assert f"| `--{name}` {placeholder} | {value} |" in manual


def test_record_and_replay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A recorded run replays as it was, and says so."""
    path = tmp_path / "run.jsonl"
    assert sim("--seed", "3", "--steps", "60", "--record", path) == 0
    printed = capsys.readouterr().out
    assert sim("--replay", path) == 0
    assert capsys.readouterr().out == printed + "the replay is the recorded run, event for event\n"


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One object with the same numbers."""
    assert sim("--seed", "3", "--steps", "60", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert sim("--seed", "3", "--steps", "60") == 0
    text = capsys.readouterr().out
    assert f"{result['choices']} choices, {result['events']} events, sha256 {result['digest']}\n" in text
    assert result["problems"] == []
    assert result["difference"] is None


def test_a_failing_run_says_how_to_repeat_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A problem exits with 1 and one line that repeats it exactly: by its seed, or by its file."""
    swallow_errors(monkeypatch)
    path = tmp_path / "run.jsonl"
    seed = next(seed for seed in range(20) if sim("--seed", str(seed), "--faults", "backend-raises") == 1)
    failure = capsys.readouterr().err
    assert "ublk-trio: a failed call fails its request: disk " in failure
    repeat = failure.splitlines()[-1].partition("repeat: ")[2]
    assert repeat == (f"python -m ublk_trio sim --seed {seed} --faults backend-raises --kernel-version 7.3 --steps 300")
    assert sim(*shlex.split(repeat)[4:]) == 1
    assert capsys.readouterr().err == failure
    assert sim(*shlex.split(repeat)[4:], "--record", path) == 1
    recorded = capsys.readouterr().err
    assert recorded.splitlines()[-1].endswith(f"repeat: python -m ublk_trio sim --replay {path}")
    assert sim("--replay", path) == 1
    assert capsys.readouterr().err == recorded


def test_code_that_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay on other code is told where it parts from the recording, and exits with 1."""
    path = tmp_path / "run.jsonl"
    assert sim("--seed", "54", "--record", path) == 0
    swallow_errors(monkeypatch)
    assert sim("--replay", path) == 1
    assert f"ublk-trio: {path} does not replay: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "-1"], "--seed is -1: give 0 or more"),
        (["--steps", "0"], "--steps is 0: give 1 or more"),
        (["--faults", "rain"], "there is no fault 'rain'"),
        (["--kernel-version", "5.4"], "Linux 5.4 had no ublk driver: 6.0 was the first"),
        (["--kernel-version", "new"], "kernel version 'new': give it as 6.12"),
        (["--replay", "run", "--seed", "1"], "--replay takes the run's options from its file"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, and exit code 2."""
    assert sim(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"ublk-trio: {message}")
    assert error.count("\n") == 1


def test_a_file_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that is not a recording exits with 2, one that is not there with 1; one line each."""
    (tmp_path / "text").write_text("text\n")
    assert sim("--replay", tmp_path / "text") == 2
    assert sim("--replay", tmp_path / "nothing") == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"ublk-trio: {tmp_path / 'text'} is not a recording of a run")
    assert lines[1] == f"ublk-trio: {tmp_path / 'nothing'}: ENOENT (No such file or directory)"
