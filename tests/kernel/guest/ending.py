"""How a run ends that is not the command's own doing: exit codes, and one line that says what, why and how to mend it."""

from __future__ import annotations

import sys
from enum import IntEnum


class Exit(IntEnum):
    """Exit codes that are not the command's."""

    USAGE = 2
    GUEST_DIED = 120
    KERNEL_COMPLAINED = 121
    TIMED_OUT = 124
    HOST_NOT_READY = 125


class Failure(Exception):
    """The run cannot go on; `code` is the exit code, the message one line with the mend."""

    def __init__(self, code: Exit, message: str) -> None:
        super().__init__(message)
        self.code = code


class Stopped(BaseException):
    """A signal asked this process to end. Not an Exception: nothing but `main` may catch it."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


def note(message: str) -> None:
    print(f"vm.py: {message}", file=sys.stderr, flush=True)
