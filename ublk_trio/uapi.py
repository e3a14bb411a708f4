"""The ublk ABI: what ``linux/ublk_cmd.h`` of Linux 7.3 says, as enums and packed layouts.

Nothing here does I/O and nothing here imports the rest of the package: the real ring, the simulator
and the tests all speak these names. Enum members keep the kernel's names without their prefix
(``UBLK_F_ZONED`` is ``Feature.ZONED``), fields keep the kernel's names whole.

Some facts about this ABI, and what they mean for us:

* Every structure is in host byte order, with its padding written out. So a layout is ``"="`` plus
  explicit ``x`` bytes, and its size is asserted at the end of this module.
* A record is for the control path and for tests. A queue that reads thousands of descriptors a
  second uses the record's ``LAYOUT`` (``iter_unpack``, ``pack_into``) and makes no records.
* Command numbers came first, ioctl-encoded opcodes second (6.4). A kernel may have the bare numbers
  configured away, and everything added since 6.4 has no bare form.
* Structures only ever grew into reserved space, except ``ublk_params``, which grew at its end: an
  older kernel knows a prefix of it. Reserved space must be zero, so that is what ``pack`` writes.

``tests/test_uapi.py`` holds every value and every offset against ``native/ublk_abi.h`` and against
whatever ``linux/ublk_cmd.h`` the machine has.
"""

import platform
import re
import struct
from collections.abc import Mapping
from enum import IntEnum, IntFlag
from functools import cache
from types import MappingProxyType
from typing import Any, ClassVar, Final, Self, TypeAlias

from attrs import field, fields, frozen

ReadableBuffer: TypeAlias = bytes | bytearray | memoryview

CONTROL_PATH: Final = "/dev/ublk-control"

# ---------------------------------------------------------------------------- limits and constants

MAX_QUEUE_DEPTH: Final = 4096
MAX_NR_QUEUES: Final = 4096
MAX_IO_BYTES: Final = 32 << 20
"""The most that one request can carry, in bytes: the 25 offset bits of a user-copy position."""
MAX_DEVICES: Final = 1 << 20
"""Device ids run below this (the driver's minor numbers; not in the header)."""

SECTOR_SHIFT: Final = 9
SECTOR_SIZE: Final = 1 << SECTOR_SHIFT
MIN_SEGMENT_SIZE: Final = 4096
"""The least ``ParamsSegment.max_segment_size``, in bytes (6.15)."""

FEATURES_LEN: Final = 8
"""Length in bytes of the word that GET_FEATURES fills in."""
ANY_DEVICE_ID: Final = 0xFFFF_FFFF
"""The device id (-1 as u32) with which ADD_DEV asks the kernel to choose one."""
NO_QUEUE: Final = 0xFFFF
"""The queue id (-1 as u16) of a control command that is not about one queue."""

IO_DESC_SIZE: Final = 24
"""Bytes of a descriptor; also the stride from one to the next, unless IO_DESC_SIZE was granted."""
IO_DESC_SIZE_MAX: Final = 256
IO_DESC_SIZE_STEP: Final = 8

IO_RES_OK: Final = 0
IO_RES_NEED_GET_DATA: Final = 1
"""The fetch of a WRITE whose data waits for a NEED_GET_DATA command."""
IO_RES_ABORT: Final = -19
"""-ENODEV: the tag must not be fetched again."""

_IOCTL_TYPE: Final = ord("u")


# -------------------------------------------------------------------------------------- commands


class ControlCommand(IntEnum):
    """What ``/dev/ublk-control`` does (``UBLK_CMD_*``, from TRY_STOP_DEV on ``UBLK_U_CMD_*``)."""

    GET_QUEUE_AFFINITY = 0x01
    GET_DEV_INFO = 0x02
    ADD_DEV = 0x04
    DEL_DEV = 0x05
    START_DEV = 0x06
    STOP_DEV = 0x07
    SET_PARAMS = 0x08
    GET_PARAMS = 0x09
    START_USER_RECOVERY = 0x10
    END_USER_RECOVERY = 0x11
    GET_DEV_INFO2 = 0x12
    GET_FEATURES = 0x13
    DEL_DEV_ASYNC = 0x14
    UPDATE_SIZE = 0x15
    QUIESCE_DEV = 0x16
    TRY_STOP_DEV = 0x17
    REG_BUF = 0x18
    UNREG_BUF = 0x19


