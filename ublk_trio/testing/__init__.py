"""For tests of disks and of ublk servers, on the simulated kernel: storage that crashes, what must survive it, and a ready-made test.

Needs Hypothesis (``pip install ublk_trio[test]``); `ublk_trio` itself does not import it.
"""

from ublk_trio.testing.against import Ending, run_against
from ublk_trio.testing.durability import BrokenPromiseError, DurabilityModel
from ublk_trio.testing.storage import SECTOR_BYTES, Storage
from ublk_trio.testing.strategies import (
    Operation,
    TapeChoices,
    device_options,
    kernel_choices,
    operation_groups,
    operations,
)

__all__ = [
    "SECTOR_BYTES",
    "BrokenPromiseError",
    "DurabilityModel",
    "Ending",
    "Operation",
    "Storage",
    "TapeChoices",
    "device_options",
    "kernel_choices",
    "operation_groups",
    "operations",
    "run_against",
]
