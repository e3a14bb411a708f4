"""What each way of moving data costs, on real disks: ``python bench/modes.py`` as root on a kernel with ublk.

Three disks of this process, alike but for their mode, are used in turn by fio at random, several rounds long, so that what else the machine
does meets all of them. The ratio is to mode copy, of the same load. Compare the rows of one run, not runs.
"""

from __future__ import annotations

import argparse
import os
import platform

import trio
from workers import cpu_seconds, use

from ublk_trio import DataMode, DeviceOptions, Memory, RealKernel, open_target

SIZE = 128 << 20
LOADS = (("randread", 4), ("randwrite", 4), ("randread", 128), ("randwrite", 128))


async def measure(*, depth: int, seconds: float, rounds: int) -> None:
    """Print a row for each load and mode."""
    async with open_target(RealKernel()) as target:
        options = [DeviceOptions(queues=2, depth=depth, serve="inline", mode=mode) for mode in DataMode]
        disks = [await target.start_device(Memory(SIZE), chosen) for chosen in options]
        for load, block_kib in LOADS:
            requests, spent = dict.fromkeys(disks, 0.0), dict.fromkeys(disks, 0.0)
            # One round to get warm.
            for counts in range(1 + rounds):
                for disk in disks:
                    before = cpu_seconds()
                    rate, done = await use(disk.path, load, block_kib, depth, seconds)
                    if counts:
                        requests[disk] += rate / rounds
                        spent[disk] += (cpu_seconds() - before) / done * 1e6 / rounds
            first = requests[disks[0]]
            for disk in disks:
                print(
                    f"{load:<10} {block_kib:>4} {disk.options.mode.value:<10} {requests[disk]:>11.0f} {spent[disk]:>15.1f} "
                    f"{requests[disk] / first:>6.2f}",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=int, default=32, help="requests in flight of each of the two jobs")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each use of a disk")
    parser.add_argument("--rounds", type=int, default=3, help="uses of each disk for each load")
    arguments = parser.parse_args()
    print(
        f"Linux {platform.release()}, Python {platform.python_version()}, {os.cpu_count()} CPUs, depth {arguments.depth}"
    )
    print(f"{'load':<10} {'KiB':>4} {'mode':<10} {'requests/s':>11} {'CPU µs/request':>15} {'ratio':>6}")
    trio.run(lambda: measure(depth=arguments.depth, seconds=arguments.seconds, rounds=arguments.rounds))


if __name__ == "__main__":
    main()
