"""Exit codes of the command line."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What the exit code of ``ublk-trio`` means."""

    #: Done; for ``start``: stopped cleanly, with nothing left, also after SIGINT or SIGTERM.
    OK = 0
    #: The kernel, a backend or a server refused, a device failed, or data came back wrong.
    FAILED = 1
    #: Wrong arguments.
    USAGE = 2
    #: There is no ublk driver here that this user can talk to (``ublk-trio doctor`` says why), or no server that answers.
    UNAVAILABLE = 3
    #: Something did not stop and had to be torn from the kernel.
    STUCK = 4
    #: SIGINT before there was anything to stop.
    INTERRUPTED = 130
