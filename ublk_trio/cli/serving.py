"""Serving real disks until a signal: what ``start`` and ``recover`` have in common.

SIGINT and SIGTERM stop the disks, SIGUSR2 lets go of them: there is no other way to tell a running server anything.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterable

import attrs
import trio

from ublk_trio.backends import Backend
from ublk_trio.cli.exit_codes import ExitCode
from ublk_trio.cli.output import print_json
from ublk_trio.cli.records import remove_record, write_record
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


async def wait_for_signal(cancel: trio.CancelScope, *, task_status: trio.TaskStatus[None]) -> None:
    """Cancel the scope at SIGINT or SIGTERM."""
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        task_status.started()
        async for number in signals:
            logger.info("%s: stopping", signal.Signals(number).name)
            cancel.cancel()


async def watch_for_release(asked: trio.Event, *, task_status: trio.TaskStatus[None]) -> None:
    """Set the event at SIGUSR2."""
    with trio.open_signal_receiver(signal.SIGUSR2) as signals:
        task_status.started()
        async for _ in signals:
            asked.set()


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
    async with trio.open_nursery() as nursery:
        serving = trio.CancelScope()
        release_asked = trio.Event()
        await nursery.start(wait_for_signal, serving)
        await nursery.start(watch_for_release, release_asked)
        with serving:
            async with open_target(RealKernel()) as target:
                devices = [await _start_one(target, disk, json=json) for disk in disks]
                nursery.start_soon(_release_when_asked, release_asked, devices)
                for device in devices:
                    code = max(code, await _wait_until_gone(target, device))
        nursery.cancel_scope.cancel()
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
