"""The simulated arm: the same verbs as `worker.Worker`, on processes of a `SimKernel`."""

from __future__ import annotations

import errno
import re
import struct
from collections.abc import Iterator
from typing import Any, Final

from tests.conformance.worker import DESCRIPTOR_BYTES, GET_DATA, SLOT_BYTES, SLOTS, USER_ID, runs
from ublk_trio.errors import KernelError
from ublk_trio.kernel_sim import SimKernel
from ublk_trio.kernel_sim.block.bio import Bio
from ublk_trio.kernel_sim.block.device import SimBlockFile
from ublk_trio.kernel_sim.process import ByteFile, CharFile, SimFile, SimMapping, SimProcess, SimTask
from ublk_trio.kernel_sim.uring import SimUring, Sqe, UringOp
from ublk_trio.uapi import IoOp

_BAD_ADDRESS: Final = 0x1000
_OPS: Final = {
    "read": IoOp.READ,
    "write": IoOp.WRITE,
    "fua": IoOp.WRITE,
    "flush": IoOp.FLUSH,
    "discard": IoOp.DISCARD,
    "zeroes": IoOp.WRITE_ZEROES,
    "punch": IoOp.WRITE_ZEROES,
    "zone-open": IoOp.ZONE_OPEN,
    "zone-close": IoOp.ZONE_CLOSE,
    "zone-finish": IoOp.ZONE_FINISH,
    "zone-reset": IoOp.ZONE_RESET,
}


class _Application:
    """One operation of the application; a FUA write is a write and, as in the system call, a flush after it."""

    def __init__(
        self, disk: SimBlockFile, token: int, kind: str, offset: int, data: memoryview | int, cpu: int
    ) -> None:  # fmt: skip
        self.token = token
        self.kind = kind
        self._disk = disk
        self._cpu = cpu
        self._written = 0
        op = _OPS[kind]
        self._bio: Bio = disk.submit(
            op, offset, data, fua=kind == "fua", no_unmap=kind == "zeroes", no_fallback=kind == "punch", cpu=cpu
        )

    def event(self) -> list[Any] | None:
        """What it ended with, if it has."""
        if not self._bio.done:
            return None
        result = self._bio.result
        assert result is not None
        if self.kind == "fua" and self._bio.op == IoOp.WRITE and result > 0:
            self._written = result
            self._bio = self._disk.submit(IoOp.FLUSH, cpu=self._cpu)
            return self.event()
        data = runs(bytes(self._bio.data)[:result]) if self.kind == "read" and result >= 0 else ""
        if self.kind == "fua" and result >= 0:
            result = self._written
        elif self.kind not in ("read", "write"):
            result = min(result, 0)
        return ["app", self.token, result, data]