class IoCommand(IntEnum):
    """What ``/dev/ublkcN`` does: per tag up to 0x24, for a batch of tags from 0x25 (7.0)."""

    FETCH_REQ = 0x20
    COMMIT_AND_FETCH_REQ = 0x21
    NEED_GET_DATA = 0x22
    REGISTER_IO_BUF = 0x23
    UNREGISTER_IO_BUF = 0x24
    PREP_IO_CMDS = 0x25
    COMMIT_IO_CMDS = 0x26
    FETCH_IO_CMDS = 0x27


LAST_LEGACY_CONTROL_COMMAND: Final = ControlCommand.GET_DEV_INFO2
LAST_LEGACY_IO_COMMAND: Final = IoCommand.NEED_GET_DATA

# DEL_DEV_ASYNC returns nothing, yet its published opcode carries the read direction alone.
_READ_ONLY_COMMANDS: Final = frozenset(
    {
        ControlCommand.GET_QUEUE_AFFINITY,
        ControlCommand.GET_DEV_INFO,
        ControlCommand.GET_PARAMS,
        ControlCommand.GET_DEV_INFO2,
        ControlCommand.GET_FEATURES,
        ControlCommand.DEL_DEV_ASYNC,
    }
)

# asm/ioctl.h: these architectures give the direction three bits, from bit 29, with write = 4.
_THREE_DIRECTION_BITS: Final = platform.machine().startswith(("ppc", "mips", "sparc", "alpha"))
_DIRECTION_SHIFT: Final = 29 if _THREE_DIRECTION_BITS else 30
_READ: Final = 2
_WRITE: Final = 4 if _THREE_DIRECTION_BITS else 1


def _encode(direction: int, number: int, size: int) -> int:
    return direction << _DIRECTION_SHIFT | size << 16 | _IOCTL_TYPE << 8 | number


def control_opcode(command: int, *, ioctl_encoded: bool) -> int:
    """The ``cmd_op`` of a control command's SQE.

    ``ioctl_encoded`` is right for every kernel from 6.4; the bare number is for older ones.
    Commands above GET_DEV_INFO2 are younger than the encoding and come encoded either way. Raises
    ValueError for a number that is no control command.
    """
    command = ControlCommand(command)
    if not ioctl_encoded and command <= LAST_LEGACY_CONTROL_COMMAND:
        return int(command)
    direction = _READ if command in _READ_ONLY_COMMANDS else _READ | _WRITE
    return _encode(direction, command, ControlCmd.LAYOUT.size)


def io_opcode(command: int, *, ioctl_encoded: bool) -> int:
    """The ``cmd_op`` of an I/O command's SQE; see :func:`control_opcode`.

    Commands above NEED_GET_DATA exist only encoded. Raises ValueError for a number that is no I/O
    command.
    """
    command = IoCommand(command)
    if not ioctl_encoded and command <= LAST_LEGACY_IO_COMMAND:
        return int(command)
    return _encode(_READ | _WRITE, command, IoCmd.LAYOUT.size)


def split_opcode(cmd_op: int) -> tuple[int, int]:
    """A ``cmd_op`` as (ioctl type, command number); a bare number's type is 0, not ``'u'``."""
    return cmd_op >> 8 & 0xFF, cmd_op & 0xFF


# -------------------------------------------------------------------------------------- features


class Feature(IntFlag):
    """``UBLK_F_*``: asked for in ADD_DEV, granted in what comes back, listed by GET_FEATURES."""

    SUPPORT_ZERO_COPY = 1 << 0
    URING_CMD_COMP_IN_TASK = 1 << 1
    NEED_GET_DATA = 1 << 2
    USER_RECOVERY = 1 << 3
    USER_RECOVERY_REISSUE = 1 << 4
    UNPRIVILEGED_DEV = 1 << 5
    CMD_IOCTL_ENCODE = 1 << 6
    USER_COPY = 1 << 7
    ZONED = 1 << 8
    USER_RECOVERY_FAIL_IO = 1 << 9
    UPDATE_SIZE = 1 << 10
    AUTO_BUF_REG = 1 << 11
    QUIESCE = 1 << 12
    PER_IO_DAEMON = 1 << 13
    BUF_REG_OFF_DAEMON = 1 << 14
    BATCH_IO = 1 << 15
    INTEGRITY = 1 << 16
    SAFE_STOP_DEV = 1 << 17
    NO_AUTO_PART_SCAN = 1 << 18
    SHMEM_ZC = 1 << 19
    IO_DESC_SIZE = 1 << 20


