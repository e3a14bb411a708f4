"""Scripts: what they say, and how one is played on an arm.

A script is a list of steps, each one line of words: a verb, its objects, and ``name=value`` options.

    up d0 depth=4 flags=USER_COPY / attrs=FUA   all that it takes until the disk is open: ADD's options / SET's
    down d0                             and back
    proc p1 [user]                      another server process; p0 is there from the start
    ctl ADD d0 depth=2 flags=USER_COPY  any control command; see `_Control`
    open p0 d0, close p0                the char device
    map p0 q=0 [off= len= w], unmap p0 q=0
    ring p0.a [sq= cq= fixed= narrow admin]   task a's ring; made by itself where a step just names the task
    io p0.a FETCH q=0 t=1 [res= at= on=p0.b enc=]   one per-tag command, as it stands
    fetch p0.a [q=0]                    FETCH for every tag of a queue
    commit @0 [res=full|N|ENAME fill=aa by=p0.b at=], getdata @0     of the request that application operation 0 became
    serve p0                            answer everything until there is rest
    diskopen d0, diskclose d0
    app write d0 0 4096 [fill=11 cpu=1] read, write, fua, flush, discard, zeroes, punch, zone-...; numbered
    app read d0 0 4096 mem=512          with the memory that "ctl REG d0" registers, from byte 512 on
    zones p0 @!                         answer, by user copy, what zones there are; @! is a request of the kernel's own
    pread p0 @0 0 512, pwrite p0 @0 0 512 fill=22     user copy
    closering p0.a, kill p0
    provide p0.a group=1 count=4 len=8; batch p0.a PREP|COMMIT|MULTI ...

Tags that the kernel chose are bound when they are delivered: ``@0`` is the (first unanswered) request of application
operation 0, ``@0.1`` its second, ``~`` in place of a tag an idle one. What a step names and the kernel did not deliver
makes the step "unbound", on either arm.

What is seen, an *observation*, is a line of text in the same terms, without ids, pids, addresses or tags that a kernel
may choose freely. A step yields the observations that it makes itself at once; all else comes by `Run.collect`.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, Protocol

import attrs

from tests.conformance.worker import SLOT_BYTES
from ublk_trio.uapi import (
    ANY_DEVICE_ID,
    NO_QUEUE,
    BasicAttr,
    BlkZone,
    ControlCommand,
    DeviceState,
    DevInfo,
    Feature,
    IoCommand,
    IoFlag,
    IoOp,
    Params,
    ParamsBasic,
    ParamsDevt,
    ParamsDiscard,
    ParamsDmaAlign,
    ParamsIntegrity,
    ParamsSegment,
    ParamsZoned,
    control_opcode,
    descriptors_length,
    descriptors_offset,
    io_opcode,
    split_shmem_zc_addr,
    user_copy_offset,
)

PAGE: Final = 4096
#: Which process sends control commands unless a step says otherwise, and opens the disks.
CONTROLLER: Final = "c"
#: What a commit that was not taken completes with.
_REFUSALS: Final = (-errno.EINVAL, -errno.EBUSY, -errno.EOPNOTSUPP)
_SHMEM_SLOT: Final = 24
_BATCH_SLOT: Final = 16

CONTROL: Final[Mapping[str, ControlCommand]] = {
    "AFFINITY": ControlCommand.GET_QUEUE_AFFINITY,
    "INFO": ControlCommand.GET_DEV_INFO,
    "ADD": ControlCommand.ADD_DEV,
    "DEL": ControlCommand.DEL_DEV,
    "START": ControlCommand.START_DEV,
    "STOP": ControlCommand.STOP_DEV,
    "SET": ControlCommand.SET_PARAMS,
    "GET": ControlCommand.GET_PARAMS,
    "RECOVER": ControlCommand.START_USER_RECOVERY,
    "RECOVERED": ControlCommand.END_USER_RECOVERY,
    "INFO2": ControlCommand.GET_DEV_INFO2,
    "FEATURES": ControlCommand.GET_FEATURES,
    "DELASYNC": ControlCommand.DEL_DEV_ASYNC,
    "SIZE": ControlCommand.UPDATE_SIZE,
    "QUIESCE": ControlCommand.QUIESCE_DEV,
    "TRYSTOP": ControlCommand.TRY_STOP_DEV,
    "REG": ControlCommand.REG_BUF,
    "UNREG": ControlCommand.UNREG_BUF,
}
IO: Final[Mapping[str, IoCommand]] = {
    "FETCH": IoCommand.FETCH_REQ,
    "COMMIT": IoCommand.COMMIT_AND_FETCH_REQ,
    "GETDATA": IoCommand.NEED_GET_DATA,
    "REGISTER": IoCommand.REGISTER_IO_BUF,
    "UNREGISTER": IoCommand.UNREGISTER_IO_BUF,
    "PREP": IoCommand.PREP_IO_CMDS,
    "BCOMMIT": IoCommand.COMMIT_IO_CMDS,
    "MULTI": IoCommand.FETCH_IO_CMDS,
}
_NAME_OF_IO: Final = {int(command): name for name, command in IO.items()}
_BUFFERED: Final = ("ADD", "SET", "GET", "INFO", "INFO2", "AFFINITY", "FEATURES", "REG")
_SERVERS_DATA: Final = Feature.USER_COPY | Feature.SUPPORT_ZERO_COPY | Feature.AUTO_BUF_REG
_OPS: Final[Mapping[str, tuple[IoOp, ...]]] = {
    "read": (IoOp.READ,),
    "write": (IoOp.WRITE,),
    "fua": (IoOp.WRITE, IoOp.FLUSH),
    "flush": (IoOp.FLUSH,),
    "discard": (IoOp.DISCARD,),
    "zeroes": (IoOp.WRITE_ZEROES, IoOp.WRITE),
    "punch": (IoOp.WRITE_ZEROES, IoOp.WRITE),
    "zone-open": (IoOp.ZONE_OPEN,),
    "zone-close": (IoOp.ZONE_CLOSE,),
    "zone-finish": (IoOp.ZONE_FINISH,),
    "zone-reset": (IoOp.ZONE_RESET, IoOp.ZONE_RESET_ALL),
}


_ZONE_OPS: Final = frozenset({IoOp.ZONE_OPEN, IoOp.ZONE_CLOSE, IoOp.ZONE_FINISH, IoOp.ZONE_RESET, IoOp.ZONE_RESET_ALL})


class ScriptError(Exception):
    """A script that says nothing sensible: ours, not a kernel's."""


