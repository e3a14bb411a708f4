"""``list`` and ``stop``: any ublk device of the machine, through the kernel's control device, whoever serves it."""

from __future__ import annotations

import errno
import os
from typing import Annotated, Any

import trio
from cyclopts import Parameter

from ublk_trio.backends import format_size
from ublk_trio.cli.exit_codes import ExitCode
from ublk_trio.cli.output import print_json, print_rows
from ublk_trio.cli.records import recorded_backend, remove_record
from ublk_trio.control import Control, open_control
from ublk_trio.device import already_gone_is_fine, try_stop
from ublk_trio.errors import KernelError, StuckError, UsageError
from ublk_trio.real import RealKernel
from ublk_trio.ring import Kernel
from ublk_trio.uapi import SECTOR_SHIFT, Feature

_COLUMNS = ("id", "disk", "state", "backend", "queues", "depth", "size", "flags", "pid")


def _is_alive(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")


async def _describe(kernel: RealKernel, control: Control, dev_id: int) -> dict[str, Any] | None:
    try:
        info = await control.device_info(dev_id)
    except KernelError as error:
        if error.errno == errno.ENODEV:
            return None  # gone since we looked
        if error.errno not in (errno.EPERM, errno.EACCES):
            raise
        # Another user's: that it is there is all that we may know.
        known = {"id": dev_id, "disk": kernel.disk_path(dev_id), "flags": [], "daemon_alive": False}
        return dict.fromkeys((*_COLUMNS, "daemon_alive")) | known
    size = None
    try:
        basic = (await control.params(dev_id)).basic
        size = basic.dev_sectors << SECTOR_SHIFT if basic else None
    except KernelError:
        pass  # added, but without parameters yet
    pid = info.ublksrv_pid if info.ublksrv_pid > 0 else None
    return {
        "id": dev_id,
        "disk": kernel.disk_path(dev_id),
        "state": info.state.name,
        "backend": recorded_backend(dev_id, pid=pid) if pid else None,
        "queues": info.nr_hw_queues,
        "depth": info.queue_depth,
        "size": size,
        "flags": [flag.name for flag in info.flags],
        "pid": pid,
        "daemon_alive": pid is not None and _is_alive(pid),
    }


async def list_devices(*, json: Annotated[bool, Parameter(negative="")] = False) -> int:
    """List every ublk device of this machine.

    Parameters
    ----------
    json
        Print a JSON array instead; sizes in bytes.
    """
    kernel = RealKernel()
    async with open_control(kernel) as control:
        found = [await _describe(kernel, control, dev_id) for dev_id in kernel.device_ids()]
    rows = [row for row in found if row is not None]
    if json:
        print_json(rows)
        return ExitCode.OK
    for row in rows:
        row["size"] = format_size(row["size"]) if row["size"] else None
        if row["pid"] and not row["daemon_alive"]:
            row["pid"] = f"{row['pid']} (dead)"
    print_rows(rows, _COLUMNS)
    return ExitCode.OK


async def stop_one(kernel: Kernel, control: Control, dev_id: int, seconds: float, *, if_unused: bool) -> None:
    """STOP_DEV or TRY_STOP_DEV, then DEL_DEV; both waits bounded together."""
    step = "STOP_DEV"
    with trio.move_on_after(seconds) as scope:
        try:
            await control.device_info(dev_id)  # learns whether it is an unprivileged one
        except KernelError as error:
            # Of another user's the next command would only say EINVAL; what else is wrong it says better.
            if error.errno in (errno.EPERM, errno.EACCES):
                raise
        if if_unused:
            await try_stop(kernel, control, dev_id)
        else:
            await control.stop_device(dev_id)
        step = "DEL_DEV"
        with already_gone_is_fine():
            await control.delete_device(dev_id)
        remove_record(dev_id)
    if scope.cancelled_caught:
        what = (
            "its server still has requests that it does not answer; kill the server"
            if step == "STOP_DEV"
            else f"somebody still has {kernel.disk_path(dev_id)} or its char device open (`fuser -vm` tells); close it"
        )
        raise StuckError(
            f"device {dev_id}: {step} did not end within {seconds:g} s: {what}, and the kernel goes on by itself"
        )


async def stop(
    *ids: int,
    all: Annotated[bool, Parameter(negative="")] = False,
    if_unused: Annotated[bool, Parameter(negative="")] = False,
    seconds: float = 30.0,
) -> int:
    """Stop and delete ublk devices, whoever serves them, and also those whose server was killed.

    Parameters
    ----------
    ids
        Device ids: the N of /dev/ublkbN.
    all
        All of this machine's.
    if_unused
        Leave a disk alone that somebody has open, and say who; needs Linux 7.0.
    seconds
        How long to wait for each.
    """
    if not seconds > 0:
        raise UsageError(f"--seconds is {seconds:g}: give more than 0")
    if any(dev_id < 0 for dev_id in ids):
        raise UsageError("device ids are 0 or more")
    if bool(ids) == all:
        raise UsageError("say which devices: ids (`ublk-trio list` shows them), or --all")
    kernel = RealKernel()
    failures: list[Exception] = []
    async with open_control(kernel) as control:
        if if_unused:
            control.need(Feature.SAFE_STOP_DEV, "stop a disk only if nobody uses it")
        for dev_id in kernel.device_ids() if all else dict.fromkeys(ids):
            try:
                await stop_one(kernel, control, dev_id, seconds, if_unused=if_unused)
            except (KernelError, StuckError) as error:
                failures.append(error)
    if failures:
        raise ExceptionGroup("not all stopped", failures)
    return ExitCode.OK
