"""`run_against`: a ready-made Hypothesis test of any backend, on the simulated kernel, through crashes.

A run has some **lives**. In each a new backend is made on what storage the last one left, a device is started with it, the whole disk
is read and compared, and groups of operations are carried out. A life ends in a stop, in the death of the process, or in a power
failure, the latter two with operations in flight. In the end the faults stop, the disk is read once more, and nothing may be left.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Collection, Sequence
from typing import Literal, get_args

import attrs
import hypothesis.strategies as st
import trio
import trio.testing
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings

from ublk_trio.backends import Backend, capabilities
from ublk_trio.control import open_control
from ublk_trio.errors import KernelError
from ublk_trio.kernel_sim import Bio, Choices, SimBlockDevice, SimKernel, scheduled_by
from ublk_trio.options import DataMode, DeviceOptions
from ublk_trio.target import open_target
from ublk_trio.testing.durability import BrokenPromiseError, DurabilityModel, Pending
from ublk_trio.testing.storage import Storage
from ublk_trio.testing.strategies import Operation, device_options, kernel_choices, operation_groups
from ublk_trio.uapi import IoOp

Ending = Literal["stop", "kill", "crash"]
_LOGGER = logging.getLogger("ublk_trio")
#: Virtual seconds in which a life must end: nothing waits so long but for ever.
LIFE_SECONDS_MAX = 3600.0
#: Passes of the scheduler between the last group's begin and a death.
PASSES_MAX = 12
#: A loaded machine is no failure. No explanations: they take longer than finding and shrinking the run.
DEFAULT_SETTINGS = hypothesis_settings(
    deadline=None,
    phases=[phase for phase in Phase if phase is not Phase.explain],
    suppress_health_check=[HealthCheck.too_slow],
)
_OPS = {"discard": IoOp.DISCARD, "write_zeroes": IoOp.WRITE_ZEROES, "flush": IoOp.FLUSH, "read": IoOp.READ}
_FAILED_COMMANDS = {"no-memory": errno.ENOMEM, "interrupted": errno.EINTR}


@attrs.frozen(kw_only=True)
class Life:
    """What happens while one process serves the disk."""

    groups: list[list[Operation]]
    options: DeviceOptions
    ending: Ending
    passes: int = 0


def run_against(
    make_backend: Callable[[Storage], Backend],
    *,
    size: int = 16 * 1024,
    storage_bytes: int | None = None,
    faults: Collection[str] | None = None,
    endings: Sequence[Ending] = get_args(Ending),
    settings: hypothesis_settings | None = None,
) -> None:
    """Look for a run in which a disk breaks its promises; raise what went wrong, with the shortest run that Hypothesis found.

    ``make_backend(storage)`` makes the backend of one life; with `Backend.size` ``size`` bytes. It must keep its bytes on ``storage``
    (``storage_bytes`` large, by default ``size``), or all is lost with each life. ``faults`` are names of `kernel_sim.faults`, None
    being what is ordinary; ``endings`` how lives may end. ``settings`` are Hypothesis' (default: `DEFAULT_SETTINGS`).

    Raises `BrokenPromiseError` when bytes are wrong or lost or an operation failed, `SimulatorViolationError` when the server broke
    the kernel's contract, AssertionError when something is left, and whatever the engine raised.
    """
    lives = st.builds(
        Life,
        groups=operation_groups(size),
        options=device_options(),
        ending=st.sampled_from(list(endings)),
        passes=st.integers(0, PASSES_MAX),
    )

    def disk_keeps_its_promises(lives: list[Life], kernel_choices: Choices, storage_choices: Choices) -> None:
        kernel = SimKernel(kernel_choices, faults=faults)
        # One set: when the kernel's faults stop, so do the storage's.
        storage = Storage(storage_bytes or size, choices=storage_choices, faults=kernel.faults)
        run = _Run(make_backend, kernel, storage, size=size)
        with scheduled_by(kernel_choices):
            trio.run(run.main, lives, clock=trio.testing.MockClock(autojump_threshold=0))

    # Choices of their own, or the many small decisions of the kernel would use up those of a crash.
    test = given(
        lives=st.lists(lives, min_size=1, max_size=3), kernel_choices=kernel_choices(), storage_choices=kernel_choices()
    )(disk_keeps_its_promises)
    (settings or DEFAULT_SETTINGS)(test)()


class _Run:
    """One run: a kernel, a storage, and the model of the disk on it."""

    def __init__(
        self,
        make_backend: Callable[[Storage], Backend],
        kernel: SimKernel,
        storage: Storage,
        *,
        size: int,
    ) -> None:
        self.make_backend = make_backend
        self.size = size
        self.kernel = kernel
        self.storage = storage
        self.model: DurabilityModel | None = None
        self.writes = 0
        #: How many of the kernel's kills the storage and the model have gone through.
        self.deaths = 0
        self._copies_may_fall_short = "copy-short" in kernel.faults
        #: In this life the kernel may fail what has data, whatever the backend does.
        self.copies_fall_short = False

    async def main(self, lives: list[Life]) -> None:
        for life in lives:
            await self._live(life)
        self.kernel.faults.clear()
        await self._live(Life(groups=[], options=DeviceOptions(depth=4), ending="stop"))
        self.kernel.check()
        assert not self.kernel.leftovers(), self.kernel.leftovers()

    async def _live(self, life: Life) -> None:
        kills = self.kernel.kills
        level = _LOGGER.level
        try:
            with trio.fail_after(LIFE_SECONDS_MAX):
                await self._serve(life)
        except BaseException as error:
            broken = _find(error, BrokenPromiseError)
            if broken is not None:
                raise broken from None
            failed = {number for fault, number in _FAILED_COMMANDS.items() if fault in self.kernel.faults}
            if isinstance(error, KernelError) and error.errno in failed:
                return
            if self.kernel.kills == kills or _find(error, KeyboardInterrupt):
                raise  # of the dead nothing is known but what they left
        finally:
            _LOGGER.setLevel(level)
        if self.kernel.kills != kills:
            self._die(life)
            # Whoever cleans up is another process, and is let live.
            faults = set(self.kernel.faults)
            self.kernel.faults.discard("server-killed")
            async with open_control(self.kernel) as control:
                for dev_id in self.kernel.device_ids():
                    await control.delete_device(dev_id)
            self.kernel.faults |= faults
        else:
            self.storage = self.storage.restart()

    async def _serve(self, life: Life) -> None:
        backend = self.make_backend(self.storage)
        kills = self.kernel.kills
        self.copies_fall_short = self._copies_may_fall_short and life.options.mode is DataMode.USER_COPY
        with trio.CancelScope() as process:
            async with open_target(self.kernel) as target:
                device = await target.start_device(backend, life.options)
                disk = self.kernel.block_device(device.dev_id)
                # Nothing is known of a disk that could not be read.
                self.kernel.faults.discard("copy-short")
                await self._compare(disk, backend, kills)
                if self.copies_fall_short:
                    self.kernel.faults.add("copy-short")
                for number, group in enumerate(life.groups, 1):
                    begun = [self._begin(disk, operation) for operation in group]
                    if number == len(life.groups) and life.ending != "stop":
                        for _ in range(life.passes):
                            await trio.lowlevel.checkpoint()
                        self._end([one for one in begun if one[1].done], kills)
                        if self.kernel.kills == kills:
                            self.kernel.kill_server()
                            _LOGGER.setLevel(logging.CRITICAL + 1)
                            self._die(life)
                    else:
                        for _, bio in begun:
                            await bio.wait()
                        self._end(begun, kills)
                    if self.kernel.kills != kills:
                        process.cancel()
                        await trio.lowlevel.checkpoint()

    def _die(self, life: Life) -> None:
        """Once for each kill, and at once: what the dead process' tasks still do on their way out changes nothing, and interests nobody."""
        if self.deaths == self.kernel.kills:
            return
        self.deaths = self.kernel.kills
        self.storage = self.storage.crash() if life.ending == "crash" else self.storage.restart()
        if self.model is not None:
            self.model.crash()

    async def _compare(self, disk: SimBlockDevice, backend: Backend, kills: int) -> None:
        """Read all of the disk: in the first life to know it, later to compare."""
        if backend.size != self.size:
            raise ValueError(f"backend {backend} has {backend.size} bytes, run_against was told {self.size}")
        bio = disk.submit(IoOp.READ, 0, self.size)
        pending = self.model.begin_read(0, self.size) if self.model is not None else None
        await bio.wait()
        if pending is not None:
            self._end([(pending, bio)], kills)
        elif bio.result == self.size:
            self.model = DurabilityModel(bytes(bio.data), volatile_cache="flush" in capabilities(backend))
        elif self.kernel.kills == kills:
            raise BrokenPromiseError(f"the first read failed: {bio}")

    def _begin(self, disk: SimBlockDevice, operation: Operation) -> tuple[Pending, Bio]:
        model = self.model
        assert model is not None, "the disk was read"
        if operation.name == "write":
            self.writes += 1
            # No two writes and no two sectors are alike.
            data = b"".join(
                (self.writes << 32 | sector).to_bytes(8, "big") * 64 for sector in range(operation.length // 512)
            )
            return model.begin_write(operation.offset, data, fua=operation.fua), disk.submit(
                IoOp.WRITE, operation.offset, data, fua=operation.fua
            )
        if operation.name == "read":
            pending = model.begin_read(operation.offset, operation.length)
        elif operation.name == "flush":
            pending = model.begin_flush()
        elif operation.name == "discard":
            pending = model.begin_discard(operation.offset, operation.length)
        else:
            pending = model.begin_write_zeroes(operation.offset, operation.length)
        return pending, disk.submit(_OPS[operation.name], operation.offset, operation.length)

    def _end(self, ended: list[tuple[Pending, Bio]], kills: int) -> None:
        model = self.model
        assert model is not None
        for pending, bio in ended:
            assert bio.result is not None
            failed = bio.result < 0
            refused = bio.result == -errno.EOPNOTSUPP or (bio.result == -errno.EPERM and pending.name != "read")
            fell_short = self.copies_fall_short and bio.result == -errno.EIO
            if failed and not refused and not fell_short and self.kernel.kills == kills:
                raise BrokenPromiseError(f"{pending} failed with {errno.errorcode.get(-bio.result, bio.result)}")
            model.end(pending, failed=failed, data=bytes(bio.data) if pending.name == "read" else b"")


def _find(error: BaseException, kind: type[BaseException]) -> BaseException | None:
    """The error of this kind in a tree of groups."""
    if isinstance(error, kind):
        return error
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            found = _find(inner, kind)
            if found is not None:
                return found
    return None
