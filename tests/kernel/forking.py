"""Processes that start at once: forked from one that has imported everything.

A Python starts in 5 to 15 s in an emulated guest, and a fork of one in a tenth of a second. That a program starts from nothing is
shown by those of ordinary users (`test_ordinary_users.py`, `test_wrong_input.py`), and by the documentation's examples.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

import trio

#: What a forked program is called; its command line is that of the process that forks.
PROGRAM_NAME = "ublk_trio"

_CONTEXT = multiprocessing.get_context("forkserver")
# What the commands import when they are called, besides this module's own. One that it has not got would just be slower.
_CONTEXT.set_forkserver_preload(
    [
        __name__,
        "tests.kernel.forked_servers",
        *(
            f"ublk_trio.cli.{name}"
            for name in ("start", "recover", "devices", "doctor", "features", "udev", "operating")
        ),
        *("ublk_trio.real._native", "ublk_trio.rpc", "ublk_trio.service.config_file", "rich.console", "rich.table"),
    ]
)


class ForkedProcess:
    """A running process, with what `trio.Process` has under the same names. Made by `fork`."""

    def __init__(self, process: ForkServerProcess) -> None:
        assert process.pid is not None
        self.pid = process.pid
        self._process = process
        self._waiting = trio.Lock()

    @property
    def returncode(self) -> int | None:
        """Its exit code, or -N after signal N; None while it runs."""
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        """Does nothing once it has ended."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    async def wait(self) -> int:
        """Its exit code, once it has ended."""
        async with self._waiting:
            if self.returncode is None:
                await trio.lowlevel.wait_readable(self._process.sentinel)
        assert self.returncode is not None
        return self.returncode


def fork(target: Callable[..., None], *arguments: object) -> ForkedProcess:
    """A process that calls ``target``, a function of a module.

    The first one waits for the process that forks. Not for another thread: that would look for ended processes at the same time.
    """
    process = _CONTEXT.Process(target=target, args=arguments, daemon=True)
    process.start()
    return ForkedProcess(process)


def fork_ublk_trio(arguments: Sequence[str], *, stdout: int, stderr: int) -> ForkedProcess:
    """``python -m ublk_trio ARGUMENTS`` with these descriptors, which stay the caller's."""
    return fork(_Program(arguments, stdout, stderr))


class _Program:
    """The command line, as a function to call in the forked process."""

    def __init__(self, arguments: Sequence[str], stdout: int, stderr: int) -> None:
        self._arguments = list(arguments)
        self._descriptors = {1: stdout, 2: stderr}

    def __getstate__(self) -> dict[str, Any]:
        # Descriptors can go along only while a process is being started, which is when this is called.
        return {"arguments": self._arguments, "descriptors": {n: DupFd(fd) for n, fd in self._descriptors.items()}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._arguments = state["arguments"]
        self._descriptors = {number: inherited.detach() for number, inherited in state["descriptors"].items()}

    def __call__(self) -> None:
        from ublk_trio.cli import main

        for number, descriptor in self._descriptors.items():
            os.dup2(descriptor, number)
            os.close(descriptor)
        Path("/proc/self/comm").write_text(PROGRAM_NAME, encoding="ascii")
        main(self._arguments)
