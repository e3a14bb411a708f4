"""``start``: serve disks until SIGINT or SIGTERM; or, with ``--kernel sim``, run a verified workload on a simulated
one."""

from __future__ import annotations

import math
import mmap
from typing import Annotated, Literal

import attrs
from cyclopts import Parameter

from ublk_trio.backends import parse_backend, parse_size
from ublk_trio.cli.serving import Disk, serve_until_signal
from ublk_trio.errors import UsageError
from ublk_trio.handlers import Serve
from ublk_trio.options import DataMode, DeviceOptions, Recovery
from ublk_trio.real import RealKernel
from ublk_trio.workload import Pattern, Workload


async def start(
    *,
    backend: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    kernel: Literal["real", "sim"] = "real",
    id: int | None = None,
    queues: int = 1,
    depth: int = 128,
    max_io: str = "512K",
    mode: Literal["copy", "get-data", "user-copy"] = "copy",
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
        How data moves: "copy" posts a buffer per request ahead; the others have a bounded pool, "user-copy" copies itself.
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
        from ublk_trio.cli.operating import Operation
        from ublk_trio.service.config_file import read_config

        simulated = None
        if kernel == "sim":
            from ublk_trio.cli.simulating import simulated_kernel

            simulated = simulated_kernel(run.seed, unprivileged=unprivileged)
        operation = Operation(
            kernel=RealKernel() if simulated is None else simulated,
            block_device=None if simulated is None else simulated.block_device,
            entries=[] if config is None else read_config(config),
            keep_going=keep_going,
            rpc_socket=rpc_socket,
            unprivileged=unprivileged,
            workload=None if workload is None else attrs.evolve(run, seconds=seconds or math.inf),
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
        from ublk_trio.cli.simulating import simulate

        return await simulate(disks, run, json=json)
    return await serve_until_signal(disks, json=json)
