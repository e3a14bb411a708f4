"""The ready-made test finds what is wrong with a backend, and nothing where nothing is."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import Phase, settings

from tests.backends.bases import OnStorage
from ublk_trio import Backend, DeviceOptions, Memory, SimKernel, open_target
from ublk_trio.kernel_sim.faults import ORDINARY, Layer, of_layers
from ublk_trio.testing import BrokenPromiseError, Storage, run_against
from ublk_trio.testing.against import DEFAULT_SETTINGS

pytest_plugins = ["ublk_trio.testing.plugin"]

#: The same examples every time, and no shrinking: whether a bug is found must not be luck.
HUNT = settings(DEFAULT_SETTINGS, max_examples=400, derandomize=True, database=None, phases=[Phase.generate])
CHECK = settings(HUNT, max_examples=60)
KERNEL_FAULTS = ORDINARY | of_layers(Layer.RING, Layer.COMMANDS, Layer.PROCESS)


class Honest(OnStorage):
    """Discards, too."""

    def discard(self, offset: int, length: int) -> None:
        self.storage.write(offset, bytes(length))


class WriteThrough(Backend):
    """Without a cache: every write is durable when it is answered."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.size = storage.size

    def read(self, offset: int, buffer: memoryview) -> None:
        self.storage.read(offset, buffer)

    def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        self.storage.write(offset, data, fua=True)


class ForgetsFlush(Honest):
    def flush(self) -> None:
        pass


class ForgetsFua(Honest):
    def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        self.storage.write(offset, data)


class NoCacheAndNotDurable(WriteThrough):
    def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        self.storage.write(offset, data)


class ForgetsTheLastSector(Honest):
    def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        self.storage.write(offset, data[: max(512, len(data) - 512)], fua=fua)


class Fails(Honest):
    def flush(self) -> None:
        raise OSError(28, "no space")


@pytest.mark.parametrize("backend", [Honest, WriteThrough])
def test_a_backend_that_keeps_its_word(backend: type[Honest | WriteThrough]) -> None:
    """Nothing is found, whatever the kernel does, whenever the server dies and power fails."""
    lives = []

    def make(storage: Storage) -> Backend:
        lives.append(storage)
        return backend(storage)

    run_against(make, faults=KERNEL_FAULTS, settings=CHECK)
    assert len(lives) > 2 * CHECK.max_examples, "each run has several lives"


@pytest.mark.parametrize(
    "backend", [ForgetsFlush, ForgetsFua, NoCacheAndNotDurable, ForgetsTheLastSector, Fails], ids=lambda b: b.__name__
)
def test_a_backend_that_does_not(backend: type[Honest | WriteThrough]) -> None:
    """Each of these mistakes is found."""
    with pytest.raises(BrokenPromiseError):
        run_against(backend, settings=HUNT)


def test_the_dead_are_quiet(caplog: pytest.LogCaptureFixture) -> None:
    """What a killed server's tasks say on their way out is no error of anybody's."""
    run_against(Honest, endings=["kill"], settings=settings(CHECK, max_examples=20))
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
    assert logging.getLogger("ublk_trio").level == logging.NOTSET, "only the dead are quiet"


@pytest.mark.parametrize("fault", ["lost-write", "misdirected-write"])
def test_a_backend_on_broken_storage(fault: str) -> None:
    """What the storage loses or misplaces is found above it."""
    with pytest.raises(BrokenPromiseError):
        run_against(Honest, faults={fault}, settings=HUNT)


def test_a_backend_without_storage() -> None:
    """One that lives in memory can be tested too, as long as it is the same one in every life."""
    made: dict[int, Memory] = {}

    def make(storage: Storage) -> Memory:
        # Each run begins with a storage of its own, and hands its faults on from life to life.
        return made.setdefault(id(storage.faults), Memory(storage.size))

    run_against(make, endings=["stop"], settings=settings(CHECK, max_examples=1))
    with pytest.raises(BrokenPromiseError):
        run_against(lambda storage: Memory(storage.size), endings=["stop"], settings=HUNT)


def test_a_wrong_size_is_said() -> None:
    with pytest.raises(ValueError, match="has 1024 bytes, run_against was told 2048"):
        run_against(lambda storage: Memory(1024), size=2048, settings=CHECK)


async def test_fixture(sim_kernel: SimKernel) -> None:
    """The fixture is a kernel to serve disks on."""
    async with open_target(sim_kernel) as target:
        await target.start_device(Memory(1 << 16), DeviceOptions(depth=2))


@pytest.mark.parametrize("sim_kernel", [{"version": (6, 8)}, {"cpus": 1}], indirect=True, ids=["6.8", "1-cpu"])
def test_fixture_takes_arguments(sim_kernel: SimKernel) -> None:
    assert (sim_kernel.version == (6, 8)) is (sim_kernel.cpus == 4)


def test_fixture_notices_what_is_left(tmp_path: Path) -> None:
    """A test that leaves a device behind fails, though it passed."""
    (tmp_path / "test_left.py").write_text(
        """
import trio
from ublk_trio.control import open_control
from ublk_trio.uapi import DevInfo, ANY_DEVICE_ID
pytest_plugins = ["ublk_trio.testing.plugin"]

def test_leaves_a_device(sim_kernel):
    async def main():
        async with open_control(sim_kernel) as control:
            await control.add_device(
                DevInfo(dev_id=ANY_DEVICE_ID, nr_hw_queues=1, queue_depth=1, max_io_buf_bytes=4096)
            )
    trio.run(main)
"""
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        capture_output=True, text=True, check=False, cwd=tmp_path,
        env={"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": ""},
    )  # fmt: skip
    assert "device 0: DEAD" in done.stdout
    assert "1 passed, 1 error" in done.stdout
