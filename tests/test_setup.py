"""What the Makefile's two scripts do, on machines that we make up: programs that say what such a machine's would."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from pathlib import Path

import attrs
import pytest

ROOT = Path(__file__).resolve().parent.parent

SKIPPED = "skipped\ttests/test_a.py::test_one[x y]\tneeds root"
PASSED = "=== 3 passed in 1.00s ==="


@attrs.frozen
class Machine:
    """A checkout of nothing but the scripts, and the programs that they find before the real ones."""

    checkout: Path
    programs: Path

    def program(self, path: str, script: str) -> None:
        file = self.checkout / path if path.startswith(".venv") else self.programs / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"#!/bin/bash\n{script}\n")
        file.chmod(0o755)

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=self.checkout,
            env={"PATH": f"{self.programs}:/usr/bin:/bin", "HOME": str(self.checkout), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=60,
        )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """An ordinary user's machine without sudo, whoever runs these tests."""
    made = Machine(tmp_path / "checkout", tmp_path / "bin")
    shutil.copytree(ROOT / "tools", made.checkout / "tools")
    shutil.copy(ROOT / "Makefile", made.checkout)
    made.program("id", "echo 1000")
    made.program("sudo", "exit 1")
    made.program("apt-get", "echo apt-get must not be called; exit 1")
    return made


def test_help_has_a_line_for_each_target() -> None:
    """`make` alone prints every target with what it does, and nothing else."""
    text = (ROOT / "Makefile").read_text()
    targets = re.findall(r"(?m)^([a-z-]+):", text)
    listed = subprocess.run(
        ["make", "--no-print-directory", "-C", ROOT], capture_output=True, text=True, check=True
    ).stdout
    assert [line.split()[:2] for line in listed.splitlines()] == [["make", target] for target in targets]
    assert {"start", "test", "lint", "bench", "docs"} <= set(targets)
    assert all(line.endswith(".") for line in listed.splitlines())


# ---------------------------------------------------------------- tools/setup.sh


def test_an_old_python_is_named_in_one_line(machine: Machine) -> None:
    """Python 3.10: one line with the version, the one needed, and how to name another."""
    machine.program("python3", 'case $* in *version_info*) exit 1 ;; -V) echo "Python 3.10.9" ;; esac')
    done = machine.run("tools/setup.sh")
    assert done.returncode == 1
    assert re.fullmatch(r"setup: python3 is Python 3\.10\.9, .* 3\.11 or newer: .*PYTHON=.*\n", done.stdout)


def test_no_python_is_said_in_one_line(machine: Machine) -> None:
    """A PYTHON that is not there: one line that names it."""
    done = machine.run("tools/setup.sh", PYTHON="/nowhere/python3")
    assert done.returncode == 1
    assert re.fullmatch(r"setup: there is no /nowhere/python3 that runs: .*\n", done.stdout)


def test_no_venv_and_no_right_to_install_stops_with_the_command(machine: Machine) -> None:
    """Without ensurepip nothing can run: the exact apt-get line, and no attempt to run it."""
    machine.program("python3", 'case $* in *ensurepip*) exit 1 ;; -V) echo "Python 3.11.2" ;; esac')
    done = machine.run("tools/setup.sh")
    assert done.returncode == 1
    assert "as root, run: apt-get install -y --no-install-recommends python3-venv\n" in done.stdout
    assert "must not be called" not in done.stdout
    assert not (machine.checkout / ".venv").exists()


def test_stale_package_lists_are_brought_up_to_date(machine: Machine) -> None:
    """A package that apt doesn't find is looked for again after apt-get update, and only then."""
    machine.program("id", "echo 0")
    calls = machine.checkout / "calls"
    machine.program(
        "apt-get",
        f"""case " $* " in
        *" update "*) echo update >> {calls} ;;
        *" python3-venv "*) echo install >> {calls}; [ "$(grep -c update {calls})" = 1 ] ;;
        esac""",
    )
    machine.program(
        "python3",
        f"""case $* in
        *ensurepip*) [ "$(grep -c install {calls} 2> /dev/null)" = 2 ] ;;
        *"-m venv"*) echo "no more for this test"; exit 1 ;;
        -V) echo "Python 3.11.2" ;;
        esac""",
    )
    done = machine.run("tools/setup.sh")
    assert calls.read_text().split() == ["install", "update", "install"]
    assert "setup: making .venv with Python 3.11.2\nno more for this test\n" in done.stdout
    assert done.returncode == 1


# ---------------------------------------------------------------- tools/test.sh


def suites(
    machine: Machine, *, check: str = "", first: str = "", old: str = "", new: str = "", rest: str | None = None
) -> None:
    """Make up what the harness's check and the four runs say; a run whose words contain FAIL fails.

    ``rest``: the second run on the newest kernel; as the first one unless given.
    """
    machine.program(
        ".venv/bin/python",
        f"""case "$*" in
        *kernel_headers*) exit 1 ;;
        *"vm.py check"*) words='{check}' ;;
        *"vm.py run --kernel 6.12"*) words='{old}' ;;
        *"vm.py run --kernel 7.3"*tests/kernel) words='{new}' ;;
        *"vm.py run --kernel 7.3"*) words='{new if rest is None else rest}' ;;
        *) words='{first}' ;;
        esac
        [ -z "$words" ] || printf '%s\\n' "$words"
        printf '%s\\n' "$*" >> calls
        case $words in *FAIL*) exit 1 ;; esac""",
    )


