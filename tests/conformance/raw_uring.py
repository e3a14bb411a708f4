"""io_uring by bare system calls: rings of 128-byte entries, for programs that must do what no sane library would let them.

It shares nothing with the package's own ring on purpose. Only what the worker of the real arm needs is here, and it
imports little: processes are forked off it by the hundred.

Facts
-----
*Task work.* A ring without DEFER_TASKRUN or COOP_TASKRUN has its completions posted wherever the thread that submitted
stands, even asleep on a lock. So any thread of the process may read the completion queue, which lies in shared memory:
here the main thread does, and the threads that submit need never wait for a completion.

*One consumer.* Whoever reaps moves the head; that is the main thread alone.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct

SETUP_CQSIZE = 1 << 3
SETUP_SQE128 = 1 << 10
SETUP_SINGLE_ISSUER = 1 << 12
ENTER_GETEVENTS = 1 << 0
SQE_BUFFER_SELECT = 1 << 5
SQE_ASYNC = 1 << 4
CQE_BUFFER = 1 << 0
CQE_MORE = 1 << 1
SQ_CQ_OVERFLOW = 1 << 1
URING_CMD_MULTISHOT = 1 << 1
REGISTER_BUFFERS2 = 15
REGISTER_PBUF_RING = 22
_REGISTER_SPARSE = 1
_SETUP, _ENTER, _REGISTER = 425, 426, 427
_OFFSET_SQES = 0x10000000

_PARAMS = struct.Struct("=7I3I 8IQ 8IQ")
_SQE = struct.Struct("=BBHi Q Q I I Q H H I Q Q")
_CQE = struct.Struct("=QiI")
_U32 = struct.Struct("=I")

_libc = ctypes.CDLL(None, use_errno=True)


def _call(number: int, *arguments: int | None) -> int:
    """A system call; its result, or the negative errno."""
    result: int = _libc.syscall(
        ctypes.c_long(number), *[ctypes.c_void_p(a) if a is None else ctypes.c_long(a) for a in arguments]
    )
    return -ctypes.get_errno() if result < 0 else result


def _address(memory: bytearray | mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def sqe(
    *,
    opcode: int,
    fd: int,
    user_data: int,
    cmd_op: int = 0,
    payload: bytes = b"",
    addr: int = 0,
    length: int = 0,
    offset: int = 0,
    command_flags: int = 0,
    buf_index: int = 0,
    flags: int = 0,
    wide: bool = True,
) -> bytes:
    """One submission entry. ``cmd_op`` shares its place with ``offset``."""
    head = struct.pack(
        "=BBHiQQIIQHHi",
        opcode, flags, 0, fd, offset or cmd_op, addr, length, command_flags, user_data, buf_index, 0, 0,
    )  # fmt: skip
    entry = head.ljust(48, b"\0") + payload
    return entry.ljust(128, b"\0") if wide else entry[:64].ljust(64, b"\0")


class Ring:
    """A ring of the thread that makes it: no other may enter it. Raises OSError when the kernel gives none."""

    def __init__(self, *, sq_entries: int = 64, cq_entries: int = 0, sqe128: bool = True) -> None:
        flags = SETUP_SINGLE_ISSUER | (SETUP_SQE128 if sqe128 else 0) | (SETUP_CQSIZE if cq_entries else 0)
        params = bytearray(120)
        struct.pack_into("=III", params, 0, 0, cq_entries, flags)
        fd = _call(_SETUP, sq_entries, _address(params))
        if fd < 0:
            raise OSError(-fd, os.strerror(-fd))
        self.fd = fd
        words = struct.unpack_from("=10I", params)
        sq, cq = struct.unpack_from("=8I", params, 40), struct.unpack_from("=8I", params, 80)
        self._entry = 128 if sqe128 else 64
        self._sq_entries = words[0]
        size = max(sq[6] + 4 * words[0], cq[5] + 16 * words[1])
        self._rings = mmap.mmap(fd, size, offset=0)
        self._sqes = mmap.mmap(fd, self._entry * words[0], offset=_OFFSET_SQES)
        self._sq_tail, self._sq_mask, self._sq_flags, self._sq_array = sq[1], self._u32(sq[2]), sq[4], sq[6]
        self._cq_head, self._cq_tail, self._cq_mask, self._cq_overflow, self._cqes = (
            cq[0], cq[1], self._u32(cq[2]), cq[4], cq[5],
        )  # fmt: skip

    def _u32(self, offset: int) -> int:
        return int(_U32.unpack_from(self._rings, offset)[0])

    def submit(self, entries: list[bytes]) -> int:
        """Queue them and enter; how many were taken, or the negative errno."""
        tail = self._u32(self._sq_tail)
        for number, entry in enumerate(entries):
            index = (tail + number) & self._sq_mask
            self._sqes[index * self._entry : (index + 1) * self._entry] = entry
            _U32.pack_into(self._rings, self._sq_array + 4 * index, index)
        _U32.pack_into(self._rings, self._sq_tail, (tail + len(entries)) & 0xFFFFFFFF)
        return _call(_ENTER, self.fd, len(entries), 0, 0, None, 0)

    @property
    def overflowed(self) -> bool:
        """Whether completions wait for room."""
        return bool(self._u32(self._sq_flags) & SQ_CQ_OVERFLOW)

    def flush(self) -> int:
        """Let completions that did not fit come in."""
        return _call(_ENTER, self.fd, 0, 0, ENTER_GETEVENTS, None, 0)

    def reap(self) -> list[tuple[int, int, int]]:
        """What has completed: (user_data, result, flags)."""
        head, tail = self._u32(self._cq_head), self._u32(self._cq_tail)
        found = []
        while head != tail:
            found.append(_CQE.unpack_from(self._rings, self._cqes + 16 * (head & self._cq_mask)))
            head = (head + 1) & 0xFFFFFFFF
        _U32.pack_into(self._rings, self._cq_head, head)
        return found

    def register_buffers(self, count: int) -> int:
        """A table of so many empty places for buffers that the driver registers."""
        argument = bytearray(struct.pack("=IIQQQ", count, _REGISTER_SPARSE, 0, 0, 0))
        return _call(_REGISTER, self.fd, REGISTER_BUFFERS2, _address(argument), len(argument))

    def register_buffer_ring(self, group: int, buffers: list[tuple[int, int]]) -> int:
        """Provided buffers, (address, length) each; their number must be a power of two."""
        self._provided = ring = mmap.mmap(-1, 4096)
        for number, (address, length) in enumerate(buffers):
            struct.pack_into("=QIH", ring, 16 * number, address, length, number)
        struct.pack_into("=H", ring, 14, len(buffers))
        argument = bytearray(struct.pack("=QIHH3Q", _address(ring), len(buffers), group, 0, 0, 0, 0))
        return _call(_REGISTER, self.fd, REGISTER_PBUF_RING, _address(argument), 1)

    def close(self) -> None:
        """Let go of everything that keeps the ring: the mappings do, and Python's have a descriptor of their own, too."""
        self._sqes.close()
        self._rings.close()
        os.close(self.fd)