class Unbound(Exception):
    """A step names a request that is not there."""


class Arm(Protocol):
    """A machine that scripts are played on: the simulator, or this very one."""

    @property
    def cpus(self) -> int: ...

    def spawn(self, process: str) -> None:
        """A new process."""

    def kill(self, process: str) -> None:
        """SIGKILL, and wait until nothing of it is left."""

    def call(self, process: str, verb: str, *arguments: Any) -> Any:
        """`worker.Worker`'s ``do_VERB`` in that process."""

    def settle(self) -> None:
        """Let everything happen that happens by itself."""


def error_name(result: int) -> str:
    if result >= 0:
        return str(result)
    return errno.errorcode.get(-result, str(result)) if result != -524 else "ENOTSUPP"


def number_of(text: str) -> int:
    """``12``, ``0x1f``, ``4K``, or an errno's name as the negative number."""
    if text.startswith("E") and hasattr(errno, text):
        return -int(getattr(errno, text))
    if text.endswith("K"):
        return int(text[:-1], 0) << 10
    return int(text, 0)


@attrs.frozen
class Words:
    """One step, taken apart."""

    verb: str
    objects: list[str]
    options: dict[str, str]

    @classmethod
    def of(cls, step: str) -> Words:
        verb, *rest = step.split()
        objects = [word for word in rest if "=" not in word]
        options = dict(word.split("=", 1) for word in rest if "=" in word)
        return cls(verb, objects, options)

    def number(self, name: str, default: int = 0) -> int:
        return number_of(self.options[name]) if name in self.options else default

    def has(self, word: str) -> bool:
        return word in self.objects


def expand(steps: Iterable[str]) -> list[str]:
    """The steps with ``up`` and ``down`` written out."""
    plain: list[str] = []
    queues = "1"
    for step in steps:
        verb, *rest = step.split()
        if verb == "up":
            name, *options = rest
            cut = options.index("/") if "/" in options else len(options)
            own = dict(word.split("=", 1) for word in options[:cut])
            ring, auto = own.pop("ring", ""), own.pop("auto", "")
            queues = own.get("queues", "1")
            plain.append(" ".join(["ctl ADD", name, *(f"{key}={value}" for key, value in own.items())]))
            plain.append(" ".join(["ctl SET", name, *options[cut + 1 :]]))
            plain.append(f"open p0 {name}")
            plain += [f"map p0 q={queue}" for queue in range(int(queues))]
            for queue in range(int(queues)):
                task = f"p0.{chr(ord('a') + queue)}"
                if ring:
                    plain.append(f"ring {task} {ring}")
                plain.append(f"fetch {task} q={queue}" + (f" auto={auto}" if auto else ""))
            plain += [f"ctl START {name}", f"diskopen {name}"]
        elif verb == "down":
            plain += [f"diskclose {rest[0]}", f"ctl STOP {rest[0]}"]
            plain += [f"unmap p0 q={queue}" for queue in range(int(queues))]
            plain += [f"closering p0.{chr(ord('a') + queue)}" for queue in range(int(queues))]
            plain += ["close p0", f"ctl DEL {rest[0]}"]
        else:
            plain.append(step)
    return plain


@attrs.define
class _Device:
    """A device of the script, as far as the script's side knows it."""

    name: str
    dev_id: int = 9999
    info: DevInfo | None = None
    sectors: int = 0
    chunk: int = 0

    @property
    def flags(self) -> Feature:
        return self.info.flags if self.info is not None else Feature(0)

    @property
    def depth(self) -> int:
        return self.info.queue_depth if self.info is not None else 2

    @property
    def stride(self) -> int:
        own = bool(self.flags & Feature.IO_DESC_SIZE) and self.info is not None
        return self.info.io_desc_size if own and self.info is not None else 24


@attrs.define
class _Part:
    """A request that the server owns."""

    process: str
    task: str
    queue_id: int
    tag: int
    op: int
    sectors: int
    start: int


@attrs.define
class _Operation:
    """An operation of the application."""

    number: int
    kind: str
    device: str
    offset: int
    length: int
    parts: list[_Part] = attrs.Factory(list)
    done: bool = False

    def covers(self, op: int, start: int, sectors: int) -> bool:
        if op not in _OPS[self.kind]:
            return False
        if op == IoOp.FLUSH:
            return not any(part.op == IoOp.FLUSH for part in self.parts)
        first, last = self.offset >> 9, (self.offset + self.length) >> 9
        if op in _ZONE_OPS:
            # They say where the zone begins, and no length.
            return first <= start < last and not self.parts
        if not (first <= start and start + sectors <= last):
            return False
        return not any(part.start < start + sectors and start < part.start + part.sectors for part in self.parts)


