"""What a held command, or a piece of the kernel's own work, waits for."""

from __future__ import annotations

from collections.abc import Callable

import attrs


@attrs.frozen
class Wait:
    """``interruptible``: the exit of the command's ring ends the wait, and the command gets True sent."""

    what: object
    ready: Callable[[], bool]
    interruptible: bool = False
