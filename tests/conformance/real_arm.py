"""The real arm: processes of this machine, on its own kernel's driver. Needs root."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.conformance.script import CONTROL, CONTROLLER
from tests.conformance.worker import MESSAGE_BYTES_MAX
from ublk_trio.uapi import NO_QUEUE, DevInfo, control_opcode

_CHECKOUT = Path(__file__).resolve().parents[2]
_ANSWER_SECONDS_MAX = 30.0
_END_SECONDS_MAX = 45.0
_SETTLE_SECONDS = 0.01
_SETTLE_SECONDS_MAX = 2.0
_ASLEEP = "SDZTIX"
#: The process that cleans up: what scripts leave behind never holds it up.
_JANITOR = "janitor"
_OWN_TOKEN = 1 << 40
_NO_DEVICE = 9998


class Wedged(Exception):
    """Something on this machine does not come to its end; nothing that follows can be trusted."""


class RealArm:
    """Plays scripts one after the other; `clean` between them."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-S", "-E", "-m", "tests.conformance.worker", str(theirs.fileno())]
        self._nursery_process = subprocess.Popen(command, cwd=_CHECKOUT, pass_fds=[theirs.fileno()])
        theirs.close()
        self._nursery = ours
        self._workers: dict[str, tuple[int, socket.socket, list[list[Any]]]] = {}
        self._result = 0
        self._wedged = False
        self.cpus = os.cpu_count() or 1
        major, minor = platform.release().split(".")[:2]
        self.release = int(major), int(re.sub(r"\D.*", "", minor))

    def close(self) -> None:
        """End every process; once something is `Wedged`, without a wait for any."""
        for name in list(self._workers):
            if self._wedged:
                os.kill(self._workers[name][0], signal.SIGKILL)
            else:
                self.kill(name)
        self._nursery.close()
        self._nursery_process.wait()

    def _wedge(self, what: str) -> Wedged:
        self._wedged = True
        return Wedged(what)

    # ------------------------------------------------------------------ script.Arm

    def spawn(self, process: str) -> None:
        if process in self._workers:
            return
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        socket.send_fds(self._nursery, [b"fork"], [theirs.fileno()])
        theirs.close()
        pid = int(self._nursery.recv(64))
        ours.settimeout(_ANSWER_SECONDS_MAX)
        self._workers[process] = pid, ours, []

    def kill(self, process: str) -> None:
        pid, channel, _events = self._workers.pop(process)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        channel.close()
        deadline = time.monotonic() + _END_SECONDS_MAX
        while True:
            self._nursery.send(f"{pid} {os.WNOHANG}".encode())
            if int(self._nursery.recv(64)):
                return
            if time.monotonic() > deadline:
                raise self._wedge(f"process {process} does not die: {self._stacks(pid)}")
            time.sleep(0.002)

    def call(self, process: str, verb: str, *arguments: Any) -> Any:
        pid, channel, events = self._workers[process]
        if verb == "poll" and events:
            # They came with another answer.
            self._workers[process] = pid, channel, []
            return events
        channel.send(json.dumps([verb, *arguments]).encode())
        try:
            answer = channel.recv(MESSAGE_BYTES_MAX)
        except TimeoutError:
            raise self._wedge(f"{process} does not answer {verb}: {self._stacks(pid)}") from None
        if not answer:
            raise self._wedge(f"{process} died of {verb} {arguments}")
        result, came = json.loads(answer)
        if verb == "poll":
            return came
        events += came
        return result

    def settle(self) -> None:
        """Wait until every thread of ours sleeps, twice in a row."""
        deadline = time.monotonic() + _SETTLE_SECONDS_MAX
        quiet = 0
        while quiet < 2 and time.monotonic() < deadline:
            time.sleep(_SETTLE_SECONDS)
            quiet = quiet + 1 if self._asleep() else 0

    def _asleep(self) -> bool:
        for pid, _channel, _events in self._workers.values():
            for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
                with contextlib.suppress(OSError):
                    if stat.read_text().rpartition(") ")[2][:1] not in _ASLEEP:
                        return False
        return True

    @staticmethod
    def _stacks(pid: int) -> str:
        found = []
        for stack in Path(f"/proc/{pid}/task").glob("*/stack"):
            with contextlib.suppress(OSError):
                lines = [line.split()[-1].split("+")[0] for line in stack.read_text().splitlines()[:6]]
                found.append(f"{stack.parent.name}: {' < '.join(lines)}")
        return "; ".join(found)

    # ------------------------------------------------------------------ between scripts

    @functools.cached_property
    def legacy_opcodes(self) -> bool:
        """Whether the kernel takes commands that are plain numbers."""
        self._control("INFO", _NO_DEVICE, ioctl_encoded=False)
        return self._result != -errno.EOPNOTSUPP

    def clean(self) -> list[str]:
        """End every process, stop and delete every device; what would not go. The controller lives on if it can."""
        problems = []
        for dev_id in self.device_ids():
            # Before 6.16, commands of a queue that never became whole end with STOP_DEV, and with nothing else.
            if self._state(dev_id) == 0:
                self._control("STOP", dev_id)
        for name in [name for name in self._workers if name not in (CONTROLLER, _JANITOR)]:
            self.kill(name)
        for dev_id in self.device_ids():
            if self._control("STOP", dev_id) is None:
                problems.append(f"STOP_DEV of device {dev_id} never ended")
        # Disks that are open, operations without an end, commands that are held: all go with the process.
        if CONTROLLER in self._workers:
            if self.call(CONTROLLER, "busy"):
                self.kill(CONTROLLER)
            else:
                self.call(CONTROLLER, "poll")
        for dev_id in self.device_ids():
            if self._control("DEL", dev_id) is None:
                problems.append(f"DEL_DEV of device {dev_id} never ended")
        if left := self.device_ids():
            raise self._wedge(f"devices {left} cannot be deleted; {'; '.join(problems)}")
        return problems

    @staticmethod
    def mark(name: str) -> None:
        """Name a script in the kernel's log, so that a complaint there tells what it is about."""
        Path("/dev/kmsg").write_text(f"conformance: {name}\n")

    def _state(self, dev_id: int) -> int | None:
        answer = self._control("INFO2", dev_id)
        return DevInfo.unpack(answer[-DevInfo.LAYOUT.size :]).state if answer else None

    def _control(self, command: str, dev_id: int, *, ioctl_encoded: bool = True) -> bytes | None:
        """One command of the clean-up's own; its buffer, or None when it does not end."""
        self.spawn(_JANITOR)
        opcode = control_opcode(CONTROL[command], ioctl_encoded=ioctl_encoded)
        token = _OWN_TOKEN
        # A user's device wants its path, whoever asks.
        path = f"/dev/ublkc{dev_id}".encode() + b"\0"
        sent = path + bytes(DevInfo.LAYOUT.size)
        self.call(
            _JANITOR, "control", token, opcode, dev_id, NO_QUEUE, len(sent), "buffer", 0, len(path), sent.hex(), True
        )
        deadline = time.monotonic() + _END_SECONDS_MAX
        while time.monotonic() < deadline:
            for event in self.call(_JANITOR, "poll"):
                if event[0] == "ctl" and event[1] == token:
                    self._result = int(event[2])
                    return bytes.fromhex(event[3])
            time.sleep(0.002)
        return None

    @staticmethod
    def device_ids() -> list[int]:
        """The devices that the driver has."""
        return sorted(
            int(found[1])
            for entry in Path("/sys/class/ublk-char").glob("ublkc*")
            if (found := re.fullmatch(r"ublkc(\d+)", entry.name))
        )
