"""Runs pytest in a forked child, in a program that was broken on purpose: the parent's program stays whole.

A bug may make the program hang, loop or eat all memory; none of that may stop the parent, and it must tell quickly:

- A child that loops has used up its CPU time (RLIMIT_CPU), however loaded the machine is.
- A child that hangs sleeps, and its CPU time stands still. Nothing that is tested in this way ever waits for real time.
- A child that eats memory gets MemoryError (RLIMIT_AS), as a failed test.

Linux only: it looks into /proc.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Literal

import attrs
import pytest

Verdict = Literal["passed", "failed", "hung", "looped", "unimportable", "broken"]

CPU_SECONDS_MAX = 60
MEMORY_BYTES_MAX = 4 << 30
#: Seconds that a child may sleep in one go. A loaded machine does not matter: a child that waits for a CPU does not sleep.
SLEEP_SECONDS_MAX = 2.0
_POLL_SECONDS = 0.1
#: What a test fails with: pytest.fail and pytest.raises that did not.
_FAILURES = ("AssertionError", "Failed", "SimulatorViolationError", "BrokenError")


@attrs.frozen(kw_only=True)
class Ended:
    """How a child's run of pytest ended.

    ``unimportable``: the tests, or what they test, could not even be imported. ``broken`` says nothing at all: no test was run, or
    pytest itself failed; ``why`` has the details.
    """

    verdict: Verdict
    #: The test that failed, or during which it hung or looped.
    test: str = ""
    #: The kinds of exceptions that made it fail, groups opened.
    errors: tuple[str, ...] = ()
    why: str = ""
    #: What the tests' plugin wrote, see `run_pytest`.
    notes: tuple[str, ...] = ()

    @property
    def by_assertion(self) -> bool:
        """Whether a test said that something is wrong, in contrast to code that merely crashed."""
        return self.verdict == "failed" and any(error in _FAILURES for error in self.errors)


class Plugin:
    """pytest's side: writes every test that begins, and the first failure, to the parent. ``note`` adds lines of one's own."""

    def __init__(self, file: int) -> None:
        self._file = file

    def _write(self, **record: object) -> None:
        os.write(self._file, (json.dumps(record) + "\n").encode())

    def note(self, text: str) -> None:
        """Say something that is no result; it comes out as one of `Ended.notes`."""
        self._write(note=text)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write(began=nodeid)

    def pytest_exception_interact(
        self, node: pytest.Item | pytest.Collector, call: pytest.CallInfo[object], report: pytest.TestReport
    ) -> None:
        assert call.excinfo is not None
        error = call.excinfo.value
        self._write(
            failed=node.nodeid, errors=sorted(_kinds(error)), why=str(error)[:2000], ran=isinstance(node, pytest.Item)
        )

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        self._write(exit=int(exitstatus))


def _kinds(error: BaseException) -> set[str]:
    if isinstance(error, BaseExceptionGroup):
        return {kind for inner in error.exceptions for kind in _kinds(inner)}
    return {type(error).__name__}


def run_pytest(
    arguments: Sequence[str],
    *,
    prepare: Callable[[], None] = lambda: None,
    plugins: Callable[[Plugin], Sequence[object]] = lambda plugin: (),
    cpu_seconds_max: int = CPU_SECONDS_MAX,
) -> Ended:
    """Fork; in the child call ``prepare``, then run pytest with ``arguments`` up to the first failure. Waits for its end."""

    def run(plugin: Plugin) -> None:
        null = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(null, standard)
        # Files, or pytest's capturing of the parent would go on here.
        sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
        prepare()
        common = ["-x", "-q", "-s", "-p", "no:cacheprovider", "-p", "no:faulthandler"]
        pytest.main([*common, *arguments], plugins=[plugin, *plugins(plugin)])

    return run_forked(run, cpu_seconds_max=cpu_seconds_max)


def run_items(
    session: pytest.Session, items: Sequence[pytest.Item], *, prepare: Callable[[], None], cpu_seconds_max: int
) -> Ended:
    """In pytest, when it has collected the tests: fork; in the child call ``prepare``, then run some of the tests, as `run_pytest`."""

    def run(plugin: Plugin) -> None:
        session.config.pluginmanager.register(plugin)
        prepare()
        for item, following in itertools.pairwise([*items, None]):
            assert item is not None
            session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if session.shouldfail:
                return
        plugin.pytest_sessionfinish(pytest.ExitCode.OK)

    return run_forked(run, cpu_seconds_max=cpu_seconds_max)


def run_forked(run: Callable[[Plugin], object], *, cpu_seconds_max: int) -> Ended:
    """Fork; ``run`` in the child, which ends with it. Waits for its end."""
    receive, send = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        # Python 3.12 and later: other threads (idle ones of trio's) are not there in the child, and nobody misses them.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        _be_the_child(send, run, cpu_seconds_max)
    os.close(send)
    try:
        return _watch(child, receive)
    finally:
        os.close(receive)


def _be_the_child(send: int, run: Callable[[Plugin], object], cpu_seconds_max: int) -> None:
    try:
        # What may be lowered but not raised again: the hard limit stays as it is.
        for what, limit in ((resource.RLIMIT_CPU, cpu_seconds_max), (resource.RLIMIT_AS, MEMORY_BYTES_MAX)):
            hard = resource.getrlimit(what)[1]
            resource.setrlimit(what, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
        run(Plugin(send))
    except BaseException:
        os.write(send, (json.dumps({"broken": traceback.format_exc()[-4000:]}) + "\n").encode())
    finally:
        os._exit(0)


def _watch(child: int, receive: int) -> Ended:
    """Read what the child says until it has ended, or has to be ended."""
    said = b""
    asleep_since: float | None = None
    cpu_before = -1
    hung = False
    while True:
        if select.select([receive], [], [], _POLL_SECONDS)[0]:
            chunk = os.read(receive, 1 << 16)
            if not chunk:
                break
            said += chunk
        state, cpu = _state_of(child)
        now = time.monotonic()
        if state != "S" or cpu != cpu_before or _has_children(child):
            asleep_since, cpu_before = None, cpu
        elif asleep_since is None:
            asleep_since = now
        elif now - asleep_since > SLEEP_SECONDS_MAX:
            os.kill(child, signal.SIGKILL)
            hung = True
            break
    _, status = os.waitpid(child, 0)
    return _ended([json.loads(line) for line in said.splitlines()], hung=hung, status=status)


def _state_of(process: int) -> tuple[str, int]:
    """The state's letter and the ticks of CPU time used so far."""
    try:
        with open(f"/proc/{process}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except FileNotFoundError:
        return "Z", 0
    return fields[0], int(fields[11]) + int(fields[12])


def _has_children(process: int) -> bool:
    """Whether it may be waiting for a program that it runs."""
    try:
        with open(f"/proc/{process}/task/{process}/children") as file:
            return bool(file.read().strip())
    except FileNotFoundError:
        return False


def _ended(said: Sequence[dict[str, object]], *, hung: bool, status: int) -> Ended:
    notes = tuple(str(record["note"]) for record in said if "note" in record)
    test = next((str(record["began"]) for record in reversed(said) if "began" in record), "")
    for record in said:
        if "broken" in record:
            return Ended(verdict="broken", why=str(record["broken"]))
        if "failed" in record:
            errors = record["errors"]
            assert isinstance(errors, list)
            verdict: Verdict = "failed" if record["ran"] else "unimportable"
            return Ended(
                verdict=verdict, test=str(record["failed"]), errors=tuple(errors), why=str(record["why"]), notes=notes
            )
    if hung:
        return Ended(verdict="hung", test=test)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL):
        return Ended(verdict="looped", test=test)
    exits = [record["exit"] for record in said if "exit" in record]
    if exits == [int(pytest.ExitCode.OK)]:
        return Ended(verdict="passed", notes=notes)
    return Ended(verdict="broken", test=test, why=f"pytest ended with {exits}, the process with status {status}")
