"""What a device, a server or a test could leave behind on a machine, and how to get rid of it."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import time
from pathlib import Path

import attrs
import trio

from tests.kernel.forking import PROGRAM_NAME
from ublk_trio.control import open_control
from ublk_trio.device import already_gone_is_fine
from ublk_trio.real import RealKernel
from ublk_trio.real.queue import bury_ended
from ublk_trio.uapi import CONTROL_PATH

#: Seconds: closed rings, udev's probes and ended processes are gone a moment after what ended them returned.
_SETTLE_SECONDS = 10.0
_CLEAN_SECONDS = 10.0


@attrs.frozen(kw_only=True)
class Leftovers:
    """What was there at one moment, as one line of text each."""

    things: frozenset[str]

    @classmethod
    def look(cls) -> Leftovers:
        """What is there now."""
        bury_ended()
        return cls(
            things=frozenset(
                _nodes() | _entries() | _processes() | _threads() | _open_files() | _mappings() | _mounts() | _rights()
            )
        )

    def new(self) -> list[str]:
        """What is there now and was not then."""
        return sorted(self.look().things - self.things)

    def wait_for_new(self) -> list[str]:
        """As `new`, but gives what is just ending the time to end."""
        deadline = time.monotonic() + _SETTLE_SECONDS
        while (left := self.new()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return left

    def clean(self) -> None:
        """Take away what is new, so that the next test starts on clean ground. Bounded, and silent when it fails."""
        for thing in self.new():
            kind, _, name = thing.partition(" ")
            if kind == "mount":
                subprocess.run(["umount", "--lazy", name], timeout=_CLEAN_SECONDS, check=False)
            elif kind == "process":
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(name.split()[0]), signal.SIGKILL)
        old = {int(thing.removeprefix("entry ublkc")) for thing in self.things if thing.startswith("entry ublkc")}
        trio.run(_delete_devices, set(RealKernel().device_ids()) - old)


async def _delete_devices(ids: set[int]) -> None:
    if not ids:
        return
    kernel = RealKernel()
    async with open_control(kernel) as control:
        for dev_id in ids:
            with trio.move_on_after(_CLEAN_SECONDS), already_gone_is_fine():
                await control.stop_device(dev_id)
                await control.delete_device(dev_id)


def _nodes() -> set[str]:
    return {f"node {path}" for path in Path("/dev").glob("ublk[bc]*")}


def _entries() -> set[str]:
    return {f"entry {path.name}" for path in Path("/sys/class/ublk-char").glob("*")}


def _processes() -> set[str]:
    """Servers and load generators: by their command lines, and forked servers by their names."""
    found = set()
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = directory.joinpath("cmdline").read_bytes()
            if not command:  # the kernel's own, or one that has ended
                continue
            words = command.split(b"\0")
            is_server = b"-m" in words and words[words.index(b"-m") + 1 :][:1] == [b"ublk_trio"]
            is_forked = directory.joinpath("comm").read_text(encoding="ascii", errors="replace").strip() == PROGRAM_NAME
            if is_server or is_forked or Path(os.fsdecode(words[0])).name in ("fio", "dd", "mkfs.ext4", "fsck.ext4"):
                found.add(f"process {directory.name} {b' '.join(words).decode(errors='replace')}")
    return found


def _threads() -> set[str]:
    """Workers of this process: by their names."""
    found = set()
    for directory in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            name = directory.joinpath("comm").read_text(encoding="ascii").strip()
            if name.startswith("ublk-cpu"):
                found.add(f"thread {directory.name} {name}")
    return found


def _open_files() -> set[str]:
    links = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            link = os.readlink(f"/proc/self/fd/{fd}")
            if any(kind in link for kind in ("ublk", "io_uring", "eventfd", "eventpoll")):
                links.add(f"descriptor {fd} {link}")
    return links


def _mappings() -> set[str]:
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    return {f"mapping {line}" for line in lines if "/dev/ublk" in line or "io_uring" in line}


def _mounts() -> set[str]:
    lines = Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()
    return {f"mount {words[1]}" for line in lines if (words := line.split()) and words[2] in ("ext4", "tmpfs")}


def _rights() -> set[str]:
    """Whom the control device was given to; without the driver there is none."""
    try:
        status = os.stat(CONTROL_PATH)
    except FileNotFoundError:
        return set()
    return {f"rights {status.st_uid}:{status.st_gid} {stat.filemode(status.st_mode)}"}