@attrs.define
class _Process:
    name: str
    pid: int
    base: int
    device: str = ""
    tasks: set[str] = attrs.Factory(set)
    is_user: bool = False


class Run:
    """One script on one arm."""

    def __init__(self, arm: Arm) -> None:
        self.arm = arm
        self.devices: dict[str, _Device] = {}
        self.processes: dict[str, _Process] = {}
        self.operations: list[_Operation] = []
        self._tokens = 0
        #: What was sent under a token.
        self._control: dict[int, tuple[str, _Device, Words]] = {}
        self._io: dict[int, tuple[str, int, int]] = {}
        #: Idle tags: (process, queue, tag) -> task, and the token of the command that is pending.
        self._pending: dict[tuple[str, int, int], tuple[str, int]] = {}
        #: What a commit took from the server, in case that it is refused.
        self._committed: dict[int, tuple[_Operation, _Part]] = {}
        self._strays: list[_Part] = []
        self._spawn(CONTROLLER)
        self._spawn("p0")

    def _spawn(self, name: str) -> None:
        if name in self.processes:
            return
        self.arm.spawn(name)
        pid, base = self.arm.call(name, "getpid"), self.arm.call(name, "shmem", 0)
        self.processes[name] = _Process(name, pid, base)

    def _token(self) -> int:
        self._tokens += 1
        return self._tokens

    # ------------------------------------------------------------------ steps

    def step(self, step: str) -> list[str]:
        """Do it; what it makes visible by itself."""
        words = Words.of(step)
        method: Callable[[Words], list[str]] | None = getattr(self, "_do_" + words.verb, None)
        if method is None:
            raise ScriptError(f"no verb {words.verb!r} in {step!r}")
        try:
            return method(words)
        except Unbound as unbound:
            return [f"unbound {unbound}"]
        except (KeyError, IndexError, ValueError) as error:
            raise ScriptError(f"{step!r}: {error!r}") from error

    def _device(self, name: str) -> _Device:
        return self.devices.setdefault(name, _Device(name))

    def _process(self, name: str) -> _Process:
        if name not in self.processes:
            raise Unbound(f"process {name}")
        return self.processes[name]

    def _do_proc(self, words: Words) -> list[str]:
        self._spawn(words.objects[0])
        if words.has("user"):
            self._process(words.objects[0]).is_user = True
            self.arm.call(words.objects[0], "user")
        return []

    def _do_kill(self, words: Words) -> list[str]:
        name = words.objects[0]
        self._process(name)
        del self.processes[name]
        for operation in self.operations:
            operation.parts = [part for part in operation.parts if part.process != name]
        self._strays = [part for part in self._strays if part.process != name]
        self._pending = {key: value for key, value in self._pending.items() if key[0] != name}
        self.arm.kill(name)
        return []

    # ------------------------------------------------------------------ control commands

    def _do_ctl(self, words: Words) -> list[str]:
        name = words.objects[0]
        device = self._device(words.objects[1])
        by = self._process(words.options.get("by", CONTROLLER)).name
        command = CONTROL.get(name)
        number = int(command) if command is not None else number_of(name)
        sent = self._payload(name, device, words)
        path = words.options.get("path", "")
        if name == "INFO2" and not path:
            path = "own"
        path_bytes = b""
        if path:
            path_bytes = (f"/dev/ublkc{device.dev_id}" if path == "own" else path).encode() + b"\0"
        sent = path_bytes + sent
        where = words.options.get("at", "buffer" if sent or name in _BUFFERED else "0")
        dev_id = words.number("id", ANY_DEVICE_ID if name == "ADD" else device.dev_id)
        encoding = words.options.get("enc", "ioctl")
        if encoding == "bad":
            opcode = 2 << 30 | 32 << 16 | ord("x") << 8 | number
        elif encoding == "legacy" or command is None:
            opcode = number if command is None and encoding == "legacy" else _plain(number, encoding)
        else:
            opcode = control_opcode(number, ioctl_encoded=True)
        token = self._token()
        self._control[token] = (name, device, words)
        self.arm.call(
            by, "control", token, opcode, dev_id, words.number("q", NO_QUEUE), words.number("len", len(sent)), where,
            self._data(name, device, words), words.number("pathlen", len(path_bytes)), sent.hex(),
            not words.has("narrow"),
        )  # fmt: skip
        return []

    def _data(self, name: str, device: _Device, words: Words) -> int:
        if name in ("START", "RECOVERED"):
            pid = words.options.get("pid", "p0")
            if pid in self.processes:
                return self.processes[pid].pid
            return {"wrong": 1, "zero": 0, "negative": (1 << 64) - 5}.get(pid, 1)
        return words.number("data")

    def _payload(self, name: str, device: _Device, words: Words) -> bytes:
        if "hex" in words.options:
            return bytes.fromhex(words.options["hex"])
        if name == "ADD":
            flags = Feature(0)
            for flag in filter(None, words.options.get("flags", "").split("|")):
                flags |= Feature[flag]
            asked = words.number("want", words.number("id", ANY_DEVICE_ID))
            return DevInfo(
                nr_hw_queues=words.number("queues", 1), queue_depth=words.number("depth", 2), dev_id=asked & 0xFFFFFFFF,
                max_io_buf_bytes=words.number("max", 32768), flags=flags, io_desc_size=words.number("desc"),
            ).pack()  # fmt: skip
        if name == "SET":
            return self._params(device, words)
        if name == "GET":
            return struct.pack("=II", words.number("plen", Params.LAYOUT.size), words.number("types")).ljust(
                Params.LAYOUT.size, b"\0"
            )
        if name == "REG":
            base = self.processes[words.options.get("by", CONTROLLER)].base + _SHMEM_SLOT * SLOT_BYTES
            return struct.pack(
                "=QQII",
                base + words.number("off"), words.number("size", 4096), words.number("regflags"), words.number("reserved"),
            )  # fmt: skip
        if name in ("INFO", "INFO2"):
            return bytes(DevInfo.LAYOUT.size)
        return bytes(8) if name in _BUFFERED else b""

    def _params(self, device: _Device, words: Words) -> bytes:
        number = words.number
        device.sectors = number("sectors", 2048)
        device.chunk = number("chunk")
        basic_attrs = BasicAttr(0)
        for attr in filter(None, words.options.get("attrs", "").split("|")):
            basic_attrs |= BasicAttr[attr]
        basic = ParamsBasic(
            attrs=basic_attrs, logical_bs_shift=number("lbs", 9), physical_bs_shift=number("pbs", 12),
            io_opt_shift=number("opt", 12), io_min_shift=number("min", 9), max_sectors=number("max", 64),
            chunk_sectors=number("chunk"), dev_sectors=device.sectors, virt_boundary_mask=number("vb"),
        )  # fmt: skip

        def section(name: str) -> list[int] | None:
            return [number_of(word) for word in words.options[name].split(",")] if name in words.options else None

        discard, zoned, dma, segment, integrity = map(section, ("discard", "zoned", "dma", "segment", "integrity"))
        params = Params(
            basic=None if words.has("nobasic") else basic,
            discard=None if discard is None else ParamsDiscard(
                discard_alignment=discard[0], discard_granularity=discard[1], max_discard_sectors=discard[2],
                max_write_zeroes_sectors=discard[3], max_discard_segments=discard[4],
            ),
            devt=ParamsDevt(char_major=1, char_minor=1, disk_major=1, disk_minor=1) if words.has("devt") else None,
            zoned=None if zoned is None else ParamsZoned(
                max_open_zones=zoned[0], max_active_zones=zoned[1], max_zone_append_sectors=zoned[2]
            ),
            dma_align=None if dma is None else ParamsDmaAlign(alignment=dma[0]),
            segment=None if segment is None else ParamsSegment(
                seg_boundary_mask=segment[0], max_segment_size=segment[1], max_segments=segment[2]
            ),
            integrity=None if integrity is None else ParamsIntegrity(
                interval_exp=integrity[0], metadata_size=integrity[1], csum_type=integrity[2]
            ),
        )  # fmt: skip
        packed = bytearray(params.pack())
        if "types" in words.options:
            struct.pack_into("=I", packed, 4, number("types"))
        if "plen" in words.options:
            struct.pack_into("=I", packed, 0, number("plen"))
        return bytes(packed)

    def _controlled(self, token: int, result: int, buffer: bytes) -> str:
        name, device, words = self._control.pop(token)
        text = f"{name} {device.name} = {error_name(result)}"
        if result < 0 or words.options.get("at", "buffer") != "buffer":
            return text
        if name == "INFO2" or "path" in words.options:
            buffer = buffer[buffer.index(b"\0") + 1 :]
        if name in ("ADD", "INFO", "INFO2"):
            if len(buffer) < DevInfo.LAYOUT.size:
                return text
            info = DevInfo.unpack(buffer[: DevInfo.LAYOUT.size])
            if name == "ADD":
                device.dev_id, device.info = info.dev_id, info
                by = self.processes.get(words.options.get("by", CONTROLLER))
                if by is not None and by.is_user:
                    self.arm.call(CONTROLLER, "grant", f"/dev/ublkc{device.dev_id}")
            return f"{text} {self._described(info)}"
        if name == "GET":
            return f"{text} {self._params_described(buffer)}"
        if name == "AFFINITY":
            return f"{text} {buffer.hex()}"
        if name == "FEATURES":
            return f"{text} {Feature(int.from_bytes(buffer[:8], 'little')):#x}"
        return text

    def _described(self, info: DevInfo) -> str:
        pids = {process.pid: name for name, process in self.processes.items()}
        pid = str(info.ublksrv_pid) if info.ublksrv_pid <= 0 else pids.get(info.ublksrv_pid, "?")
        names = "|".join(feature.name or "" for feature in Feature if info.flags & feature)
        return (
            f"queues={info.nr_hw_queues} depth={info.queue_depth} state={DeviceState(info.state).name} pid={pid} "
            f"max={info.max_io_buf_bytes} desc={info.io_desc_size} owner={info.owner_uid}.{info.owner_gid} {names}"
        )

    @staticmethod
    def _params_described(buffer: bytes) -> str:
        """The parameters, as bytes; of the numbers of devices only whether they are there."""
        data = bytearray(buffer)
        offset = Params.offsets()["devt"]
        for place in range(4):
            start = offset + 4 * place
            if start + 4 <= len(data):
                value = int.from_bytes(data[start : start + 4], "little")
                data[start : start + 4] = (1 if value and place in (0, 2) else 0).to_bytes(4, "little")
        return bytes(data).rstrip(b"\0").hex()

    # ------------------------------------------------------------------ the char device

    def _do_open(self, words: Words) -> list[str]:
        process, device = self._process(words.objects[0]), self._device(words.objects[1])
        result = self.arm.call(process.name, "open", f"/dev/ublkc{device.dev_id}")
        if not result:
            process.device = device.name
            self.arm.call(process.name, "stride", device.stride)
        return [f"open = {error_name(result)}"]

    def _do_close(self, words: Words) -> list[str]:
        process = self._process(words.objects[0])
        if not process.device:
            raise Unbound("char device")
        self.arm.call(process.name, "close")
        return []

    def _do_map(self, words: Words) -> list[str]:
        process = self._process(words.objects[0])
        if not process.device:
            raise Unbound("char device")
        device = self._device(process.device)
        queue_id = words.number("q")
        offset = descriptors_offset(queue_id, io_desc_size=device.stride, page_size=PAGE)
        length = descriptors_length(device.depth, io_desc_size=device.stride, page_size=PAGE)
        offset, length = words.number("off", offset), words.number("len", length)
        keep = "off" not in words.options and not words.has("w")
        result = self.arm.call(process.name, "mmap", queue_id, offset, length, words.has("w"), keep)
        return [f"map = {error_name(result)}"]

    def _do_unmap(self, words: Words) -> list[str]:
        result = self.arm.call(self._process(words.objects[0]).name, "munmap", words.number("q"))
        return [f"unmap = {error_name(result)}"] if result else []

    # ------------------------------------------------------------------ tasks and their rings

    def _task(self, name: str, words: Words | None = None) -> tuple[_Process, str]:
        """Process and task of ``p0.a``; the task gets its ring when it is first named."""
        process_name, _, task = name.partition(".")
        process = self._process(process_name)
        if task not in process.tasks:
            process.tasks.add(task)
            self.arm.call(process.name, "task", task, words is not None and words.has("admin"))
            number = (lambda key, default: default) if words is None else words.number
            self.arm.call(
                process.name, "ring", task, number("sq", 16), number("cq", 0),
                words is None or not words.has("narrow"), number("fixed", 0),
            )  # fmt: skip
        return process, task

    def _do_ring(self, words: Words) -> list[str]:
        self._task(words.objects[0], words)
        return []

    def _do_closering(self, words: Words) -> list[str]:
        process, task = self._task(words.objects[0])
        self.arm.call(process.name, "closering", task)
        self._pending = {
            key: value for key, value in self._pending.items() if (key[0], value[0]) != (process.name, task)
        }
        return []

    def _slot(self, queue_id: int, tag: int) -> int:
        return (queue_id * 4 + tag) % _BATCH_SLOT

    def _send(
        self, by: str, name: str, queue_id: int, tag: int, words: Words, *, result: int = 0, on: str | None = None
    ) -> list[str]:
        process, task = self._task(by)
        ring_task = self._task(on)[1] if on is not None else task
        if not process.device:
            raise Unbound("char device")
        device = self._device(process.device)
        number = int(IO[name]) if name in IO else number_of(name)
        encoding = words.options.get("enc", "ioctl")
        opcode = (
            io_opcode(number, ioctl_encoded=True) if name in IO and encoding == "ioctl" else _plain(number, encoding)
        )
        sqe_addr = words.number("sqe", tag | words.number("auto") << 16 if device.flags & Feature.AUTO_BUF_REG else 0)
        token = self._token()
        self._io[token] = (name, queue_id, tag)
        if name == "COMMIT":
            self._disown(token, process.name, queue_id, tag)
        taken = self.arm.call(
            process.name, "io", task, ring_task, token, opcode, queue_id, tag, result,
            self._address(name, device, queue_id, tag, words), sqe_addr, not words.has("narrow"),
        )  # fmt: skip
        if name in ("FETCH", "COMMIT", "GETDATA"):
            self._pending.setdefault((process.name, queue_id, tag), (ring_task, token))
        return (
            [] if taken == 0 else [f"{process.name}.{task} enter = {'blocked' if taken is None else error_name(taken)}"]
        )

    def _address(self, name: str, device: _Device, queue_id: int, tag: int, words: Words) -> int | str:
        if "at" in words.options:
            where = words.options["at"]
            return where if where in ("bad", "0") else int(where)
        if name in ("REGISTER", "UNREGISTER"):
            return str(words.number("index", tag))
        if device.flags & _SERVERS_DATA or (name == "FETCH" and device.flags & Feature.NEED_GET_DATA):
            return "0"
        return self._slot(queue_id, tag)

    def _disown(self, token: int, process: str, queue_id: int, tag: int) -> None:
        self._strays = [
            part for part in self._strays if (part.process, part.queue_id, part.tag) != (process, queue_id, tag)
        ]
        for operation in self.operations:
            for part in operation.parts:
                if (part.process, part.queue_id, part.tag) == (process, queue_id, tag):
                    operation.parts.remove(part)
                    self._committed[token] = operation, part
                    return

    def _owned(self, expression: str) -> tuple[_Operation | None, _Part]:
        """What ``@0.1`` means now."""
        if expression == "@!":
            if not self._strays:
                raise Unbound(expression)
            return None, self._strays[0]
        number, _, place = expression.removeprefix("@").partition(".")
        if int(number) >= len(self.operations):
            raise Unbound(expression)
        operation = self.operations[int(number)]
        parts = sorted(operation.parts, key=lambda part: part.start)
        if int(place or 0) >= len(parts):
            raise Unbound(expression)
        return operation, parts[int(place or 0)]

    def _tag(self, process: str, words: Words) -> tuple[int, int]:
        queue_id = words.number("q")
        tag = words.options.get("t", "0")
        if tag.startswith("@"):
            part = self._owned(tag)[1]
            return part.queue_id, part.tag
        if tag == "~":
            idle = sorted(t for (name, q, t) in self._pending if name == process and q == queue_id)
            if not idle:
                raise Unbound("idle tag")
            return queue_id, idle[0]
        return queue_id, number_of(tag)

    def _do_io(self, words: Words) -> list[str]:
        by, name = words.objects[:2]
        queue_id, tag = self._tag(by.partition(".")[0], words)
        return self._send(by, name, queue_id, tag, words, result=words.number("res"), on=words.options.get("on"))

    def _do_fetch(self, words: Words) -> list[str]:
        process = self._task(words.objects[0])[0]
        if not process.device:
            raise Unbound("char device")
        found = []
        for tag in range(self._device(process.device).depth):
            found += self._send(words.objects[0], "FETCH", words.number("q"), tag, words)
        return found

    def _do_commit(self, words: Words) -> list[str]:
        _operation, part = self._owned(words.objects[0])
        device = self._device(self._process(part.process).device)
        result = words.options.get("res", "full")
        if result == "full":
            number = _whole(part)
        else:
            number = number_of(result)
        if part.op == IoOp.READ and "fill" in words.options and number > 0 and not device.flags & _SERVERS_DATA:
            slot = self._slot(part.queue_id, part.tag)
            self.arm.call(part.process, "fill", slot, int(words.options["fill"], 16), min(number, SLOT_BYTES))
        by = words.options.get("by", f"{part.process}.{part.task}")
        return self._send(by, "COMMIT", part.queue_id, part.tag, words, result=number)

    def _do_getdata(self, words: Words) -> list[str]:
        _operation, part = self._owned(words.objects[0])
        by = words.options.get("by", f"{part.process}.{part.task}")
        return self._send(by, "GETDATA", part.queue_id, part.tag, words)

    def _do_register(self, words: Words) -> list[str]:
        """REGISTER_IO_BUF or UNREGISTER_IO_BUF of an operation's request."""
        _operation, part = self._owned(words.objects[1])
        by = words.options.get("by", f"{part.process}.{part.task}")
        name = "REGISTER" if words.objects[0] == "on" else "UNREGISTER"
        return self._send(by, name, part.queue_id, part.tag, words)

    def _do_fixed(self, words: Words) -> list[str]:
        """I/O between a registered buffer and a file in memory: ``fixed p0.a write index=0 len=4096``."""
        process, task = self._task(words.objects[0])
        write = words.objects[1] == "write"
        length = words.number("len", 4096)
        if not write:
            self.arm.call(process.name, "memory", int(words.options.get("fill", "00"), 16), length)
        token = self._token()
        self._io[token] = (f"fixed-{words.objects[1]}", 0, 0)
        self.arm.call(process.name, "fixed", task, token, write, words.number("index"), "memory", 0, length)
        return []

    def _do_memory(self, words: Words) -> list[str]:
        process = self._process(words.objects[0])
        return [f"memory {self.arm.call(process.name, 'memory_read', words.number('len', 4096))}"]

    # ------------------------------------------------------------------ many tags at once

    def _do_provide(self, words: Words) -> list[str]:
        process, task = self._task(words.objects[0])
        result = self.arm.call(
            process.name, "provide", task, words.number("group", 1), _BATCH_SLOT + 1, words.number("count", 4),
            words.number("len", 8),
        )  # fmt: skip
        return [f"provide = {error_name(result)}"]

    def _do_batch(self, words: Words) -> list[str]:
        """``batch p0.a PREP tags=0,1``, ``BCOMMIT tags=@0,@1 res=full``, ``MULTI group=1``."""
        process, task = self._task(words.objects[0])
        name = words.objects[1]
        if not process.device:
            raise Unbound("char device")
        device = self._device(process.device)
        queue_id = words.number("q")
        flags = words.number("bflags", 0 if device.flags & _SERVERS_DATA else 2)
        elements = b""
        count = 0
        for expression in filter(None, words.options.get("tags", "").split(",")):
            result = 0
            if expression.startswith("@"):
                _operation, part = self._owned(expression)
                queue_id, tag = part.queue_id, part.tag
                if words.options.get("res", "full") == "full":
                    result = _whole(part)
                else:
                    result = words.number("res")
                if part.op == IoOp.READ and "fill" in words.options and flags & 2:
                    slot = self._slot(queue_id, tag)
                    self.arm.call(process.name, "fill", slot, int(words.options["fill"], 16), max(result, 0))
            else:
                tag = number_of(expression)
                result = words.number("res") if words.options.get("res", "full") != "full" else 0
            elements += struct.pack("=HHi", tag, tag, result)
            if flags & 2:
                slot = self._slot(queue_id, tag)
                address = process.base + slot * SLOT_BYTES if words.options.get("at") != "0" else 0
                elements += struct.pack("=Q", address)
            if flags & 1:
                elements += struct.pack("=Q", 0)
            count += 1
        multi = name == "MULTI"
        size = 8 + 8 * (flags & 1) + 4 * (flags & 2)
        payload = struct.pack(
            "=HHHBBQ", queue_id, 0 if multi else flags, words.number("count", 0 if multi else count),
            words.number("bytes", 2 if multi else size), 0, 0,
        )  # fmt: skip
        number = int(IO[name])
        token = self._token()
        self._io[token] = (name, queue_id, -1)
        if name == "BCOMMIT":
            for expression in filter(lambda word: word.startswith("@"), words.options.get("tags", "").split(",")):
                part = self._owned(expression.partition(".")[0])[1]
                self._disown(token, process.name, part.queue_id, part.tag)
        self.arm.call(
            process.name, "batch", task, task, token, io_opcode(number, ioctl_encoded=True), payload.hex(),
            _BATCH_SLOT if words.options.get("at") != "bad" else "bad", elements.hex(), words.number("group", 1), multi,
        )  # fmt: skip
        return []

    # ------------------------------------------------------------------ applications

    def _do_diskopen(self, words: Words) -> list[str]:
        device = self._device(words.objects[0])
        result = self.arm.call(CONTROLLER, "diskopen", f"/dev/ublkb{device.dev_id}")
        return [f"diskopen = {error_name(result)}"]

    def _do_diskclose(self, words: Words) -> list[str]:
        device = self._device(words.objects[0])
        self.arm.call(CONTROLLER, "diskclose", f"/dev/ublkb{device.dev_id}")
        return []

    def _do_app(self, words: Words) -> list[str]:
        kind, name, *place = words.objects
        device = self._device(name)
        offset, length = (number_of(word) for word in place) if place else (0, 0)
        operation = _Operation(len(self.operations), kind, name, offset, length)
        self.operations.append(operation)
        fill = int(words.options.get("fill", "a5"), 16)
        memory = _SHMEM_SLOT * SLOT_BYTES + words.number("mem") if "mem" in words.options else -1
        self.arm.call(
            CONTROLLER, "app", operation.number, kind, f"/dev/ublkb{device.dev_id}", offset, length, fill,
            words.number("cpu", 0), memory,
        )  # fmt: skip
        return []

    def _do_pread(self, words: Words) -> list[str]:
        answer = self.arm.call(self._process(words.objects[0]).name, "pread", *self._position(words))
        return [f"pread = {error_name(answer) if isinstance(answer, int) else answer}"]

    def _do_pwrite(self, words: Words) -> list[str]:
        fill = int(words.options.get("fill", "5a"), 16)
        answer = self.arm.call(self._process(words.objects[0]).name, "pwrite", *self._position(words), fill)
        return [f"pwrite = {error_name(answer)}"]

    def _do_zones(self, words: Words) -> list[str]:
        """Report the zones that a request asks for: all of them empty, and to be written in order."""
        process = self._process(words.objects[0])
        part = self._owned(words.objects[1])[1]
        size = self._device(process.device).chunk
        report = b"".join(
            BlkZone(start=start, len=size, wp=start, type=2, cond=1, capacity=size).pack()
            for start in range(part.start, part.start + part.sectors * size, size)
        )
        position = user_copy_offset(queue_id=part.queue_id, tag=part.tag, offset=0)
        return [f"zones = {error_name(self.arm.call(process.name, 'pwritten', position, report.hex()))}"]

    def _position(self, words: Words) -> tuple[int, int]:
        """Position and length of ``p0 @0 512 1024``: from byte 512 of the request, 1024 bytes."""
        process = self._process(words.objects[0])
        if not process.device:
            raise Unbound("char device")
        *place, offset, length = words.objects[1:]
        if place:
            part = self._owned(place[0])[1]
            queue_id, tag = part.queue_id, part.tag
        else:
            queue_id, tag = self._tag(process.name, words)
        if words.has("raw"):
            return words.number("pos"), number_of(length)
        return user_copy_offset(
            queue_id=queue_id, tag=tag, offset=number_of(offset), integrity="integrity" in words.options
        ), number_of(length)

    def _do_serve(self, words: Words) -> list[str]:
        return []

    def serve(self, process: str) -> bool:
        """Answer every request that a process owns; whether there was one."""
        owned = [part for operation in self.operations for part in operation.parts if part.process == process]
        owned += [part for part in self._strays if part.process == process]
        self._strays = [part for part in self._strays if part.process != process]
        for part in owned:
            number = _whole(part)
            words = Words("commit", [], {})
            self._send(f"{process}.{part.task}", "COMMIT", part.queue_id, part.tag, words, result=number)
        return bool(owned)

    # ------------------------------------------------------------------ what came by itself

    @property
    def held(self) -> bool:
        """Whether the kernel owes an answer: to a control command, or for an operation that no server has."""
        return bool(self._control) or not all(operation.parts or operation.done for operation in self.operations)

    def collect(self, *, scanning: bool = False) -> list[str]:
        """What has happened since, in no particular order. ``scanning`` leaves out requests that no operation made."""
        seen = []
        for name in list(self.processes):
            for event in self.arm.call(name, "poll"):
                kind, *rest = event
                if kind == "ctl":
                    seen.append(self._controlled(rest[0], rest[1], bytes.fromhex(rest[2])))
                elif kind == "app":
                    seen.append(self._finished(*rest))
                else:
                    seen += self._completed(name, *rest, scanning=scanning)
        return seen

    def _finished(self, number: int, result: int, data: str) -> str:
        operation = self.operations[number]
        operation.done = True
        operation.parts.clear()
        return f"app {number} {operation.kind} = {error_name(result)} {data}".rstrip()

    def _completed(
        self, process: str, task: str, token: int, result: int, flags: int, descriptor: str, data: str, *,
        scanning: bool,
    ) -> list[str]:  # fmt: skip
        name, queue_id, tag = self._io[token]
        where = self._where(process, task)
        if name == "MULTI" and result > 0:
            return self._delivered_many(process, task, queue_id, bytes.fromhex(data), flags)
        if name in ("FETCH", "COMMIT", "GETDATA"):
            if self._pending.get((process, queue_id, tag)) == (task, token):
                del self._pending[process, queue_id, tag]
            operation, part = self._committed.pop(token, (None, None))
            if operation is not None and part is not None and result in _REFUSALS:
                operation.parts.append(part)
            if result == -errno.ENODEV:
                # Which of the idle tags had been used before is the kernel's choice.
                return [f"{where} aborts"]
            if result in (0, 1):
                return self._delivered(process, task, queue_id, tag, result, descriptor, data, scanning=scanning)
        more = " more" if flags & 2 else ""
        return [f"{where} {name} = {error_name(result)}{more}"]

    def _where(self, process: str, task: str) -> str:
        """The task; but which CPU uses which of more than two queues is the kernel's choice."""
        info = self._device(self.processes[process].device).info
        return f"{process}.{task if info is None or info.nr_hw_queues <= 2 else '*'}"

    def _delivered_many(self, process: str, task: str, queue_id: int, tags: bytes, flags: int) -> list[str]:
        seen = []
        for (tag,) in struct.iter_unpack("=H", tags):
            descriptor = self.arm.call(process, "descriptor", queue_id, tag)
            data = ""
            if descriptor[:2] == "01" and not self._device(self.processes[process].device).flags & _SERVERS_DATA:
                sectors = int.from_bytes(bytes.fromhex(descriptor)[4:8], "little")
                data = self.arm.call(process, "peek", self._slot(queue_id, tag), min(sectors << 9, SLOT_BYTES))
            seen += self._delivered(process, task, queue_id, tag, 0, descriptor, data, scanning=False)
        if not flags & 2:
            seen.append(f"{process}.{task} MULTI ended")
        return seen

    def _delivered(
        self, process: str, task: str, queue_id: int, tag: int, result: int, descriptor: str, data: str, *,
        scanning: bool,
    ) -> list[str]:  # fmt: skip
        where = self._where(process, task)
        if not descriptor:
            return [f"{where} delivers something unmapped = {result}"]
        op_flags, sectors, start, address = struct.unpack("=IIQQ", bytes.fromhex(descriptor))
        op = op_flags & 0xFF
        part = _Part(process, task, queue_id, tag, op, sectors, start)
        number = "?"
        if result == 1 or not self._redelivered(part):
            for operation in self.operations:
                same_device = operation.device == self.processes[process].device
                if same_device and not operation.done and operation.covers(op, start, sectors):
                    operation.parts.append(part)
                    number = str(operation.number)
                    break
            else:
                self._strays.append(part)
                if scanning:
                    return []
        else:
            number = next(
                str(operation.number) for operation in self.operations for other in operation.parts if other is not part
                and (other.process, other.queue_id, other.tag) == (process, queue_id, tag)
            )  # fmt: skip
        names = "|".join(flag.name or "" for flag in IoFlag if op_flags & flag)
        place = "" if op == IoOp.FLUSH else f" {sectors}@{start}"
        device = self._device(self.processes[process].device)
        base = self.processes[process].base
        slot = base + self._slot(queue_id, tag) * SLOT_BYTES
        at = " at=own" if address == slot else " at=0" if not address else " at=other"
        if op_flags & IoFlag.SHMEM_ZC:
            # Nothing was copied: what lies in the tag's own buffer is old.
            data = ""
            if address != slot:
                at = " at={}+{}".format(*split_shmem_zc_addr(address))
        elif device.flags & Feature.NEED_GET_DATA and (op != IoOp.WRITE or result):
            # What the tag's last command said, and which tag that is, is the kernel's choice.
            at = ""
        elif device.flags & Feature.AUTO_BUF_REG:
            # The word that says where to register the buffer lies there: by default the tag, which is the kernel's choice.
            at = " at=index" if address & 0xFFFF == tag else " at=other"
        return [
            f"{where} delivers @{number} {IoOp(op).name}{place} {names}= {result}{at} {data}".rstrip(),
        ]

    def _redelivered(self, part: _Part) -> bool:
        """Whether the request is known: its data came by NEED_GET_DATA."""
        return any(
            (other.process, other.queue_id, other.tag) == (part.process, part.queue_id, part.tag)
            for operation in self.operations
            for other in operation.parts
        )


def _whole(part: _Part) -> int:
    """What a request that was carried out whole is committed with."""
    if part.op == IoOp.REPORT_ZONES:
        return part.sectors * BlkZone.LAYOUT.size
    return part.sectors << 9 if part.op in (IoOp.READ, IoOp.WRITE) else 0


def _plain(number: int, encoding: str) -> int:
    """An opcode that nobody defined: the number bare, or with a type."""
    if encoding == "legacy":
        return number
    return 3 << 30 | 16 << 16 | (ord("x") if encoding == "bad" else ord("u")) << 8 | number
