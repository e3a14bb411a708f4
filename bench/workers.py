"""What workers cost and gain, on real disks: ``python bench/workers.py`` as root on a kernel with ublk.

Each row is one disk of two queues, served in this process, and used by two fio jobs at random. The ratio is to the first row of the same
load, which has no workers. Compare the rows of one run, not runs. Where fio needs the same CPUs as the server, as on a machine with two,
workers can only cost.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
from collections.abc import Collection
from functools import partial

import attrs
import trio
from fio import run_fio

from ublk_trio import DeviceOptions, Memory, RealKernel, open_target

SIZE = 256 << 20
LOADS = (("randread", 4), ("randwrite", 4), ("randread", 512), ("randwrite", 512))


@attrs.frozen(kw_only=True)
class Measured:
    """Requests per second, and the CPU time of a request in this process, all threads."""

    rate: float
    cpu_us: float


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


async def use(path: str, load: str, block_kib: int, depth: int, seconds: float) -> tuple[float, int]:
    """Requests per second, and how many there were."""
    options = (f"--bs={block_kib}k", "--ioengine=libaio", f"--iodepth={depth}", "--numjobs=2", "--group_reporting")
    found = await run_fio(path, load, seconds, *options)
    return found["iops"], found["total_ios"]


async def measure(cpus: Collection[int] | None, load: str, block_kib: int, depth: int, seconds: float) -> Measured:
    async with open_target(RealKernel(), cpus=cpus) as target:
        device = await target.start_device(Memory(SIZE), DeviceOptions(queues=2, depth=depth, serve="inline"))
        await use(device.path, load, block_kib, depth, 1)
        before = cpu_seconds()
        rate, requests = await use(device.path, load, block_kib, depth, seconds)
        return Measured(rate=rate, cpu_us=(cpu_seconds() - before) / requests * 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=int, default=32, help="requests in flight of each of the two jobs")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each row")
    arguments = parser.parse_args()
    cpus = sorted(os.sched_getaffinity(0))
    ways: list[tuple[str, Collection[int] | None]] = [("none", None), ("1", cpus[-1:]), ("2", cpus[-2:])]
    print(f"Linux {platform.release()}, Python {platform.python_version()}, {len(cpus)} CPUs, depth {arguments.depth}")
    print(f"{'load':<10} {'KiB':>4} {'workers':>8} {'requests/s':>11} {'MiB/s':>7} {'CPU µs/request':>15} {'ratio':>6}")
    for load, block_kib in LOADS:
        first = 0.0
        for name, chosen in ways[: 1 + len(cpus)]:
            run = partial(measure, chosen, load, block_kib, arguments.depth, arguments.seconds)
            found = trio.run(run)
            first = first or found.rate
            print(
                f"{load:<10} {block_kib:>4} {name:>8} {found.rate:>11.0f} {found.rate * block_kib / 1024:>7.0f} "
                f"{found.cpu_us:>15.1f} {found.rate / first:>6.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
