"""`SimKernel`: the whole simulated machine, as far as ublk goes.

**Supported.** `ring.Kernel` whole; several devices, several control rings; commands that the kernel holds, resumed as
soon as what they wait for has come, in an order that Choices decides. **Rejected.** See `control`, `queue`, `block`.
**Differs from Linux.** See there; besides: nothing takes time but `SimKernel.let_time_pass`, and one server process opens every char device, with
`server_pid`.

Nothing here is a task. What a call changes is worked off, to the end, before the call returns: `changed` resumes held
commands until none can go on.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING

import trio

from ublk_trio.errors import KernelError, errno_text
from ublk_trio.kernel_sim import char_device
from ublk_trio.kernel_sim import faults as fault_table
from ublk_trio.kernel_sim.block import Bio, SimBlockDevice
from ublk_trio.kernel_sim.call import Caller, Identity
from ublk_trio.kernel_sim.checks import SimulatorViolationError, Violation
from ublk_trio.kernel_sim.choices import Choices, FirstChoice
from ublk_trio.kernel_sim.clock import SimClock
from ublk_trio.kernel_sim.device import SimDevice
from ublk_trio.kernel_sim.event_log import NO_DEVICE, EventLog
from ublk_trio.kernel_sim.process import CharFile, SimProcess
from ublk_trio.kernel_sim.ring import SimCharDevice, SimControlRing
from ublk_trio.kernel_sim.version import MODELLED, KernelVersion
from ublk_trio.kernel_sim.waits import Held, SimMutex, Steps
from ublk_trio.kernel_sim.worker import SimWorker
from ublk_trio.uapi import DevInfo, Feature

if TYPE_CHECKING:
    from ublk_trio.kernel_sim.uring import SimUring

_PAGE_SIZE = 4096
#: Above Linux's highest pid, and so never the server's of the engine.
_FIRST_PID = 1 << 22


class SimKernel:
    """A kernel with a ublk driver and a block layer, in this process. Implements `ublk_trio.ring.Kernel`.

    ``choices`` decides whatever a kernel is free to decide (default: calm). ``version`` is the release it plays,
    ``features`` (default: all that the release has and the simulator models) what its driver offers. ``cpus`` bounds
    the number of queues. ``paranoid`` poisons buffers that the kernel owns. ``log=True`` keeps `log`, every event of
    the run and every decision of ``choices`` (see `EventLog`). ``devices_max`` is the driver's ``ublks_max``. ``faults``
    are names of `faults.FAULTS`; None is what a healthy kernel may do.
    """

    def __init__(
        self,
        choices: Choices | None = None,
        *,
        version: KernelVersion | tuple[int, int] = (7, 3),
        cpus: int = 4,
        features: Feature | None = None,
        paranoid: bool = True,
        partition_scan: bool = True,
        log: bool = False,
        privileged: bool = True,
        legacy_opcodes: bool = True,
        devices_max: int = 64,
        faults: Collection[str] | None = None,
    ) -> None:
        assert cpus > 0
        self.choices = choices if choices is not None else FirstChoice()
        self.version = KernelVersion.of(version)
        #: Moved by `let_time_pass` alone.
        self.clock = SimClock()
        self.cpus = cpus
        offered = self.version.features & MODELLED
        self.features = offered if features is None else offered & features
        self.paranoid = paranoid
        self.partition_scan = partition_scan
        #: Whoever calls, where nothing says which process it is: root or not, and whom its devices belong to.
        self.privileged = privileged
        self.uid = self.gid = 0 if privileged else 1000
        #: Points of `control_faults.CONTROL_FAULTS` where Choices may let a control command fail.
        self.control_faults: frozenset[str] = frozenset()
        self.legacy_opcodes = legacy_opcodes
        self.devices_max = devices_max
        #: What may go wrong now. May change at any time: emptied, nothing more goes wrong.
        self.faults = fault_table.enabled(faults)
        #: How often the whole server was killed.
        self.kills = 0
        #: The process that opens char devices; START_DEV must name it.
        self.server_pid = os.getpid()
        self.log = EventLog() if log else None
        if self.log is not None:
            self.choices.log = self.log
        self.violations: list[Violation] = []
        #: What is no breach, but worth knowing when a run hangs.
        self.notes: list[str] = []
        self.devices: dict[int, SimDevice] = {}
        #: Serialises ADD_DEV and DEL_DEV of all devices.
        self.devices_mutex = SimMutex("of all devices")
        self.control_rings: list[SimControlRing] = []
        #: The server's, as long as they run; and CPUs on which none can be started. May be filled at any time.
        self.workers: list[SimWorker] = []
        self.offline_cpus: set[int] = set()
        #: Those of all processes.
        self.raw_rings: list[SimUring] = []
        self._held: list[Held] = []
        self._dropped: deque[Callable[[], None]] = deque()
        self._settling = False
        self._bios = 0
        self._cpu = 0
        self._threads = 0
        self._next_pid = _FIRST_PID

    # ------------------------------------------------------------------ ring.Kernel

    @property
    def name(self) -> str:
        return f"simulated Linux {self.version}"

    @property
    def page_size(self) -> int:
        return _PAGE_SIZE

    def open_control(self) -> AbstractAsyncContextManager[SimControlRing]:
        return self._open_control()

    @contextlib.asynccontextmanager
    async def _open_control(self) -> AsyncIterator[SimControlRing]:
        await trio.lowlevel.checkpoint()
        ring = SimControlRing(self)
        self.control_rings.append(ring)
        try:
            yield ring
        finally:
            ring.close()

    def open_worker(self, cpu: int) -> SimWorker:
        # A process's first thread has its pid.
        self._threads += 1
        return SimWorker(self, cpu, self.server_pid + self._threads)

    async def open_char_device(self, info: DevInfo, *, ioctl_encoded: bool) -> SimCharDevice:
        """`ring.Kernel.open_char_device`. Raises `KernelError`: ENOENT without such a device, EACCES, EBUSY while it has an opener."""
        await trio.lowlevel.checkpoint()
        return SimCharDevice(self.char_to_open(info.dev_id, self.identity), ioctl_encoded=ioctl_encoded)

    def char_to_open(self, dev_id: int, caller: Caller) -> SimDevice:
        """The device whose char device somebody opens now. Raises `KernelError`: ENOENT, EACCES, EBUSY."""
        device = self.devices.get(dev_id)
        refused = char_device.check_open(device, caller)
        if refused:
            text = f"cannot open {self.char_path(dev_id)}: {errno_text(refused)}"
            raise KernelError(-refused, f"{text}: it has an opener" if refused == -errno.EBUSY else text)
        assert device is not None
        return device

    def process(self, pid: int | None = None, *, privileged: bool = True, uid: int = 0, gid: int = 0) -> SimProcess:
        """A new process, for raw access to the driver. Without ``pid`` it gets one that nobody else has."""
        if pid is None:
            pid = self._next_pid
            self._next_pid += 1000
        return SimProcess(self, pid, privileged=privileged, uid=uid, gid=gid)

    def device_ids(self) -> list[int]:
        return sorted(self.devices)

    def disk_path(self, dev_id: int) -> str:
        return f"/dev/ublkb{dev_id}"

    def disk_usable(self, dev_id: int) -> bool:
        return True  # only char devices have an owner here

    def disk_users(self, dev_id: int) -> list[str]:
        device = self.devices.get(dev_id)
        openers = device.disk.openers if device is not None and device.disk is not None else 0
        return [f"{openers} simulated programs"] if openers else []

    def char_path(self, dev_id: int) -> str:
        """``/dev/ublkcN``."""
        return f"/dev/ublkc{dev_id}"

    # ------------------------------------------------------------------ what tests look at

    def block_device(self, dev_id: int) -> SimBlockDevice:
        """The disk as an application sees it. It need not exist yet."""
        return SimBlockDevice(self, dev_id)

    def check(self) -> None:
        """Raise `SimulatorViolationError` if a server broke the contract so far."""
        if self.violations:
            raise SimulatorViolationError(self.violations)

    def held_commands(self) -> list[str]:
        """What the kernel holds, and what each waits for."""
        return [str(held) for held in self._held]

    def leftovers(self) -> list[str]:
        """Names everything that a clean server would have left behind nothing of."""
        found = [f"held command: {held}" for held in self.held_commands()]
        found += ["open control ring"] * len(self.control_rings)
        found += [f"running {worker}" for worker in self.workers]
        found += [f"open {ring}" for ring in self.raw_rings]
        for dev_id, device in sorted(self.devices.items()):
            found.append(f"device {dev_id}: {device.info.state.name}")
            if device.char is not None:
                found.append(f"open char device: {self.char_path(dev_id)}")
            found += [f"open ring: {ring}" for ring in device.rings]
            for disk in (device.disk, device.detached_disk):
                if disk is not None:
                    found += [f"unfinished operation: {bio}" for bio in sorted(disk.bios, key=lambda bio: bio.number)]
        return found

    def let_time_pass(self, seconds: float) -> None:
        """The machine's clock goes on; what has a time limit meets it. Nothing else moves this clock."""
        if self.log is not None:
            self.log.append(("time", seconds))
        self.clock.advance(seconds)
        self.changed()

    def crash_server(self, dev_id: int) -> None:
        """The device's server is killed: its rings and its char device close. Whoever still waits on a ring gets `trio.ClosedResourceError`."""
        device = self.devices[dev_id]
        if self.log is not None:
            self.log.append(("crash", dev_id))
        if not isinstance(device.char, CharFile):
            device.server_died = True
        for ring in list(device.rings):
            ring.close()
        if device.char is not None:
            device.char.crash()

    def kill_server(self) -> None:
        """The server's process is killed, whatever it was doing: every ring, control ring and char device closes."""
        self.kills += 1
        for device in list(self.devices.values()):
            if device.char_in_use:
                self.crash_server(device.dev_id)
        for ring in list(self.control_rings):
            ring.close()

    # ------------------------------------------------------------------ for the other modules

    @property
    def identity(self) -> Identity:
        """Who calls, where nothing else says so."""
        return Identity(pid=self.server_pid, uid=self.uid, gid=self.gid, privileged=self.privileged)

    def strikes(self, fault: str, options: int = 2) -> bool:
        """Whether a fault happens here: if it is enabled, one of so many options (the last) says so."""
        strikes = fault in self.faults and self.choices.choose(fault, options) == options - 1
        if strikes and self.log is not None:
            self.log.append(("fault", fault, NO_DEVICE, ""))
        return strikes

    def violation(self, kind: str, dev_id: int, queue_id: int, tag: int, text: str) -> None:
        """Record that a server broke the contract."""
        if self.log is not None:
            self.log.append(("violation", kind, dev_id, queue_id, tag))
        self.violations.append(Violation(kind=kind, dev_id=dev_id, queue_id=queue_id, tag=tag, text=text))

    def new_bio(self, op: int, offset: int, length: int, data: memoryview) -> Bio:
        """An operation, numbered in the order of arrival."""
        self._bios += 1
        if self.log is not None:
            self.log.append(("bio", self._bios, op, offset, length))
        return Bio(self._bios, op, offset, length, data)

    def next_cpu(self) -> int:
        """On a calm machine applications run on one CPU after the other."""
        self._cpu += 1
        return (self._cpu - 1) % self.cpus

    def free_id(self) -> int:
        """The lowest device id that is free."""
        return next(dev_id for dev_id in range(len(self.devices) + 1) if dev_id not in self.devices)

    def put_device(self, device: SimDevice) -> None:
        """A reference to the device went: free it if it was deleted and that was the last."""
        if (
            device.removed
            and not device.references
            and not device.char_in_use
            and not device.used
            and self.devices.get(device.dev_id) is device
        ):
            del self.devices[device.dev_id]
            if self.log is not None:
                self.log.append(("deleted", device.dev_id))
            self.changed()

    def run(
        self,
        name: str,
        steps: Steps,
        *,
        ring: object = None,
        on_done: Callable[[int], None] = lambda result: None,
    ) -> None:
        """Start a command or a piece of kernel work and carry it as far as it goes now."""
        try:
            wait = next(steps)
        except StopIteration as stop:
            on_done(stop.value)
        else:
            self._held.append(Held(name, steps, wait, ring, on_done))
        self.changed()

    def changed(self) -> None:
        """Something changed: let the held commands go on that can."""
        if self._settling or not (self._held or self._dropped):
            return
        self._settling = True
        try:
            while True:
                while self._dropped:
                    self._dropped.popleft()()
                ready = [held for held in self._held if held.wait.ready()]
                if not ready:
                    return
                self._resume(ready[self.choices.choose("settle", len(ready))], interrupted=False)
        finally:
            self._settling = False

    @contextlib.contextmanager
    def undisturbed(self) -> Iterator[None]:
        """What is done meanwhile is done before any held command goes on."""
        settling, self._settling = self._settling, True
        try:
            yield
        finally:
            self._settling = settling
            self.changed()

    def drop(self, put: Callable[[], None]) -> None:
        """Give up a reference, though not before the work under way is done."""
        self._dropped.append(put)

    def interrupt(self, ring: object, *, on_done: Callable[[int], None] | None = None) -> None:
        """The interruptible waits of a control ring's commands end: of all, or of the one with that ``on_done``."""
        for held in [held for held in self._held if held.ring is ring and held.wait.interruptible]:
            if held in self._held and on_done in (None, held.on_done):
                self._resume(held, interrupted=True)
        self.changed()

    def _resume(self, held: Held, *, interrupted: bool) -> None:
        try:
            held.wait = held.steps.send(interrupted)
        except StopIteration as stop:
            self._held.remove(held)
            held.on_done(stop.value)
