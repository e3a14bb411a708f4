"""``doctor``: checks everything that ``start`` needs, one line each, with the mend."""

from __future__ import annotations

import os
import platform
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import attrs
from cyclopts import Parameter

from ublk_trio.cli.exit_codes import ExitCode
from ublk_trio.cli.output import print_json
from ublk_trio.control import open_control
from ublk_trio.errors import UblkError
from ublk_trio.real import RealKernel
from ublk_trio.real.native import load
from ublk_trio.uapi import CONTROL_PATH


@attrs.frozen(kw_only=True)
class Finding:
    """One thing that was checked. ``mend`` is None when it is fine."""

    what: str
    fine: bool
    mend: str | None = None


def _system() -> Finding:
    fine = platform.system() == "Linux"
    return Finding(
        what=f"{platform.system()} {platform.release()}",
        fine=fine,
        mend=None if fine else "ublk needs Linux 6.0 or newer",
    )


def _native() -> Finding:
    try:
        load()
    except UblkError as error:
        return Finding(what="native part", fine=False, mend=str(error))
    return Finding(what="native part is built", fine=True)


def _io_uring() -> Finding:
    switch = Path("/proc/sys/kernel/io_uring_disabled")
    try:
        value = int(switch.read_text())
    except (OSError, ValueError):
        value = 0
    if value == 0 or (value == 1 and os.geteuid() == 0):
        return Finding(what="io_uring is enabled", fine=True)
    return Finding(
        what=f"io_uring is disabled ({switch} is {value})", fine=False, mend="sysctl kernel.io_uring_disabled=0"
    )


def _module() -> Finding:
    if Path("/sys/module/ublk_drv").exists():
        return Finding(what="driver ublk_drv is loaded", fine=True)
    builtin = any(Path("/lib/modules", platform.release()).glob("**/ublk_drv.ko*"))
    mend = (
        "modprobe ublk_drv"
        if builtin
        else "install a kernel with CONFIG_BLK_DEV_UBLK (Debian: 6.12 or newer), then modprobe ublk_drv"
    )
    return Finding(what="driver ublk_drv is not loaded", fine=False, mend=mend)


def _node() -> Finding:
    try:
        mode = os.stat(CONTROL_PATH).st_mode
    except OSError as error:
        return Finding(what=f"{CONTROL_PATH}: {error.strerror}", fine=False, mend="modprobe ublk_drv")
    if not stat.S_ISCHR(mode):
        return Finding(
            what=f"{CONTROL_PATH} is not a character device", fine=False, mend="remove it and modprobe ublk_drv"
        )
    if not os.access(CONTROL_PATH, os.R_OK | os.W_OK):
        return Finding(
            what=f"{CONTROL_PATH}: no permission",
            fine=False,
            mend="run as root, for example with sudo; `ublk-trio udev-rule` lets ordinary users in",
        )
    return Finding(what=f"{CONTROL_PATH} can be opened", fine=True)


def _release() -> tuple[int, ...]:
    return tuple(int(part) for part in platform.release().split("-")[0].split(".")[:2] if part.isdigit())


def _limit() -> Finding:
    path = Path("/sys/module/ublk_drv/parameters/ublks_max")
    try:
        limit, used = int(path.read_text()), len(RealKernel().device_ids())
    except (OSError, ValueError):
        return Finding(what="limit on devices: not known without the driver", fine=True)
    if _release() >= (6, 15):
        return Finding(what=f"{used} ublk devices; the driver's limit of {limit} is for unprivileged ones", fine=True)
    fine = used < limit
    return Finding(
        what=f"{used} ublk devices; the driver's limit is {limit}",
        fine=fine,
        mend=None if fine else f"stop one, or raise {path}",
    )


CHECKS: tuple[Callable[[], Finding], ...] = (_system, _native, _io_uring, _module, _node, _limit)


async def _answers() -> Finding:
    try:
        async with open_control(RealKernel()) as control:
            count = len(control.features) if control.features is not None else 0
    except UblkError as error:
        return Finding(what="driver does not answer", fine=False, mend=str(error))
    return Finding(what=f"driver answers and offers {count} features", fine=True)


async def doctor(*, json: Annotated[bool, Parameter(negative="")] = False) -> int:
    """Check everything that `start` needs on a real kernel: one line each, with the mend for what is wrong.

    Parameters
    ----------
    json
        Print a JSON array instead.
    """
    findings = [check() for check in CHECKS] + [await _answers()]
    if json:
        print_json([attrs.asdict(finding) for finding in findings])
    else:
        for line in _lines(findings):
            print(line)
    return ExitCode.OK if all(finding.fine for finding in findings) else ExitCode.UNAVAILABLE


def _lines(findings: list[Finding]) -> Iterator[str]:
    for finding in findings:
        yield f"ok    {finding.what}" if finding.fine else f"FAIL  {finding.what}: {finding.mend}"