FEATURE_RELEASE: Final[Mapping[Feature, tuple[int, int]]] = MappingProxyType(
    {
        Feature.SUPPORT_ZERO_COPY: (6, 15),
        Feature.URING_CMD_COMP_IN_TASK: (6, 0),
        Feature.NEED_GET_DATA: (6, 0),
        Feature.USER_RECOVERY: (6, 1),
        Feature.USER_RECOVERY_REISSUE: (6, 1),
        Feature.UNPRIVILEGED_DEV: (6, 3),
        Feature.CMD_IOCTL_ENCODE: (6, 4),
        Feature.USER_COPY: (6, 5),
        Feature.ZONED: (6, 6),
        Feature.USER_RECOVERY_FAIL_IO: (6, 13),
        Feature.UPDATE_SIZE: (6, 16),
        Feature.AUTO_BUF_REG: (6, 16),
        Feature.QUIESCE: (6, 16),
        Feature.PER_IO_DAEMON: (6, 16),
        Feature.BUF_REG_OFF_DAEMON: (6, 17),
        Feature.BATCH_IO: (7, 0),
        Feature.INTEGRITY: (7, 0),
        Feature.SAFE_STOP_DEV: (7, 0),
        Feature.NO_AUTO_PART_SCAN: (7, 0),
        Feature.SHMEM_ZC: (7, 1),
        Feature.IO_DESC_SIZE: (7, 3),
    }
)
"""The first kernel release in which each feature works. SUPPORT_ZERO_COPY's bit is as old as ublk,
and did nothing until 6.15."""


class DeviceState(IntEnum):
    """``UBLK_S_DEV_*``."""

    DEAD = 0
    LIVE = 1
    QUIESCED = 2
    FAIL_IO = 3


# ------------------------------------------------------------------------ requests and their flags


class IoOp(IntEnum):
    """``UBLK_IO_OP_*``: the low byte of a descriptor's ``op_flags``. Zone operations: 6.6."""

    READ = 0
    WRITE = 1
    FLUSH = 2
    DISCARD = 3
    WRITE_SAME = 4
    WRITE_ZEROES = 5
    ZONE_OPEN = 10
    ZONE_CLOSE = 11
    ZONE_FINISH = 12
    ZONE_APPEND = 13
    ZONE_RESET_ALL = 14
    ZONE_RESET = 15
    REPORT_ZONES = 18


OP_MASK: Final = 0xFF


class IoFlag(IntFlag):
    """``UBLK_IO_F_*``: the upper three bytes of ``op_flags``, in place (not shifted down)."""

    FAILFAST_DEV = 1 << 8
    FAILFAST_TRANSPORT = 1 << 9
    FAILFAST_DRIVER = 1 << 10
    META = 1 << 11
    FUA = 1 << 13
    NOUNMAP = 1 << 15
    SWAP = 1 << 16
    NEED_REG_BUF = 1 << 17
    INTEGRITY = 1 << 18
    SHMEM_ZC = 1 << 19


class AutoBufRegFlag(IntFlag):
    """``UBLK_AUTO_BUF_REG_*`` (6.16). FALLBACK: deliver with NEED_REG_BUF rather than fail."""

    FALLBACK = 1 << 0


class BatchFlag(IntFlag):
    """``UBLK_BATCH_F_*`` (7.0): which optional words follow each element's header."""

    HAS_ZONE_LBA = 1 << 0
    HAS_BUF_ADDR = 1 << 1
    AUTO_BUF_REG_FALLBACK = 1 << 2


class ShmemBufFlag(IntFlag):
    """``UBLK_SHMEM_BUF_*`` (7.1). READ_ONLY pins without write access: fit for a sealed memfd."""

    READ_ONLY = 1 << 0


class ParamType(IntFlag):
    """``UBLK_PARAM_TYPE_*``: the sections of ``ublk_params`` that are filled in."""

    BASIC = 1 << 0
    DISCARD = 1 << 1
    DEVT = 1 << 2
    ZONED = 1 << 3
    DMA_ALIGN = 1 << 4
    SEGMENT = 1 << 5
    INTEGRITY = 1 << 6


class BasicAttr(IntFlag):
    """``UBLK_ATTR_*``. FUA works only with VOLATILE_CACHE, and without that no FLUSH ever comes."""

    READ_ONLY = 1 << 0
    ROTATIONAL = 1 << 1
    VOLATILE_CACHE = 1 << 2
    FUA = 1 << 3


class IntegrityCap(IntFlag):
    """``LBMD_PI_CAP_*`` of ``linux/fs.h``, for :class:`ParamsIntegrity`."""

    INTEGRITY = 1 << 0
    REFTAG = 1 << 1


