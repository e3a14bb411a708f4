"""Errors, split by whose fault they are.

| class | fault | typical cause |
|---|---|---|
| `UsageError` | the caller's | a depth of 0, a mode that the kernel does not have |
| `KernelError` | the kernel refused | `EEXIST` from ADD_DEV: the id is taken |
| `KernelUnavailableError` | the machine's | no `ublk_drv`, no native part, no permission |
| `BackendError` | the backend's | the file is missing, locked, or of size 0 |
| `StuckError` | somebody's handler's | a request was not answered within the grace time |
| `IllegalTagEventError` | ours | a tag got an event that its state does not allow: a bug |

An errno is always shown by name. `KernelError` and `BackendError` are `OSError`s too, so `except OSError` and
`.errno` work.
"""

from __future__ import annotations

import errno as errno_names
import os

from ublk_trio.uapi import ControlCommand

#: Linux's own for "not supported": user space has no name for it, but older drivers let it out.
ENOTSUPP = 524


def errno_name(number: int) -> str:
    """The symbolic name of an errno (positive or negative), or ``errno N`` when it has none."""
    if abs(number) == ENOTSUPP:
        return "ENOTSUPP"
    return errno_names.errorcode.get(abs(number), f"errno {abs(number)}")


def errno_text(number: int) -> str:
    """``ENOENT (No such file or directory)``."""
    text = "Operation is not supported" if abs(number) == ENOTSUPP else os.strerror(abs(number))
    return f"{errno_name(number)} ({text})"


def error_line(error: BaseException) -> str:
    """What there is to say about an error, on one line."""
    text = str(error)
    if isinstance(error, OSError) and not isinstance(error, UblkError) and error.errno:
        # Python's own text has the number and no name.
        ours = error.strerror and error.strerror != os.strerror(error.errno)
        text = str(error.strerror) if ours else errno_text(error.errno)
        text = f"{error.filename}: {text}" if error.filename else text
    return " ".join(text.split()) or type(error).__name__


class UblkError(Exception):
    """Base of every error that this package raises on purpose."""


class UsageError(UblkError, ValueError):
    """The caller asked for something that cannot be: the message says what and how to mend it."""


class KernelUnavailableError(UblkError):
    """There is no ublk driver to talk to, or no way to talk to it; the message names the mend.

    ``errno`` is what an attempt to open it gave; ENODEV where it did not come to that.
    """

    def __init__(self, message: str, number: int = errno_names.ENODEV) -> None:
        super().__init__(message)
        self.errno = abs(number)


class _ErrnoError(UblkError, OSError):
    """An error that carries an errno; ``str()`` shows only our one line."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(abs(number), message)
        self.message = message

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.errno, self.message)


class KernelError(_ErrnoError):
    """The kernel refused something. ``.errno`` is its errno, ``str()`` one line with its meaning here.

    ``.command`` is the control command that was refused; None where it was something else, such as opening a file.
    """

    def __init__(self, number: int, message: str, command: ControlCommand | None = None) -> None:
        super().__init__(number, message)
        self.command = command

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.errno, self.message, self.command)


class BackendError(_ErrnoError):
    """A backend could not be opened or does not fit; ``.errno`` says why, ``str()`` how to mend it."""


class StuckError(UblkError):
    """Something did not stop within the grace time; the message names what."""


class IllegalTagEventError(UblkError):
    """A tag got an event that its state does not allow. Nothing was changed. A bug in ublk_trio."""