class SimWorker:
    """One simulated process, with `worker.Worker`'s verbs."""

    def __init__(self, kernel: SimKernel) -> None:
        self.kernel = kernel
        self.process: SimProcess = kernel.process()
        self.arena = bytearray(SLOTS * SLOT_BYTES)
        self.base: int = self.process.memory.map(self.arena)
        self.char: CharFile | None = None
        self.control_file: SimFile | None = None
        self.maps: dict[int, SimMapping] = {}
        self.tasks: dict[str, SimTask] = {}
        self.rings: dict[str, SimUring] = {}
        self.control_rings: dict[bool, SimUring] = {}
        self.main = self.process.task()
        self.io: dict[int, tuple[int, int, int, int]] = {}
        self.batches: dict[int, tuple[int, int]] = {}
        self.buffers: dict[int, bytearray] = {}
        self.addresses: dict[int, int] = {}
        self.applications: list[_Application] = []
        self.disks: dict[str, SimBlockFile] = {}
        self.refused: list[list[Any]] = []
        self.memory: ByteFile | None = None

    def call(self, verb: str, *arguments: Any) -> Any:
        try:
            return getattr(self, "do_" + verb)(*arguments)
        except (KernelError, OSError) as error:
            return -(error.errno or errno.EIO)

    def do_user(self) -> int:
        self.process.uid = self.process.gid = USER_ID
        self.process.privileged = False
        return 0

    def do_grant(self, path: str) -> int:
        """A simulated char device belongs to its device's owner anyway."""
        return 0

    def do_getpid(self) -> int:
        return self.process.pid

    def do_shmem(self, slot: int) -> int:
        return self.base + slot * SLOT_BYTES

    # ------------------------------------------------------------------ the char device

    def do_open(self, path: str) -> int:
        opened = self.process.open(path)
        assert isinstance(opened, CharFile)
        self.char = opened
        return 0

    def _char(self) -> CharFile:
        if self.char is None:
            raise OSError(errno.EBADF, "no char device is open")
        return self.char

    def do_close(self) -> int:
        self._char().close()
        self.char = None
        return 0

    def do_mmap(self, queue_id: int, offset: int, length: int, writable: bool, keep: bool) -> int:
        mapped = self._char().mmap(offset, length, writable=writable)
        if keep:
            self.maps[queue_id] = mapped
        else:
            mapped.unmap()
        return 0

    def do_munmap(self, queue_id: int) -> int:
        if queue_id not in self.maps:
            return -errno.EINVAL
        self.maps.pop(queue_id).unmap()
        return 0

    def do_stride(self, stride: int) -> int:
        return 0

    def do_descriptor(self, queue_id: int, tag: int) -> str:
        return self.maps[queue_id].read(tag)[:DESCRIPTOR_BYTES].hex() if queue_id in self.maps else ""

    def do_peek(self, slot: int, length: int) -> str:
        return runs(self.arena[slot * SLOT_BYTES : slot * SLOT_BYTES + length])

    def do_pread(self, offset: int, length: int) -> str:
        return runs(self._char().pread(length, offset))

    def do_pwrite(self, offset: int, length: int, fill: int) -> int:
        return self._char().pwrite(bytes([fill]) * length, offset)

    def do_pwritten(self, offset: int, data: str) -> int:
        return self._char().pwrite(bytes.fromhex(data), offset)

    # ------------------------------------------------------------------ rings

    def do_task(self, name: str, admin: bool) -> int:
        self.tasks[name] = self.process.task()
        return 0

    def do_ring(self, name: str, sq_entries: int, cq_entries: int, sqe128: bool, fixed: int) -> int:
        ring = SimUring(self.tasks[name], sq_entries=sq_entries, cq_entries=cq_entries or None, sqe128=sqe128)
        self.rings[name] = ring
        if fixed:
            ring.register_buffers(fixed)
        return 0

    def do_closering(self, name: str) -> int:
        if name in self.rings:
            self.rings.pop(name).close()
        return 0

    def address(self, where: int | str) -> int:
        if where == "bad":
            return _BAD_ADDRESS
        return int(where) if isinstance(where, str) else self.base + where * SLOT_BYTES

    def _submit(self, by: str, ring: str, sqe: Sqe) -> int:
        on = self.rings.get(ring)
        if on is None:
            return -errno.EBADF
        on.submit([sqe], task=self.tasks[by])
        return 0

    def do_io(
        self, by: str, ring: str, token: int, cmd_op: int, queue_id: int, tag: int, result: int, where: int | str,
        sqe_addr: int, wide: bool,
    ) -> int:  # fmt: skip
        payload = struct.pack("=HHiQ", queue_id, tag, result, self.address(where))
        self.io[token] = (cmd_op & 0xFF, queue_id, tag, where if isinstance(where, int) else -1)
        sqe = Sqe(
            opcode=UringOp.URING_CMD, user_data=token, file=self.char, cmd_op=cmd_op, payload=payload, addr=sqe_addr
        )
        return self._submit(by, ring, sqe)

    def do_batch(
        self, by: str, ring: str, token: int, cmd_op: int, payload: str, where: int | str, elements: str, group: int,
        multishot: bool,
    ) -> int:  # fmt: skip
        data = bytes.fromhex(elements)
        if isinstance(where, int):
            self.arena[where * SLOT_BYTES : where * SLOT_BYTES + len(data)] = data
        sqe = Sqe(
            opcode=UringOp.URING_CMD, user_data=token, file=self.char, cmd_op=cmd_op, payload=bytes.fromhex(payload),
            addr=0 if multishot else self.address(where), length=0 if multishot else len(data), buf_index=group,
            buffer_select=multishot, multishot=multishot,
        )  # fmt: skip
        return self._submit(by, ring, sqe)

    def do_provide(self, name: str, group: int, slot: int, count: int, length: int) -> int:
        start = self.base + slot * SLOT_BYTES
        self.batches[group] = (slot * SLOT_BYTES, length)
        self.rings[name].register_buffer_ring(group, [(start + n * length, length) for n in range(count)])
        return 0

    def do_fixed(self, by: str, token: int, write: bool, index: int, where: str, offset: int, length: int) -> int:
        assert where == "memory"
        sqe = Sqe(
            opcode=UringOp.WRITE_FIXED if write else UringOp.READ_FIXED, user_data=token, file=self._memory(),
            offset=offset, length=length, buf_index=index,
        )  # fmt: skip
        return self._submit(by, by, sqe)

    def _memory(self) -> ByteFile:
        if self.memory is None:
            self.memory = ByteFile(self.process, bytearray())
        return self.memory

    def do_memory(self, fill: int, length: int) -> int:
        self._memory().data[:length] = bytes([fill]) * length
        return length

    def do_memory_read(self, length: int) -> str:
        return runs(self._memory().data[:length])

    def do_cancel(self, by: str, token: int, target: int) -> int:
        return self._submit(
            by, by, Sqe(opcode=UringOp.ASYNC_CANCEL, user_data=token, file=None, cancel_user_data=target)
        )

    def do_fill(self, slot: int, fill: int, length: int) -> int:
        self.arena[slot * SLOT_BYTES : slot * SLOT_BYTES + length] = bytes([fill]) * length
        return 0

    # ------------------------------------------------------------------ control commands

    def do_control(
        self, token: int, cmd_op: int, dev_id: int, queue_id: int, length: int, where: str, data: int,
        path_length: int, sent: str, wide: bool,
    ) -> int:  # fmt: skip
        if self.control_file is None:
            self.control_file = self.process.open("/dev/ublk-control")
        ring = self.control_rings.get(wide)
        if ring is None:
            ring = self.control_rings[wide] = SimUring(self.main, sq_entries=16, sqe128=wide)
        buffer = bytearray.fromhex(sent)
        self.buffers[token] = buffer
        address = 0 if where != "bad" else _BAD_ADDRESS
        if where == "buffer" and buffer:
            address = self.addresses[token] = self.process.memory.map(buffer)
        payload = struct.pack("=IHHQQHHI", dev_id, queue_id, length, address, data, path_length, 0, 0)
        ring.submit(
            [Sqe(opcode=UringOp.URING_CMD, user_data=token, file=self.control_file, cmd_op=cmd_op, payload=payload)]
        )
        return 0

    # ------------------------------------------------------------------ operations on disks

    def do_diskopen(self, path: str) -> int:
        disk = self.kernel.block_device(_dev_id(path))
        if not disk.exists:
            return -errno.ENOENT
        self.disks[path] = disk.open()
        return 0

    def do_diskclose(self, path: str) -> int:
        if path not in self.disks:
            return -errno.EBADF
        self.disks.pop(path).close()
        return 0

    def do_app(
        self, token: int, kind: str, path: str, offset: int, length: int, fill: int, cpu: int, place: int
    ) -> int:  # fmt: skip
        if path not in self.disks:
            self.refused.append(["app", token, -errno.EBADF, ""])
            return 0
        data: memoryview | int = length
        if kind in ("read", "write", "fua"):
            data = memoryview(bytearray(length) if place < 0 else self.arena)[max(place, 0) :][:length]
            if kind != "read" or place >= 0:
                data[:] = bytes([fill]) * length
        self.applications.append(_Application(self.disks[path], token, kind, offset, data, cpu))
        return 0

    # ------------------------------------------------------------------ what has happened

    def do_poll(self) -> list[list[Any]]:
        return list(self._events())

    def _events(self) -> Iterator[list[Any]]:
        for ring in self.control_rings.values():
            for cqe in ring.reap():
                buffer = self.buffers.pop(cqe.user_data)
                if cqe.user_data in self.addresses:
                    self.process.memory.unmap(self.addresses.pop(cqe.user_data))
                yield ["ctl", cqe.user_data, cqe.result, buffer.hex()]
        for name, ring in self.rings.items():
            for cqe in ring.reap():
                yield self._completion(name, cqe.user_data, cqe.result, cqe.flags)
        yield from self.refused
        self.refused.clear()
        for application in list(self.applications):
            event = application.event()
            if event is not None:
                self.applications.remove(application)
                yield event

    def _completion(self, name: str, token: int, result: int, flags: int) -> list[Any]:
        descriptor = data = ""
        if token in self.io and result in (0, 1):
            number, queue_id, tag, slot = self.io[token]
            if number <= GET_DATA and queue_id in self.maps:
                descriptor = self.do_descriptor(queue_id, tag)
                sectors = int.from_bytes(bytes.fromhex(descriptor)[4:8], "little")
                if descriptor[:2] in ("01", "0d") and slot >= 0 and not result:
                    data = self.do_peek(slot, min(SLOT_BYTES, sectors << 9))
        elif flags & 1 and result > 0 and self.batches:
            start, length = next(iter(self.batches.values()))
            at = start + (flags >> 16) * length
            data = bytes(self.arena[at : at + result]).hex()
        return ["cqe", name, token, result, flags, descriptor, data]


def _dev_id(path: str) -> int:
    found = re.search(r"\d+$", path)
    assert found is not None, path
    return int(found[0])


class SimArm:
    """A simulated machine for one script."""

    def __init__(self, kernel: SimKernel) -> None:
        self.kernel = kernel
        self._workers: dict[str, SimWorker] = {}

    @property
    def cpus(self) -> int:
        return self.kernel.cpus

    def spawn(self, process: str) -> None:
        self._workers[process] = SimWorker(self.kernel)

    def kill(self, process: str) -> None:
        self._workers.pop(process).process.exit()

    def call(self, process: str, verb: str, *arguments: Any) -> Any:
        return self._workers[process].call(verb, *arguments)

    def settle(self) -> None:
        """Whatever can happen has happened."""