class IntegrityChecksum(IntEnum):
    """``LBMD_PI_CSUM_*`` of ``linux/fs.h``, for :class:`ParamsIntegrity`. There is no 3."""

    NONE = 0
    IP = 1
    CRC16_T10DIF = 2
    CRC64_NVME = 4


class ZoneType(IntEnum):
    """``BLK_ZONE_TYPE_*`` of ``linux/blkzoned.h``."""

    CONVENTIONAL = 1
    SEQWRITE_REQ = 2
    SEQWRITE_PREF = 3


class ZoneCondition(IntEnum):
    """``BLK_ZONE_COND_*`` of ``linux/blkzoned.h``. ACTIVE (6.19) is for cached reports only."""

    NOT_WP = 0x0
    EMPTY = 0x1
    IMP_OPEN = 0x2
    EXP_OPEN = 0x3
    CLOSED = 0x4
    READONLY = 0xD
    FULL = 0xE
    OFFLINE = 0xF
    ACTIVE = 0xFF


# --------------------------------------------------------------------------------------- records

_INTEGER_RANGES: Final = {
    code: (-(1 << bits - 1), (1 << bits - 1) - 1) if code.islower() else (0, (1 << bits) - 1)
    for bits, codes in ((8, "bB"), (16, "hH"), (32, "iI"), (64, "qQ"))
    for code in codes
}
_FORMAT_TOKEN: Final = re.compile(r"(\d*)([a-zA-Z])")


@cache  # every record that is made asks for its own
def layout_members(layout: struct.Struct) -> tuple[tuple[int, str], ...]:
    """(offset in bytes, format code) of each value in a layout whose padding is written out."""
    members, offset = [], 0
    for count, code in _FORMAT_TOKEN.findall(layout.format):
        one_value = code in "xs"
        for _ in range(1 if one_value or not count else int(count)):
            token = count + code if one_value else code
            if code != "x":
                members.append((offset, token))
            offset += struct.calcsize("=" + token)
    return tuple(members)


@frozen(kw_only=True)
class Record:
    """What the kernel's structures have in common here: integer fields, in the layout's order.

    Making one raises ValueError, naming field and range, for a value that its field can't hold.
    """

    LAYOUT: ClassVar[struct.Struct]

    def __attrs_post_init__(self) -> None:
        for name, value, (_, code) in zip(self._names(), self._values(), layout_members(self.LAYOUT), strict=True):
            low, high = _INTEGER_RANGES[code]
            if not low <= value <= high:
                raise ValueError(f"{type(self).__name__}.{name} = {value} does not fit: {low} to {high}")

    @classmethod
    def _names(cls) -> list[str]:
        return [attribute.name for attribute in fields(cls)]

    def _values(self) -> list[Any]:
        return [getattr(self, name) for name in self._names()]

    @classmethod
    def offsets(cls) -> dict[str, int]:
        """The offset in bytes of each field, in the layout's order."""
        return {name: offset for name, (offset, _) in zip(cls._names(), layout_members(cls.LAYOUT), strict=True)}

    def pack(self) -> bytes:
        """The structure's bytes, with zeros in its padding."""
        return self.LAYOUT.pack(*self._values())

    @classmethod
    def unpack(cls, data: ReadableBuffer) -> Self:
        """The record in ``data``, whose length must be the layout's (else ValueError).

        Padding is not looked at. An enum field with a value that this module doesn't know raises
        ValueError; an unknown flag bit is kept.
        """
        if len(data) != cls.LAYOUT.size:
            raise ValueError(f"{cls.__name__} takes {cls.LAYOUT.size} bytes, not {len(data)}")
        return cls(**dict(zip(cls._names(), cls.LAYOUT.unpack(data), strict=True)))


@frozen(kw_only=True)
class ControlCmd(Record):
    """``ublksrv_ctrl_cmd``: a control command, in the SQE's 80-byte command area.

    ``addr`` and ``len`` are the command's buffer, ``data`` its one inline argument (a pid, a size
    in sectors, a time in ms). ``dev_path_len`` (6.3) counts the char device's path, with its NUL,
    that an unprivileged caller puts in front of the buffer's contents. Before 6.3 ``data`` had a
    second word where the path's length is now.
    """

    LAYOUT = struct.Struct("= I H H Q Q H 6x")

    dev_id: int
    queue_id: int = NO_QUEUE
    len: int = 0
    addr: int = 0
    data: int = 0
    dev_path_len: int = 0


