"""Scripts on the simulator."""

from __future__ import annotations

from tests.conformance import lockstep
from tests.conformance.lockstep import Record, Script
from tests.conformance.sim_arm import SimArm
from ublk_trio.kernel_sim import SimKernel


def simulated(script: Script, release: tuple[int, int], *, legacy_opcodes: bool = True, cpus: int = 4) -> Record:
    """What the simulator shows, as a release's driver on a machine with so many CPUs."""
    kernel = SimKernel(
        version=release, cpus=cpus, partition_scan=script.scan, legacy_opcodes=legacy_opcodes, paranoid=False
    )
    return lockstep.play(script, SimArm(kernel))
