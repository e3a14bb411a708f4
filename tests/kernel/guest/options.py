"""What is asked for in one run, and what of it the guest's init is told."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SCRATCH_DEVICE = "/dev/vda"


@dataclass(frozen=True, kw_only=True)
class Options:
    """One `run`."""

    series: str
    cpus: int
    memory: str
    timeout_seconds: float
    icount: bool
    kvm: bool
    udev: bool
    console: bool
    scratch_bytes: int | None
    fail_on_kernel_warning: bool
    directory: Path
    environment: Mapping[str, str]
    command: Sequence[str]

    def touches_tmp(self) -> bool:
        """Whether the command needs something under /tmp, which a tmpfs there would hide."""
        words = [str(self.directory), *self.command, *self.environment.values()]
        paths = [path for word in words for path in re.split("[:=]", word)]
        return any(path == "/tmp" or path.startswith("/tmp/") for path in paths)

    def guest_environment(self) -> dict[str, str]:
        scratch = {} if self.scratch_bytes is None else {"UBLK_TRIO_SCRATCH": SCRATCH_DEVICE}
        return {**self.environment, **scratch}

    def job(self, nonce: str) -> dict[str, bytes]:
        """The two files that the guest's init reads."""
        settings = {
            "nonce": nonce,
            "udev": "yes" if self.udev else "no",
            "scratch": "" if self.scratch_bytes is None else SCRATCH_DEVICE,
            "tmp_on_tmpfs": "no" if self.touches_tmp() else "yes",
        }
        lines = [
            *(f"export {name}={shlex.quote(v)}" for name, v in self.guest_environment().items()),
            f"cd {shlex.quote(str(self.directory))} || exit 126",
            f"exec {shlex.join(self.command)}",
        ]
        assignments = [f"{name}={shlex.quote(value)}" for name, value in settings.items()]
        texts = {"settings": assignments, "command": lines}
        return {name: os.fsencode("\n".join(text) + "\n") for name, text in texts.items()}