@pytest.mark.parametrize("ci", ["", "true"])
def test_all_runs_pass(machine: Machine, ci: str) -> None:
    """Four runs, in two lanes; the summary has pytest's closing words for each."""
    suites(machine, first=PASSED, old=PASSED, new=PASSED)
    done = machine.run("tools/test.sh", CI=ci)
    assert done.returncode == 0
    assert len(re.findall(r"(?m)^passed .* 3 passed in 1\.00s$", done.stdout)) == 4
    assert re.search(r"make test: all [45] runs passed\n\Z", done.stdout)


def test_outputs_do_not_mix(machine: Machine) -> None:
    """What the runs say at the same time is shown one run after the other, each whole."""
    slowly = "for word in one two three; do echo $word; sleep 0.3; done"
    machine.program(".venv/bin/python", f'case "$*" in *kernel_headers* | *"vm.py check") ;; *) {slowly} ;; esac')
    done = machine.run("tools/test.sh")
    assert re.findall(r"(?m)^(?:== (\w+)|(one|two|three)$)", done.stdout.partition("== summary")[0])[:16] == [
        (title, word)
        for name in ("simulator", "kernel", "kernel", "kernel")
        for title, word in ((name, ""), ("", "one"), ("", "two"), ("", "three"))
    ]


def is_running(pid: int) -> bool:
    """Whether there is such a process that has not ended; a zombie has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_nothing_runs_on_after_an_interrupt(machine: Machine) -> None:
    """SIGTERM ends both lanes and all that they run, and leaves no file."""
    machine.program(
        ".venv/bin/python",
        """case "$*" in
        *kernel_headers* | *"vm.py check") ;;
        *) echo $$ >> pids; sleep 1000 ;;
        esac""",
    )
    pids = machine.checkout / "pids"
    temporary = machine.checkout / "temporary"
    temporary.mkdir()
    environment = {"PATH": f"{machine.programs}:/usr/bin:/bin", "HOME": str(machine.checkout), "TMPDIR": str(temporary)}
    running = subprocess.Popen(["tools/test.sh"], cwd=machine.checkout, env=environment, stdout=subprocess.DEVNULL)
    try:
        while not (pids.exists() and len(pids.read_text().splitlines()) == 2):
            assert running.poll() is None
            time.sleep(0.05)
        running.terminate()
        assert running.wait(timeout=60) == 130
    finally:
        running.kill()
    assert [pid for pid in pids.read_text().split() if is_running(int(pid))] == []
    assert list(temporary.iterdir()) == []


def test_a_failure_keeps_no_other_run_from_running(machine: Machine) -> None:
    """The first run fails: both kernels run nevertheless, and the whole fails."""
    suites(machine, first="FAIL", old=PASSED, new=PASSED)
    done = machine.run("tools/test.sh")
    assert done.returncode == 1
    assert re.search(r"(?m)^FAILED \(1\) .* pytest did not come to an end$", done.stdout)
    assert len(re.findall(r"(?m)^passed ", done.stdout)) >= 3
    assert re.search(r"make test: FAILED: 1 of [45] runs\n\Z", done.stdout)


@pytest.mark.parametrize(("ci", "code"), [("", 0), ("true", 1)])
def test_a_test_skipped_in_every_run_fails_under_ci(machine: Machine, ci: str, code: int) -> None:
    """What nothing ran is named; under CI that is a failure."""
    words = f"{SKIPPED}\n{PASSED}"
    suites(machine, first=words, old=words, new=words)
    done = machine.run("tools/test.sh", CI=ci)
    assert done.returncode == code
    assert "SKIPPED      tests/test_a.py::test_one[x y], in every run\n" in done.stdout


def test_what_one_run_skips_another_may_run(machine: Machine) -> None:
    """A test that the first run and one kernel skip, and the other kernel runs, has run; each kernel is asked for it."""
    words = f"{SKIPPED}\n{PASSED}"
    suites(machine, first=words, old=words, new=PASSED)
    done = machine.run("tools/test.sh", CI="true")
    assert done.returncode == 0
    calls = (machine.checkout / "calls").read_text().splitlines()
    assert any(call.endswith("tests/kernel tests/both tests/test_a.py::test_one[x y]") for call in calls)
    assert any(call.endswith("--list-skipped tests/both tests/test_a.py::test_one[x y]") for call in calls)


def test_what_half_of_a_kernels_tests_skip_is_seen(machine: Machine) -> None:
    """A test of the newest kernel's first run that both kernels skip is named, though the second run has not got it."""
    words = f"{SKIPPED}\n{PASSED}"
    suites(machine, first=PASSED, old=words, new=words, rest=PASSED)
    done = machine.run("tools/test.sh", CI="true")
    assert done.returncode == 1
    assert "SKIPPED      tests/test_a.py::test_one[x y], in every run\n" in done.stdout


@pytest.mark.parametrize(("ci", "code"), [("", 0), ("true", 1)])
def test_kernels_that_cannot_be_booted_are_said(machine: Machine, ci: str, code: int) -> None:
    """No QEMU: the last line says that the kernel tests did not run, and the summary how to get them to."""
    suites(machine, check="no QEMU\nmend: apt-get install qemu", first=PASSED)
    done = machine.run("tools/test.sh", CI=ci)
    assert done.returncode == code
    assert len(re.findall(r"(?m)^NOT RUN .* as root: apt-get install qemu$", done.stdout)) == 3
    assert "did not\n" in done.stdout if ci else done.stdout.endswith("the kernel tests were NOT run\n")
