"""What the kernel's own threads sleep on: conditions and mutexes.

**Supported.** A command, or a piece of the kernel's work, is a generator: it yields a `Wait` where the kernel would
sleep, and is resumed once that is over. **Rejected.** Nothing. **Differs from Linux.** A mutex is not fair: which of
those that wait gets it is one of the free decisions.
"""

from __future__ import annotations

from collections.abc import Callable, Generator

import attrs


@attrs.frozen
class Wait:
    """What a held command waits for. ``interruptible``: its ring's exit ends the wait, and the command gets True sent."""

    what: object
    ready: Callable[[], bool]
    interruptible: bool = False


#: A command under way: yields what it waits for, gets True sent when it was interrupted, returns its result.
Steps = Generator[Wait, bool, int]


class Held:
    """A command, or a piece of the kernel's own work, that waits for something."""

    __slots__ = ("name", "on_done", "ring", "steps", "wait")

    def __init__(self, name: str, steps: Steps, wait: Wait, ring: object, on_done: Callable[[int], None]) -> None:
        self.name = name
        self.steps = steps
        self.wait = wait
        self.ring = ring
        self.on_done = on_done

    def __str__(self) -> str:
        return f"{self.name}, waiting for {self.wait.what}"


class SimMutex:
    """A kernel mutex: taken in a command's own time, so that the commands of two callers exclude each other."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.locked = False

    def lock(self) -> Generator[Wait, bool, None]:
        """Wait for it, not interruptibly, and take it."""
        while self.locked:
            yield Wait(self, lambda: not self.locked)
        self.locked = True

    def unlock(self) -> None:
        assert self.locked, f"{self.name} is not locked"
        self.locked = False

    def __str__(self) -> str:
        return f"the mutex {self.name}"
