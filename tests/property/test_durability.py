"""A disk on storage that crashes, under the engine, under a kernel with every fault: what was settled is there again."""

from __future__ import annotations

import trio
from hypothesis import settings

from tests.property.reports import PROFILE, SETTINGS
from ublk_trio import Backend
from ublk_trio.kernel_sim.faults import ORDINARY, Layer, of_layers
from ublk_trio.testing import Storage, run_against

#: A run has several devices, and is as long as some of the state machine's.
EXAMPLES = {"dev": 30, "ci": 300, "soak": 5_000}


class OnStorage(Backend):
    """Its cache is the storage's own; each method suspends, so that requests overtake one another."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.size = storage.size

    async def read(self, offset: int, buffer: memoryview) -> None:
        self.storage.read(offset, buffer)

    async def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        half = len(data) // 1024 * 512
        self.storage.write(offset, data[:half], fua=fua)
        await trio.lowlevel.checkpoint()
        self.storage.write(offset + half, data[half:], fua=fua)

    async def flush(self) -> None:
        await trio.lowlevel.checkpoint()
        self.storage.flush()

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        self.storage.write(offset, bytes(length))


def test_what_is_settled_survives() -> None:
    """Acknowledged before a completed FLUSH or with FUA: there after any crash, in the middle of anything."""
    run_against(
        OnStorage,
        faults=ORDINARY | of_layers(Layer.RING, Layer.COMMANDS, Layer.PROCESS),
        settings=settings(SETTINGS, max_examples=EXAMPLES[PROFILE]),
    )
