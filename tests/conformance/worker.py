"""A process of the real arm: does what it is told over a socket, one JSON list a message, and can be killed at any time.

Run as ``python -S -E -m tests.conformance.worker FD`` it is the *nursery* of all others: a small interpreter without
threads that forks a worker for each socket that it is handed (a fork costs milliseconds where a new interpreter costs
seconds, in an emulated guest). A worker's main thread talks and reaps; each task of a script is a thread of its own
that only submits, because the kernel knows a daemon by its thread. Operations on disks are threads as well: they may
hang for as long as the disk does.

A request is ``[verb, argument...]`` and is answered with ``[result, events]``. A result is a number, negative for an
errno, or what the verb says; ``poll`` only asks for events, what has happened since: ``["cqe", task, token, result, flags, descriptor,
data]``, ``["ctl", token, result, buffer]``, ``["app", token, result, data]``. Data are runs of equal bytes (`runs`).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import mmap
import os
import queue
import signal
import socket
import struct
import sys
import threading
from typing import Any

from tests.conformance.raw_uring import SQE_BUFFER_SELECT, URING_CMD_MULTISHOT, Ring, sqe

SLOT_BYTES = 1 << 16
SLOTS = 32
MESSAGE_BYTES_MAX = 1 << 17
SUBMIT_SECONDS_MAX = 5.0
USER_ID = 65534
_URING_CMD = 46
_NOP, _CANCEL, _READ_FIXED, _WRITE_FIXED = 0, 14, 4, 5
DESCRIPTOR_BYTES = 24
GET_DATA = 0x22
_BLKDISCARD, _BLKZEROOUT = 0x1277, 0x127F
_ZONE_IOCTLS = {
    "zone-reset": 0x40101283,
    "zone-open": 0x40101286,
    "zone-close": 0x40101287,
    "zone-finish": 0x40101288,
}
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_CAP_SYS_ADMIN = 21
_CAPABILITY_VERSION = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


def runs(data: bytes | bytearray | memoryview) -> str:
    """Bytes as ``aa*4096 00*512``; a hash stands for what has too many runs."""
    data = bytes(data)
    found: list[str] = []
    start = 0
    while start < len(data):
        byte = data[start : start + 1]
        rest = data[start:].lstrip(byte)
        length = len(data) - start - len(rest)
        found.append(f"{byte.hex()}*{length}")
        if len(found) > 12:
            return f"{len(data)} bytes, crc {_checksum(data):08x}"
        start += length
    return " ".join(found)


def _checksum(data: bytes) -> int:
    import zlib

    return zlib.crc32(data)


def _drop_admin() -> None:
    """This thread gives up CAP_SYS_ADMIN: the kernel then reads no partition table through a disk that it serves."""
    header = struct.pack("=Ii", _CAPABILITY_VERSION, 0)
    sets = ctypes.create_string_buffer(24)
    _libc.capget(header, sets)
    words = list(struct.unpack("=6I", sets.raw))
    words[0] &= ~(1 << _CAP_SYS_ADMIN)
    _libc.capset(header, struct.pack("=6I", *words))


class Task(threading.Thread):
    """A thread that submits to its own ring, or to another task's, and does nothing else."""

    def __init__(self, *, admin: bool) -> None:
        super().__init__(daemon=True)
        self.admin = admin
        self.work: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self.answers: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.ring: Ring | None = None
        self.start()

    def run(self) -> None:
        if not self.admin:
            _drop_admin()
        while True:
            function, *arguments = self.work.get()
            try:
                self.answers.put(function(*arguments))
            except OSError as error:
                self.answers.put(-(error.errno or 1))

    def call(self, *work: Any) -> int | None:
        """Do it in this thread; None when that takes too long, and the task is of no use any more."""
        self.work.put(work)
        try:
            return self.answers.get(timeout=SUBMIT_SECONDS_MAX)
        except queue.Empty:
            return None


