"""Serving real disks until a signal: what ``start`` and ``recover`` have in common."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable

import attrs
import trio

from ublk_trio.backends import Backend
from ublk_trio.cli.exit_codes import ExitCode
from ublk_trio.cli.output import print_json
from ublk_trio.cli.records import remove_record, write_record
from ublk_trio.cli.signals import until_signal
from ublk_trio.device import Device
from ublk_trio.errors import UblkError, UsageError
from ublk_trio.options import DeviceOptions
from ublk_trio.real import RealKernel
from ublk_trio.target import Target, open_target

logger = logging.getLogger("ublk_trio.cli")


@attrs.frozen(kw_only=True)
class Disk:
    """A disk to serve, as the command line asked for it."""

    spec: str
    backend: Backend
    options: DeviceOptions
    #: The id of the device to take over; None for a new one.
    recovers: int | None = None


def release_all(devices: Iterable[Device]) -> None:
    """Begin to let go of every disk that can outlive its server, and to stop the others."""
    logger.info("SIGUSR2: releasing")
    for device in devices:
        try:
            device.ask_to_release()
        except UsageError as error:
            print(f"ublk-trio: {error}; it is stopped", file=sys.stderr)
            device.ask_to_stop()


async def _release_when_asked(asked: trio.Event, devices: list[Device]) -> None:
    await asked.wait()
    release_all(devices)


async def serve_until_signal(disks: list[Disk], *, json: bool) -> int:
    """Start the disks on the real kernel, say so, and serve them until a signal. Returns the exit code."""
    code = ExitCode.OK
    async with until_signal() as signals, open_target(RealKernel()) as target:
        devices = [await _start_one(target, disk, json=json) for disk in disks]
        signals.waiting.start_soon(_release_when_asked, signals.release, devices)
        for device in devices:
            code = max(code, await _wait_until_gone(target, device))
    return code


async def _start_one(target: Target, disk: Disk, *, json: bool) -> Device:
    if disk.recovers is None:
        device = await target.start_device(disk.backend, disk.options)
    else:
        device = await target.recover_device(disk.recovers, disk.backend, disk.options)
    write_record(device.dev_id, backend=disk.spec)
    if json:
        print_json({"id": device.dev_id, "path": device.path, "size": device.size, "serve": device.serve})
    else:
        print(device.path, flush=True)
    return device


async def _wait_until_gone(target: Target, device: Device) -> ExitCode:
    try:
        await target.wait_device(device)
    except UblkError as error:
        print(f"ublk-trio: {error}", file=sys.stderr)
        return ExitCode.FAILED
    finally:
        remove_record(device.dev_id, pid=os.getpid())
    return ExitCode.OK
