"""Serving what operators ask for by configuration and by remote calls, until a signal: ``start --config`` and
``--rpc-socket``."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable

import attrs
import trio

from ublk_trio.backends import Backend, Null
from ublk_trio.backends.stacked import Stacked
from ublk_trio.bdev import Descriptor
from ublk_trio.cli.exit_codes import ExitCode
from ublk_trio.cli.output import print_json
from ublk_trio.cli.records import remove_record, write_record
from ublk_trio.cli.serving import release_all
from ublk_trio.cli.signals import Signals, until_signal
from ublk_trio.nursery import open_plain_nursery
from ublk_trio.ring import Kernel
from ublk_trio.rpc import FRAMEWORK_METHODS, Dispatcher, Framework, serve_rpc
from ublk_trio.service.config_file import Entry, apply_config
from ublk_trio.service.disks import Disk
from ublk_trio.service.methods import METHODS
from ublk_trio.service.service import Service, open_service
from ublk_trio.workload import Disk as UsedDisk
from ublk_trio.workload import Workload, WorkloadReport


@attrs.frozen(kw_only=True)
class Operation:
    """What to serve, and how."""

    kernel: Kernel
    #: Of a simulated kernel: its applications' end of a disk.
    block_device: Callable[[int], UsedDisk] | None
    entries: list[Entry]
    #: Carry on when a call of the configuration fails.
    keep_going: bool
    rpc_socket: str | None
    #: Disks are an ordinary user's, if nothing else is said.
    unprivileged: bool
    #: Run on each simulated disk while it is live.
    workload: Workload | None
    json: bool
    reports: list[WorkloadReport] = attrs.field(factory=list)

    async def run(self) -> int:
        """Serve until a signal; without an RPC socket until the last disk is gone. Returns the exit code.

        SIGUSR2 lets go of the disks, as `serve_until_signal` does.
        """
        code = ExitCode.OK
        async with (
            until_signal() as signals,
            open_service(self.kernel, attend=self._attend, unprivileged=self.unprivileged) as service,
        ):
            signals.waiting.start_soon(self._release, service, signals)
            code = await self._operate(service)
        for report in self.reports:
            print(report, file=sys.stderr)
            for fault in report.faults[:20]:
                code = ExitCode.FAILED
                print(f"ublk-trio: {fault}", file=sys.stderr)
        return code

    async def _operate(self, service: Service) -> ExitCode:
        dispatcher = Dispatcher()
        dispatcher.register(METHODS, service)
        kill = functools.partial(os.kill, os.getpid())
        dispatcher.register(FRAMEWORK_METHODS, Framework(dispatcher=dispatcher, kill=kill))
        async with open_plain_nursery() as nursery:
            failures = await apply_config(dispatcher, service, self.entries, keep_going=self.keep_going)
            for failure in failures:
                print(f"ublk-trio: {failure}", file=sys.stderr)
            if self.rpc_socket is not None:
                await nursery.start(serve_rpc, self.rpc_socket, dispatcher)
                print(f"ublk-trio: listening at {self.rpc_socket}", file=sys.stderr, flush=True)
                await trio.sleep_forever()
            for disk in list(service.disks):
                await disk.gone.wait()
        return ExitCode.FAILED if failures else ExitCode.OK

    async def _release(self, service: Service, signals: Signals) -> None:
        await signals.release.wait()
        disks = list(service.disks)
        release_all(disk.device for disk in disks if disk.device is not None)
        for disk in disks:
            await disk.gone.wait()
        signals.stop.cancel()

    async def _attend(self, disk: Disk) -> None:
        device = disk.device
        assert device is not None
        if self.json:
            print_json({"id": device.dev_id, "path": device.path, "size": device.size, "serve": device.serve})
        else:
            print(device.path, flush=True)
        if self.block_device is not None:
            await self._work(self.block_device(device.dev_id), disk)
            return
        write_record(device.dev_id, backend=disk.bdev_name)
        try:
            await disk.gone.wait()
        finally:
            remove_record(device.dev_id)

    async def _work(self, used: UsedDisk, disk: Disk) -> None:
        assert disk.device is not None
        if self.workload is None:
            return
        report = WorkloadReport(disk=disk.device.path)
        self.reports.append(report)
        own = attrs.evolve(
            self.workload, keeps_data=_keeps_data(disk.device.backend), writable=not disk.device.read_only
        )
        async with open_plain_nursery() as nursery:

            async def until_closing() -> None:
                await disk.closing.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(until_closing)
            await own.run(used, report)
            nursery.cancel_scope.cancel()


def _keeps_data(backend: Backend) -> bool:
    """Whether what is written can be read again: not with a null bdev at the bottom."""
    match backend:
        case Null():
            return False
        case Descriptor():
            return _keeps_data(backend.bdev.backend)
        case Stacked():
            return all(_keeps_data(base.backend) for base in backend.bases)
    return True
