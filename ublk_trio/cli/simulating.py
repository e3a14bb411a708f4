"""``start --kernel sim``: a verified workload on simulated disks."""

from __future__ import annotations

import sys

import attrs
import trio

from ublk_trio.backends import Null
from ublk_trio.cli.exit_codes import ExitCode
from ublk_trio.cli.output import print_json
from ublk_trio.cli.progress import Progress
from ublk_trio.cli.serving import Disk
from ublk_trio.cli.signals import until_signal
from ublk_trio.kernel_sim import SeededChoices, SimKernel
from ublk_trio.target import open_target
from ublk_trio.workload import Workload, WorkloadReport


def simulated_kernel(seed: int, *, unprivileged: bool) -> SimKernel:
    """As an ordinary user sees it, where disks are that user's."""
    return SimKernel(choices=SeededChoices(seed), paranoid=True, privileged=not unprivileged)


async def simulate(disks: list[Disk], workload: Workload, *, json: bool) -> int:
    """Run the workload on each disk until its time is over, or a signal. Returns the exit code."""
    kernel = simulated_kernel(workload.seed, unprivileged=any(disk.options.unprivileged for disk in disks))
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