@frozen(kw_only=True)
class DevInfo(Record):
    """``ublksrv_ctrl_dev_info``: what ADD_DEV asks for, and what the kernel made of it.

    ``max_io_buf_bytes`` is in bytes, ``io_desc_size`` (7.3) too; ``ublksrv_pid`` is -1 when no
    server runs; ``ublksrv_flags`` is the server's own and means nothing to the driver; the kernel
    fills in ``owner_uid`` and ``owner_gid`` (6.3).
    """

    LAYOUT = struct.Struct("= H H H H I I i 4x Q Q I I 16x")

    nr_hw_queues: int
    queue_depth: int
    state: DeviceState = field(default=DeviceState.DEAD, converter=DeviceState)
    io_desc_size: int = 0
    max_io_buf_bytes: int
    dev_id: int = ANY_DEVICE_ID
    ublksrv_pid: int = -1
    flags: Feature = field(default=Feature(0), converter=Feature)
    ublksrv_flags: int = 0
    owner_uid: int = 0
    owner_gid: int = 0


@frozen(kw_only=True)
class IoDesc(Record):
    """``ublksrv_io_desc``: one request, in the memory that the driver maps to the server.

    ``nr_sectors`` and ``start_sector`` are in 512-byte sectors; for REPORT_ZONES ``nr_sectors``
    counts zones. ``addr`` is the server's buffer, or with SHMEM_ZC a place in shared memory.
    """

    LAYOUT = struct.Struct("= I I Q Q")

    op_flags: int
    nr_sectors: int
    start_sector: int
    addr: int = 0

    @property
    def op(self) -> IoOp:
        """The operation. Raises ValueError for one that this module doesn't know."""
        return IoOp(self.op_flags & OP_MASK)

    @property
    def flags(self) -> IoFlag:
        """The flags, without the operation."""
        return IoFlag(self.op_flags & ~OP_MASK)


@frozen(kw_only=True)
class IoCmd(Record):
    """``ublksrv_io_cmd``: an I/O command for one tag, in the SQE's command area.

    ``result`` is bytes done or a negative errno, for commits only. ``addr`` is, by command: the
    buffer; the LBA of a finished zone append; the buffer index of (UN)REGISTER_IO_BUF.
    """

    LAYOUT = struct.Struct("= H H i Q")

    q_id: int
    tag: int
    result: int = 0
    addr: int = 0


@frozen(kw_only=True)
class BatchIo(Record):
    """``ublk_batch_io``: an I/O command for many tags (7.0).

    Its buffer holds ``nr_elem`` elements of ``elem_bytes`` each; see :func:`batch_elem_layout`. The
    kernel takes any reserved bit for an error.
    """

    LAYOUT = struct.Struct("= H H H B B Q")

    q_id: int
    flags: BatchFlag = field(default=BatchFlag(0), converter=BatchFlag)
    nr_elem: int = 0
    elem_bytes: int = 0
    reserved: int = 0
    reserved2: int = 0


@frozen(kw_only=True)
class BatchElem(Record):
    """``ublk_elem_header``: what every element of a batch starts with (7.0).

    ``buf_index`` counts only with AUTO_BUF_REG, ``result`` only in a commit.
    """

    LAYOUT = struct.Struct("= H H i")

    tag: int
    buf_index: int = 0
    result: int = 0


def batch_elem_layout(flags: int) -> struct.Struct:
    """The layout of a whole batch element: tag, buf_index, result, then a u64 per HAS_ flag.

    The buffer's address comes before the zone's LBA, the reverse of their flag bits. ``.size`` is
    what ``BatchIo.elem_bytes`` must be: 8, 16 or 24.
    """
    optional = (BatchFlag.HAS_BUF_ADDR, BatchFlag.HAS_ZONE_LBA)
    return struct.Struct(BatchElem.LAYOUT.format + "Q" * sum(bool(flags & flag) for flag in optional))


BATCH_TAG_LAYOUT: Final = struct.Struct("=H")
"""One tag, as FETCH_IO_CMDS writes them into a provided buffer (7.0)."""


@frozen(kw_only=True)
class AutoBufReg(Record):
    """``ublk_auto_buf_reg``: where the driver registers a request's buffer by itself (6.16).

    It rides in ``sqe->addr``, so it also converts to and from that 64-bit word. The kernel wants
    the reserved parts zero.
    """

    LAYOUT = struct.Struct("= H B B I")

    index: int
    flags: AutoBufRegFlag = field(default=AutoBufRegFlag(0), converter=AutoBufRegFlag)
    reserved0: int = 0
    reserved1: int = 0

    def to_sqe_addr(self) -> int:
        """The word: index from bit 0, flags from 16, the reserved parts from 24 and 32."""
        return self.index | self.flags << 16 | self.reserved0 << 24 | self.reserved1 << 32

    @classmethod
    def from_sqe_addr(cls, sqe_addr: int) -> Self:
        """The reverse of :meth:`to_sqe_addr`."""
        return cls(
            index=sqe_addr & 0xFFFF,
            flags=AutoBufRegFlag(sqe_addr >> 16 & 0xFF),
            reserved0=sqe_addr >> 24 & 0xFF,
            reserved1=sqe_addr >> 32,
        )


