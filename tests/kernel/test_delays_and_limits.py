"""How late and how fast a real disk is, by the real clock: what was asked for.

A slow machine makes a delay longer and a rate lower, never the other way round. So it is the other way round that is asserted, and
strictly; the mean and the rate that came out are printed. Against a clock that is exact, both bounds are tested in
`tests/backends`.
"""

from __future__ import annotations

import json
from typing import Any

import attrs
import pytest
import trio

from tests.kernel.programs import run
from ublk_trio import Backend, DeviceOptions, Memory, RealKernel, open_target
from ublk_trio.backends import Delay, Limited, Limits
from ublk_trio.backends import limits as limits_module
from ublk_trio.backends.limits import BURST_SECONDS

MIB = 1 << 20
#: Seconds for one test, in an emulated guest.
SECONDS_MAX = 300.0


async def fio(backend: Backend, kind: str, *options: str) -> dict[str, Any]:
    """What fio says of its reads or writes of a disk of that backend."""
    async with open_target(RealKernel()) as target:
        device = await target.start_device(backend, DeviceOptions())
        done = await run(
            *("fio", "--name=load", f"--filename={device.path}", f"--rw=rand{kind}", "--direct=1", "--ioengine=libaio"),
            *("--thread", "--clocksource=clock_gettime", "--allow_file_create=0", "--output-format=json", *options),
        )
    (job,) = json.loads(done.check().stdout)["jobs"]
    said: dict[str, Any] = job[kind]
    return said


# Delays -----------------------------------------------------------------------------------------------------------------

#: Microseconds.
LATENCIES = {"read": 200_000, "write": 400_000}
COUNT = 8
#: What a request waited too long, the next ones may make up for; the first of these may have been the kernel's own.
MADE_UP_US = 100_000


def delayed(read_us: int, write_us: int) -> Delay:
    return Delay(Memory(MIB), avg_read_us=read_us, p99_read_us=read_us, avg_write_us=write_us, p99_write_us=write_us)


async def check_delay(kind: str, backend: Delay) -> str:
    """The mean is not below what was asked for, and a request that nothing else held up not much above it."""
    said = (await fio(backend, kind, "--bs=4K", "--iodepth=1", f"--number_ios={COUNT}"))["lat_ns"]
    asked, mean = LATENCIES[kind], said["mean"] / 1000
    assert said["N"] == COUNT
    assert mean * COUNT >= asked * COUNT - MADE_UP_US
    assert said["min"] / 1000 < 1.5 * asked
    return f" {kind}s: mean {mean / 1000:.1f} ms of {asked / 1000:.0f}"


async def test_delay(capsys: pytest.CaptureFixture[str]) -> None:
    """Reads and writes are as late as they should be, each by its own latency."""
    with trio.fail_after(SECONDS_MAX):
        said = [await check_delay(kind, delayed(LATENCIES["read"], LATENCIES["write"])) for kind in LATENCIES]
    with capsys.disabled():
        print(*said, end=" ")


# Limits -----------------------------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Case:
    """A limit, and requests that keep it busy."""

    limits: Limits
    kind: str
    block: int
    #: Requests.
    allowed_per_second: int


#: So little that an emulated machine keeps up.
CASES = [
    Case(limits=Limits(rw_ios_per_sec=50), kind="read", block=4096, allowed_per_second=50),
    Case(limits=Limits(w_mbytes_per_sec=1), kind="write", block=65536, allowed_per_second=16),
]
PLANTED_CASE = Case(limits=Limits(rw_ios_per_sec=20), kind="read", block=4096, allowed_per_second=20)


async def check_limit(case: Case, seconds: int) -> str:
    """In so many seconds no more is done than their worth and a full bucket."""
    backend = Limited(Memory(MIB), case.limits)
    options = ("--iodepth=16", f"--bs={case.block}", f"--runtime={seconds}", "--time_based")
    said = await fio(backend, case.kind, *options)
    done, took = said["total_ios"], said["runtime"] / 1000
    assert done <= case.allowed_per_second * (took + BURST_SECONDS) + 1
    return f" {case.kind}s: {done / took:.1f} a second of {case.allowed_per_second}"


async def test_limits(capsys: pytest.CaptureFixture[str]) -> None:
    """In ten seconds no more requests, and no more bytes, are done than ten seconds' worth and a full bucket."""
    said: list[str] = []

    async def check(case: Case) -> None:
        said.append(await check_limit(case, 10))

    with trio.fail_after(SECONDS_MAX):
        async with trio.open_nursery() as nursery:
            for case in CASES:
                nursery.start_soon(check, case)
    with capsys.disabled():
        print(*said, end=" ")


# Planted bugs -----------------------------------------------------------------------------------------------------------


async def test_planted_bugs_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes that are as late as reads, and a bucket that takes half, are noticed."""
    with trio.fail_after(SECONDS_MAX):
        with pytest.raises(AssertionError):
            await check_delay("write", delayed(LATENCIES["read"], LATENCIES["read"]))
        real = limits_module._Bucket.take

        def planted(bucket: limits_module._Bucket, moment: float, length: int) -> None:
            real(bucket, moment, length)
            bucket.free_at -= 0.5 / bucket.rate

        monkeypatch.setattr(limits_module._Bucket, "take", planted)
        with pytest.raises(AssertionError):
            await check_limit(PLANTED_CASE, 2)
