"""Mutants that no test can tell from the module as it is, each with the reason. One that is found after all must go from here."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

#: By module: the mutant as `python -m tests.proof.mutate` prints it, and why it is as good as the original.
EXPLAINED: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "ublk_trio.kernel_sim.registered": {
            "BufferTable.unregister: return 0 -> return 1": "UNREGISTER_IO_BUF turns 0 into ENDED, which is 1",
        },
        "ublk_trio.kernel_sim.tag": {
            "SimTag.reset: self.address = 0 -> self.address = 1": "a tag gets its address by FETCH_REQ before anything reads it",
            "SimTag.reset: self.address = 0 -> self.address = -1": "a tag gets its address by FETCH_REQ before anything reads it",
            "SimTag.reset: self.poisoned_bytes = -1 -> self.poisoned_bytes = -2": "any negative number says the same",
        },
    }
)