@frozen(kw_only=True)
class ShmemBufReg(Record):
    """``ublk_shmem_buf_reg``: REG_BUF's buffer (7.1): page-aligned memory, ``len`` in bytes."""

    LAYOUT = struct.Struct("= Q Q I I")

    addr: int
    len: int
    flags: ShmemBufFlag = field(default=ShmemBufFlag(0), converter=ShmemBufFlag)
    reserved: int = 0


@frozen(kw_only=True)
class BlkZone(Record):
    """``blk_zone`` of ``linux/blkzoned.h``: an entry of the answer to REPORT_ZONES; sectors.

    A zero ``len`` ends a report that is shorter than asked for.
    """

    LAYOUT = struct.Struct("= Q Q Q B B B B 4x Q 24x")

    start: int
    len: int
    wp: int
    type: int
    cond: int
    non_seq: int = 0
    reset: int = 0
    capacity: int


# ------------------------------------------------------------------------------------- parameters


@frozen(kw_only=True)
class ParamsBasic(Record):
    """``ublk_param_basic``: the one section that every device needs.

    The shifts are log2 of bytes; a sector is 512 bytes. No request crosses a multiple of
    ``chunk_sectors`` (0 = it may; a zoned device's zone size). ``virt_boundary_mask`` is in bytes.
    """

    LAYOUT = struct.Struct("= I B B B B I I Q Q")

    attrs: BasicAttr = field(default=BasicAttr(0), converter=BasicAttr)
    logical_bs_shift: int = SECTOR_SHIFT
    physical_bs_shift: int = 12
    io_opt_shift: int = 12
    io_min_shift: int = SECTOR_SHIFT
    max_sectors: int
    chunk_sectors: int = 0
    dev_sectors: int
    virt_boundary_mask: int = 0


@frozen(kw_only=True)
class ParamsDiscard(Record):
    """``ublk_param_discard``: alignment and granularity in bytes, the limits in sectors."""

    LAYOUT = struct.Struct("= I I I I H 2x")

    discard_alignment: int = 0
    discard_granularity: int = 0
    max_discard_sectors: int = 0
    max_write_zeroes_sectors: int = 0
    max_discard_segments: int = 0


@frozen(kw_only=True)
class ParamsDevt(Record):
    """``ublk_param_devt`` (6.3): device numbers, from the kernel; the disk's are 0 before START."""

    LAYOUT = struct.Struct("= I I I I")

    char_major: int
    char_minor: int
    disk_major: int
    disk_minor: int


@frozen(kw_only=True)
class ParamsZoned(Record):
    """``ublk_param_zoned`` (6.6)."""

    LAYOUT = struct.Struct("= I I I 20x")

    max_open_zones: int = 0
    max_active_zones: int = 0
    max_zone_append_sectors: int


@frozen(kw_only=True)
class ParamsDmaAlign(Record):
    """``ublk_param_dma_align``: a mask, that is bytes minus one."""

    LAYOUT = struct.Struct("= I 4x")

    alignment: int


@frozen(kw_only=True)
class ParamsSegment(Record):
    """``ublk_param_segment`` (6.15): a mask (bytes minus one), bytes, a count; none may be 0."""

    LAYOUT = struct.Struct("= Q I H 2x")

    seg_boundary_mask: int
    max_segment_size: int
    max_segments: int


@frozen(kw_only=True)
class ParamsIntegrity(Record):
    """``ublk_param_integrity`` (7.0): bytes, but ``interval_exp`` is log2 of bytes.

    ``max_integrity_segments`` = 0 sets no limit; ``metadata_size`` must not be 0.
    """

    LAYOUT = struct.Struct("= I H B B B B B 5x")

    flags: IntegrityCap = field(default=IntegrityCap(0), converter=IntegrityCap)
    max_integrity_segments: int = 0
    interval_exp: int
    metadata_size: int
    pi_offset: int = 0
    csum_type: IntegrityChecksum = field(default=IntegrityChecksum.NONE, converter=IntegrityChecksum)
    tag_size: int = 0


