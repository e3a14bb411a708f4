"""``start``: serve disks until SIGINT or SIGTERM; or, with ``--kernel sim``, run a verified workload on a simulated
one."""

from __future__ import annotations

import math
import mmap
import sys
from typing import Annotated, Literal

import attrs
import trio
from cyclopts import Parameter

from ublk_trio.backends import Null, parse_backend, parse_size
from ublk_trio.cli.exit_codes import ExitCode
from ublk_trio.cli.operating import Operation
from ublk_trio.cli.output import print_json
from ublk_trio.cli.progress import Progress
from ublk_trio.cli.serving import Disk, serve_until_signal
from ublk_trio.cli.signals import until_signal
from ublk_trio.errors import UsageError
from ublk_trio.handlers import Serve
from ublk_trio.kernel_sim import SeededChoices, SimKernel
from ublk_trio.options import DataMode, DeviceOptions, Recovery
from ublk_trio.real import RealKernel
from ublk_trio.service.config_file import read_config
from ublk_trio.target import open_target
from ublk_trio.workload import Pattern, Workload, WorkloadReport


async def start(
    *,
    backend: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    kernel: Literal["real", "sim"] = "real",
    id: int | None = None,
    queues: int = 1,
    depth: int = 128,
    max_io: str = "512K",
    mode: Literal["copy", "get-data"] = "copy",
    serve: Serve | None = None,
    read_only: Annotated[bool, Parameter(negative="")] = False,
    recovery: Literal["off", "requeue", "reissue", "fail"] = "off",
    unprivileged: Annotated[bool, Parameter(negative="")] = False,
    grace: float = 10.0,
    workload: Pattern | None = None,
    seconds: float | None = None,
    seed: int | None = None,
    config: str | None = None,
    keep_going: Annotated[bool, Parameter(negative="")] = False,
    rpc_socket: str | None = None,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Serve disks until SIGINT or SIGTERM, then stop them cleanly.

    Prints the path of each disk, one a line, when it is live. With --kernel sim, runs a verified workload instead.

    Parameters
    ----------
    backend
        What a disk is made of: memory:SIZE[,block_size=N], null:SIZE[,block_size=N] or
        file:PATH[,direct=on][,read_only=on][,block_size=N]. Repeat it for more disks.
    kernel
        "sim" runs a verified workload on simulated disks, without root; exits 0 only if every byte came back right.
    id
        The N of /dev/ublkbN; further disks get the next ones. Default: free ones.
    queues
        Queues per disk; the kernel lowers it to its number of CPUs.
    depth
        Requests in flight per queue.
    max_io
        The largest request.
    mode
        How data moves: "copy" posts a buffer per request ahead, "get-data" takes buffers from a bounded pool.
    serve
        "inline" calls the backend in the loop that reaps requests, "async" lets requests wait for each other's I/O.
        Default: what suits the backend.
    read_only
        Refuse writes.
    recovery
        What becomes of a disk when this process is killed. "off": it goes. Else it stays for `ublk-trio recover`, and
        what was in flight here fails ("requeue"), is asked again of the next server ("reissue"), or fails together with
        all else until there is one ("fail").
    unprivileged
        Make disks as an ordinary user, by remote calls and configuration too; `ublk-trio udev-rule` tells how an administrator
        lets users do that.
    grace
        Seconds without progress after which a stop no longer waits for the backend.
    workload
        The order of the simulated workload's blocks. Default: random.
    seconds
        How long the simulated workload runs. Default: 5.
    seed
        Decides everything random in the simulated run, but for how far it gets in its time. Default: 0.
    config
        A file of bdevs and disks: TOML, or what SPDK's save_config wrote. Instead of --backend.
    keep_going
        Carry on when something in the configuration fails.
    rpc_socket
        Listen there for remote calls: bdevs and disks are made by them, and by --config.
    json
        Print JSON objects instead of paths and text.
    """
    if kernel == "real" and (workload, seconds, seed) != (None, None, None):
        raise UsageError("--workload, --seconds and --seed are for --kernel sim; a real disk is served until a signal")
    if seconds is not None and not seconds > 0:
        raise UsageError(f"--seconds is {seconds:g}: give more than 0")
    run = Workload(seed=seed or 0, pattern=workload or "random", seconds=seconds or 5.0)
    if config is not None or rpc_socket is not None:
        if backend:
            raise UsageError("--backend is for a fixed set of disks: with --config or --rpc-socket, make them there")
        simulated = kernel == "sim"
        operation = Operation(
            kernel=_simulated_kernel(run.seed, unprivileged=unprivileged) if simulated else RealKernel(),
            entries=[] if config is None else read_config(config),
            keep_going=keep_going,
            rpc_socket=rpc_socket,
            unprivileged=unprivileged,
            workload=attrs.evolve(run, seconds=seconds or math.inf) if simulated and workload is not None else None,
            json=json,
        )
        return await operation.run()
    if not backend:
        raise UsageError("nothing to serve: give --backend, --config or --rpc-socket")
    disks = [
        Disk(
            spec=spec,
            backend=parse_backend(spec),
            options=DeviceOptions(
                dev_id=None if id is None else id + index,
                queues=queues,
                depth=depth,
                max_io_bytes=parse_size(max_io),
                mode=DataMode(mode),
                serve=serve,
                read_only=read_only,
                recovery=Recovery(recovery),
                unprivileged=unprivileged,
                grace_seconds=grace,
            ),
        )
        for index, spec in enumerate(backend)
    ]
    for disk in disks:
        disk.options.check(page_size=mmap.PAGESIZE)
    if kernel == "sim":
        return await _simulate(disks, run, json=json)
    return await serve_until_signal(disks, json=json)


def _simulated_kernel(seed: int, *, unprivileged: bool) -> SimKernel:
    """As an ordinary user sees it, where disks are that user's."""
    return SimKernel(choices=SeededChoices(seed), paranoid=True, privileged=not unprivileged)


async def _simulate(disks: list[Disk], workload: Workload, *, json: bool) -> int:
    kernel = _simulated_kernel(workload.seed, unprivileged=any(disk.options.unprivileged for disk in disks))
    print(f"ublk-trio: simulated kernel, seed {workload.seed}, {workload.seconds:g} s", file=sys.stderr)
    reports: list[WorkloadReport] = []
    async with until_signal() as signals, open_target(kernel) as target:
        with Progress(seconds=workload.seconds) as progress:
            async with trio.open_nursery() as workloads:
                for disk in disks:
                    device = await target.start_device(disk.backend, disk.options)
                    report = WorkloadReport(disk=device.path)
                    reports.append(report)
                    progress.add(report)
                    own = attrs.evolve(
                        workload,
                        keeps_data=not isinstance(disk.backend, Null),
                        writable=not device.read_only,
                    )
                    workloads.start_soon(own.run, kernel.block_device(device.dev_id), report)
    return _conclude(kernel, reports, interrupted=signals.stop.cancelled_caught, json=json)


def _conclude(kernel: SimKernel, reports: list[WorkloadReport], *, interrupted: bool, json: bool) -> int:
    leftovers = kernel.leftovers()
    faults = [fault for report in reports for fault in report.faults] + [str(v) for v in kernel.violations]
    faults += [f"left behind: {thing}" for thing in leftovers]
    if json:
        print_json(
            {
                "disks": [
                    {
                        "disk": report.disk,
                        "reads": report.reads,
                        "writes": report.writes,
                        "other": report.others,
                        "bytes_verified": report.bytes_verified,
                    }
                    for report in reports
                ],
                "faults": faults,
                "interrupted": interrupted,
            }
        )
    else:
        for report in reports:
            print(report)
        if not faults:
            print("every byte came back right; nothing is left behind")
    for fault in faults[:20]:
        print(f"ublk-trio: {fault}", file=sys.stderr)
    return ExitCode.FAILED if faults else ExitCode.OK
