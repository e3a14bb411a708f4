"""``udev-rule`` and ``node-owner``: how ordinary users get at their unprivileged disks.

Some facts, and what they mean here:

- An unprivileged device belongs to the user who added it, and the driver knows whom; but its nodes in /dev belong to root until somebody
  gives them away. sysfs does not say who the owner is: the driver must be asked, so the rule has a program run.
- Who may use the char device may do everything with the device. So the nodes are their owner's alone (0600), and those of root's devices
  stay as they are: for these the program fails, and udev then leaves out what stands behind it in the rule.
- ``/dev/ublk-control`` is opened by everybody who adds a device. What a user may do there the driver decides, command by command.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

import ublk_trio
from ublk_trio.cli.exit_codes import ExitCode
from ublk_trio.control import open_control
from ublk_trio.errors import UsageError
from ublk_trio.real import RealKernel
from ublk_trio.uapi import Feature

RULES = Path("/etc/udev/rules.d/85-ublk-trio.rules")
_NODE = re.compile(r"ublk[bc](\d+)(?:p\d+)?")
_RELOAD = (
    ("udevadm", "control", "--reload"),
    ("udevadm", "trigger", "--action=add", "--sysname-match=ublk-control"),
)


def rule() -> str:
    """The file's text, with the paths of this Python and this package."""
    package = Path(ublk_trio.__file__).resolve().parent.parent
    program = f"/usr/bin/env PYTHONPATH={package} {sys.executable} -m ublk_trio node-owner %k"
    return f"""\
# Written by `ublk-trio udev-rule`. Ordinary users may make unprivileged ublk disks, and own the nodes of theirs.
KERNEL=="ublk-control", MODE="0666", OPTIONS+="static_node=ublk-control"
ACTION!="remove", KERNEL=="ublk[bc][0-9]*", PROGRAM="{program}", OWNER="%c{{1}}", GROUP="%c{{2}}", MODE="0600"
"""


def udev_rule(*, install: Annotated[bool, Parameter(negative="")] = False) -> int:
    """Print the udev rule that lets ordinary users make unprivileged disks and use them.

    Parameters
    ----------
    install
        Write it to /etc/udev/rules.d instead, and have udev read it; as root.
    """
    if not install:
        print(rule(), end="")
        return ExitCode.OK
    RULES.write_text(rule(), encoding="ascii")
    for command in _RELOAD:
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=30)
        except (OSError, subprocess.SubprocessError) as error:
            print(f"ublk-trio: {RULES} is written, but `{' '.join(command)}` failed: {error}", file=sys.stderr)
            return ExitCode.FAILED
    print(RULES)
    return ExitCode.OK


async def node_owner(node: str, /) -> int:
    """Print the user and group ids of the owner of an unprivileged disk's node. For the udev rule.

    Parameters
    ----------
    node
        A name in /dev: ublkcN or ublkbN.
    """
    found = _NODE.fullmatch(node)
    if found is None:
        raise UsageError(f"{node!r} is no node of a ublk device: say ublkc0 or ublkb0")
    async with open_control(RealKernel()) as control:
        info = await control.device_info(int(found[1]))
    if Feature.UNPRIVILEGED_DEV not in info.flags:
        return ExitCode.FAILED  # root's: udev leaves its nodes alone
    print(info.owner_uid, info.owner_gid)
    return ExitCode.OK
