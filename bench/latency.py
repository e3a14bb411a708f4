"""How long one request takes, one at a time: ``python bench/latency.py`` as root on a kernel with ublk, brd and loop.

Disks of this process beside two of the kernel's own, used in turn by fio, 4 KiB at random and one request at a time. brd answers in the program
that asks; loop, on a file in memory, hands each request to a thread of the kernel, as ublk hands it to a program. Ratios are of the medians, to
loop's. Compare the rows of one run, not runs: under emulation a change of process costs much more than on hardware.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import trio
from fio import run_fio

from ublk_trio import DeviceOptions, Memory, Null, RealKernel, open_target

SIZE = 64 << 20
LOADS = ("randread", "randwrite")
PERCENTILES = ("50.000000", "99.000000", "99.900000")
#: What ratios are to.
BASE = "loop"


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@contextmanager
def ram_disk() -> Iterator[str]:
    """A disk of the module brd."""
    run("modprobe", "brd", "rd_nr=1", f"rd_size={SIZE >> 10}")
    try:
        yield "/dev/ram0"
    finally:
        run("modprobe", "--remove", "brd")


@contextmanager
def loop_disk() -> Iterator[str]:
    """A loop device on a file in memory."""
    run("modprobe", "loop")
    descriptor = os.memfd_create("bench")
    try:
        os.posix_fallocate(descriptor, 0, SIZE)
        path = run("losetup", "--find", "--show", f"/proc/{os.getpid()}/fd/{descriptor}")
        try:
            yield path
        finally:
            run("losetup", "--detach", path)
    finally:
        os.close(descriptor)


async def percentiles(path: str, load: str, seconds: float) -> list[float]:
    """µs, one for each of PERCENTILES."""
    found = await run_fio(path, load, seconds, "--bs=4k", "--ioengine=psync", "--percentile_list=50:99:99.9")
    return [found["clat_ns"]["percentile"][name] / 1000 for name in PERCENTILES]


async def compare(disks: dict[str, str], load: str, *, rounds: int, seconds: float) -> None:
    """Measure each disk in each round; print the median of the rounds."""
    measured: dict[str, list[list[float]]] = {name: [] for name in disks}
    for name in disks:
        await percentiles(disks[name], "randwrite", 1)  # its memory is there after this
    for _ in range(rounds):
        for name, path in disks.items():
            measured[name].append(await percentiles(path, load, seconds))
    rows = {
        name: [statistics.median(column) for column in zip(*taken, strict=True)] for name, taken in measured.items()
    }
    for name, row in rows.items():
        ratio = row[0] / rows[BASE][0]
        print(f"{load:<10} {name:<15} " + " ".join(f"{value:>9.1f}" for value in row) + f" {ratio:>7.3f}", flush=True)


async def serve_and_compare(rounds: int, seconds: float) -> None:
    with ram_disk() as brd, loop_disk() as loop:
        async with open_target(RealKernel()) as target:
            inline = await target.start_device(Memory(SIZE), DeviceOptions(serve="inline"))
            handed_on = await target.start_device(Memory(SIZE), DeviceOptions(serve="async"))
            null = await target.start_device(Null(SIZE), DeviceOptions(serve="inline"))
            disks = {
                "brd": brd,
                BASE: loop,
                "null": null.path,
                "memory, inline": inline.path,
                "memory, async": handed_on.path,
            }
            for load in LOADS:
                await compare(disks, load, rounds=rounds, seconds=seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each disk")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each turn")
    arguments = parser.parse_args()
    print(f"Linux {platform.release()}, Python {platform.python_version()}, {os.cpu_count()} CPUs, 4 KiB, depth 1, µs")
    print(f"{'load':<10} {'disk':<15} {'median':>9} {'99 %':>9} {'99.9 %':>9} {'ratio':>7}")
    trio.run(serve_and_compare, arguments.rounds, arguments.seconds)


if __name__ == "__main__":
    main()
