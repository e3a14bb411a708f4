"""What comes out of the guest: the kernel's console, and the port with the command's output and the messages of the init.

A virtio-serial port carries the command's output (stdout and stderr in one, as on a
terminal), so the kernel's console, on a serial port, never mixes with it. In it, ``\\x01NONCE
WORD...\\n`` is a message of the guest's init: ``start``, ``exit STATUS`` or ``failed REASON``. The
port keeps order, so who has read ``exit`` has all the output.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

CONSOLE_BYTES_MAX = 4 << 20
COMPLAINT_LINES_MAX = 200
CONSOLE_TAIL_LINES = 40
COMPLAINT = re.compile(
    r"\bBUG:|\bOops\b|\bWARNING:|\bKernel panic\b|\bhung[ _]task|blocked for more than \d+ seconds"
    r"|\bUBSAN:|\bgeneral protection fault\b|\bdetected stalls?\b"
)


@dataclass(kw_only=True)
class Messages:
    """Parts the port's bytes into the command's output and the messages of the guest's init."""

    nonce: str
    _pending: bytes = b""

    def feed(self, data: bytes) -> Iterator[bytes | str]:
        """Output as bytes, messages as str, in order."""
        marker = b"\x01" + self.nonce.encode("ascii") + b" "
        self._pending += data
        while (start := self._pending.find(marker)) >= 0:
            end = self._pending.find(b"\n", start)
            if start > 0:
                yield self._pending[:start]
            if end < 0:
                self._pending = self._pending[start:]
                return
            message = self._pending[start + len(marker) : end]
            self._pending = self._pending[end + 1 :]
            yield message.decode("utf-8", "replace")
        end = len(self._pending) - self._held_back(marker)
        if end > 0:
            yield self._pending[:end]
        self._pending = self._pending[end:]

    def _held_back(self, marker: bytes) -> int:
        """How many bytes at the end may be the beginning of a marker."""
        longest = min(len(marker) - 1, len(self._pending))
        return next((n for n in range(longest, 0, -1) if self._pending.endswith(marker[:n])), 0)


class Console:
    """The kernel's console: its end, bounded, as text."""

    def __init__(self, nonce: str, *, live: bool = False) -> None:
        self._nonce = nonce
        self._live = live
        self._data = bytearray()

    def feed(self, data: bytes) -> None:
        if self._live:
            write_all(sys.stderr.fileno(), data.replace(b"\r", b""))
        self._data += data
        if len(self._data) > CONSOLE_BYTES_MAX:
            del self._data[: CONSOLE_BYTES_MAX // 2]

    def text(self) -> str:
        return self._data.decode("utf-8", "replace").replace("\r", "")

    def ended(self) -> bool:
        """Whether all that the kernel said up to the command's end has arrived."""
        return f"{self._nonce} exit".encode() in self._data

    def tail(self) -> str:
        return "\n".join(self.text().splitlines()[-CONSOLE_TAIL_LINES:])

    def complaints(self) -> str:
        """What the kernel said while the command ran, from its first complaint on; or ""."""
        begun = self.text().rpartition(f"{self._nonce} start\n")[2]
        lines = begun.partition(f"ublk_trio-vm: {self._nonce} exit")[0].splitlines()
        first = next((n for n, line in enumerate(lines) if COMPLAINT.search(line)), None)
        return "" if first is None else "\n".join(lines[first:][:COMPLAINT_LINES_MAX])


def write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