class Worker:
    """One process of a script."""

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self.tasks: dict[str, Task] = {}
        self.arena = mmap.mmap(-1, SLOTS * SLOT_BYTES)
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(self.arena))
        self.char = -1
        self.maps: dict[int, mmap.mmap] = {}
        self.io: dict[int, tuple[int, int, int, int]] = {}
        self.batches: dict[int, tuple[int, int]] = {}
        self.control: Ring | None = None
        self.narrow: Ring | None = None
        self.control_fd = -1
        self.buffers: dict[int, bytearray] = {}
        self.disks: dict[str, int] = {}
        self.done: queue.SimpleQueue[list[Any]] = queue.SimpleQueue()
        self.operating = 0

    def serve(self) -> None:
        while True:
            message = self.channel.recv(MESSAGE_BYTES_MAX)
            if not message:
                return
            verb, *arguments = json.loads(message)
            try:
                answer = getattr(self, "do_" + verb)(*arguments)
            except OSError as error:
                answer = -(error.errno or 1)
            self.channel.send(json.dumps([answer, self.events()]).encode())

    # ------------------------------------------------------------------ the char device

    def do_open(self, path: str) -> int:
        descriptor = os.open(path, os.O_RDWR)
        self.char = descriptor
        return 0

    def do_close(self) -> int:
        if self.char < 0:
            return -errno.EBADF
        os.close(self.char)
        self.char = -1
        return 0

    def do_mmap(self, queue_id: int, offset: int, length: int, writable: bool, keep: bool) -> int:
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        mapped = mmap.mmap(self.char, length, mmap.MAP_SHARED, protection, offset=offset)
        if keep:
            self.maps[queue_id] = mapped
        else:
            mapped.close()
        return 0

    def do_munmap(self, queue_id: int) -> int:
        if queue_id not in self.maps:
            return -errno.EINVAL
        self.maps.pop(queue_id).close()
        return 0

    def do_pread(self, offset: int, length: int) -> Any:
        # Not os.pread: 6.12 counts bytes that it has not copied, and they should have a value.
        data = bytearray(length)
        return runs(data[: os.preadv(self.char, [data], offset)])

    def do_pwrite(self, offset: int, length: int, fill: int) -> int:
        return os.pwrite(self.char, bytes([fill]) * length, offset)

    def do_pwritten(self, offset: int, data: str) -> int:
        return os.pwrite(self.char, bytes.fromhex(data), offset)

    # ------------------------------------------------------------------ rings

    def _task(self, name: str) -> Task:
        return self.tasks[name]

    def do_task(self, name: str, admin: bool) -> int:
        self.tasks[name] = Task(admin=admin)
        return 0

    def do_ring(self, name: str, sq_entries: int, cq_entries: int, sqe128: bool, fixed: int) -> int:
        task = self._task(name)

        def make() -> int:
            task.ring = Ring(sq_entries=sq_entries, cq_entries=cq_entries, sqe128=sqe128)
            return task.ring.register_buffers(fixed) if fixed else 0

        result = task.call(make)
        return -errno.ETIMEDOUT if result is None else result

    def do_closering(self, name: str) -> int:
        task = self._task(name)
        if task.ring is not None:
            task.ring.close()
        task.ring = None
        return 0

    def address(self, where: int | str) -> int:
        """A slot of the arena, 0, or an address where nothing is."""
        if where == "bad":
            return 0x1000
        if isinstance(where, str):
            return int(where)
        return self.base + where * SLOT_BYTES

    def do_io(
        self, by: str, ring: str, token: int, cmd_op: int, queue_id: int, tag: int, result: int, where: int | str,
        sqe_addr: int, wide: bool,
    ) -> int | None:  # fmt: skip
        """A per-tag command, by one task, on the ring of maybe another."""
        address = self.address(where)
        payload = struct.pack("=HHiQ", queue_id, tag, result, address)
        if isinstance(where, int):
            self.io[token] = (cmd_op & 0xFF, queue_id, tag, where)
        else:
            self.io[token] = (cmd_op & 0xFF, queue_id, tag, -1)
        entry = sqe(
            opcode=_URING_CMD, fd=self.char, user_data=token, cmd_op=cmd_op, payload=payload, addr=sqe_addr, wide=wide
        )
        return self._submit(by, ring, entry)

    def do_batch(
        self, by: str, ring: str, token: int, cmd_op: int, payload: str, where: int | str, elements: str, group: int,
        multishot: bool,
    ) -> int | None:  # fmt: skip
        """A command for many tags: its elements lie at an address, or a group of buffers takes the tags."""
        address = self.address(where)
        data = bytes.fromhex(elements)
        if isinstance(where, int):
            self.arena[where * SLOT_BYTES : where * SLOT_BYTES + len(data)] = data
        entry = sqe(
            opcode=_URING_CMD, fd=self.char, user_data=token, cmd_op=cmd_op, payload=bytes.fromhex(payload),
            addr=0 if multishot else address, length=0 if multishot else len(data), buf_index=group,
            flags=SQE_BUFFER_SELECT if multishot else 0, command_flags=URING_CMD_MULTISHOT if multishot else 0,
        )  # fmt: skip
        return self._submit(by, ring, entry)

    def do_provide(self, name: str, group: int, slot: int, count: int, length: int) -> int | None:
        """A group of ``count`` buffers of so many bytes, in a slot of the arena."""
        task = self._task(name)
        assert task.ring is not None
        start = self.base + slot * SLOT_BYTES
        self.batches[group] = (slot * SLOT_BYTES, length)
        return task.call(task.ring.register_buffer_ring, group, [(start + n * length, length) for n in range(count)])

    def do_fixed(
        self, by: str, token: int, write: bool, index: int, where: str, offset: int, length: int
    ) -> int | None:
        """READ_FIXED or WRITE_FIXED between a registered buffer and a file of so many bytes."""
        path = where
        descriptor = self.disks.setdefault(path, os.memfd_create("fixed")) if path == "memory" else self.char
        entry = sqe(
            opcode=_WRITE_FIXED if write else _READ_FIXED, fd=descriptor, user_data=token, offset=offset, addr=0,
            length=length, buf_index=index,
        )  # fmt: skip
        return self._submit(by, by, entry)

    def do_memory(self, fill: int, length: int) -> int:
        """What the file of `do_fixed` holds."""
        descriptor = self.disks.setdefault("memory", os.memfd_create("fixed"))
        return os.pwrite(descriptor, bytes([fill]) * length, 0)

    def do_memory_read(self, length: int) -> str:
        return runs(os.pread(self.disks["memory"], length, 0))

    def do_cancel(self, by: str, token: int, target: int) -> int | None:
        """Ask io_uring to cancel a command."""
        return self._submit(by, by, sqe(opcode=_CANCEL, fd=-1, user_data=token, addr=target))

    def _submit(self, by: str, ring: str, entry: bytes) -> int | None:
        on = self._task(ring).ring
        if on is None:
            return -errno.EBADF
        result = self._task(by).call(on.submit, [entry])
        return 0 if result == 1 else result

    def do_fill(self, slot: int, fill: int, length: int) -> int:
        self.arena[slot * SLOT_BYTES : slot * SLOT_BYTES + length] = bytes([fill]) * length
        return 0

    # ------------------------------------------------------------------ control commands

    def do_control(
        self, token: int, cmd_op: int, dev_id: int, queue_id: int, length: int, where: str, data: int,
        path_length: int, sent: str, wide: bool,
    ) -> int:  # fmt: skip
        self._open_control()
        if wide:
            ring = self.control = self.control or Ring(sq_entries=16)
        else:
            ring = self.narrow = self.narrow or Ring(sq_entries=16, sqe128=False)
        buffer = bytearray(bytes.fromhex(sent))
        self.buffers[token] = buffer
        if where == "buffer" and buffer:
            address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        else:
            address = 0 if where != "bad" else 0x1000
        payload = struct.pack("=IHHQQHHI", dev_id, queue_id, length, address, data, path_length, 0, 0)
        entry = sqe(opcode=_URING_CMD, fd=self.control_fd, user_data=token, cmd_op=cmd_op, payload=payload, wide=wide)
        result = ring.submit([entry])
        return 0 if result == 1 else result

    def _open_control(self) -> None:
        if self.control_fd < 0:
            self.control_fd = os.open("/dev/ublk-control", os.O_RDWR)

    def do_user(self) -> int:
        """Become an ordinary user, who has the control device open: the driver asks who sends, not who opened."""
        self._open_control()
        os.setgroups([])
        os.setgid(USER_ID)
        os.setuid(USER_ID)
        return 0

    def do_grant(self, path: str) -> int:
        """Give a char device to that user, as the udev rule of ublk's documentation does."""
        os.chown(path, USER_ID, USER_ID)
        return 0

    def do_getpid(self) -> int:
        return os.getpid()

    def do_shmem(self, slot: int) -> int:
        return self.base + slot * SLOT_BYTES

    # ------------------------------------------------------------------ operations on disks

    def do_diskopen(self, path: str) -> int:
        self.disks[path] = os.open(path, os.O_RDWR | os.O_DIRECT)
        return 0

    def do_diskclose(self, path: str) -> int:
        if path not in self.disks:
            return -errno.EBADF
        os.close(self.disks.pop(path))
        return 0

    def do_busy(self) -> bool:
        """Whether something of the last script is left."""
        return bool(self.operating or self.buffers or self.disks)

    def do_app(
        self, token: int, kind: str, path: str, offset: int, length: int, fill: int, cpu: int, place: int
    ) -> int:  # fmt: skip
        """An operation, with memory of its own, or, where a read finds ``fill``, with the arena's from ``place`` on."""
        descriptor = self.disks.get(path, -1)
        if place < 0:
            view = memoryview(mmap.mmap(-1, max(length, 4096)))[:length]
        else:
            view = memoryview(self.arena)[place : place + length]
        if kind in ("write", "fua") or place >= 0:
            view[:] = bytes([fill]) * length
        placed = threading.Event()
        thread = threading.Thread(
            target=self._operate, args=(token, kind, descriptor, offset, length, view, cpu, placed), daemon=True
        )
        self.operating += 1
        thread.start()
        # It sleeps while it is moved to its CPU; who waits until all threads sleep must not take that for the operation.
        placed.wait()
        return 0

    def _operate(
        self, token: int, kind: str, fd: int, offset: int, length: int, view: memoryview, cpu: int, placed: threading.Event
    ) -> None:  # fmt: skip
        try:
            if cpu >= 0:
                os.sched_setaffinity(0, {cpu})
        finally:
            placed.set()
        result, data = 0, ""
        try:
            if kind == "read":
                result = os.preadv(fd, [view], offset)
                data = runs(view[:result])
            elif kind in ("write", "fua"):
                result = os.pwritev(fd, [view], offset, os.RWF_DSYNC if kind == "fua" else 0)
            elif kind == "flush":
                os.fsync(fd)
            elif kind == "discard":
                fcntl.ioctl(fd, _BLKDISCARD, struct.pack("=QQ", offset, length))
            elif kind in _ZONE_IOCTLS:
                fcntl.ioctl(fd, _ZONE_IOCTLS[kind], struct.pack("=QQ", offset >> 9, length >> 9))
            elif kind == "zeroes":
                fcntl.ioctl(fd, _BLKZEROOUT, struct.pack("=QQ", offset, length))
            elif _libc.fallocate(fd, _KEEP_SIZE | _PUNCH_HOLE, ctypes.c_long(offset), ctypes.c_long(length)):
                result = -ctypes.get_errno()
        except OSError as error:
            result = -(error.errno or 1)
        self.done.put(["app", token, result, data])

    # ------------------------------------------------------------------ what has happened

    def do_poll(self) -> int:
        return 0

    def events(self) -> list[list[Any]]:
        """What comes with every answer."""
        events = []
        for ring in (self.control, self.narrow):
            for token, result, _flags in ring.reap() if ring is not None else ():
                events.append(["ctl", token, result, self.buffers.pop(token).hex()])
        for name, task in self.tasks.items():
            if task.ring is not None:
                if task.ring.overflowed:
                    task.call(task.ring.flush)
                events += [self._completion(name, *cqe) for cqe in task.ring.reap()]
        while True:
            try:
                events.append(self.done.get_nowait())
                self.operating -= 1
            except queue.Empty:
                return events

    def _completion(self, name: str, token: int, result: int, flags: int) -> list[Any]:
        descriptor = data = ""
        if token in self.io and result in (0, 1):
            number, queue_id, tag, slot = self.io[token]
            if number <= GET_DATA and queue_id in self.maps:
                descriptor = self._descriptor(queue_id, tag)
                sectors = int.from_bytes(bytes.fromhex(descriptor)[4:8], "little")
                if descriptor[:2] in ("01", "0d") and slot >= 0 and not result:
                    start = slot * SLOT_BYTES
                    data = runs(self.arena[start : start + min(SLOT_BYTES, sectors << 9)])
        elif flags & 1 and result > 0 and self.batches:
            # Tags in a provided buffer: the tags, with each one's descriptor.
            start, length = next(iter(self.batches.values()))
            at = start + (flags >> 16) * length
            data = self.arena[at : at + result].hex()
        return ["cqe", name, token, result, flags, descriptor, data]

    def _descriptor(self, queue_id: int, tag: int) -> str:
        mapped = self.maps[queue_id]
        stride = self.stride
        return mapped[tag * stride : tag * stride + DESCRIPTOR_BYTES].hex()

    stride = DESCRIPTOR_BYTES

    def do_stride(self, stride: int) -> int:
        self.stride = stride
        return 0

    def do_descriptor(self, queue_id: int, tag: int) -> str:
        return self._descriptor(queue_id, tag) if queue_id in self.maps else ""

    def do_peek(self, slot: int, length: int) -> str:
        return runs(self.arena[slot * SLOT_BYTES : slot * SLOT_BYTES + length])


def nursery(channel: socket.socket) -> None:
    """Fork a worker for each socket that comes; ``wait PID`` is answered when that one is dead and buried."""
    while True:
        message, descriptors, _flags, _address = socket.recv_fds(channel, 64, 1)
        if not message:
            return
        if descriptors:
            pid = os.fork()
            if not pid:
                channel.close()
                worker = Worker(socket.socket(fileno=descriptors[0]))
                try:
                    worker.serve()
                finally:
                    os._exit(0)
            os.close(descriptors[0])
            channel.send(str(pid).encode())
        else:
            pid, flags = (int(word) for word in message.split())
            channel.send(str(os.waitpid(pid, flags)[0]).encode())


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    nursery(socket.socket(fileno=int(sys.argv[1])))