@frozen(kw_only=True)
class Params:
    """``ublk_params``: the argument of SET_PARAMS and the answer of GET_PARAMS.

    A section that is None is not there; ``types`` on the wire follows from that. A release that
    added a section put it at the end, and the C structure's tail padding means that a kernel's
    length may exceed its last section.
    """

    LAYOUT: ClassVar = struct.Struct("= I I 32s 20s 16s 32s 8s 4x 16s 16s")

    basic: ParamsBasic | None = None
    discard: ParamsDiscard | None = None
    devt: ParamsDevt | None = None
    zoned: ParamsZoned | None = None
    dma_align: ParamsDmaAlign | None = None
    segment: ParamsSegment | None = None
    integrity: ParamsIntegrity | None = None

    @property
    def types(self) -> ParamType:
        """The sections that are there."""
        return ParamType(sum(kind for name, (kind, _) in PARAM_SECTIONS.items() if getattr(self, name) is not None))

    @classmethod
    def offsets(cls) -> dict[str, int]:
        """The offset in bytes of the two header words and of each section."""
        names = ["len", "types", *PARAM_SECTIONS]
        return {name: offset for name, (offset, _) in zip(names, layout_members(cls.LAYOUT), strict=True)}

    def pack(self, *, length: int | None = None) -> bytes:
        """The structure's bytes: all of them, or the first ``length``, as an older kernel has it.

        Raises ValueError if a section that is there, or the header, does not fit in ``length``.
        """
        length = self.LAYOUT.size if length is None else length
        end = 8
        sections = []
        for name, (_, section_type) in PARAM_SECTIONS.items():
            section = getattr(self, name)
            size = section_type.LAYOUT.size
            sections.append(section.pack() if section else bytes(size))
            if section:
                end = self.offsets()[name] + size
        if not end <= length <= self.LAYOUT.size:
            raise ValueError(f"Params of {length} bytes: not {end} to {self.LAYOUT.size}")
        return self.LAYOUT.pack(length, self.types, *sections)[:length]

    @classmethod
    def unpack(cls, data: ReadableBuffer) -> Self:
        """The parameters in ``data``: each section whose type bit is set and which fits.

        A section past the header's ``len``, or past ``data``, is None; so is everything that this
        module doesn't know. Raises ValueError without a whole header.
        """
        if len(data) < 8:
            raise ValueError(f"Params take a header of 8 bytes, not {len(data)}")
        length, types = struct.unpack_from("=II", data)
        sections: dict[str, Any] = {}
        for name, (kind, section_type) in PARAM_SECTIONS.items():
            start = cls.offsets()[name]
            end = start + section_type.LAYOUT.size
            if types & kind and end <= min(length, len(data)):
                sections[name] = section_type.unpack(data[start:end])
        return cls(**sections)

    @classmethod
    def query(cls) -> bytes:
        """A buffer for GET_PARAMS: zeros under a header that has room for every section."""
        return struct.pack("=II", cls.LAYOUT.size, sum(ParamType)).ljust(cls.LAYOUT.size, b"\0")


PARAM_SECTIONS: Final[Mapping[str, tuple[ParamType, type[Record]]]] = MappingProxyType(
    {
        "basic": (ParamType.BASIC, ParamsBasic),
        "discard": (ParamType.DISCARD, ParamsDiscard),
        "devt": (ParamType.DEVT, ParamsDevt),
        "zoned": (ParamType.ZONED, ParamsZoned),
        "dma_align": (ParamType.DMA_ALIGN, ParamsDmaAlign),
        "segment": (ParamType.SEGMENT, ParamsSegment),
        "integrity": (ParamType.INTEGRITY, ParamsIntegrity),
    }
)
"""The sections of :class:`Params`, in the order of the structure."""


# -------------------------------------------------- positions in the char device, and shared memory

CMD_BUF_OFFSET: Final = 0
"""Where in ``/dev/ublkcN`` queue 0's descriptors are mapped."""
IO_BUF_OFFSET: Final = 0x8000_0000
"""Where user-copy positions begin (6.5)."""
IO_BUF_BITS: Final = 25
TAG_SHIFT: Final = IO_BUF_BITS
TAG_BITS: Final = 16
QUEUE_SHIFT: Final = TAG_SHIFT + TAG_BITS
QUEUE_BITS: Final = 12
IO_BUF_TOTAL_BITS: Final = QUEUE_SHIFT + QUEUE_BITS
INTEGRITY_SHIFT: Final = 62
"""The bit that turns a user-copy position to the request's integrity data (7.0)."""

SHMEM_ZC_OFFSET_BITS: Final = 32
SHMEM_ZC_INDEX_BITS: Final = 16


