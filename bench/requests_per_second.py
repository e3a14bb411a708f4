"""Requests per second of real disks: ``make bench``, or ``python bench/requests_per_second.py`` as root on a kernel with ublk.

Each row is one disk served by ``python -m ublk_trio start`` and read by fio in 4 KiB random direct reads at the given depth. Compare the rows of one
run with each other, not runs: under emulation all of it is some ten times slower than on hardware, and these machines are noisy.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import trio
from fio import run_fio

BACKENDS = ("null:1G", "memory:256M")
WAYS = ("inline", "async")
START_SECONDS_MAX = 120
STOP_SECONDS_MAX = 60


@contextmanager
def served(backend: str, serve: str, depth: int) -> Iterator[tuple[str, int]]:
    """A live disk: its path, and the pid of its server."""
    command = [
        sys.executable,
        "-m",
        "ublk_trio",
        "start",
        "--backend",
        backend,
        "--serve",
        serve,
        "--depth",
        str(depth),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            path = server.stdout.readline().strip()
            if not path:
                raise SystemExit(f"{' '.join(command)} did not start: exit code {server.wait(START_SECONDS_MAX)}")
            yield path, server.pid
        finally:
            server.send_signal(signal.SIGINT)
            if server.wait(STOP_SECONDS_MAX) != 0:
                raise SystemExit(f"{' '.join(command)} stopped with exit code {server.returncode}")


def cpu_seconds(pid: int) -> float:
    """User and system time of a process."""
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def random_reads(path: str, depth: int, seconds: float) -> dict[str, Any]:
    """What fio says of 4 KiB random direct reads."""
    return trio.run(run_fio, path, "randread", seconds, "--bs=4k", "--ioengine=io_uring", f"--iodepth={depth}")


def measure(backend: str, serve: str, depth: int, seconds: float) -> tuple[float, float, float]:
    """Requests per second, mean latency in µs, and the server's CPU time per request in µs."""
    with served(backend, serve, depth) as (path, pid):
        random_reads(path, depth, 1)
        before = cpu_seconds(pid)
        read = random_reads(path, depth, seconds)
        spent = cpu_seconds(pid) - before
        return read["iops"], read["lat_ns"]["mean"] / 1000, spent / read["total_ios"] * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=int, default=128, help="requests in flight")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each row")
    arguments = parser.parse_args()
    print(
        f"Linux {platform.release()}, Python {platform.python_version()}, {os.cpu_count()} CPUs, depth {arguments.depth}"
    )
    print(
        f"{'backend':<12} {'serve':<7} {'requests/s':>11} {'latency µs':>11} {'server CPU µs/request':>22} {'ratio':>6}"
    )
    first = 0.0
    for backend in BACKENDS:
        for serve in WAYS:
            rate, latency, cpu = measure(backend, serve, arguments.depth, arguments.seconds)
            first = first or rate
            print(
                f"{backend:<12} {serve:<7} {rate:>11.0f} {latency:>11.0f} {cpu:>22.1f} {rate / first:>6.2f}", flush=True
            )


if __name__ == "__main__":
    main()