def _check(name: str, value: int, bits: int) -> None:
    if not 0 <= value < 1 << bits:
        raise ValueError(f"{name} = {value} does not fit: 0 to {(1 << bits) - 1}")


def user_copy_offset(*, queue_id: int, tag: int, offset: int, integrity: bool = False) -> int:
    """The position in ``/dev/ublkcN`` of byte ``offset`` of a request, for pread and pwrite (6.5).

    Raises ValueError for a part that does not fit its bits: it would name another tag's data.
    """
    _check("queue_id", queue_id, QUEUE_BITS)
    _check("tag", tag, TAG_BITS)
    _check("offset", offset, IO_BUF_BITS)
    place = queue_id << QUEUE_SHIFT | tag << TAG_SHIFT | offset
    return IO_BUF_OFFSET + place | integrity << INTEGRITY_SHIFT


def split_user_copy_offset(position: int) -> tuple[int, int, int, bool]:
    """A user-copy position as (queue_id, tag, offset, integrity).

    Raises ValueError for a position where no request can be.
    """
    integrity = bool(position >> INTEGRITY_SHIFT & 1)
    place = (position & ~(1 << INTEGRITY_SHIFT)) - IO_BUF_OFFSET
    _check("user-copy position past its base", place, IO_BUF_TOTAL_BITS)
    tag = place >> TAG_SHIFT & (1 << TAG_BITS) - 1
    return place >> QUEUE_SHIFT, tag, place & (1 << IO_BUF_BITS) - 1, integrity


def _round_up(size: int, page_size: int) -> int:
    return -(-size // page_size) * page_size


def descriptors_length(depth: int, *, io_desc_size: int = IO_DESC_SIZE, page_size: int) -> int:
    """The length in bytes with which a queue's descriptors must be mapped: whole pages."""
    return _round_up(depth * io_desc_size, page_size)


def descriptors_offset(queue_id: int, *, io_desc_size: int = IO_DESC_SIZE, page_size: int) -> int:
    """The offset in ``/dev/ublkcN`` of a queue's descriptors, whatever depth the queue has."""
    full = descriptors_length(MAX_QUEUE_DEPTH, io_desc_size=io_desc_size, page_size=page_size)
    return CMD_BUF_OFFSET + queue_id * full


def shmem_zc_addr(*, index: int, offset: int) -> int:
    """The descriptor address that means byte ``offset`` of registered buffer ``index`` (7.1)."""
    _check("index", index, SHMEM_ZC_INDEX_BITS)
    _check("offset", offset, SHMEM_ZC_OFFSET_BITS)
    return index << SHMEM_ZC_OFFSET_BITS | offset


def split_shmem_zc_addr(addr: int) -> tuple[int, int]:
    """A SHMEM_ZC address as (buffer index, byte offset); its top 16 bits are reserved."""
    index = addr >> SHMEM_ZC_OFFSET_BITS & (1 << SHMEM_ZC_INDEX_BITS) - 1
    return index, addr & (1 << SHMEM_ZC_OFFSET_BITS) - 1


# ------------------------------------------------------------------------------ asserted at import

RECORD_SIZES: Final[Mapping[type[Record] | type[Params], int]] = MappingProxyType(
    {
        ControlCmd: 32,
        DevInfo: 64,
        IoDesc: 24,
        IoCmd: 16,
        BatchIo: 16,
        BatchElem: 8,
        AutoBufReg: 8,
        ShmemBufReg: 24,
        BlkZone: 64,
        ParamsBasic: 32,
        ParamsDiscard: 20,
        ParamsDevt: 16,
        ParamsZoned: 32,
        ParamsDmaAlign: 8,
        ParamsSegment: 16,
        ParamsIntegrity: 16,
        Params: 152,
    }
)
"""Every record and its size in bytes, as the kernel has it."""

for _record, _size in RECORD_SIZES.items():
    assert _record.LAYOUT.size == _size, f"{_record.__name__}: {_record.LAYOUT.size}, not {_size}"
    assert _record.offsets(), f"{_record.__name__}: its fields and its layout differ in number"
assert IoDesc.LAYOUT.size == IO_DESC_SIZE, "IoDesc: not the stride that kernels before 7.3 use"
assert 1 << IO_BUF_BITS == MAX_IO_BYTES, "user copy: a request's bytes don't fit its offset bits"
assert 1 << QUEUE_BITS == MAX_NR_QUEUES, "user copy: the queues don't fit their bits"
assert set(FEATURE_RELEASE) == set(Feature), "FEATURE_RELEASE: a feature is missing"
